"""Folders that `datasets.save_to_disk` left: their Arrow files, read without `datasets`."""

import json
from pathlib import Path
from typing import Any

from luthier.data.reading.places import File, Local
from luthier.errors import UserError

_STATE = "state.json"
_SPLITS = "dataset_dict.json"


def is_saved(path: str) -> bool:
    """Whether a folder of this machine was left by `save_to_disk`."""
    folder = Path(path).expanduser()
    return (folder / _STATE).is_file() or (folder / _SPLITS).is_file()


def saved_files(path: str, split: str, name: str) -> list[File]:
    """The Arrow files of the dataset, or of one split of several, in order."""
    folder = Path(path).expanduser()
    if (folder / _SPLITS).is_file():
        known = [str(known) for known in _described(folder / _SPLITS, path, "splits")]
        if split not in known:
            raise UserError(
                f"dataset: {path} has no split {split!r}. It has: {', '.join(known)}. Set "
                f"{name}.split."
            )
        folder, path = folder / split, f"{path.rstrip('/')}/{split}"
    elif not is_saved(path):
        raise UserError(
            f"dataset: {path} is no folder of a saved dataset (looked for {_STATE} and {_SPLITS} "
            f"in {folder.absolute()})."
        )
    elif split != "train":
        raise UserError(
            f"{name}.split={split}: {path} was saved as one dataset without splits. Remove it."
        )
    shards = _described(folder / _STATE, path, "_data_files")
    names = [str(shard["filename"]) for shard in shards]
    return [File(f"{path.rstrip('/')}/{name}", "arrow", Local(folder / name)) for name in names]


def _described(file: Path, path: str, key: str) -> list[Any]:
    """A list of the description that `save_to_disk` writes."""
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"dataset: {path} is a saved dataset whose {file.name} cannot be read "
            f"({type(error).__name__}: {error}). Save or copy it again."
        ) from error
