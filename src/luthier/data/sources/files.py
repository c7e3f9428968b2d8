"""The data files that a path means: one, or those of a glob, a folder or a zip archive.

A path may be one of this machine or an address (`s3://...`), which is read through fsspec; web
servers are read without it. Where a folder or an archive is named, its data files are those of one
format, and of no two splits.
Nothing is left out in silence: what is no file in a place of data is an error, and what is passed
over is noted in `FileSettings.left_out`.
"""

import difflib
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from luthier.data.sources.hub import is_offline
from luthier.data.sources.options import (
    FORMAT_OF_SUFFIX,
    archive_command,
    describe_other_file,
    format_of,
    is_file_name,
)
from luthier.data.sources.streams import (
    DataFile,
    FileLocation,
    LocalFile,
    RemoteFile,
    WebFile,
    list_zip_members,
    read_errors_as_user_errors,
)
from luthier.errors import UserError
from luthier.redaction import redact_message

NamedLocation = tuple[str, FileLocation]
"""A file's name and place."""
_DOCUMENT_NAMES = re.compile(r"(readme|license|licence|notice|changelog|citation)\b", re.IGNORECASE)
_TRAIN_SPLIT_NAMES = re.compile(r"(^|[^a-z])train(ing)?([^a-z]|$)")
_EVAL_SPLIT_NAMES = re.compile(
    r"(^|[^a-z])(test|valid|validation|val|dev|eval|heldout|held-out)([^a-z]|$)"
)


def select_data_files(
    folder: str, locations: Sequence[NamedLocation], settings: "FileSettings"
) -> list[NamedLocation]:
    """Return the data files among these, of one format and of no two splits.

    Hidden files, readmes and licences are none; text is data only where nothing else is. What is
    passed over and could be data is noted in the settings.
    """
    visible = [entry for entry in locations if not _is_hidden(entry[0])]
    if settings.format == "auto":
        selected = _select_main_format(folder, visible)
    else:
        selected = _select_format(folder, visible, settings.format)
    names = {name for name, _ in selected}
    others = [name for name, _ in locations if name not in names and not _is_document(name)]
    # Of hidden files only those are named that would be data by another name.
    settings.left_out.extend(
        [name for name in others if not _is_hidden(name) or is_file_name(name)]
    )
    return selected


def _select_main_format(folder: str, visible: list[NamedLocation]) -> list[NamedLocation]:
    """Return the files of the one format that the names say; UserError if they say several."""
    with_formats = [(format_of(name), (name, location)) for name, location in visible]
    formats = Counter(file_format for file_format, _ in with_formats if file_format is not None)
    # Notes lie beside data as .txt and .md, so text is data only where nothing else is.
    if len(formats) > 1:
        del formats["text"]
    if len(formats) > 1:
        counts = ", ".join(
            f"{count} {file_format}" for file_format, count in sorted(formats.items())
        )
        raise UserError(
            f"dataset: {folder} holds files of several formats ({counts}). Set format to "
            f"one of them, or name the files in path: {folder}/*.SUFFIX"
        )
    selected = [entry for file_format, entry in with_formats if file_format in formats]
    return _check_one_split(folder, selected or _refuse_empty_folder(folder))


def _select_format(
    folder: str, locations: Sequence[NamedLocation], format: str
) -> list[NamedLocation]:
    """Return the files whose names say this format, or all where no name says any."""
    formats = [format_of(name) for name, _ in locations]
    # Names without suffixes, such as part-00000, say nothing, so the setting is believed.
    if not any(formats):
        return _check_one_split(folder, list(locations) or _refuse_empty_folder(folder, format))
    selected = [
        entry
        for file_format, entry in zip(formats, locations, strict=True)
        if file_format == format
    ]
    return _check_one_split(folder, selected or _refuse_empty_folder(folder, format))


def _refuse_empty_folder(folder: str, format: str = "") -> list[NamedLocation]:
    """Stop at a folder without data."""
    noun = f"{format} files" if format else "data files"
    raise UserError(
        f"dataset: {folder} holds no {noun}. Its subfolders are read only if the path says so, "
        f"such as {folder.rstrip('/')}/**/*.jsonl"
    )


