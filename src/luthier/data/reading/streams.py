"""The content of a file as a stream of bytes: unpacked by what its first bytes say."""

import bz2
import gzip
import io
import lzma
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from zipfile import ZipExtFile, ZipFile

from luthier.data.reading.places import File, Place
from luthier.data.reading.troubles import in_words
from luthier.errors import UserError

BLOCK = 1 << 20
"""Bytes that are read at once."""


@contextmanager
def content(file: File) -> Iterator[io.BufferedReader]:
    """The file's content, unpacked; by its first bytes, because names lie about compression."""
    with ExitStack() as stack:
        stream = stack.enter_context(file.place.open())
        if file.member:
            stream = _member(stack, stream, file.label, file.member)
        while unpack := _packing(stream.peek(10)):
            stream = unpack(stack, stream, file.label)
        yield stream


def blocks(file: File) -> Iterator[bytes]:
    """The file's content, unpacked, a block at a time."""
    with in_words(file.label, file.place.is_remote), content(file) as stream:
        while block := stream.read(BLOCK):
            yield block


def stored_blocks(place: Place) -> Iterator[bytes]:
    """The bytes of a place as they are stored."""
    with in_words(place.key, place.is_remote), place.open() as stream:
        while block := stream.read(BLOCK):
            yield block


def seekable(stack: ExitStack, stream: io.BufferedReader) -> Any:
    """The stream, or a temporary copy of it on disk where it cannot be read at will."""
    if stream.seekable() and not isinstance(stream.raw, _UNPACKED):
        return stream
    copy = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    try:
        shutil.copyfileobj(stream, copy, BLOCK)
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(
            f"dataset: a temporary copy in {tempfile.gettempdir()} failed: {error.strerror}. "
            "Set TMPDIR to a folder with more room, or unpack the file yourself."
        ) from error
    copy.seek(0)
    return copy


def members(place: Place, label: str) -> list[str]:
    """The names of the files in a zip archive, sorted; hidden ones left out."""
    with in_words(label, place.is_remote), ExitStack() as stack:
        stream = stack.enter_context(place.open())
        return _names(stack.enter_context(ZipFile(seekable(stack, stream))))


def _names(archive: ZipFile) -> list[str]:
    """The files of an archive that are not hidden (as `__MACOSX` is meant to be)."""
    return sorted(
        name
        for name in archive.namelist()
        if not name.endswith("/")
        and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    )


def _member(stack: ExitStack, stream: Any, label: str, name: str) -> io.BufferedReader:
    """The content of one file in a zip archive."""
    return _in_archive(stack, stack.enter_context(ZipFile(seekable(stack, stream))), label, name)


def _only_member(stack: ExitStack, stream: Any, label: str) -> io.BufferedReader:
    """The content of an archive whose name does not say so, and which must hold one file."""
    archive = stack.enter_context(ZipFile(seekable(stack, stream)))
    names = _names(archive)
    if len(names) != 1:
        raise UserError(
            f"dataset: {label} is a zip archive of {len(names)} files by its first bytes, and its "
            "name does not say so. Name it .zip, or unpack it."
        )
    return _in_archive(stack, archive, label, names[0])


def _in_archive(stack: ExitStack, archive: ZipFile, label: str, name: str) -> io.BufferedReader:
    """The content of one file in an open archive."""
    try:
        return io.BufferedReader(cast(io.RawIOBase, stack.enter_context(archive.open(name))))
    except (RuntimeError, NotImplementedError) as error:  # zipfile: encrypted, or an unknown method
        raise UserError(f"dataset: {label} cannot be unpacked: {error}. Unpack it.") from error


def _zstandard(stack: ExitStack, stream: Any, label: str) -> io.BufferedReader:
    """The content of a .zst file; pyarrow brings the library, Python has it from 3.14 on."""
    import pyarrow

    packed = pyarrow.PythonFile(stream, mode="r")
    return io.BufferedReader(stack.enter_context(pyarrow.CompressedInputStream(packed, "zstd")))


def _of_python(opener: Callable[[Any], Any]) -> Callable[..., io.BufferedReader]:
    """The way to unpack with one of Python's own file classes."""
    return lambda stack, stream, label: io.BufferedReader(stack.enter_context(opener(stream)))


_PACKINGS: tuple[tuple[bytes, Callable[..., io.BufferedReader]], ...] = (
    (rb"\x1f\x8b", _of_python(lambda stream: gzip.GzipFile(fileobj=stream, mode="rb"))),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", _of_python(bz2.BZ2File)),
    (rb"\xfd7zXZ\x00", _of_python(lzma.LZMAFile)),
    (rb"\x28\xb5\x2f\xfd", _zstandard),
    (rb"PK\x03\x04", _only_member),
)
_UNPACKED = (gzip.GzipFile, bz2.BZ2File, lzma.LZMAFile, ZipExtFile)
"""Streams that go back by unpacking from the start again."""


def _packing(head: bytes) -> Callable[..., io.BufferedReader] | None:
    """How to unpack what begins with these bytes; None if it is not packed."""
    return next((unpack for magic, unpack in _PACKINGS if re.match(magic, head)), None)
