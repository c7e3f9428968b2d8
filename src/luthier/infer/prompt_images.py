"""Images in prompts: where their bytes are, and what the model takes for them.

The images of a prompt are `PromptImage`s in the parts of its messages. In a row they are references
that a source's reader made, in a call from Python anything that such a reader takes, and in a
request to the server what `request_images` made of it: only that module sees strings of a client.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from luthier.chat.images import IMAGE_FIELD, find_image_message, is_image_part
from luthier.data.examples import OpenedSource
from luthier.data.formats.image_parts import (
    IMAGE_PART_TYPES,
    check_message_keys,
    check_text_part,
    image_parts,
    read_image_part,
)
from luthier.data.images.decode import decode_image
from luthier.data.images.reader import (
    ImageReader,
    ImageRef,
    ReadImage,
    find_image,
    read_image_file,
)
from luthier.data.rows import RowError
from luthier.errors import UserError
from luthier.redaction import redact_message

if TYPE_CHECKING:
    from PIL.Image import Image

    from luthier.data.batching.image_collators import ImageInputs
    from luthier.infer.generate import ImagePromptInputs


class PromptImage(dict[str, Any]):
    """An image of a prompt: its reference, which JSON can hold, and what gives its bytes."""

    __slots__ = ("read",)

    def __init__(self, ref: Mapping[str, Any], read: Callable[[], bytes]) -> None:
        """`ref`: an `ImageRef`. `read`: gives the bytes; UserError where they are gone."""
        super().__init__(ref)
        self.read = read

    def open(self) -> "Image":
        """Return the picture in RGB; UserError where it cannot be decoded."""
        try:
            return decode_image(self.read())
        except RowError as error:
            raise UserError(f"The image {redact_message(self['source'])}: {error}.") from None


class RowImages:
    """The images of a source's rows while these are read: bytes of a row, or where its file is."""

    def __init__(self, opened: OpenedSource) -> None:
        self._names = opened.names
        self._images: dict[str, ReadImage] = {}

    def keep(self, image: ReadImage) -> None:
        """Take an image that the source's reader read."""
        self._images.setdefault(image.ref["sha256"], image)

    def attach(self, example: Mapping[str, Any]) -> None:
        """Put the images of an example, which were kept, into its parts."""
        attach_images(example, self.read)

    def digest(self) -> str | None:
        """Return a hash of all images; None where there are none."""
        return sha256("".join(self._images).encode()).hexdigest() if self._images else None

    def read(self, ref: ImageRef) -> bytes:
        """Return the bytes of an image; UserError where its file is gone or changed."""
        return _read_again(self._images[ref["sha256"]], self._names)


def attach_images(example: Mapping[str, Any], read: Callable[[Any], bytes]) -> None:
    """Put images that `read` gives the bytes of into the parts of an example, in place."""
    for part in image_parts(example):
        if not isinstance(part[IMAGE_FIELD], PromptImage):
            part[IMAGE_FIELD] = PromptImage(part[IMAGE_FIELD], partial(read, part[IMAGE_FIELD]))


def open_image(value: Any) -> PromptImage:
    """Return the image that a path, an address, bytes or a picture of Pillow is.

    Raises UserError for one that cannot be read.
    """
    try:
        return _open_value(value, ImageReader())
    except RowError as error:
        raise UserError(f"The image cannot be read: {error}.") from None


def name_prompts(prompts: Sequence[Any], places: Sequence[str] | None) -> Sequence[str]:
    """Return what each prompt is called in an error: its place, else `prompt 1` and so on."""
    return places or [f"prompt {number}" for number in range(1, len(prompts) + 1)]


def open_prompts(prompts: Sequence[Any], places: Sequence[str] | None = None) -> list[Any]:
    """Return prompts whose images can be opened; all else is as it was.

    An image is a path, an address, bytes, a picture of Pillow, or a `PromptImage`. Raises
    UserError, with the place of the prompt, for an image that cannot be read.
    """
    reader, names = ImageReader(), name_prompts(prompts, places)
    return [_open_prompt(each, reader, name) for each, name in zip(prompts, names, strict=True)]