def _check_one_split(folder: str, locations: list[NamedLocation]) -> list[NamedLocation]:
    """Return the files, unless their names say that some of them are to be held out of training."""
    stems = {name: PurePosixPath(name).name.lower() for name, _ in locations}
    training = [name for name, stem in stems.items() if _TRAIN_SPLIT_NAMES.search(stem)]
    held_out = [name for name, stem in stems.items() if _EVAL_SPLIT_NAMES.search(stem)]
    # Only both together are refused: test files alone may be just what the user wants to read.
    if training and held_out:
        raise UserError(
            f"dataset: {folder} holds files of several splits by their names, such as "
            f"{training[0]} and {held_out[0]}. Name those to train on in path (a file, a "
            "glob or a list) and the others in dataset.eval.path."
        )
    return locations


def _is_hidden(name: str) -> bool:
    """Return whether a file is hidden or there for people."""
    return PurePosixPath(name).name.startswith((".", "_")) or _is_document(name)


def _is_document(name: str) -> bool:
    """Return whether a file is there for people, such as README.md and LICENSE."""
    is_text = format_of(name) in (None, "text")
    return is_text and bool(_DOCUMENT_NAMES.match(PurePosixPath(name).name))


PROTOCOL_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "hf": "huggingface_hub",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
"""Protocol -> the package that speaks it."""


def is_address(path: str) -> bool:
    """Return whether a path names a protocol."""
    return "://" in path


def local_path(path: str) -> str | None:
    """Return the path of this machine that a `file://` address means; None for any other."""
    return url2pathname(urlsplit(path).path) if path.startswith("file://") else None


def find_remote_files(path: str, settings: "FileSettings") -> list[tuple[str, FileLocation]]:
    """Return the files at an address (a file, a glob or a folder), each with its own address,
    sorted."""
    protocol = path.split("://")[0].split("::")[0]
    if protocol in ("http", "https"):
        return [(path, _check_web_file(path, settings.storage))]
    if protocol == "hf" and is_offline():
        raise UserError(f"dataset: {path} needs the network, and HF_HUB_OFFLINE is set.")
    with read_errors_as_user_errors(path, is_remote=True):
        filesystem, root = _open_filesystem(path, protocol, settings.storage)
        return _list_remote_files(filesystem, root, path, settings.left_out)


def _check_web_file(path: str, storage: dict[str, Any]) -> WebFile:
    """Return a file of a web server, if it answers."""
    unknown = sorted(set(storage) - {"headers"})
    if unknown:
        raise UserError(
            f"dataset.options.storage.{unknown[0]}: {path.split(':')[0]} takes only headers, "
            "such as {headers: {Authorization: Bearer ...}}."
        )
    headers = tuple((str(key), str(value)) for key, value in storage.get("headers", {}).items())
    web = WebFile(path, headers)
    with read_errors_as_user_errors(path, is_remote=True):
        web.open().close()
    return web


