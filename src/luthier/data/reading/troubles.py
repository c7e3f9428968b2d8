"""What goes wrong while bytes are read, in words."""

import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import HTTPError, URLError

from luthier.errors import UserError

_BROKEN = (
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
def in_words(label: str, is_remote: bool = False) -> Iterator[None]:
    """Turn whatever the block's reading fails with into a UserError about this file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries fail in many ways; what is none of reading goes on
        text = _words(label, error, is_remote)
        if text is None:
            raise
        raise UserError(f"dataset: {text}") from error


def _words(label: str, error: Exception, is_remote: bool) -> str | None:
    """The words for one failure; None for what is no failure of reading."""
    if isinstance(error, FileNotFoundError):
        return f"there is no file {label}."
    if isinstance(error, HTTPError):
        return f"{label} cannot be read: the server answers {error.code} ({error.reason})."
    if isinstance(error, URLError | TimeoutError | ConnectionError):
        return f"{label} cannot be reached: {error}. Is there a network, and is the address right?"
    if isinstance(error, _BROKEN) or (isinstance(error, OSError) and error.errno is None):
        return (
            f"{label} is broken, perhaps cut short: {error}. Copy, download or compress it again."
        )
    # The classes of s3fs, gcsfs and others are not to be had without importing them.
    if is_remote:
        return _refused(label, error)
    return f"{label} cannot be read: {error.strerror}." if isinstance(error, OSError) else None


def _refused(label: str, error: Exception) -> str:
    """The words for a remote file system that does not give a file out."""
    name = type(error).__name__
    text = f"{label} cannot be read: {name}: {error}."
    if isinstance(error, PermissionError) or "Credential" in name or "Forbidden" in str(error):
        return (
            f"{text} Log in as its file system wants it, or pass what that takes in "
            "options.storage, such as {anon: true} for a public bucket."
        )
    return text
