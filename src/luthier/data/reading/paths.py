"""The files that a path means: one, those of a glob, of a folder, of a zip archive."""

import difflib
import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.data.reading import remote
from luthier.data.reading.folders import Found, data_files
from luthier.data.reading.formats import SUFFIXES, format_of, is_file_name
from luthier.data.reading.places import File, Local, Place
from luthier.data.reading.streams import members
from luthier.errors import UserError


@dataclass(frozen=True)
class Wanted:
    """What decides which files a path means and how they are read."""

    format: str
    storage: dict[str, Any]


def is_local(path: str) -> bool:
    """Whether a path means files of this machine, and no hub name."""
    looks_local = path.startswith(("/", "./", "../", "~", ".\\", "..\\"))
    return looks_local or is_file_name(path) or _is_glob(path) or Path(path).exists()


def find_files(paths: Sequence[str], wanted: Wanted) -> list[File]:
    """The files of all paths, in their order, those of one path sorted by name."""
    files = [file for path in paths for file in _of_path(path, wanted)]
    seen: dict[tuple[str, str], str] = {}
    for file in files:
        key = (file.place.key, file.member)
        if key in seen:
            raise UserError(
                f"dataset: {file.label} stands twice in path (as {seen[key]} too). Name "
                "it once; repeats shows its rows more often."
            )
        seen[key] = file.label
    return files


def _of_path(path: str, wanted: Wanted) -> list[File]:
    """The files of one path."""
    local = remote.local_path(path)
    if remote.is_address(path) and local is None:
        found = _remote(path, wanted)
    else:
        found = _local(local or path, wanted)
    return [file for label, place in found for file in _unzipped(label, place, wanted)]


def _remote(path: str, wanted: Wanted) -> list[Found]:
    """The files at an address."""
    found = remote.find(path, wanted.storage)
    if [label for label, _ in found] == [path]:
        return found
    if not found:
        raise UserError(f"dataset: there are no files at {path}.")
    return data_files(path, found, wanted.format)


def _local(path: str, wanted: Wanted) -> list[Found]:
    """The files that a path of this machine means."""
    file = Path(path).expanduser()
    if file.is_dir():
        entries = sorted(entry for entry in file.iterdir() if entry.is_file())
        return data_files(path, [(_join(path, entry.name), Local(entry)) for entry in entries],
                          wanted.format)  # fmt: skip
    if file.is_file():
        return [(path, Local(file))]
    if file.exists():
        raise UserError(
            f"dataset: {path} is no regular file (a pipe, say), and cannot be read twice."
        )
    if not _is_glob(path):
        raise UserError(_missing(path, file))
    # Path.glob would take hidden files and refuse absolute patterns.
    names = sorted(glob.glob(str(file), recursive=True))  # noqa: PTH207
    found: list[Found] = [(name, Local(Path(name))) for name in names if Path(name).is_file()]
    if not found:
        raise UserError(_unmatched(path, file))
    return found


def _unzipped(label: str, place: Place, wanted: Wanted) -> list[File]:
    """The file, or the data files of a zip archive, each with its format."""
    if not label.lower().endswith(".zip"):
        return [File(label, _format(label, wanted), place)]
    names = members(place, label)
    if len(names) == 1:
        known = wanted.format if wanted.format != "auto" else format_of(names[0])
        return [File(f"{label}/{names[0]}", known or _format(label, wanted), place, names[0])]
    kept = data_files(label, [(name, place) for name in names], wanted.format)
    return [File(f"{label}/{name}", _format(name, wanted), place, name) for name, _ in kept]


def _format(label: str, wanted: Wanted) -> str:
    """The format of a file: the one that is set, else the one its name says."""
    found = wanted.format if wanted.format != "auto" else format_of(label)
    if found is None:
        raise UserError(
            f"dataset: {label} has none of the suffixes {', '.join(SUFFIXES)} (with .gz, .bz2, "
            ".xz, .zst or .zip behind them where it is compressed). Set format to what "
            "it is."
        )
    return found


def _is_glob(path: str) -> bool:
    """Whether a path has characters that stand for others."""
    return any(mark in path for mark in "*?[")


def _join(folder: str, name: str) -> str:
    """The name of a file in a folder, as the user calls the folder."""
    return f"{folder.rstrip('/')}/{name}" if folder != "." else name


def _missing(path: str, file: Path) -> str:
    """The words for a file that is not there."""
    folder = file.absolute().parent
    text = f"dataset: there is no file {path} (looked at {file.absolute()})."
    if not folder.is_dir():
        return f"{text} The folder {folder} is missing too; relative paths start at {Path.cwd()}."
    return text + _neighbours(folder, file.name)


def _unmatched(path: str, file: Path) -> str:
    """The words for a glob that means nothing."""
    text = f"dataset: no file matches {path} (relative paths start at {Path.cwd()})."
    folder = file.absolute().parent
    while _is_glob(folder.name):
        folder = folder.parent
    if not folder.is_dir():
        return f"{text} There is no folder {folder}."
    return text + _neighbours(folder, file.name)


def _neighbours(folder: Path, name: str) -> str:
    """The data files of a folder, the most similar names first."""
    names = sorted(entry.name for entry in folder.iterdir() if is_file_name(entry.name))
    if not names:
        return f" There are no data files ({', '.join(SUFFIXES)}) in {folder}."
    close = difflib.get_close_matches(name, names, n=3)
    return f" In that folder: {', '.join(close or names[:5])}."
