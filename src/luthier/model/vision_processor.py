"""A vision-language model's own processor: the texts that stand for images, and their pixels.

Everything comes from the processor's code, never from a count of tokens beside it: transformers'
`_get_num_multimodal_tokens` gives other numbers than the processor writes for some classes (5.23,
Idefics3: 33 in place of 46).
"""

import copy
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from luthier.chat import ChatError
from luthier.chat.images import is_image_part
from luthier.config.schema import ModelConfig
from luthier.data.images.decode import MAX_IMAGE_PIXELS
from luthier.errors import UserError, nearest_option
from luthier.model import source
from luthier.model.model_class import resolve_model_class
from luthier.model.processor import has_other_inputs, merge_settings
from luthier.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_TEXT_INPUTS = frozenset(["input_ids", "attention_mask"])
_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""The names of inputs that say of each token whether it stands for an image."""
_CHECKED_SIZES = ((64, 64), (40, 500), (500, 40), (700, 450))
"""Heights and widths at which arithmetic is held against a picture that really is processed."""
_SMALL_SIZES = ((32, 32), (64, 64), (32, 256), (256, 32))
_UNSUPPORTED = (
    "luthier trains images with processors that write a text in place of each image, as those of "
    "Qwen-VL, Gemma 3 and 4, LLaVA and Idefics3 do. Rows of text train."
)


class VisionProcessor:
    """The image side of a model's processor, for data preparation and for the loader's workers."""

    def __init__(self, model: ModelConfig, processor: Any, config: Any, model_class: Any) -> None:
        """Take a processor with the run's tokenizer, and the model's `PretrainedConfig` and class.

        Raises UserError for a processor whose call does anything else than to replace its token.
        """
        self.model = model
        self.processor = processor
        self.config = config
        self._model_class = model_class
        self._forward_inputs = _named_inputs(model_class)
        self._texts: dict[tuple[int, int], str] = {}
        self._sizes: Any = None
        """The processor without pixels; None where it was not made yet, False where it is wrong."""
        self.placeholder: str = getattr(processor, "image_token", None) or ""
        """The token that a chat template writes for an image."""
        self.prefix_ids: list[int] = []
        """The ids that the processor's own call puts in front of a text."""
        self._token_types: str | None = None
        self._check_call()

    def __reduce__(self) -> Any:
        """Load it anew in a process that starts from nothing."""
        return find_vision_processor, (self.model,)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that reads the texts."""
        return self.processor.tokenizer

    @property
    def chat_template(self) -> str | None:
        """The processor's chat template, which may be another one than the tokenizer's."""
        template: Any = self.processor.chat_template
        return template.get("default") if isinstance(template, dict) else template

    def expand(self, image: Mapping[str, Any]) -> str:
        """Return the processor's text for an image of this `height` and `width`, in pixels.

        Raises ChatError for a size that the processor refuses.
        """
        size = (int(image["height"]), int(image["width"]))
        if size not in self._texts:
            try:
                self._texts[size] = self._expand_size(*size)
            except (ValueError, ZeroDivisionError) as error:
                raise ChatError(
                    f"an image of {size[1]} x {size[0]} pixels, which the processor of "
                    f"{self.model.path} refuses: {error}",
                    reason="image size",
                    field="image",
                ) from error
        return self._texts[size]

    def encode_image(self, image: Mapping[str, Any]) -> list[int]:
        """Return the ids of an image's text."""
        return list(self.tokenizer(self.expand(image), add_special_tokens=False)["input_ids"])

    def encode_prompt(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> list[int]:
        """Return the ids of the processor's own `apply_chat_template`, with these settings.

        Image parts have an image's `width` and `height` alone: a blank one is processed.
        """
        template = settings.pop("chat_template", None)
        if template is None:
            template = self.tokenizer.get_chat_template(tools=settings.get("tools"))
        shown = [
            message
            if isinstance(message.get("content"), str)
            else {**message, "content": [*map(_with_blank_image, message.get("content") or [])]}
            for message in messages
        ]
        inputs = self.processor.apply_chat_template(
            shown, template, tokenize=True, return_dict=True, return_tensors="pt", **settings
        )
        ids: list[int] = inputs["input_ids"][0].tolist()
        return ids

    @property
    def reserved_ids(self) -> frozenset[int]:
        """The ids of control tokens, those of images among them."""
        return frozenset(self.tokenizer.added_tokens_decoder)

    def choose_small_size(self) -> dict[str, int]:
        """Return the `height` and `width` of an image that takes few tokens, but no fewer than 4.

        Those have more than one direction.
        """
        counts = {
            size: len(self.encode_image(dict(zip(("height", "width"), size, strict=True))))
            for size in _SMALL_SIZES
        }
        by_count = sorted(counts, key=counts.__getitem__)
        height, width = next((size for size in by_count if counts[size] >= 4), by_count[-1])
        return {"height": height, "width": width}

    def settings(self) -> dict[str, Any]:
        """Return what decides the texts, for JSON."""
        return {**self.processor.to_dict(), "image_token": self.placeholder}

    def pixel_inputs(self, images: "Sequence[Sequence[Image]]") -> "dict[str, Tensor]":
        """Return the model's inputs for the images of a batch, one sequence a row or document.

        They are those of the processor's own call; none where there is no image. Shapes are the
        processor's.
        """
        if not any(images):
            return {}
        texts = [self.placeholder * len(row) for row in images]
        inputs = self._call([list(row) for row in images], texts)
        return {
            name: value
            for name, value in inputs.items()
            if name not in (*_TEXT_INPUTS, *_TOKEN_TYPES) and self._takes(name)
        }

    def token_type_inputs(self, input_ids: "Tensor") -> "dict[str, Tensor]":
        """Return what says of each token whether it stands for an image, of the shape of the ids.

        It is empty for models that take no such input.
        """
        import torch

        if self._token_types is None:
            return {}
        types = self.processor.create_mm_token_type_ids(input_ids.tolist())
        return {self._token_types: torch.tensor(types, dtype=torch.int64)}

    def position_ids(self, input_ids: "Tensor", pixels: "Mapping[str, Tensor]") -> "Tensor | None":
        """Return the positions of one document, int64 of shape (directions, tokens).

        `input_ids` are of shape (tokens,), `pixels` those inputs of its images that say how large
        they are, such as `image_grid_thw`. None for models that count tokens in a single direction.
        """
        import torch

        count_positions = _rope_index_method(self.config)
        if count_positions is None:
            return None
        inputs = {"input_ids": input_ids[None], **pixels}
        inputs |= self.token_type_inputs(input_ids[None])
        names = inspect.signature(count_positions).parameters
        positions, _ = count_positions(**{n: v for n, v in inputs.items() if n in names})
        return positions[:, 0].to(torch.int64)

    @property
    def has_own_positions(self) -> bool:
        """Whether images have positions in several directions (M-RoPE)."""
        return _rope_index_method(self.config) is not None

    def _takes(self, name: str) -> bool:
        return self._forward_inputs is None or name in self._forward_inputs

    def _call(self, images: Any, texts: list[str]) -> Any:
        """Return what the processor makes of texts with images, as tensors."""
        from torch.utils.data import get_worker_info

        # tokenizers 0.23: the threads that it had before a fork do not exist in a loader's worker,
        # which would wait for them for ever.
        if get_worker_info() is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return self.processor(images=images, text=texts, padding=True, return_tensors="pt")

    def _check_call(self) -> None:
        """Learn from one call what stands before a text, and that nothing else is done to it."""
        has_texts = getattr(type(self.processor), "replace_image_token", None) is not None
        if not self.placeholder or not has_texts:
            raise self._unsupported("it has no text for an image")
        try:
            size = {"height": 64, "width": 64}
            inputs = self._call([[_blank_image(64, 64)]], [self.placeholder])
            expected = self.encode_image(size)
        except NotImplementedError as error:
            raise self._unsupported("it has no text for an image") from error
        # Settings that do not fit raise whatever they lead to in a class of transformers.
        except Exception as error:
            raise self._unsupported(f"its own call fails: {error}") from error
        ids = inputs["input_ids"][0].tolist()
        prefix = len(ids) - len(expected)
        if prefix < 0 or ids[prefix:] != expected:
            raise self._unsupported("it does more to a text than to replace the token of an image")
        self.prefix_ids = ids[:prefix]
        names = [name for name in _TOKEN_TYPES if name in inputs and self._takes(name)]
        self._token_types = names[0] if names else None
        for name, types in self.token_type_inputs(inputs["input_ids"]).items():
            if not types.equal(inputs[name]):
                raise self._unsupported(f"its {name} depend on more than the ids")

    def _unsupported(self, reason: str) -> UserError:
        return UserError(
            f"model.path={self.model.path}: images cannot train with "
            f"{type(self.processor).__name__}: {reason}.\n{_UNSUPPORTED}"
        )

    def _expand_size(self, height: int, width: int) -> str:
        if self._sizes is None:
            self._sizes = self._check_arithmetic()
        if self._sizes is False:
            return _replacement(self.processor, _blank_image(height, width))
        return _replacement(self._sizes, _blank_pixels(height, width))

    def _check_arithmetic(self) -> Any:
        """Return the processor without pixels; False where its texts are not the processor's."""
        texts = {size: _replacement(self.processor, _blank_image(*size)) for size in _CHECKED_SIZES}
        for processor in _without_pixels(self.processor):
            # Whatever a class does to an image beside the usual steps may fail without pixels.
            with suppress(Exception):
                if all(
                    _replacement(processor, _blank_pixels(*size)) == text
                    for size, text in texts.items()
                ):
                    return processor
        return False


def find_vision_processor(model: ModelConfig) -> VisionProcessor | None:
    """Return the processor of a model that reads images; None for a model of text alone.

    Raises UserError where it cannot be had, or is none that luthier can train images with.
    """
    from transformers import AutoConfig

    if not source.needs_hub(model.path) and source.local_folder(model) is None:
        return None
    hub = _hub_arguments(model)
    config = AutoConfig.from_pretrained(model.path, **hub)
    if not has_other_inputs(config) or getattr(config, "vision_config", None) is None:
        return None
    try:
        processor = _load_processor(model, config)
    except UserError:
        raise
    except Exception as error:  # files of any age, written by any version
        problem = source.explain_hub_error(error, model.path, "model.path")
        raise problem or UserError(
            f"model.path={model.path}: its processor cannot be loaded, so no image can be read: "
            f"{error}"
        ) from error
    if not hasattr(processor, "image_processor"):
        raise UserError(
            f"model.path={model.path} reads images, and the files of its image processor "
            "(preprocessor_config.json or processor_config.json) are missing. Copy them from the "
            "model's repository into its folder."
        )
    if model.processor:
        processor.image_processor = _change_settings(processor.image_processor, model)
    processor.tokenizer = load_tokenizer(model)
    model_class = resolve_model_class(config, "CAUSAL_LM", model.trust_remote_code)
    return VisionProcessor(model, processor, config, model_class)


def _change_settings(image_processor: Any, model: ModelConfig) -> Any:
    """Return an image processor with the settings of `model.processor`.

    Raises UserError for a setting that its class does not have, or a value that it does not take.
    """
    image_class = type(image_processor)
    names = image_class.valid_kwargs.__annotations__
    for name in model.processor:
        if name not in names:
            near = nearest_option(name, names)
            hint = f" Did you mean model.processor.{near}?" if near else ""
            raise UserError(
                f"model.processor.{name}: is not a setting of transformers.{image_class.__name__}."
                f"{hint} It has: {', '.join(sorted(names))}."
            )
    try:
        return image_class(**merge_settings(image_processor.to_dict(), model.processor))
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"model.processor: transformers.{image_class.__name__} does not take it: {error}"
        ) from error