def _open_filesystem(path: str, protocol: str, storage: dict[str, Any]) -> tuple[Any, str]:
    """Return the file system of an address, and the address as it calls it."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(path, **storage)
    except ImportError as error:
        package = PROTOCOL_PACKAGES.get(protocol)
        cure = f"Install it: pip install {package}" if package else str(error)
        raise UserError(f"dataset: {path} needs a package that is not installed. {cure}") from error
    except ValueError as error:
        raise UserError(
            f"dataset: {path} cannot be opened: {error}. luthier reads s3://, gs://, hf://, "
            "http://, https:// and file://, and whatever else fsspec has a package for."
        ) from error


def _list_remote_files(
    filesystem: Any, root: str, path: str, left_out: list[str]
) -> list[tuple[str, FileLocation]]:
    """Return the files that an address means: itself, those of a folder, or those of a glob."""
    # The store is asked before the name is: keys of an object store may hold `*` and `[`.
    if filesystem.isfile(root):
        return [(path, RemoteFile(filesystem, root))]
    if filesystem.isdir(root):
        entries = {entry["name"]: entry["type"] == "file" for entry in filesystem.ls(root)}
    else:
        entries = {name: filesystem.isfile(name) for name in filesystem.glob(root)}
    left_out += [f"{name.rstrip('/')}/" for name, is_file in entries.items() if not is_file]
    paths = sorted(name for name, is_file in entries.items() if is_file)
    hidden = [name for name in paths if name.rsplit("/", 1)[-1].startswith(".")]
    left_out += filter(is_file_name, hidden)
    visible = [name for name in paths if name not in hidden]
    return [(filesystem.unstrip_protocol(name), RemoteFile(filesystem, name)) for name in visible]


@dataclass(frozen=True)
class FileSettings:
    """What decides which files a path means and how they are read."""

    format: str
    storage: dict[str, Any]
    options_key: str = "dataset.options"
    """The config key of the options, for messages."""
    left_out: list[str] = field(default_factory=list)
    """What was passed over, by name, and could be data; a folder ends in a slash."""


def is_local(path: str) -> bool:
    """Return whether a path means files of this machine, and no hub name."""
    looks_local = path.startswith(("/", "./", "../", "~", ".\\", "..\\"))
    return looks_local or is_file_name(path) or _is_glob(path) or os.path.lexists(path)


def find_files(paths: Sequence[str], settings: FileSettings) -> list[DataFile]:
    """Return the files of all paths, in their order, those of one path sorted by name."""
    files = [
        replace(file, options_key=settings.options_key)
        for path in paths
        for file in _files_of_path(path, settings)
    ]
    seen: dict[tuple[str, str], str] = {}
    for file in files:
        # By the resolved path: a link, or a glob beside a name, would train the same rows twice in
        # silence.
        key = (file.location.key, file.member)
        if key in seen:
            raise UserError(
                f"dataset: {file.label} is listed twice in path (also as {seen[key]}). List "
                "it once; to train on its rows more often, set repeats."
            )
        seen[key] = file.label
    return files


def _files_of_path(path: str, settings: FileSettings) -> list[DataFile]:
    """Return the files of one path."""
    local = local_path(path)
    if is_address(path) and local is None:
        # What rows are called goes into reports: an address without its login and signature.
        named = _remote_locations(path, settings)
        locations = [(redact_message(label), location) for label, location in named]
    else:
        with read_errors_as_user_errors(path):
            locations = _local_locations(local or path, settings)
    return [
        file for label, location in locations for file in _expand_archive(label, location, settings)
    ]


def _remote_locations(path: str, settings: FileSettings) -> list[NamedLocation]:
    """Return the files at an address."""
    locations = find_remote_files(path, settings)
    # The address is a file itself, which is read whatever its name is, as a local file is.
    if [label for label, _ in locations] == [path]:
        return locations
    if not locations:
        raise UserError(f"dataset: there are no files at {path}.")
    return select_data_files(path, locations, settings)


def _local_locations(path: str, settings: FileSettings) -> list[NamedLocation]:
    """Return the files that a path of this machine means."""
    file = Path(path).expanduser()
    if file.is_dir():
        # As the user calls the folder; the working directory needs no name.
        prefix = "" if path == "." else f"{path.rstrip('/')}/"
        entries = {f"{prefix}{entry.name}": entry for entry in sorted(file.iterdir())}
        return select_data_files(path, _check_files(entries, settings), settings)
    if os.path.lexists(file):
        return _check_files({path: file}, settings, is_named=True)
    if not _is_glob(path):
        raise UserError(_describe_missing(path, file))
    _check_glob_folders(file)
    # Path.glob would take hidden files and refuse absolute patterns.
    names = sorted(glob.glob(str(file), recursive=True))  # noqa: PTH207
    if file.name == "**":  # every folder, and what is in each
        names = [name for name in names if not Path(name).is_dir()]
    locations = _check_files({name: Path(name) for name in names}, settings, is_named=True)
    if not locations:
        raise UserError(_describe_unmatched(path, file))
    return locations


def _check_files(
    entries: dict[str, Path], settings: "FileSettings", is_named: bool = False
) -> list[NamedLocation]:
    """Return the files among these; UserError for what stands where data is and is no file.

    Folders are noted as left out. With `is_named` the user named each of these, if by a glob, so
    that all of them are meant to be data; of a folder's entries, those are that end as data does.
    """
    locations: list[NamedLocation] = []
    for label, path in entries.items():
        if path.is_dir():
            if not _is_hidden(label):
                settings.left_out.append(f"{label.rstrip('/')}/")
        elif path.is_file():
            locations.append((label, LocalFile(path)))
            if (is_named or is_file_name(label)) and not is_readable(path):
                raise UserError(f"dataset: {label} cannot be read: permission denied.")
        elif is_named or (is_file_name(label) and not _is_hidden(label)):
            raise UserError(f"dataset: {label} {_describe_no_file(path)}")
        elif not _is_hidden(label):
            settings.left_out.append(label)
    return locations


def _describe_no_file(path: Path) -> str:
    """Return what an entry is that is neither a file nor a folder, and what to do about it."""
    if path.is_symlink() and not path.exists():
        return (
            f"is a link to {path.readlink()}, which is not there. Restore what it points to, or "
            "remove the link."
        )
    mode = path.stat().st_mode
    nouns = {stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    noun = next((noun for is_such, noun in nouns.items() if is_such(mode)), "a device")
    return (
        f"is {noun}, not a file, and rows are read more than once. Write them to a file first, or "
        "remove it."
    )


def is_readable(path: Path, mode: int = os.R_OK) -> bool:
    """Return whether this process may read a file; for a folder, ask for X_OK too."""
    # The rights of setuid programs are the effective ones, which `access` only asks about if told.
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _check_glob_folders(pattern: Path) -> None:
    """Raise UserError for a folder that a glob looks into and cannot: `glob` passes it over."""
    parts = pattern.parts
    for length in range(1, len(parts)):
        if not _is_glob(str(Path(*parts[:length]))):
            continue
        for folder in glob.iglob(f"{Path(*parts[:length])}/", recursive=True):  # noqa: PTH207
            if not is_readable(Path(folder), os.R_OK | os.X_OK):
                raise UserError(f"dataset: {folder} cannot be opened: permission denied.")


def _expand_archive(label: str, location: FileLocation, settings: FileSettings) -> list[DataFile]:
    """Return the file, or the data files of a zip archive, each with its format."""
    # By the name alone, as looking into each remote file would fetch its end; an archive by another
    # name is met when it is read.
    if not label.lower().endswith(".zip"):
        return [DataFile(label, _file_format(label, settings), location)]
    names, hidden = list_zip_members(location, label)
    settings.left_out.extend([f"{label}/{name}" for name in hidden if is_file_name(name)])
    # A single file is what was compressed: its name need not say that it is data.
    if len(names) == 1:
        member = f"{label}/{names[0]}"
        # The member's name says what it is, or else that of the archive.
        named = next(filter(format_of, (member, label)), member)
        return [DataFile(member, _file_format(named, settings), location, names[0])]
    members: list[NamedLocation] = [(f"{label}/{name}", location) for name in names]
    selected = {name for name, _ in select_data_files(label, members, settings)}
    return [
        DataFile(f"{label}/{name}", _file_format(name, settings), location, name)
        for name in names
        if f"{label}/{name}" in selected
    ]


def _file_format(label: str, settings: FileSettings) -> str:
    """Return the format of a file: the one that is set, else the one its name says."""
    file_format = settings.format if settings.format != "auto" else format_of(label)
    if file_format is None and (unpack := archive_command(label)):
        raise UserError(f"dataset: {label} is an archive that luthier does not open. {unpack}")
    if file_format is None and (other := describe_other_file(label)):
        raise UserError(f"dataset: {label} is {other}")
    if file_format is None:
        key = settings.options_key.removesuffix("options")
        raise UserError(
            f"dataset: {label} has none of the suffixes {', '.join(FORMAT_OF_SUFFIX)} (followed by "
            ".gz, .bz2, .xz, .zst or .zip if it is compressed). If it holds rows, say in which "
            f"format, such as {key}format=jsonl."
        )
    return file_format


def _is_glob(path: str) -> bool:
    """Return whether a path has characters that stand for others."""
    return any(mark in path for mark in "*?[")


def _describe_missing(path: str, file: Path) -> str:
    """Return the text for a file that is not there."""
    folder = file.absolute().parent
    text = f"dataset: there is no file {path} (looked at {file.absolute()})."
    if not folder.is_dir():
        return f"{text} The folder {folder} is missing too; relative paths start at {Path.cwd()}."
    return text + _describe_neighbours(folder, file.name)


def _describe_unmatched(path: str, file: Path) -> str:
    """Return the text for a glob that means nothing."""
    text = f"dataset: no file matches {path} (relative paths start at {Path.cwd()})."
    folder = file.absolute().parent
    while _is_glob(folder.name):
        folder = folder.parent
    if not folder.is_dir():
        return f"{text} There is no folder {folder}."
    return text + _describe_neighbours(folder, file.name)


def _describe_neighbours(folder: Path, name: str) -> str:
    """Return the data files of a folder, the most similar names first."""
    names = sorted(entry.name for entry in folder.iterdir() if is_file_name(entry.name))
    if not names:
        return f" There are no data files ({', '.join(FORMAT_OF_SUFFIX)}) in {folder}."
    close = difflib.get_close_matches(name, names, n=3)
    return f" In that folder: {', '.join(close or names[:5])}."
