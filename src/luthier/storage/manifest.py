"""What makes a folder whole: a manifest, written last, with the hash of every file."""

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from luthier.storage.typed_files import DamagedFileError, load_json

MANIFEST = "manifest.json"
BLOCK = 64 * 2**20
"""Bytes that are hashed at once: files are hashed in blocks, so that all cores take part."""
_CHUNK = 2**20


class DamagedFolderError(Exception):
    """An entry that is not as it was written; the text says what is wrong with which file."""


class _SealedFile(BaseModel):
    size: int
    sha256: list[str]


class _Manifest(BaseModel):
    seal: str
    files: dict[str, _SealedFile]
    made: dict[str, Any]


def write_manifest(folder: Path, made: dict[str, Any], unsealed: Collection[str] = ()) -> None:
    """Write the manifest: size and SHA-256 (of each block of 64 MiB) of every file, and `made`.

    A file of a folder within goes by its path. Names in `unsealed` are left out: they may change.
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).as_posix() not in (MANIFEST, *unsealed)
    )
    content = {
        "files": {
            file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": hashes}
            for file, hashes in zip(files, _hashes(files), strict=True)
        },
        "made": made,
    }
    text = json.dumps({"seal": compute_seal(content), **content}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def verify_manifest(folder: Path) -> dict[str, Any]:
    """What was sealed as `made`, after every byte of every file was compared with its hash.

    Raises FileNotFoundError if there is no such folder, and DamagedFolderError if a file is not as
    it was.
    """
    content = verify_sizes(folder)
    files = {name: folder / name for name in content["files"]}
    try:
        file_hashes = list(_hashes([*files.values()]))
    except OSError as error:
        raise DamagedFolderError(
            f"a file cannot be read: {os.strerror(error.errno or 0)}"
        ) from error
    for name, hashes in zip(files, file_hashes, strict=True):
        if hashes != content["files"][name]["sha256"]:
            raise DamagedFolderError(f"the content of {name} has changed")
    facts: dict[str, Any] = content["made"]
    return facts


def verify_sizes(folder: Path, pattern: str = "*") -> dict[str, Any]:
    """The manifest, after the sizes of the files were compared: cheap, whatever they hold.

    `pattern` limits it to some names. Raises as `verify_manifest` does.
    """
    content = read_manifest(folder)
    names = [name for name in content["files"] if fnmatchcase(name, pattern)]
    _check_sizes({name: folder / name for name in names}, content)
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, whose own hash is compared; raises as `verify_manifest` does."""
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        content: dict[str, Any] | None = load_json(folder / MANIFEST, _Manifest)
    except DamagedFileError as damage:
        raise DamagedFolderError(f"{MANIFEST} cannot be read") from damage
    if content is None:
        raise DamagedFolderError(f"{MANIFEST} is missing")
    written_seal = content.pop("seal")
    if written_seal != compute_seal(content):
        raise DamagedFolderError(f"the content of {MANIFEST} has changed")
    return content


def hash_file(file: Path) -> str:
    """The SHA-256 of a file's content, as hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_sizes(files: dict[str, Path], content: dict[str, Any]) -> None:
    """Raise DamagedFolderError for a missing or too short file, before anything is hashed."""
    for name, file in files.items():
        expected = content["files"][name]["size"]
        if not file.is_file():
            raise DamagedFolderError(f"{name} is missing")
        if file.stat().st_size != expected:
            raise DamagedFolderError(
                f"{name} has {file.stat().st_size} bytes instead of {expected}"
            )


def _hashes(files: list[Path]) -> Iterator[list[str]]:
    """The SHA-256 of each block of each file; an empty file has one, of nothing."""
    starts = [range(0, max(file.stat().st_size, 1), BLOCK) for file in files]
    # hashlib lets go of the interpreter's lock, so threads are enough.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        running = [
            [pool.submit(_hash_block, file, start) for start in blocks]
            for file, blocks in zip(files, starts, strict=True)
        ]
        yield from ([block.result() for block in blocks] for blocks in running)


def _hash_block(file: Path, start: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        for _ in range(BLOCK // _CHUNK):
            digest.update(stream.read(_CHUNK))
    return digest.hexdigest()


def compute_seal(content: dict[str, Any]) -> str:
    """Return the SHA-256 of JSON values, whatever the order of their keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