def _hub_arguments(model: ModelConfig) -> dict[str, Any]:
    return {
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "local_files_only": source.needs_hub(model.path) and source.is_hub_unreachable(),
    }


def _load_processor(model: ModelConfig, config: Any) -> Any:
    """Return the model's processor, without a video processor where torchvision is missing."""
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    hub = _hub_arguments(model)
    try:
        return AutoProcessor.from_pretrained(model.path, **hub)
    except ImportError:
        if is_torchvision_available():
            raise
    # transformers 5.23 has video processors with torchvision alone, and makes no processor that
    # names one without it, though images need it nowhere.
    processor_class = _find_processor_class(model, config)
    names = [name for name in processor_class.get_attributes() if "video" not in name]
    reader: Any = _derive(processor_class, get_attributes=classmethod(lambda cls: names))

    def load_arguments(cls: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Return what the constructor takes, None for a video processor."""
        loaded = dict(
            zip(names, reader._get_arguments_from_pretrained(*args, **kwargs), strict=True)
        )
        return [loaded.get(name) for name in processor_class.get_attributes()]

    def check_class(self: Any, name: str, argument: Any) -> Any:
        """Check the class of all that was loaded."""
        if argument is None:
            return None
        return processor_class.check_argument_for_proper_class(self, name, argument)

    reduced: Any = _derive(
        processor_class,
        _get_arguments_from_pretrained=classmethod(load_arguments),
        check_argument_for_proper_class=check_class,
    )
    processor = reduced.from_pretrained(model.path, **hub)
    processor.__class__ = processor_class
    return processor


def _derive(base: Any, **members: Any) -> Any:
    """Return a class of the same name with other members."""
    return type(base.__name__, (base,), {"__module__": base.__module__, **members})


def _find_processor_class(model: ModelConfig, config: Any) -> Any:
    """Return the processor's class that a model's files name, or else that of its type."""
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.models.auto.processing_auto import (
        PROCESSOR_MAPPING,
        processor_class_from_name,
    )

    hub = _hub_arguments(model)
    content, _ = ImageProcessingMixin.get_image_processor_dict(model.path, **hub)
    name = content.get("processor_class")
    named = processor_class_from_name(name) if name else None
    return named or PROCESSOR_MAPPING[type(config)]


def _named_inputs(model_class: Any) -> frozenset[str] | None:
    """Return the inputs of a model class by name; None for an `Auto` class, which names none."""
    forward = getattr(model_class, "forward", None)
    return None if forward is None else frozenset(inspect.signature(forward).parameters)


def _rope_index_method(config: Any) -> Any:
    """Return the model's `get_rope_index`, which needs no weights; None where it has none."""
    from transformers import AutoModel

    mapping: Any = AutoModel._model_mapping
    base_class: Any = mapping.get(type(config), None)
    if isinstance(base_class, tuple):
        base_class = base_class[0]
    if not hasattr(base_class, "get_rope_index"):
        return None
    # A model without modules: the method reads the config alone.
    model: Any = object.__new__(base_class)
    model.__dict__["config"] = config
    return model.get_rope_index


def _replacement(processor: Any, image: Any) -> str:
    """Return the text that a processor writes for an image."""
    # What the processor's own call does between its arguments and the tokenizer.
    settings = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs)
    _, texts = processor._process_images([[image]], **settings["images_kwargs"])
    return str(texts[0])


