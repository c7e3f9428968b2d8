"""Finds the bytes of the images that rows name, and measures them.

A row names an image by a path beside its file, an address, base64 text, or has it: as bytes, as
`datasets` stores a column of images, or as a picture of Pillow. What comes out is a reference that
JSON can hold, and the bytes.
"""

import base64
import binascii
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from os import PathLike
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, NamedTuple, TypedDict
from urllib.error import HTTPError
from urllib.parse import unquote_to_bytes

from luthier.data.images.decode import check_mode, convert_image, measure_image
from luthier.data.rows import RowError, describe_type, excerpt, is_picture
from luthier.data.sources.files import local_path
from luthier.data.sources.hub import is_offline
from luthier.data.sources.streams import WebFile
from luthier.errors import UserError
from luthier.redaction import redact_message
from luthier.storage.cache import cache_root

READER_VERSION = 1
"""Raise it when the same row gives other references than before: it is part of the cache's keys."""
MAX_IMAGE_BYTES = 256 * 2**20
"""Bytes of the largest file that is read."""
EMBEDDED = "bytes"
"""The source of an image that the row itself holds, where it has no name there."""
_WEB_PREFIXES = ("http://", "https://")
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD")
"""How base64 text of PNG, JPEG, WebP and GIF begins."""
_LONGEST_NAME = 255
"""Longer text with such a beginning is no path."""


class ImageRef(TypedDict):
    """An image as an example holds it: what decides its tokens, and where it came from."""

    sha256: str
    """Of its bytes, in hex."""
    width: int
    """Pixels of the picture, the right way up."""
    height: int
    source: str
    """The path or address as the row has it; of embedded images their name, or `bytes`."""


class FileStamp(NamedTuple):
    """What changes when a file is written."""

    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class ReadImage:
    """An image that was read: its reference, and its bytes where no file holds them."""

    ref: ImageRef
    folder: int = -1
    """The number of the data file that a relative path is beside; -1 for all other sources."""
    stamp: FileStamp | None = None
    """Of its file when it was read; None where no file holds it."""
    data: bytes = b""
    """Its bytes; empty where a file holds them."""


class ImageReader:
    """Reads the images of one source's rows; each file is read once."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        """`names`: those of the source's files, which the places of its rows begin with."""
        self._names = tuple(names)
        self._last = -1
        self._read_files: dict[tuple[int, str], ReadImage] = {}

    @staticmethod
    def settings() -> dict[str, Any]:
        """Return all that decides the references besides rows and files, for JSON."""
        return {"version": READER_VERSION}

    def read(self, value: Any, where: str) -> ReadImage:
        """Return the image that a row at this place has as this value.

        Raises RowError for a value that names no image and for an image that is missing, broken,
        too large or an animation, and UserError for an address where the network is needed and
        fails.
        """
        if isinstance(value, PathLike):
            value = os.fspath(value)
        if isinstance(value, str):
            return self._read_text(value, where)
        if isinstance(value, bytes | bytearray | memoryview):
            return _read_embedded(bytes(value), EMBEDDED)
        if isinstance(value, dict):
            return self._read_dict(value, where)
        if is_picture(value):
            return _read_picture(value)
        raise RowError(
            f"this is {describe_type(value)} ({excerpt(value)}); expected a path, an address, "
            "base64 text, or bytes"
        )

    def read_bytes(self, image: ReadImage) -> bytes:
        """Return the bytes of an image that was read; RowError where its file cannot be read."""
        if image.data:
            return image.data
        source = image.ref["source"]
        data_file = self._names[image.folder] if image.folder >= 0 else None
        return read_image_file(find_image(source, data_file), source)[1]

    def _read_dict(self, value: dict[str, Any], where: str) -> ReadImage:
        """Return the image of what `datasets` stores, or of OpenAI's object of an address."""
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes):
            return _read_embedded(data, path if isinstance(path, str) and path else EMBEDDED)
        if isinstance(data, str):
            return _read_embedded(_decode_base64(data), EMBEDDED)
        address = path or value.get("url")
        if isinstance(address, str) and address:
            return self._read_text(address, where)
        keys = ", ".join(map(str, value)) or "nothing"
        raise RowError(f"this object has neither bytes, path nor url (it has: {keys})")

    def _read_text(self, text: str, where: str) -> ReadImage:
        """Return the image of a data address, a web address or a path."""
        if text.startswith("data:"):
            return _read_embedded(_decode_data_address(text), EMBEDDED)
        if len(text) > _LONGEST_NAME and text.startswith(_BASE64_STARTS):
            return _read_embedded(_decode_base64(text), EMBEDDED)
        is_relative = not text.startswith(_WEB_PREFIXES) and not _expand(text).is_absolute()
        folder = self._folder_of(where) if is_relative else -1
        image = self._read_files.get((folder, text))
        if image is None:
            image = self._read_files[folder, text] = self._read_file(text, folder)
        return image

    def _read_file(self, text: str, folder: int) -> ReadImage:
        if text.startswith(_WEB_PREFIXES):
            path = fetch_image(text)
        else:
            path = find_image(text, self._names[folder] if folder >= 0 else None)
        stamp, data = read_image_file(path, text)
        try:
            width, height = measure_image(data)
        except RowError as error:
            raise RowError(f"{redact_message(excerpt(text))}: {error}") from None
        return ReadImage(_make_ref(data, width, height, text), folder, stamp)

    def _folder_of(self, where: str) -> int:
        """Return the number of the data file that a row's place begins with; -1 for none."""
        # Rows come file by file.
        if self._last < 0 or not where.startswith(self._names[self._last]):
            lengths = [len(name) if where.startswith(name) else -1 for name in self._names]
            longest = max(lengths, default=-1)
            self._last = lengths.index(longest) if longest >= 0 else -1
        return self._last


