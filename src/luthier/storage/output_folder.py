"""Folders that a command writes: which files in them are luthier's, and how one takes a place.

What luthier did not write is never removed: it stays, or moves along into the folder that takes
the place. No link is followed, neither to read what is luthier's nor to remove it.
"""

import glob
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from luthier.errors import UserError
from luthier.storage.disk_space import free_bytes
from luthier.storage.manifest import MANIFEST, write_manifest
from luthier.storage.write_errors import explain_write_errors

MARKER = ".luthier.json"
"""The file of a run's directory that says so, and lists what luthier writes there."""
UNSEALED_FILES = ("README.md", "EXPORT.md", "card.json", "loss.png")
"""Files beside a model's weights that luthier writes anew when they are out of date."""
_UNLISTED_FILES = (
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    *("adapter_model.safetensors", "adapter_config.json", "config.json", "labels.json"),
    *("generation_config.json", "quantize_config.json", "preprocessor_config.json"),
    *("processor_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("spiece.model", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "tekken.json", "chat_template.jinja", "chat.json"),
    *(
        "trainer_state.json",
        "training_args.bin",
        "optimizer.pt",
        "optimizer.bin",
        "scheduler.pt",
        "scaler.pt",
    ),
    *("rng_state*.pth", "counted_*.json", "additional_chat_templates/*.jinja", *UNSEALED_FILES),
    *("pytorch_model_fsdp_*/*", "optimizer_*/*", "global_step*/*", "latest", "zero_to_fp32.py"),
)
"""What stands in a model's folder or a checkpoint of a version that kept no list of its files."""
_NAMES_SHOWN = 6


@dataclass(frozen=True)
class WrittenFiles:
    """What a folder holds of luthier's, as patterns of paths within it."""

    files: tuple[str, ...]
    folders: tuple[str, ...] = ()
    """Folders that list their own files in a manifest."""
    temporary: tuple[str, ...] = ()
    """Folders of what was being written, which go with all that they hold."""


def remove_written(folder: Path, written: WrittenFiles) -> None:
    """Remove what luthier wrote into a folder, and folders within it that are empty then.

    Nothing is reached through a link; one that has the name of a file is removed, and what it
    names stays.
    """
    for path in _matches(folder, written.temporary):
        _remove_folder(path)
    for path in _list_written(folder, written):
        path.unlink()
        _remove_empty_folders(path.parent, folder)
    for pattern in written.folders:
        _remove_empty_folders(folder / PurePosixPath(pattern).parent, folder)


def move_written(folder: Path, written: WrittenFiles, target: Path) -> None:
    """Move what `remove_written` would remove into a folder within, under the same paths.

    What was being written is removed.
    """
    for path in _list_written(folder, written):
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
        _remove_empty_folders(path.parent, folder)
    remove_written(folder, written)


def move_back(source: Path, folder: Path) -> None:
    """Move all files from a folder to their paths in another one, and remove the empty one.

    What has the name of one of them stays; the file then gets `.old` behind its name.
    """
    for name in list_remaining_files(source):
        target = find_free_name(folder / name)
        target.parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(target)
    # Nothing but empty folders is left of it.
    shutil.rmtree(source, ignore_errors=True)


def remove_listed_files(folder: Path, manifest: Path | None = None) -> None:
    """Remove the files that a folder's manifest lists, and the folder where nothing else is in it.

    `manifest` is where it lies, where it has another name; it goes last. For a folder without one
    that can be read these are the files of models and checkpoints by their names.
    """
    for path in _list_sealed(folder, manifest or folder / MANIFEST):
        path.unlink()
        _remove_empty_folders(path.parent, folder)
    _remove_empty_folders(folder, folder.parent)


def _list_written(folder: Path, written: WrittenFiles) -> list[Path]:
    """Return the files and links that luthier wrote into a folder, but for temporary ones."""
    paths = []
    for path in _matches(folder, written.folders):
        if path.is_dir() and not path.is_symlink():
            paths += _list_sealed(path, path / MANIFEST)
    return [*paths, *_list_files(folder, written.files)]


def _list_sealed(folder: Path, manifest: Path) -> list[Path]:
    """Return the files of a folder that its manifest lists, and the manifest itself at the end."""
    files = [path for path in _list_files(folder, _listed_names(manifest)) if path != manifest]
    return [*files, *([manifest] if os.path.lexists(manifest) else [])]


def _list_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files and links in a folder under one of the patterns."""
    return [path for path in _matches(folder, patterns) if path.is_symlink() or not path.is_dir()]


def list_remaining_files(folder: Path, ignored: Iterable[str] = ()) -> list[str]:
    """Return the files and links in a folder and below it, by their paths, but for some names."""
    names = []
    for root, folders, files in os.walk(folder):
        inside = [name for name in folders if (Path(root) / name).is_symlink()]
        names += [(Path(root) / name).relative_to(folder).as_posix() for name in [*files, *inside]]
    return sorted(set(names) - set(ignored))


def find_free_name(path: Path) -> Path:
    """Return the path, with as many `.old` behind it as it takes for nothing to be there."""
    while os.path.lexists(path):
        path = path.with_name(f"{path.name}.old")
    return path


def name_some(names: list[str]) -> str:
    """Return the first of some names, and how many more there are."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def publish_folder(temporary: Path, path: Path) -> None:
    """Rename a finished folder to `path`; an older one there is moved aside first, then removed.

    Of the older one only what luthier wrote is removed. Other files move into the new folder, one
    that has a namesake there as NAME.old. The new files get the mode that new files have here:
    safetensors leaves weights that their owner alone can read, and others on a cluster are to load
    them.
    """
    _share_as_new(temporary)
    aside = path.with_name(f".{path.name}.old")
    _merge_aside(aside, path)
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        path.replace(aside)
    temporary.replace(path)
    _merge_aside(aside, path)


def seal_model(folder: Path) -> None:
    """List the files of a finished model's folder in its manifest, with sizes and hashes."""
    write_manifest(folder, {"kind": "model"}, UNSEALED_FILES)


def check_target(
    target: Path, overwrite: bool, inputs: Iterable[Path] = (), runs: Iterable[Path] = ()
) -> None:
    """Raise UserError where a model cannot be written into `target`.

    That is a file, a link, a folder with something in it (with `overwrite`: with other things than
    a model of luthier), and a folder that is, holds or lies in one of the `inputs` or `runs`,
    which the model is made of. In the folder of a run there may be folders for merged models.
    """
    if target.is_symlink():
        raise UserError(
            f"--out {target}: this is a link to {target.readlink()}. Name that folder itself."
        )
    if target.exists() and not target.is_dir():
        raise UserError(f"--out {target}: this is a file. Name a folder.")
    here, place = Path.cwd().resolve(), target.resolve()
    if here.is_relative_to(place):
        raise UserError(f"--out {target}: you are in this folder, or below it. Name another.")
    for path in runs:
        if place.parent != path.resolve() or not place.name.startswith(_MERGED):
            _refuse_input(target, place, path, f", or {path / _MERGED}")
    for path in inputs:
        _refuse_input(target, place, path)
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"--out {target}: this folder is not empty. --overwrite replaces a model in it that "
            "luthier wrote, or name another."
        )
    if not _is_model_of_luthier(target):
        raise UserError(
            f"--out {target}: this folder holds other things than a model that luthier wrote "
            f"({name_some(list_remaining_files(target))}), and --overwrite removes nothing else. "
            "Name another."
        )