def _open_prompt(prompt: Any, reader: ImageReader, name: str) -> Any:
    if isinstance(prompt, Mapping):
        messages = prompt.get("messages")
        opened = _open_messages(messages, reader, name)
        return prompt if opened is messages else {**prompt, "messages": opened}
    return _open_messages(prompt, reader, name)


def _open_messages(messages: Any, reader: ImageReader, name: str) -> Any:
    if not isinstance(messages, list | tuple):
        return messages
    opened: list[Any] = []
    for number, message in enumerate(messages):
        label = f"{name}: messages[{number}]"
        _check_nothing_is_lost(message, label)
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list | tuple) and any(map(_is_unread, content)):
            message = {**message, "content": [_open_part(part, reader, label) for part in content]}
        opened.append(message)
    return opened


def _check_nothing_is_lost(message: Any, label: str) -> None:
    """Raise UserError for images where no model would see them: beside a content or a text."""
    if not isinstance(message, Mapping):
        return
    content = message.get("content")
    try:
        check_message_keys(message)
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, Mapping) and part.get("type") == "text":
                check_text_part(part)
    except RowError as error:
        raise UserError(f"{label}: {error}.") from None


def _is_unread(part: Any) -> bool:
    if not isinstance(part, dict) or part.get("type") not in IMAGE_PART_TYPES:
        return False
    return not isinstance(part.get(IMAGE_FIELD), PromptImage)


def _open_part(part: Any, reader: ImageReader, label: str) -> Any:
    if not _is_unread(part):
        return part
    try:
        value = read_image_part(part).get(IMAGE_FIELD)
        if value is None:
            raise RowError('an image part has no image: write {"type": "image", "image": PATH}')
        return {"type": "image", IMAGE_FIELD: _open_value(value, reader)}
    except RowError as error:
        raise UserError(f"{label}: {error}.") from None


def _open_value(value: Any, reader: ImageReader) -> PromptImage:
    image = reader.read(value, "")
    return PromptImage(image.ref, partial(_read_again, image, ()))


def _read_again(image: ReadImage, names: Sequence[str]) -> bytes:
    """Return the bytes of an image that was read; UserError where its file changed since."""
    if image.data:
        return image.data
    source = image.ref["source"]
    data_file = names[image.folder] if image.folder >= 0 else None
    try:
        _, data = read_image_file(find_image(source, data_file), source)
    except RowError as error:
        raise UserError(f"An image is gone since its row was read: {error}.") from None
    if sha256(data).hexdigest() != image.ref["sha256"]:
        raise UserError(f"The image {redact_message(source)} changed since its row was read.")
    return data


def list_prompt_images(prompt: Any) -> list[PromptImage]:
    """Return the images of an opened prompt, in the order of their parts."""
    messages: Any = prompt.get("messages") if isinstance(prompt, Mapping) else prompt
    images: list[PromptImage] = []
    if find_image_message(messages) is None:
        return images
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            if is_image_part(part):
                images.append(part[IMAGE_FIELD])
    return images


def bind_images(
    images: Sequence[Sequence[PromptImage]], processor: "Callable[[], ImageInputs]"
) -> "ImagePromptInputs | None":
    """Return what makes the inputs of some of these prompts; None where none has an image.

    `images`: those of each prompt. `processor`: gives the model's, which only images need.
    """
    if not any(images):
        return None
    inputs = processor()

    def make(numbers: Sequence[int], input_ids: Any) -> dict[str, Any]:
        pixels = inputs.pixel_inputs([[each.open() for each in images[n]] for n in numbers])
        return pixels | inputs.token_type_inputs(input_ids) if pixels else {}

    return make
