"""The bytes of a data file: where they lie, how they are unpacked, and what goes wrong with them.

A `DataFile` lies on this machine, on a file system of fsspec, or on a web server. `open_content`
gives its bytes unpacked, and `read_errors_as_user_errors` turns what reading fails with into words.
"""

import bz2
import gzip
import io
import lzma
import re
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.error import HTTPError, URLError
from zipfile import ZipExtFile, ZipFile

from luthier.data.sources.options import describe_other_file
from luthier.errors import UserError

WEB_TIMEOUT_SECONDS = 30.0
"""Seconds to wait for a web server's next answer."""


class FileLocation(Protocol):
    """Something whose bytes can be read, from the start, any number of times."""

    @property
    def is_remote(self) -> bool:
        """Whether reading it takes a network."""

    @property
    def key(self) -> str:
        """What two names of the same place have in common."""

    def open(self) -> io.BufferedReader:
        """Return the bytes as they are stored."""


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine."""

    path: Path
    is_remote = False

    @property
    def key(self) -> str:
        """The path without links."""
        return str(self.path.resolve())

    def open(self) -> io.BufferedReader:
        """Return the bytes as they are stored."""
        return self.path.open("rb")


@dataclass(frozen=True)
class RemoteFile:
    """A file of an fsspec file system."""

    filesystem: Any
    path: str
    is_remote = True

    @property
    def key(self) -> str:
        """The path with its protocol."""
        return str(self.filesystem.unstrip_protocol(self.path))

    def open(self) -> io.BufferedReader:
        """Return the bytes as they are stored."""
        return io.BufferedReader(self.filesystem.open(self.path, "rb"))


@dataclass(frozen=True)
class WebFile:
    """A file that a web server gives out; needs no package, unlike fsspec's own reader."""

    url: str
    headers: tuple[tuple[str, str], ...] = ()
    is_remote = True

    @property
    def key(self) -> str:
        """The address."""
        return self.url

    def open(self) -> io.BufferedReader:
        """Return the bytes as the server sends them; they can be read once, front to back."""
        # With it comes TLS, which files on this machine do not need.
        from urllib.request import Request, urlopen

        request = Request(self.url, headers=dict(self.headers))
        return io.BufferedReader(_WebResponse(urlopen(request, timeout=WEB_TIMEOUT_SECONDS)))


class _WebResponse(io.RawIOBase):
    """A server's answer that fails where the connection ends early: urllib takes it for the end."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self._response.readinto(buffer))
        # http.client of Python 3.11 raises IncompleteRead only where everything is read at once. In
        # pieces an early end looks like the end, and `length` still counts the bytes that did not
        # come.
        if not count and self._response.length:
            raise EOFError(f"the connection ended {self._response.length:,} bytes too early")
        return count

    def close(self) -> None:
        self._response.close()
        super().close()


class HashedFile:
    """A place whose bytes are hashed while they are read from front to back.

    So what is decoded is what is hashed, however the file changes in the meantime.
    """

    def __init__(self, location: FileLocation) -> None:
        self._location, self._stream = location, _HashedStream(io.BytesIO())
        self.is_remote, self.key = location.is_remote, location.key

    def open(self) -> io.BufferedReader:
        """Return the bytes as they are stored; they can be read once, front to back."""
        self._stream = _HashedStream(self._location.open())
        return io.BufferedReader(self._stream, BLOCK_BYTES)

    def digest(self) -> bytes | None:
        """Return the SHA-256 of what was read; None where reading stopped before the end."""
        return self._stream.digest


class _HashedStream(io.RawIOBase):
    """A stream that hashes what is read of it."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream, self._hash = stream, sha256()
        self.digest: bytes | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        if count:
            self._hash.update(memoryview(buffer)[:count])
        else:
            self.digest = self._hash.digest()
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


@dataclass(frozen=True)
class DataFile:
    """A data file: what the user calls it, its format, and its place."""

    label: str
    format: str
    location: FileLocation
    member: str = ""
    """The file's name inside a zip archive."""
    options_key: str = "dataset.options"
    """The config key of the options that it is read with, for messages."""


# Libraries raise these for content that is cut short or was changed on its way.
_BROKEN_FILE_ERRORS = (
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    # What zipfile raises for headers whose bytes are wrong.
    NotImplementedError,
    UnicodeDecodeError,
    struct.error,
)


