"""The files that go to the hub: those of a model and no others, without paths or keys."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.errors import UserError
from luthier.export import carried
from luthier.export.names import hub_name, last
from luthier.export.story import Story
from luthier.model import source

GOES = (
    *carried.SPEECH,
    *("config.json", "generation_config.json", "adapter_config.json", "labels.json", "loss.png"),
    *("preprocessor_config.json", "processor_config.json", "quantize_config.json"),
    *("model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json"),
)
"""Files by name; besides them go the shards of a model and further chat templates."""
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PLACES = ("_name_or_path", "_model_name_or_path", "name_or_path", "base_model_name_or_path")
"""Where the libraries write the path that something was loaded from."""
_KEYS = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,}|AKIA[0-9A-Z]{16}|ghp_\w{36})\b")
"""Keys of the hub, of OpenAI, AWS and GitHub."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass
class Parcel:
    """What goes to the hub, and what stays here."""

    files: dict[str, Path] = field(default_factory=dict)
    """Files that go as they are, by their names in the repository."""
    texts: dict[str, str] = field(default_factory=dict)
    """Files whose text is written for the hub."""
    left: dict[str, str] = field(default_factory=dict)
    """Files that stay, and why."""

    def sizes(self) -> dict[str, int]:
        """The bytes of each file, by name."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        sizes |= {name: len(text.encode()) for name, text in self.texts.items()}
        return dict(sorted(sizes.items()))


def pack(folder: Path, story: Story, written: dict[str, str]) -> Parcel:
    """Gather what of `folder` goes to the hub. `written` are the card and the notes.

    Raises UserError where weights are missing, are pickles, or a text holds a key.
    """
    parcel = Parcel()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name in written:
            continue
        why = _stays(name)
        if why:
            parcel.left[name] = why
        elif path.suffix == ".json":
            parcel.texts[name] = _without_paths(path, story)
        else:
            parcel.files[name] = path
    parcel.texts |= written
    _refuse_missing(folder, parcel)
    _refuse_keys(folder, parcel)
    return parcel


def _stays(name: str) -> str:
    """Why a file stays here; empty where it goes."""
    if name in GOES or _SHARD.fullmatch(name) or name.startswith(f"{carried.TEMPLATES}/"):
        return ""
    if name.endswith(_PICKLES):
        return "a pickle, which can run code: weights go as safetensors"
    return "no file of a model"


def _without_paths(path: Path, story: Story) -> str:
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: damaged JSON: {error}") from error
    return _dumped(content, text, story)


def _dumped(content: Any, text: str, story: Story) -> str:
    """The text with each path of this machine named otherwise; as it was where there is none."""
    if not isinstance(content, dict):
        return text
    changed = dict(content)
    for key in _PLACES:
        value = content.get(key)
        if isinstance(value, str) and value:
            changed[key] = _place(value, story)
    if changed == content:
        return text
    return json.dumps(changed, indent=2, ensure_ascii=False) + "\n"


def _place(value: str, story: Story) -> str:
    is_path = value.startswith(("/", ".", "~")) or "\\" in value or value.count("/") > 1
    is_path |= value == story.base.name and story.base.hub is None
    if not is_path:
        return value
    if story.base.package is not None:
        return f"{source.PACKAGE}{story.base.package}"
    return hub_name(value) or story.base.hub or last(story.base.name)


def _refuse_missing(folder: Path, parcel: Parcel) -> None:
    if any(name.endswith(".safetensors") for name in parcel.files):
        return
    pickles = [name for name in parcel.left if name.endswith(_PICKLES)]
    has = f"only pickles ({', '.join(pickles)}), which can run code" if pickles else "no weights"
    raise UserError(f"{folder}: there is {has}; what goes to the hub is safetensors.")


def _refuse_keys(folder: Path, parcel: Parcel) -> None:
    here = {str(folder.resolve()), str(Path.cwd().resolve())} - {"/"}
    for name, text in parcel.texts.items():
        if _KEYS.search(text):
            raise UserError(
                f"{folder / name}: this holds what looks like an access key. Remove it."
            )
        for path in here:
            if path in text:
                raise UserError(f"{folder / name}: this holds a path of this machine, {path}.")
