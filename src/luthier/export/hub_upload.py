"""The files that go to the hub: those of a model and no others, without paths or keys."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import UserError
from luthier.export import write_card
from luthier.export.model_facts import ModelFacts, hub_name, last_name
from luthier.model import source
from luthier.model.processor import PROCESSOR_FILES
from luthier.redaction import holds_token

if TYPE_CHECKING:
    from huggingface_hub import HfApi

UPLOADED_FILES = (
    *write_card.TOKENIZER_FILES,
    *("config.json", "generation_config.json", "adapter_config.json", "labels.json", "loss.png"),
    *(*PROCESSOR_FILES, "quantize_config.json"),
    *("model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json"),
)
"""Files by name; besides them go the shards of a model and further chat templates."""
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PLACES = ("_name_or_path", "_model_name_or_path", "name_or_path", "base_model_name_or_path")
"""Where the libraries write the path that something was loaded from."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LINK = "a link out of this folder"


@dataclass
class UploadPlan:
    """What goes to the hub, and what stays here."""

    files: dict[str, Path] = field(default_factory=dict)
    """Files that go as they are, by their names in the repository."""
    texts: dict[str, str] = field(default_factory=dict)
    """Files whose text is written for the hub."""
    left: dict[str, str] = field(default_factory=dict)
    """Files that stay, and why."""

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file, by name."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        sizes |= {name: len(text.encode()) for name, text in self.texts.items()}
        return dict(sorted(sizes.items()))


def plan_upload(folder: Path, facts: ModelFacts, written: dict[str, str]) -> UploadPlan:
    """Gather what of `folder` goes to the hub. `written` are the card and the notes.

    Raises UserError where weights are missing, are pickles, or a text holds a key.
    """
    upload_plan = UploadPlan()
    # A list of what goes, not of what stays: a file that nobody thought of is not published.
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name in written:
            continue
        why = _reason_to_stay(name) or ("" if _is_inside(path, folder) else _LINK)
        if why:
            upload_plan.left[name] = why
        elif path.suffix == ".json":
            upload_plan.texts[name] = _remove_paths(path, facts)
        else:
            upload_plan.files[name] = path
    upload_plan.texts |= written
    _refuse_missing(folder, upload_plan)
    _refuse_keys(folder, upload_plan)
    return upload_plan


def _is_inside(path: Path, folder: Path) -> bool:
    """Return whether a file lies in the folder itself, or in the hub's cache that it is part of."""
    target, home = path.resolve(), folder.resolve()
    is_cached = home.parent.name == "snapshots" and target.is_relative_to(home.parents[1] / "blobs")
    return is_cached or target.is_relative_to(home)


def _reason_to_stay(name: str) -> str:
    """Return why a file stays here; empty where it goes."""
    if (
        name in UPLOADED_FILES
        or _SHARD.fullmatch(name)
        or name.startswith(f"{write_card.TEMPLATES}/")
    ):
        return ""
    if name.endswith(_PICKLES):
        return "a pickle, which can run code: weights go as safetensors"
    return "not a model file"


def _remove_paths(path: Path, facts: ModelFacts) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged JSON: {error}") from error
    return _replace_paths(content, text, facts)


def _replace_paths(content: Any, text: str, facts: ModelFacts) -> str:
    """Return the text with each path of this machine replaced; unchanged where there is none."""
    if not isinstance(content, dict):
        return text
    changed = dict(content)
    for key in _PLACES:
        value = content.get(key)
        if isinstance(value, str) and value:
            changed[key] = _make_public_path(value, facts)
    # A file without a path keeps its bytes, so that its checksum stays the one of the run.
    if changed == content:
        return text
    return json.dumps(changed, indent=2, ensure_ascii=False) + "\n"


def _make_public_path(value: str, facts: ModelFacts) -> str:
    # A hub name has at most one slash and begins with neither a dot nor a tilde.
    is_path = value.startswith(("/", ".", "~")) or "\\" in value or value.count("/") > 1
    is_path |= value == facts.base.name and facts.base.hub is None
    if not is_path:
        return value
    if facts.base.package is not None:
        return f"{source.PACKAGE_PREFIX}{facts.base.package}"
    return hub_name(value) or facts.base.hub or last_name(facts.base.name)