@contextmanager
def read_errors_as_user_errors(label: str, is_remote: bool = False) -> Iterator[None]:
    """Turn whatever the block's reading fails with into a UserError about this file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries fail in many ways; what is none of reading goes on
        text = _describe_read_error(label, error, is_remote)
        if text is None:
            raise
        raise UserError(f"dataset: {text}") from error


def _describe_read_error(label: str, error: Exception, is_remote: bool) -> str | None:
    """Return the text for one failure; None for what is no failure of reading."""
    if isinstance(error, FileNotFoundError):
        return f"there is no file {label}."
    # An HTTPError is a URLError, and both are OSErrors, so the most special class is asked for
    # first.
    if isinstance(error, HTTPError):
        return f"{label} cannot be read: the server answers {error.code} ({error.reason})."
    if isinstance(error, URLError | TimeoutError | ConnectionError):
        return f"{label} cannot be reached: {error}. Is there a network, and is the address right?"
    # gzip and bz2 raise an OSError without a number for content that they did not write; one with a
    # number comes from the operating system.
    if isinstance(error, _BROKEN_FILE_ERRORS) or (
        isinstance(error, OSError) and error.errno is None
    ):
        return (
            f"{label} is broken, perhaps cut short: {error}. Copy, download or compress it again."
        )
    # The classes of s3fs, gcsfs and others are not to be had without importing them.
    if is_remote:
        return _describe_remote_error(label, error)
    return f"{label} cannot be read: {error.strerror}." if isinstance(error, OSError) else None


def _describe_remote_error(label: str, error: Exception) -> str:
    """Return the text for a remote file system that does not give a file out."""
    name = type(error).__name__
    text = f"{label} cannot be read: {name}: {error}."
    if isinstance(error, PermissionError) or "Credential" in name or "Forbidden" in str(error):
        return (
            f"{text} Log in as its file system wants it, or pass what that takes in "
            "options.storage, such as {anon: true} for a public bucket."
        )
    return text


BLOCK_BYTES = 1 << 20
"""Bytes that are read at once."""


@contextmanager
def open_content(file: DataFile) -> Iterator[io.BufferedReader]:
    """Yield the content, unpacked; its first bytes decide, as names lie about compression."""
    with ExitStack() as stack:
        stream = stack.enter_context(file.location.open())
        if file.member:
            stream = _open_named_member(stack, stream, file.label, file.member)
        # Packed content may lie in packed content, such as a .jsonl.gz inside a zip archive. The
        # longest mark, that of bzip2, has ten bytes.
        while unpack := _find_unpacker(stream.peek(10)):
            stream = unpack(stack, stream, file.label)
        if noun := _find_unknown_archive(stream.peek(_TAR_MAGIC_END)):
            raise UserError(
                f"dataset: {file.label} is {noun} by its first bytes, which luthier does not open. "
                "Unpack it, and name the files in it."
            )
        yield stream


def read_blocks(file: DataFile) -> Iterator[bytes]:
    """Yield the file's content, unpacked, a block at a time."""
    with (
        read_errors_as_user_errors(file.label, file.location.is_remote),
        open_content(file) as stream,
    ):
        while block := stream.read(BLOCK_BYTES):
            yield block


def read_stored_blocks(location: FileLocation) -> Iterator[bytes]:
    """Yield the bytes of a place as they are stored."""
    with read_errors_as_user_errors(location.key, location.is_remote), location.open() as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block


def make_seekable(stack: ExitStack, stream: io.BufferedReader) -> Any:
    """Return the stream, or a temporary copy of it on disk where it cannot be read at will."""
    # gzip and its like call themselves seekable, and unpack from the start again for each step
    # back; Arrow reads the end of a table first and then goes back and forth.
    if stream.seekable() and not isinstance(stream.raw, _UNPACKED_STREAMS):
        return stream
    copy = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    try:
        shutil.copyfileobj(stream, copy, BLOCK_BYTES)
    except OSError as error:
        # Without a number the source is broken; the copy fails with the number of a full disk, say.
        if error.errno is None:
            raise
        raise UserError(
            f"dataset: a temporary copy in {tempfile.gettempdir()} failed: {error.strerror}. "
            "Set TMPDIR to a folder with more room, or unpack the file yourself."
        ) from error
    copy.seek(0)
    return copy


def list_zip_members(location: FileLocation, label: str) -> tuple[list[str], list[str]]:
    """Return the names of the files in a zip archive, sorted: the visible and the hidden ones."""
    with read_errors_as_user_errors(label, location.is_remote), ExitStack() as stack:
        stream = stack.enter_context(location.open())
        return _list_members(stack.enter_context(ZipFile(make_seekable(stack, stream))), label)


