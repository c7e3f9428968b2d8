"""What can go wrong with a name on the Hugging Face hub, in words with the way out."""

from functools import lru_cache
from pathlib import Path

from luthier.errors import UserError

PATIENCE = 3.0
"""Seconds that the hub has to answer."""


def check(name: str, revision: str | None, key: str, file: str) -> None:
    """Raise UserError if `name` is neither in the local cache nor open to us on the hub.

    `file` is a file of the repository that tells whether it was downloaded before. Takes one
    request for a name that was not. Imports neither torch nor transformers.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError as error:
        raise UserError(f"{key}={name}: neither a folder here nor a hub name. {error}") from error
    if isinstance(cached, str):
        return
    if is_out_of_reach():
        raise UserError(offline(name, key))
    try:
        HfApi().auth_check(name)
    except Exception as error:  # the HTTP client has its own errors for a network that is down
        raise UserError(words(error, name, key)) from error


def is_offline() -> bool:
    """Whether the libraries were told not to use the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@lru_cache
def is_out_of_reach() -> bool:
    """Whether the hub may not be asked or does not answer; asked once in a process.

    The libraries try again and again for most of a minute, even for a model that is in the cache:
    who knows that there is no network tells them (`local_files_only`).
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if is_offline():
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # the HTTP client's own errors, and those of a proxy's settings
        return True
    return False


def explain(error: Exception, name: str, key: str) -> UserError | None:
    """Return the UserError for a failure to fetch `name`, or None if it is of another kind."""
    chain: BaseException | None = error
    while chain is not None:
        if _is_of_the_hub(chain):
            return UserError(words(chain, name, key))
        chain = chain.__cause__ or chain.__context__
    return None


def words(error: BaseException, name: str, key: str) -> str:
    """Say what the hub's error means for the user and what to do."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{name}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{key}={name}: this model is gated. Accept its licence at {page}, then log in with\n"
            f"    hf auth login\n(or set HF_TOKEN) and run the same command again."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{key}={name}: there is no such model on the hub, nor a folder of that name in "
            f"{Path.cwd()}.\nCheck the spelling at https://huggingface.co/models. "
            "If it is private, log in first: hf auth login"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{key}={name}: no such revision; {page}/tree/main lists them (model.revision)."
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{key}={name}: the repository lacks a file that is needed: {error}"
    return offline(name, key)


def offline(name: str, key: str) -> str:
    """Say how to go on when `name` is not on this machine and the hub is out of reach."""
    reason = (
        "HF_HUB_OFFLINE is set" if is_offline() else "the hub (huggingface.co) cannot be reached"
    )
    return (
        f"{key}={name}: the model is not on this machine (nor is there a folder of that name in "
        f"{Path.cwd()}), and {reason}.\n"
        f"With a network, download it first:\n    hf download {name}\n"
        f"and run the same command again, or name a local folder: {key}=/path/to/folder"
    )


def _is_of_the_hub(error: BaseException) -> bool:
    from huggingface_hub import errors

    kinds = (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.OfflineModeIsEnabled)
    return isinstance(error, kinds)
