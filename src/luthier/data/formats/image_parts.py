"""Images among the parts of messages: as parts of their own, typed placeholders, or columns.

Every format of rows with messages takes them. Here an image is only found and put where it stands;
`luthier.data.images` reads it.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from luthier.data.formats.columns import (
    ColumnMapping,
    describe_value,
    is_empty_cell,
    list_or_empty,
)
from luthier.data.rows import Row, RowError, excerpt

Message = dict[str, Any]
IMAGES = "images"
"""Our column of a row's images, and the key of an example that says how many it has until they are
read."""
PROMPT_LISTS = ("messages", "prompt")
REPLY_LISTS = ("chosen", "rejected", "completion")
_MESSAGE_LISTS = frozenset({*PROMPT_LISTS, *REPLY_LISTS})
TYPED_PLACEHOLDER = "<image>"
"""What LLaVA's files type where an image stands (github.com/haotian-liu/LLaVA, finetune data)."""
IMAGE_PART_TYPES = ("image", "image_url", "input_image")
OTHER_MEDIA_TYPES = ("video", "video_url", "input_video", "audio", "audio_url", "input_audio")
_SOURCE_KEYS = ("image", "image_url", "url", "path", "base64", "source", "value")
"""Where a part has its image: `image_url` is OpenAI's (platform.openai.com, images and vision),
`source` Anthropic's (docs.anthropic.com, vision), `value` LLaMA-Factory's, the others transformers'
(chat templating)."""
_SIZE_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
"""What qwen_vl_utils reads from a part (github.com/QwenLM/Qwen2-VL, README); transformers' own
processors resize all images alike."""
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
"""Columns, and keys of messages, that hold what no model is trained on here."""
_MESSAGE_KEYS = (IMAGES, "image", "image_url", *_OTHER_MEDIA)
"""Keys of a message beside its content that no chat template reads; `images` is Ollama's
(github.com/ollama/ollama, docs/api.md)."""


class TypedPlaceholderError(RowError):
    """Texts that hold as many `<image>` as the row has images, where no setting says what is
    meant."""


class RefusedColumnError(RowError):
    """A column that would be lost without a word, where no setting says that it may be."""

    def __init__(self, text: str, column: str) -> None:
        """`column`: the source's name of it."""
        super().__init__(text)
        self.column = column


@dataclass(frozen=True, slots=True)
class UnreadImage:
    """An image that was found and not read yet."""

    value: Any
    """A path, an address, bytes, ... as the row has it."""
    label: str
    """Where it stands in the row, for messages."""


