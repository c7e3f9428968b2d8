"""Images in a conversation: where a template shows them, and the text that stands for each.

A template writes one token for an image part, the processor's placeholder. The k-th placeholder
that the template itself wrote is the k-th image part of the rendered messages; each is replaced by
the processor's own text for that image before anything looks at the rendered text. So an image is
a run of characters with an origin of its own, as the text of a field is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from luthier.chat.provenance import FieldOrigin, TracedStr, origin_spans, runs_of, trace_field
from luthier.chat.types import ChatError

IMAGE_FIELD = "image"
"""The field that the origin of an image names, and the key of a part that holds the image."""
IMAGE_PART: Mapping[str, Any] = {"type": "image"}
"""An image part as templates see it."""
LOST_IMAGE = "lost image"
"""The reason of an error about an image that the template does not show as one image."""


class ImageExpander(Protocol):
    """What a vision-language model's processor makes of an image in a rendered text.

    `model.vision_processor.VisionProcessor` is one; this package reads no picture itself.
    """

    placeholder: str
    """The token that a chat template writes for an image part, such as `<|image_pad|>`."""
    prefix_ids: list[int]
    """The ids that the processor's own call puts in front of a text which does not begin with the
    BOS token; empty where it puts none."""

    def expand(self, image: Any) -> str:
        """Return the text that stands for an image: the processor's own replacement text.

        `image`: what an image part holds under `image`, as the rows have it.
        """

    def settings(self) -> dict[str, Any]:
        """Return everything that decides these texts, for JSON."""


class ImageOrigin(FieldOrigin):
    """An image part of a message, as the origin of the text that stands for the image."""

    __slots__ = ("_expansion", "image", "number")

    def __init__(self, message: int, role: str, number: int, image: Any) -> None:
        """`number`: the image's number in the row, counted from 0."""
        super().__init__(message, role, IMAGE_FIELD)
        self.number = number
        self.image = image
        self._expansion: TracedStr | None = None

    def expand(self, expander: ImageExpander) -> TracedStr:
        """Return the text that stands for the image; the row is rendered more than once."""
        if self._expansion is None:
            text = expander.expand(self.image)
            if not text:
                raise ChatError(
                    "the model's processor writes nothing for this image, so a model trained on "
                    "the row would not see it",
                    reason=LOST_IMAGE,
                    message=self.message,
                    field=IMAGE_FIELD,
                )
            self._expansion = trace_field(self, text)
        return self._expansion


class ImagePart(dict[str, Any]):
    """An image part of a message's content as a template sees it, which knows its image."""

    __slots__ = ("origin",)

    def __init__(self, part: Mapping[str, Any], origin: ImageOrigin) -> None:
        super().__init__(part)
        self.origin = origin


def is_image_part(part: Any) -> bool:
    """Return whether a part of a message's content is an image."""
    return isinstance(part, dict) and part.get("type") == "image"


def find_image_message(messages: Any) -> int | None:
    """Return the number of the first message with an image part; None where there is none."""
    if not isinstance(messages, list | tuple):
        return None
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list | tuple) and any(map(is_image_part, content)):
            return number
    return None


def list_image_origins(messages: Iterable[dict[str, Any]]) -> list[ImageOrigin]:
    """Return the images of traced messages, in the order of their parts."""
    return [
        part.origin
        for message in messages
        if type(content := message.get("content")) is list
        for part in content
        if type(part) is ImagePart
    ]


def find_placeholders(text: str, placeholder: str) -> list[int]:
    """Return where the placeholder stands in text that the template itself wrote."""
    plain = str.__str__(text)
    positions = []
    for start, stop, origin in origin_spans(runs_of(text)) if placeholder in plain else ():
        if origin is None:
            position = plain.find(placeholder, start, stop)
            while position >= 0:
                positions.append(position)
                position = plain.find(placeholder, position + len(placeholder), stop)
    return positions


def expand_placeholders(
    pieces: Sequence[str], origins: Sequence[ImageOrigin], expander: ImageExpander
) -> list[list[str]] | None:
    """Return each piece cut at its placeholders, with the text of an image for each of these.

    `pieces`: what a template wrote, in order. None where the placeholders are not as many as the
    images.
    """
    length = len(expander.placeholder)
    positions = [find_placeholders(piece, expander.placeholder) for piece in pieces]
    if sum(map(len, positions)) != len(origins):
        return None
    remaining = iter(origins)
    expanded = []
    for piece, starts in zip(pieces, positions, strict=True):
        stretches: list[str] = []
        begin = 0
        for start in starts:
            stretches += piece[begin:start], next(remaining).expand(expander)
            begin = start + length
        expanded.append([*stretches, piece[begin:]])
    return expanded


def image_count_error(
    counts: Iterable[tuple[list[ImageOrigin], int]], placeholder: str
) -> ChatError:
    """Return what is wrong with a row whose template shows more or fewer images than it has.

    `counts`: for more and more of its messages, the images that they have, and how often the
    template writes the placeholder for them. At least one of these numbers differs.
    """
    origins, written = next(each for each in counts if len(each[0]) != each[1])
    images, origin = len(origins), origins[-1]
    if written < images:
        description = (
            f"the chat template shows {written} of the {images} images up to this message: it "
            f"writes no image token ({placeholder}) for an image part here, so a model trained on "
            "the row would not see it; use a template that shows images in messages of this role "
            f"({origin.role}), or move the image into a user's message"
        )
    else:
        description = (
            f"the chat template writes the image token ({placeholder}) {written} times up to this "
            f"message, where the messages have {images} image part{'s' * (images != 1)}, so it is "
            "not known which belongs to which; use a template that writes it for image parts alone"
        )
    return ChatError(description, reason=LOST_IMAGE, message=origin.message, field=IMAGE_FIELD)


class ImageRun(NamedTuple):
    """Characters `start` up to `stop` of a rendered text stand for an image."""

    start: int
    stop: int
    origin: ImageOrigin


def find_image_runs(text: TracedStr) -> list[ImageRun]:
    """Return the images of a rendered text in order."""
    if not any(type(origin) is ImageOrigin for _, origin, _ in text._runs):
        return []
    return [
        ImageRun(start, stop, origin)
        for start, stop, origin in origin_spans(text._runs)
        if isinstance(origin, ImageOrigin)
    ]