def _with_blank_image(part: Any) -> Any:
    if not is_image_part(part):
        return part
    return {**part, "image": _blank_image(part["image"]["height"], part["image"]["width"])}


def _blank_image(height: int, width: int) -> Any:
    from PIL import Image

    return Image.new("RGB", (width, height))


def _blank_pixels(height: int, width: int) -> Any:
    """Return a black image of shape (3, height, width) that takes no memory."""
    import numpy as np

    return np.broadcast_to(np.uint8(0), (3, height, width))


def _without_pixels(processor: Any) -> Iterator[Any]:
    """Yield copies of a processor whose images have sizes alone; none of torchvision's.

    The first one leaves out what most classes do behind the arithmetic, too. The added class comes
    before the base class of transformers in the order of methods, so the arithmetic of the
    processor's own class runs, and nothing is computed for a pixel.
    """
    from transformers.image_processing_backends import PilBackend

    image_processor = processor.image_processor
    if not isinstance(image_processor, PilBackend):
        return

    class SizeBackend(PilBackend):
        """Has the steps of transformers' PIL backend, on arrays that hold nothing."""

        def process_image(self, image: Any, *args: Any, **kwargs: Any) -> Any:
            return image

        def resize(self, image: Any, size: Any, *args: Any, **kwargs: Any) -> Any:
            height, width = _resized(image, size)
            # CLIP's shortest edge of 336 makes 13 GB of a line of 40,000 pixels, and crops it then.
            if height * width > MAX_IMAGE_PIXELS:
                raise ValueError(
                    f"it would be resized to {width} x {height} pixels, more than "
                    f"{MAX_IMAGE_PIXELS:,}"
                )
            return _blank_pixels(height, width)

        def rescale(self, image: Any, *args: Any, **kwargs: Any) -> Any:
            return image

        def normalize(self, image: Any, *args: Any, **kwargs: Any) -> Any:
            return image

    class GridBackend:
        """Leaves out what classes do with the pixels of images whose sizes are known."""

        def patchify(self, image: Any, patch_size: int, **kwargs: Any) -> Any:
            height, width = image.shape[-2:]
            return image[:, :0, 0], height // patch_size, width // patch_size

    own_class = type(image_processor)
    for bases in ((GridBackend, own_class, SizeBackend), (own_class, SizeBackend)):
        sized = copy.copy(image_processor)
        sized.__class__ = type(own_class.__name__, bases, {})
        sized.do_pad = sized.do_pad and bases[0] is not GridBackend
        sized_processor = copy.copy(processor)
        sized_processor.image_processor = sized
        yield sized_processor


def _resized(image: Any, size: Any) -> tuple[int, int]:
    """Return the height and width that transformers' PIL backend (5.23) resizes an image to."""
    from transformers.image_transforms import (
        get_resize_output_image_size,
        get_size_with_aspect_ratio,
    )
    from transformers.image_utils import get_image_size_for_max_height_width

    shape = image.shape[-2:]
    if size.shortest_edge and size.longest_edge:
        return get_size_with_aspect_ratio(shape, size.shortest_edge, size.longest_edge)
    if size.shortest_edge:
        edge: Any = size.shortest_edge
        return get_resize_output_image_size(
            image, size=edge, default_to_square=False, input_data_format="channels_first"
        )
    if size.max_height and size.max_width:
        return get_image_size_for_max_height_width(shape, size.max_height, size.max_width)
    return size.height, size.width
