"""The content of a request's message: a text, or parts of texts and images."""

from typing import Any

from luthier.errors import format_value
from luthier.infer.api_objects import describe_options

TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image_url", "input_image")
"""Parts of an image in chat completions and in responses."""


def join_parts(content: Any) -> Any:
    """Return the text of content that is given as a list of parts of text."""
    if not isinstance(content, list):
        return content
    return "\n".join(map(_read_text_part, content))


def read_content(content: Any) -> Any:
    """Return content in parts as parts of a row; as one text where all of them are texts.

    An image is the address that the client gave.
    """
    if not isinstance(content, list) or not any(map(_is_image_part, content)):
        return join_parts(content)
    return [
        {"type": "image", "image": _read_image_part(part)}
        if _is_image_part(part)
        else {"type": "text", "text": _read_text_part(part)}
        for part in content
    ]


def _read_text_part(part: Any) -> str:
    is_text = isinstance(part, dict) and part.get("type") in TEXT_PARTS
    if not is_text or not isinstance(part.get("text"), str):
        name = part.get("type") if isinstance(part, dict) else None
        shown = format_value(name) if isinstance(name, str) else type(part).__name__
        form = '{"type": "text", "text": ...}'
        raise ValueError(f"must be text, or a list of {form}; found {shown}")
    if extra := set(part) - {"type", "text", "annotations", "logprobs"}:
        raise ValueError(f"a part of text has no field {format_value(min(extra))}")
    return str(part["text"])


def _is_image_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in IMAGE_PARTS


def _read_image_part(part: dict[str, Any]) -> str:
    """Return the address of an image, which chat completions have in an object of its own."""
    source = part.get("image_url")
    fields = {**part, **source} if isinstance(source, dict) else {**part, "url": source}
    if extra := set(fields) - {"type", "image_url", "url", "detail", "file_id"}:
        raise ValueError(f"a part of an image has no field {format_value(min(extra))}")
    if fields.get("file_id") is not None:
        raise ValueError("file_id: this server keeps no files; send the image as a data: URL")
    if fields.get("detail") not in (None, "auto"):
        raise ValueError(f"detail: {describe_options(('auto',))}")
    if not isinstance(fields.get("url"), str):
        form = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
        raise ValueError(f"an image must be {form}")
    return str(fields["url"])


Content = str | list[dict[str, str]]
"""A text, or parts of a row; of an image they have the address that the client gave."""