def check_free_space(size: int, folder: Path) -> None:
    """Raise UserError where the weights do not fit on the disk."""
    free = free_bytes(folder)
    if size > free:
        raise UserError(
            f"The model takes {size / 1e9:.2f} GB, and the disk of {folder.parent} has "
            f"{free / 1e9:.2f} GB left. Name a folder on another disk: --out."
        )


@contextmanager
def output_folder(
    target: Path, keep: type[BaseException] | tuple[type[BaseException], ...] = ()
) -> Iterator[Path]:
    """Give an empty folder beside the target, which takes its place when the block ends.

    After an error the folder is removed, but for errors of the kinds `keep`. Raises UserError where
    nothing can be written there, or the disk is full.
    """
    aside = target.with_name(f".{target.name}.new")
    missing = [path for path in target.parents if not path.exists()]
    with explain_write_errors(target, "--out"):
        try:
            _remove_folder(aside)
            aside.mkdir(parents=True)
            yield aside
            seal_model(aside)
            publish_folder(aside, target)
        except BaseException as error:
            if not isinstance(error, keep):
                shutil.rmtree(aside, ignore_errors=True)
                for path in missing:
                    with suppress(OSError):  # not made, or not empty
                        path.rmdir()
            raise


def describe_written(target: Path) -> str:
    """Return the line that says what was written, and which files of others are there too."""
    names = list_remaining_files(target)
    listed = _listed_names(target / MANIFEST)
    foreign = [n for n in names if n != MANIFEST and glob.escape(n) not in listed]
    left = f"\nstays     in it, not luthier's, and left: {name_some(foreign)}" if foreign else ""
    return f"written   {target}{left}"


# What a folder holds of luthier's.


def _listed_names(manifest: Path) -> tuple[str, ...]:
    """Return the paths that a manifest lists, or the names of files in folders without one."""
    files = (_read_content(manifest) or {}).get("files")
    if not isinstance(files, dict):
        return _UNLISTED_FILES
    return (*map(glob.escape, files), *UNSEALED_FILES)


def _is_model_of_luthier(folder: Path) -> bool:
    """Tell a folder that a merge of luthier wrote, also of a version that sealed none."""
    made = (_read_content(folder / MANIFEST) or {}).get("made")
    if isinstance(made, dict) and made.get("kind") == "model":
        return True
    card = _read_content(folder / "card.json") or {}
    return isinstance(card.get("base"), dict) and (folder / "config.json").is_file()


def _read_content(file: Path) -> dict[str, Any] | None:
    """Return the mapping in a JSON file; None where there is no such file or no such mapping."""
    try:
        content = None if file.is_symlink() else json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _matches(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return what lies in a folder under one of the patterns, reached through no link."""
    parts = [PurePosixPath(pattern).parts for pattern in patterns]
    paths: list[Path] = []
    for names in parts:
        if names and names[0] != "/" and ".." not in names:
            paths += _match_below(folder, names)
    return sorted(set(paths))


def _match_below(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Return what lies below a folder (which may be a link itself) by one pattern for each name."""
    entries = folder.iterdir() if folder.is_dir() else ()
    paths = [path for path in entries if fnmatchcase(path.name, names[0])]
    if len(names) == 1:
        return paths
    inner = [path for path in paths if not path.is_symlink()]
    return [path for entry in inner for path in _match_below(entry, names[1:])]


def _remove_empty_folders(folder: Path, top: Path) -> None:
    """Remove a folder and those around it, below `top`, as far as they are empty."""
    while folder != top and folder.is_relative_to(top):
        if folder.is_symlink() or not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()
        folder = folder.parent


# How a folder takes the place of another.


def _merge_aside(aside: Path, path: Path) -> None:
    """Empty the older folder that was moved aside; one that a killed process left, too."""
    if aside.is_symlink() or not aside.is_dir():
        return
    if not path.exists():
        aside.replace(path)
        return
    remove_listed_files(aside)
    move_back(aside, path)


def _remove_folder(folder: Path) -> None:
    """Remove a temporary folder of luthier's with all that it holds; never what a link names."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)


def _share_as_new(folder: Path) -> None:
    probe = folder / f".mode.{os.getpid()}"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


_MERGED = "merged"
"""What the folders of merged models in a run's folder begin with."""


def _refuse_input(target: Path, place: Path, path: Path, also: str = "") -> None:
    """Raise UserError where a target (resolved: `place`) is, holds or lies in an input's path.

    `also` is what the user may name besides a folder outside of it.
    """
    source = path.expanduser().resolve()
    if source == place:
        relation = "is"
    elif source.is_relative_to(place):
        relation = "holds"
    elif place.is_relative_to(source):
        relation = "lies in"
    else:
        return
    raise UserError(
        f"--out {target}: this {relation} {path}, which the model is made of. Name a folder "
        f"outside of it{also}."
    )