def is_web_address(value: Any) -> bool:
    """Return whether the value of a row names its image by an address of the web."""
    if isinstance(value, dict) and not value.get("bytes"):
        value = value.get("path") or value.get("url")
    return isinstance(value, str) and value.startswith(_WEB_PREFIXES)


def find_image(source: str, data_file: str | None) -> Path:
    """Return the path of an image by the path that its row has, or the web address.

    A relative one is beside `data_file`, the name of the row's file, or in the working folder where
    that is no file of this machine.
    """
    if source.startswith(_WEB_PREFIXES):
        return _fetched_path(source)
    path = _expand(source)
    if path.is_absolute() or data_file is None:
        return path
    file = Path(data_file).expanduser()
    return (file.parent if file.exists() else Path()) / path


def read_image_file(path: Path, source: str) -> tuple[FileStamp, bytes]:
    """Return the stamp and the bytes of an image's file; RowError where it cannot be read.

    `source` is what its row calls it.
    """
    try:
        # A pipe would wait for its writer when it is opened, and some devices never end.
        mode = path.stat().st_mode
        if not S_ISREG(mode) and not S_ISDIR(mode):
            raise RowError(
                f"{redact_message(excerpt(source))} is a pipe or a device, and no picture's file"
            )
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            if stat.st_size > MAX_IMAGE_BYTES:
                raise RowError(f"{source} has {stat.st_size:,} bytes, too many for a picture")
            return FileStamp(stat.st_size, stat.st_mtime_ns), file.read(MAX_IMAGE_BYTES + 1)
    except FileNotFoundError:
        raise RowError(
            f"there is no file {redact_message(excerpt(source))} (looked for {path.absolute()})"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RowError(f"{redact_message(excerpt(source))} cannot be read: {reason}") from None


def fetch_image(address: str) -> Path:
    """Return the file of the cache that holds what a web address gives, which is fetched once.

    Raises RowError where the server says that there is nothing for us, and UserError where it or
    the network fails: another time the row would be whole.
    """
    path = _fetched_path(address)
    if path.is_file():
        return path
    label = redact_message(address)
    if is_offline():
        raise UserError(
            f"dataset: the image {label} is not in the cache ({path.parent}), and HF_HUB_OFFLINE "
            "is set. Run the command once where there is a network, or name files in its place."
        )
    try:
        with WebFile(address, (("User-Agent", "luthier"),)).open() as response:
            data = response.read(MAX_IMAGE_BYTES + 1)
    except HTTPError as error:
        if error.code < 500 and error.code not in (408, 425, 429):
            raise RowError(f"{label} cannot be fetched: HTTP {error.code} {error.reason}") from None
        raise UserError(_describe_failed_fetch(label, error)) from None
    except (OSError, EOFError) as error:
        raise UserError(_describe_failed_fetch(label, error)) from None
    except ValueError as error:
        raise RowError(f"{label} is no address: {error}") from None
    if len(data) > MAX_IMAGE_BYTES:
        raise RowError(f"{label} has more than {MAX_IMAGE_BYTES:,} bytes, too many for a picture")
    _keep_fetched(path, data)
    return path


def _fetched_path(address: str) -> Path:
    """Return where the cache has what an address gave."""
    return cache_root() / "images" / sha256(address.encode()).hexdigest()


def _keep_fetched(path: Path, data: bytes) -> None:
    """Write a fetched image whole or not at all; of several processes each writes the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, new = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(new).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(new).unlink()
            raise
    except OSError as error:
        raise UserError(
            f"The cache folder {path.parent} cannot be written to: {error.strerror or error}. Free "
            "some space there, or set LUTHIER_CACHE to another folder."
        ) from None


def _describe_failed_fetch(label: str, error: Exception) -> str:
    return (
        f"dataset: the image {label} cannot be fetched: {redact_message(str(error))}. Run the same "
        "command again; images that came are kept."
    )


def _make_ref(data: bytes, width: int, height: int, source: str) -> ImageRef:
    return {"sha256": sha256(data).hexdigest(), "width": width, "height": height, "source": source}


def _read_embedded(data: bytes, name: str) -> ReadImage:
    return ReadImage(_make_ref(data, *measure_image(data), name), data=data)


def _read_picture(picture: Any) -> ReadImage:
    """Return a picture of Pillow as the PNG of what `load_image` makes of it."""
    check_mode(picture)
    file = BytesIO()
    # Little compression: the pixels count, and not the size.
    convert_image(picture).save(file, "PNG", compress_level=1)
    name = getattr(picture, "filename", "")
    return _read_embedded(file.getvalue(), name if isinstance(name, str) and name else EMBEDDED)


def _decode_data_address(address: str) -> bytes:
    """Return the bytes of `data:image/png;base64,...`."""
    head, comma, body = address.partition(",")
    if not comma:
        raise RowError(f"the data address {excerpt(address[:40])!r} has no comma before its data")
    return _decode_base64(body) if head.endswith(";base64") else unquote_to_bytes(body)


def _decode_base64(text: str) -> bytes:
    """Return the bytes of base64 text, with or without line breaks."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(f"its base64 text is broken: {error}") from None


def _expand(text: str) -> Path:
    """Return the path of text: a `file://` address, or with the user's own folder for `~`."""
    return Path(local_path(text) or text).expanduser()