def _refuse_missing(folder: Path, upload_plan: UploadPlan) -> None:
    if any(name.endswith(".safetensors") for name in upload_plan.files):
        return
    pickles = [name for name in upload_plan.left if name.endswith(_PICKLES)]
    left = upload_plan.left.items()
    links = [name for name, why in left if why == _LINK and name.endswith(".safetensors")]
    has = f"only pickles ({', '.join(pickles)}), which can run code" if pickles else "no weights"
    if links:
        has += f", and what is a link out of this folder does not go ({', '.join(links)})"
    raise UserError(f"{folder}: there is {has}; what goes to the hub is safetensors.")


def _refuse_keys(folder: Path, upload_plan: UploadPlan) -> None:
    # Run from the root of the file system, "/" would be found in every text.
    here = {str(folder.resolve()), str(Path.cwd().resolve())} - {"/"}
    for name, text in upload_plan.texts.items():
        if holds_token(text):
            raise UserError(
                f"{folder / name}: this holds what looks like an access key. Remove it."
            )
        for path in here:
            if path in text:
                raise UserError(f"{folder / name}: this holds a path of this machine, {path}.")


# Sending. Whatever can be refused is refused before the first byte leaves the machine.

_IGNORED = (".gitattributes",)
"""What the hub itself puts into an empty repository."""


def upload(upload_plan: UploadPlan, target: str, public: bool, overwrite: bool) -> None:
    """Upload in one commit. Raises UserError before anything is sent where it cannot be."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    check_login(api)
    check_card(upload_plan.texts[write_card.CARD])
    _check_repository(api, target, public, overwrite)
    operations = [CommitOperationAdd(name, path) for name, path in upload_plan.files.items()]
    operations += [CommitOperationAdd(n, text.encode()) for n, text in upload_plan.texts.items()]
    try:
        # One commit: either all files of the model are there or none.
        api.create_repo(target, private=not public, exist_ok=True)
        done = api.create_commit(target, operations, commit_message="Model from luthier")
    except Exception as error:  # the HTTP client has its own errors for a network that is down
        raise UserError(f"--to {target}: the hub did not take it: {_first_line(error)}") from error
    print(f"sent      {done.repo_url if done.repo_url else target}")


def check_login(api: "HfApi") -> None:
    """Raise UserError where there is no valid login, or the hub is out of reach."""
    from huggingface_hub import errors

    try:
        api.whoami()
    except errors.OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so that nothing can be sent. Unset it.") from error
    # LocalTokenNotFoundError and HTTP errors of huggingface_hub 2.4.0 are OSErrors; a refused login
    # (401, 403) is told apart from a network that is down.
    except OSError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.LocalTokenNotFoundError) or status in (401, 403):
            raise UserError(
                "You are not logged in to the hub (or the login is no longer valid). Log in with a "
                "token that may write:\n    hf auth login\n(or set HF_TOKEN). Nothing was sent."
            ) from error
        raise UserError(
            f"The hub cannot be reached: {_first_line(error)}. Nothing was sent."
        ) from error
    except Exception as error:  # the HTTP client's own errors
        raise UserError(
            f"The hub cannot be reached: {_first_line(error)}. Nothing was sent."
        ) from error


def check_card(text: str) -> None:
    """Let the hub check the card's metadata; raise UserError with its answer where it refuses."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(text).validate()
    except ValueError as error:
        raise UserError(f"The hub refuses the card: {error}. Nothing was sent.") from error


def _check_repository(api: "HfApi", target: str, public: bool, overwrite: bool) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        repository = api.repo_info(target)
    # A new repository is made private, or public where that was asked for.
    except RepositoryNotFoundError:
        return
    if repository.private is False and not public:
        raise UserError(
            f"--to {target}: this repository exists and is public. --public says that this is "
            "meant, or name another. Nothing was sent."
        )
    names = [
        sibling.rfilename
        for sibling in repository.siblings or []
        if sibling.rfilename not in _IGNORED
    ]
    if names and not overwrite:
        raise UserError(
            f"--to {target}: this repository holds {len(names)} files already ({names[0]}, ...). "
            "--overwrite replaces those of the same names, or name another. Nothing was sent."
        )


def _first_line(error: Any) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