def _list_members(archive: ZipFile, label: str) -> tuple[list[str], list[str]]:
    """Return the files of an archive that are visible, and those that are hidden.

    `__MACOSX` is meant to be. UserError for links, and for two files of one name, of which zipfile
    gives the last.
    """
    visible, hidden = list[str](), list[str]()
    for info in archive.infolist():
        if info.is_dir():
            continue
        if info.filename in visible or info.filename in hidden:
            raise UserError(
                f"dataset: {label} holds two files of the name {info.filename}. Unpack it, and "
                "name the files."
            )
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(f"dataset: {label} holds a link, {info.filename}. Unpack it.")
        # bsdtar writes `./data.jsonl`. Nothing is written to disk, so `..` leads nowhere.
        folders = [folder for folder in info.filename.split("/") if folder not in (".", "..")]
        is_hidden = any(folder.startswith((".", "__MACOSX")) for folder in folders)
        (hidden if is_hidden else visible).append(info.filename)
    return sorted(visible), sorted(hidden)


def _open_named_member(stack: ExitStack, stream: Any, label: str, name: str) -> io.BufferedReader:
    """Return the content of one file in a zip archive."""
    return _open_member(
        stack, stack.enter_context(ZipFile(make_seekable(stack, stream))), label, name
    )


def _open_only_member(stack: ExitStack, stream: Any, label: str) -> io.BufferedReader:
    """Return the content of an archive whose name does not say so, and which must hold one file."""
    archive = stack.enter_context(ZipFile(make_seekable(stack, stream)))
    names, _ = _list_members(archive, label)
    if other := describe_other_file(label, names):
        raise UserError(f"dataset: {label} is, by its content, {other}")
    if len(names) != 1:
        raise UserError(
            f"dataset: {label} is a zip archive of {len(names)} files by its first bytes, and its "
            "name does not say so. Name it .zip, or unpack it."
        )
    return _open_member(stack, archive, label, names[0])


def _open_member(stack: ExitStack, archive: ZipFile, label: str, name: str) -> io.BufferedReader:
    """Return the content of one file in an open archive."""
    try:
        return io.BufferedReader(cast(io.RawIOBase, stack.enter_context(archive.open(name))))
    except (RuntimeError, NotImplementedError) as error:  # zipfile: encrypted, or an unknown method
        raise UserError(f"dataset: {label} cannot be unpacked: {error}. Unpack it.") from error


def _unpack_zstandard(stack: ExitStack, stream: Any, label: str) -> io.BufferedReader:
    """Return the content of a .zst file; pyarrow brings the library, Python has it from 3.14 on."""
    import pyarrow

    packed = pyarrow.PythonFile(stream, mode="r")
    return io.BufferedReader(stack.enter_context(pyarrow.CompressedInputStream(packed, "zstd")))


def _unpacker(opener: Callable[[Any], Any]) -> Callable[..., io.BufferedReader]:
    """Return the way to unpack with one of Python's own file classes."""
    return lambda stack, stream, label: io.BufferedReader(stack.enter_context(opener(stream)))


_UNPACKERS: tuple[tuple[bytes, Callable[..., io.BufferedReader]], ...] = (
    (rb"\x1f\x8b", _unpacker(lambda stream: gzip.GzipFile(fileobj=stream, mode="rb"))),
    # A text may begin with BZh and a digit, so the mark of the first block, or that of an empty
    # file's end, must follow.
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", _unpacker(bz2.BZ2File)),
    (rb"\xfd7zXZ\x00", _unpacker(lzma.LZMAFile)),
    (rb"\x28\xb5\x2f\xfd", _unpack_zstandard),
    (rb"PK(\x03\x04|\x05\x06)", _open_only_member),
)
_UNPACKED_STREAMS = (gzip.GzipFile, bz2.BZ2File, lzma.LZMAFile, ZipExtFile)
"""Streams that go back by unpacking from the start again."""


_TAR_MAGIC_END = 262


def _find_unknown_archive(head: bytes) -> str | None:
    """Return what kind of archive begins with these bytes, of those that are not opened."""
    # A tar file begins with a member's name, which is padded with zeros to 100 bytes.
    if head[257:_TAR_MAGIC_END] == b"ustar" and b"\0" in head[:100]:
        return "a tar archive"
    marks = {b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!\x1a\x07": "a RAR archive"}
    return next((noun for mark, noun in marks.items() if head.startswith(mark)), None)


def _find_unpacker(head: bytes) -> Callable[..., io.BufferedReader] | None:
    """Return how to unpack what begins with these bytes; None if it is not packed."""
    return next((unpack for magic, unpack in _UNPACKERS if re.match(magic, head)), None)
