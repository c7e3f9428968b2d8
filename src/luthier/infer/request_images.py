"""Images of the server's requests: bytes in a `data:` URL, or fetched where that is allowed.

A client names no file of this machine, and no address unless the server's user allows it. What it
sends is measured before it is decoded, and decoded before its turn comes, so that a broken picture
is an error of its request.
"""

import base64
import binascii
import http.client
import threading
import time
from hashlib import sha256
from typing import Any, NamedTuple
from urllib import request as web

from luthier.chat.images import IMAGE_FIELD, is_image_part
from luthier.data.images.decode import decode_image, measure_image
from luthier.data.rows import RowError
from luthier.infer.api_objects import ApiError
from luthier.infer.prompt_images import PromptImage

MAX_IMAGES = 128
"""The most images of a request."""
_FETCH_SECONDS = 20.0
"""How long a server may take to send an image."""
_BLOCK_BYTES = 2**16
_WEB_SCHEMES = ("http:", "https:")


class ImageLimits(NamedTuple):
    """What the images of a request may take; flags of `luthier serve`."""

    image_bytes: int = 20 * 2**20
    """The largest file of an image."""
    pixels: int = 64_000_000
    """The pixels of a request's images together."""
    allow_urls: bool = False
    """Whether images are fetched from the addresses that requests name."""


class RequestImages:
    """Opens the images of requests."""

    def __init__(self, limits: ImageLimits) -> None:
        self._limits = limits
        # One picture at a time: a request may hold as many pixels as the limit allows.
        self._lock = threading.Lock()

    def open(self, messages: list[dict[str, Any]], field: str, names_parts: bool) -> None:
        """Put a `PromptImage` in place of each address, in place; ApiError where that fails.

        `field`: that of the request with the messages. `names_parts`: whether the numbers of
        messages and parts are those of the request.
        """
        left, count = self._limits.pixels, 0
        for number, message in enumerate(messages):
            content = message.get("content")
            for position, part in enumerate(content if isinstance(content, list) else ()):
                if is_image_part(part):
                    count += 1
                    if count > MAX_IMAGES:
                        raise ApiError(f"{field}: has more than {MAX_IMAGES} images.", param=field)
                    place = f"{field}[{number}].content[{position}]" if names_parts else field
                    try:
                        part[IMAGE_FIELD] = self._open(part[IMAGE_FIELD], left)
                    except RowError as error:
                        raise ApiError(f"{place}: the image: {error}.", param=place) from None
                    left -= part[IMAGE_FIELD]["width"] * part[IMAGE_FIELD]["height"]

    def _open(self, address: str, pixels_left: int) -> PromptImage:
        """Return the image at an address; RowError for one that is not allowed, or no picture."""
        data = self._read(address)
        with self._lock:
            width, height = measure_image(data, self._limits.pixels)
            if width * height > pixels_left:
                raise RowError(
                    f"it has {width} x {height} pixels, and the images of a request may have "
                    f"{self._limits.pixels:,} together; make them smaller"
                )
            decode_image(data)
        digest = sha256(data).hexdigest()
        ref = {"sha256": digest, "width": width, "height": height, "source": "bytes"}
        return PromptImage(ref, lambda: data)

    def _read(self, address: str) -> bytes:
        if address.startswith("data:"):
            data = _decode_data_url(address)
        elif not address.lower().startswith(_WEB_SCHEMES):
            raise RowError(
                "its URL must be data:image/...;base64,... with the bytes of the picture; no file "
                "of the server is read"
            )
        elif not self._limits.allow_urls:
            raise RowError(
                "this server fetches no addresses; send the bytes of the picture in a data: URL "
                "(its user may allow addresses: luthier serve --allow-image-urls)"
            )
        else:
            data = _fetch(address, self._limits.image_bytes)
        if len(data) > self._limits.image_bytes:
            raise RowError(_too_large(self._limits.image_bytes))
        return data


def _too_large(limit: int) -> str:
    return f"its file is larger than {limit:,} bytes"


def _decode_data_url(address: str) -> bytes:
    head, comma, body = address.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RowError("its data: URL must be data:image/...;base64,... with the bytes in base64")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise RowError("its base64 text is broken") from None


def _fetch(address: str, limit: int) -> bytes:
    """Return what a web address gives; RowError where that fails, is slow or is too large."""
    deadline = time.monotonic() + _FETCH_SECONDS
    data = bytearray()
    try:
        # ValueError: an address that is none.
        request = web.Request(address, headers={"User-Agent": "luthier"})
        with _web_opener().open(request, timeout=_FETCH_SECONDS) as response:
            # `read` would wait for a whole block, however slowly it comes.
            while block := response.read1(_BLOCK_BYTES):
                data += block
                if len(data) > limit:
                    raise RowError(_too_large(limit))
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not complete after {_FETCH_SECONDS:.0f} seconds")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RowError(f"it cannot be fetched: {str(error)[:200]}") from None
    return bytes(data)


def _web_opener() -> web.OpenerDirector:
    """Return what opens addresses of http and https alone, also where one leads to another."""
    opener = web.OpenerDirector()
    for handler in (
        web.ProxyHandler, web.UnknownHandler, web.HTTPHandler, web.HTTPSHandler,
        web.HTTPDefaultErrorHandler, web.HTTPRedirectHandler, web.HTTPErrorProcessor,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener
