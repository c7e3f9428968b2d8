"""From the bytes of an image to its size without its pixels, and to the picture that a model sees.

Both agree with transformers' `load_image` (5.23): the picture is turned as its EXIF data says, and
its colours are made RGB. What that function would change without a word is refused.
"""

import struct
import warnings
from hashlib import sha256
from io import BytesIO
from typing import TYPE_CHECKING, Any

from luthier.data.rows import RowError, excerpt
from luthier.errors import UserError
from luthier.redaction import redact_message

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGE_PIXELS = 89_478_485
"""Pixels of the largest image that is read: Pillow's own bound for decompression bombs."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What Pillow may read: formats of pictures alone, none that runs other programs."""
_ORIENTATION = 274
"""The tag of EXIF that says how a picture is to be turned."""
_TURNED_SIDEWAYS = (5, 6, 7, 8)
_DEEP_MODES = ("I", "F")
"""Modes of more than 8 bits a pixel begin so: `I;16` is one."""
_PNG_ORIENTATION_MARKS = (b"eXIf", b"Raw profile type", b"com.adobe.xmp")
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, TypeError)
"""What Pillow's readers raise for files that are cut or damaged."""


def measure_image(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """Return the width and height of the picture that `decode_image` gives, from its header.

    Pixels are decoded only where the file looks cut or its format has no sure end. Raises RowError
    for what is no picture, is broken, larger than `max_pixels`, an animation, or has more than 8
    bits a colour.
    """
    image = _open_image(data)
    _check_readable(image, max_pixels)
    try:
        orientation = _read_orientation(image, data)
    except _BROKEN:
        orientation = None
    if orientation is None:
        return decode_image(data).size
    width, height = image.size
    return (height, width) if orientation in _TURNED_SIDEWAYS else (width, height)


def decode_image(data: bytes) -> "Image":
    """Return the picture in RGB, the right way up, as transformers' `load_image` gives it.

    Raises RowError for bytes that cannot be decoded.
    """
    image = _open_image(data)
    _check_readable(image)
    return convert_image(image)


class StoredBytes(bytes):
    """The bytes of an image of encoded rows, which know where they are from."""

    source: str = ""
    """The path or address as its row has it; empty where the row itself holds the bytes."""


def decode_stored_image(data: bytes) -> "Image":
    """Return the picture of an image of encoded rows; UserError where it cannot be decoded.

    Encoding reads headers and ends of files, and broken pixels between them show only here.
    """
    try:
        return decode_image(data)
    except RowError as error:
        source = getattr(data, "source", "")
        name = redact_message(source) or f"of SHA-256 {sha256(data).hexdigest()}"
        raise UserError(
            f"dataset: the image {name} cannot be decoded: {error}.\nIts header and its end are "
            "whole, so encoding did not see it. `luthier check` with the same settings decodes "
            "every image and names the rows of those that are broken."
        ) from None


def convert_image(image: "Image") -> "Image":
    """Return a picture of Pillow in RGB, the right way up; RowError where it cannot be decoded."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except _BROKEN as error:
        raise RowError(f"it is broken: {_describe_error(error)}") from None


def check_mode(image: "Image") -> None:
    """Raise RowError for a picture with more than 8 bits a colour, which Pillow would clip."""
    # Pillow 13.0: `convert("RGB")` cuts all numbers above 255 to 255, so such a picture is white.
    if image.mode.startswith(_DEEP_MODES):
        raise RowError(
            f"it has more than 8 bits a pixel (Pillow's mode {image.mode}), and would be clipped "
            "to white; save it with 8 bits"
        )


def _open_image(data: bytes) -> Any:
    """Return the picture with its header read and no pixel decoded."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise RowError("it is empty: it has no bytes")
    # A bomb is an error here, and Pillow's warning before it would say nothing of the row.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    try:
        return Image.open(BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise RowError(_describe_other_content(data)) from None
    except Image.DecompressionBombError:
        raise RowError(f"it says that it has more than {2 * MAX_IMAGE_PIXELS:,} pixels") from None
    except _BROKEN as error:
        raise RowError(f"it is broken: {_describe_error(error)}") from None


def _check_readable(image: Any, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
    """Refuse what is too large, an animation, or more than 8 bits deep."""
    width, height = image.size
    if width * height > max_pixels:
        raise RowError(
            f"it says that it has {width} x {height} pixels, more than {max_pixels:,}; make it "
            "smaller"
        )
    # The pictures behind the first one of an MPO, as telephones save them, are other views of it.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise RowError(
            f"it has {image.n_frames} frames or pages, and a model sees one picture; save one of "
            "them"
        )
    check_mode(image)


def _read_orientation(image: Any, data: bytes) -> int | None:
    """Return how EXIF turns a picture whose file certainly ends where its picture does.

    None where its pixels have to be decoded to know either. May raise what broken files do.
    """
    match image.format:
        case "PNG":
            # It may stand behind the pixels, which Pillow then decodes to look there.
            if any(mark in data for mark in _PNG_ORIENTATION_MARKS):
                return None
            # The checksum of every chunk up to the last; Pillow cannot use a picture behind it.
            _open_image(data).verify()
            return 1
        case "JPEG" | "MPO":
            is_whole = _has_jpeg_end(data)
        case "WEBP":
            is_whole = int.from_bytes(data[4:8], "little") + 8 <= len(data)
        case "GIF":
            is_whole = data.endswith(b";")
        case _:
            return None
    return image.getexif().get(_ORIENTATION, 1) if is_whole else None


def _has_jpeg_end(data: bytes) -> bool:
    """Return whether the mark of the end stands behind the first scan.

    Thumbnails have such marks, too, so the segments before the scan are skipped by their lengths.
    """
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
        elif marker == 0xDA:
            # Within a scan 0xFF is followed by 0, so this can be nothing else.
            return data.find(b"\xff\xd9", position) >= 0
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def _describe_other_content(data: bytes) -> str:
    """Return the text for bytes that no reader of pictures knows."""
    start = data[:200].decode("utf-8", "replace").strip()
    if start[:1] == "<":
        return (
            f"it is not a picture but markup ({excerpt(start[:40])!r}), such as a page that a "
            "server sent in its place"
        )
    names = ", ".join(IMAGE_FORMATS)
    return f"it is not a picture that can be read (it begins with {data[:8]!r}; read are {names})"


def _describe_error(error: Exception) -> str:
    """Return what Pillow says of a broken file."""
    return str(error).strip() or type(error).__name__