def read_image_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part of an image with its source under `image`; one without a source has none.

    Raises RowError for two sources in one part, and for a text or a size of its own beside them.
    """
    sources = {key: part[key] for key in _SOURCE_KEYS if not is_empty_cell(part.get(key))}
    if len(sources) > 1:
        raise RowError(f"an image part has {' and '.join(sources)}; keep one of them")
    if not is_empty_cell(part.get("text")):
        raise RowError(
            f"an image part has a text ({excerpt(part['text'])!r}), which no model would see; "
            "make it a part of its own"
        )
    for key in _SIZE_KEYS:
        if not is_empty_cell(part.get(key)):
            raise RowError(
                f"an image part has {key}, and the model's processor resizes all images alike; "
                "remove it, and set model.processor.max_pixels or model.processor.size for all"
            )
    image: dict[str, Any] = {"type": "image"}
    if isinstance(part.get("index"), int):
        image["index"] = part["index"]
    for key, value in sources.items():
        image["image"] = _read_source(key, value)
    return image


def check_text_part(part: Mapping[str, Any]) -> None:
    """Raise RowError for a part of text that has an image, too."""
    for key in ("image", "image_url"):
        if _is_medium(part.get(key)):
            raise RowError(f"a text part has an image ({key}); make it a part of its own")


def check_message_keys(message: Mapping[str, Any]) -> None:
    """Raise RowError for a message with images, videos or sound beside its content."""
    for key in _MESSAGE_KEYS:
        if _is_medium(message.get(key)):
            raise RowError(
                f"the message has {key!r} beside its content, which no chat template shows; "
                + (
                    "images are trained on, videos and sound are not"
                    if key in _OTHER_MEDIA
                    else 'make each image a part of the content: {"type": "image", "image": ...}'
                )
            )


def _is_medium(value: Any) -> bool:
    """Return whether a value names something; Arrow fills objects with nulls."""
    if isinstance(value, Mapping):
        return any(not is_empty_cell(item) for item in value.values())
    return not is_empty_cell(value)


def list_refused_columns(names: Mapping[str, str], removed: Collection[str]) -> tuple[str, ...]:
    """Return the columns that rows with messages may not have.

    `names`: the columns that are read, by our names. `removed`: those that are left out on purpose.
    """
    refused = [*_OTHER_MEDIA, *["image"] * (names.get(IMAGES) == IMAGES)]
    return tuple(name for name in refused if name not in {*names.values(), *removed})


def _check_refused_columns(row: Row, columns: ColumnMapping) -> None:
    """Raise RefusedColumnError for a row with a video, sound, or a second column of images."""
    for name in columns.refused:
        if name in row.fields and _is_medium(row.fields[name]):
            problem = (
                f"has {name!r}; images are trained on, videos and sound are not"
                if name in _OTHER_MEDIA
                else f"has {name!r} beside {IMAGES!r}, and one column of images is read"
            )
            raise RefusedColumnError(f"the row {problem}", name)


def _read_source(key: str, value: Any) -> Any:
    """Return what a part has under one of the keys as the reader of images takes it."""
    if key == "base64" and isinstance(value, str):
        return {"bytes": value} if not value.startswith("data:") else value
    if key == "source" and isinstance(value, Mapping):
        return {"bytes": value["data"]} if "data" in value else dict(value)
    return value


def fill_image_parts(example: dict[str, Any], row: Row, columns: ColumnMapping) -> dict[str, Any]:
    """Return the example with a `UnreadImage` in each part of an image, and their count.

    Images of the row's column fill parts without a source in order, or stand before the first text
    of a user. An example without images is returned as it is. Raises RowError where there are more
    parts than images, or the reverse, and for columns that are refused.
    """
    _check_refused_columns(row, columns)
    values = _read_column(row, columns)
    if not values and columns.image_placeholder is None and not _holds_parts(example):
        return example
    example = {
        name: [dict(message) for message in value] if name in _MESSAGE_LISTS else value
        for name, value in example.items()
    }
    if columns.image_placeholder is not None:
        _split_placeholders(example, columns.image_placeholder)
    parts = list(_image_parts(example))
    empty = [part for _, part in parts if "image" not in part]
    if values and not empty:
        _check_no_other_images(parts, values, columns)
        if columns.image_placeholder is None:
            _check_no_placeholders(example, len(values))
        _put_first(example, len(values))
        parts = list(_image_parts(example))
        empty = [part for _, part in parts if "image" not in part]
    _fill(empty, values, columns)
    if not parts:
        return example
    for label, part in parts:
        if not isinstance(part["image"], UnreadImage):
            part["image"] = UnreadImage(part["image"], label)
        part.pop("index", None)
    return {**example, IMAGES: len(parts)}


def image_parts(example: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the parts of images of an example, in their order."""
    for _, part in _image_parts(example):
        yield part


def _holds_parts(example: Mapping[str, Any]) -> bool:
    """Return whether a message has parts; most rows have none, and are many."""
    for name, value in example.items():
        if name in _MESSAGE_LISTS:
            for message in value:
                if type(message.get("content")) is list:
                    return True
    return False


def _image_parts(example: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each part of an image with its place in words."""
    for name in (*PROMPT_LISTS, *REPLY_LISTS):
        for number, message in enumerate(example.get(name, ())):
            if type(message.get("content")) is list:
                for position, part in enumerate(message["content"]):
                    if isinstance(part, dict) and part.get("type") == "image":
                        yield f"{name}[{number}], part {position}", part


def _read_column(row: Row, columns: ColumnMapping) -> list[UnreadImage]:
    """Return the images of the row's column, if it has one."""
    if IMAGES not in columns.source_names:
        # Most rows are text, and this is asked of each.
        for name in columns.late_names.get(IMAGES, ()):
            if name in row.fields:
                break
        else:
            return []
    cell = columns.get(row, IMAGES)
    if is_empty_cell(cell):
        return []
    column = columns.source_names.get(IMAGES, "image")
    values = cell if isinstance(cell, list) else list_or_empty(cell) or [cell]
    images = []
    for number, value in enumerate(values):
        label = f"{column}[{number}]" if len(values) > 1 else column
        if is_empty_cell(value):
            raise RowError(f"{label} is {describe_value(value)}; expected an image")
        images.append(UnreadImage(value, label))
    return images


def _split_placeholders(example: dict[str, Any], placeholder: str) -> None:
    """Make parts of images of the placeholders that texts hold, but for those of replies.

    A line break between a placeholder at the start or end of a message and its text goes, as in
    LLaVA's own reader: chat templates write one of their own where the model wants it.
    """
    for name in PROMPT_LISTS:
        for message in example.get(name, ()):
            content = message.get("content")
            if message["role"] == "assistant":
                continue
            if isinstance(content, str) and placeholder in content:
                message["content"] = _split_text(content, placeholder)
            elif isinstance(content, list):
                message["content"] = [
                    piece
                    for part in content
                    for piece in (
                        _split_text(part["text"], placeholder)
                        if isinstance(part.get("text"), str) and placeholder in part["text"]
                        else [part]
                    )
                ]


def _split_text(text: str, placeholder: str) -> list[dict[str, Any]]:
    """Return the parts of a text that holds placeholders."""
    pieces = text.split(placeholder)
    with_text = [number for number, piece in enumerate(pieces) if piece.strip()]
    first, last = (with_text[0], with_text[-1]) if with_text else (len(pieces), -1)
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image"})
        if number == first and number:
            piece = piece.removeprefix("\n")
        if number == last and number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        # What stands outside of the first and the last text is white space between images.
        if piece and first <= number <= last:
            parts.append({"type": "text", "text": piece})
    return parts


def _check_no_other_images(
    parts: list[tuple[str, dict[str, Any]]], values: list[UnreadImage], columns: ColumnMapping
) -> None:
    """Refuse a column of images where the parts of images have sources of their own."""
    if parts:
        raise RowError(
            f"{columns.source_names.get(IMAGES, values[0].label)!r} has {len(values)} "
            f"{_images(len(values))}, and the parts of images in the messages have sources of "
            "their own; leave the column out with remove_columns, or the sources"
        )


def _check_no_placeholders(example: Mapping[str, Any], images: int) -> None:
    """Refuse to put images first where the texts seem to say where they stand."""
    texts = [
        text
        for name in PROMPT_LISTS
        for message in example.get(name, ())
        if message["role"] != "assistant"
        for text in _list_texts(message.get("content"))
    ]
    if sum(text.count(TYPED_PLACEHOLDER) for text in texts) == images:
        raise TypedPlaceholderError(
            f"its texts hold {TYPED_PLACEHOLDER} {_times(images)}, and it has {images} "
            f"{_images(images)}, which would be placed before the text"
        )


def _list_texts(content: Any) -> list[str]:
    """Return the texts of a content, which is a text itself or a list of parts."""
    if isinstance(content, list):
        content = [part.get("text") for part in content if isinstance(part, dict)]
    texts = content if isinstance(content, list) else [content]
    return [text for text in texts if isinstance(text, str)]


def _put_first(example: dict[str, Any], count: int) -> None:
    """Put so many parts of images before the first text of a user."""
    for name in PROMPT_LISTS:
        for message in example.get(name, ()):
            if message["role"] != "user":
                continue
            content = message.get("content")
            texts = content if isinstance(content, list) else []
            if isinstance(content, str) and content:
                texts = [{"type": "text", "text": content}]
            message["content"] = [*({"type": "image"} for _ in range(count)), *texts]
            return
    raise RowError("it has images and no message of a user that they could be placed in")


def _fill(empty: list[dict[str, Any]], values: list[UnreadImage], columns: ColumnMapping) -> None:
    """Put the images of the column into the parts without a source, in their order."""
    if len(empty) != len(values):
        column = columns.source_names.get(IMAGES)
        held = (
            f"the column {column!r} has {len(values)}" if column else "it has no column of images"
        )
        raise RowError(
            f"{len(empty)} {'part is an image' if len(empty) == 1 else 'parts are images'} without "
            f"a source, and {held}"
        )
    for number, (part, value) in enumerate(zip(empty, values, strict=True)):
        if part.get("index", number) != number:
            raise RowError(
                f"the image part number {number} says index {part['index']}; images fill the parts "
                "in their order, so write the column in the order of the parts"
            )
        part["image"] = value


def _images(count: int) -> str:
    return "image" if count == 1 else "images"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def describe_other_media(name: str) -> str:
    """Return the text for a part of a video or of sound."""
    return f"a content part is {excerpt(name)!r}; images are trained on, videos and sound are not"
