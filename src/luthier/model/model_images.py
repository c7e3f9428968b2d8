"""What a run's model makes of images in rows: its processor, loaded at the first of them.

Rows of text never need it, so a model whose processor cannot be had, or is none that luthier knows,
still trains on text.
"""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from typing import Any

from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model import source
from luthier.model.load import read_model_config
from luthier.model.processor import find_processor_files
from luthier.model.tokenizer import load_tokenizer
from luthier.model.vision_processor import VisionProcessor, find_vision_processor


class ModelImages:
    """The `luthier.chat.images.ImageExpander` of a model that reads images."""

    placeholder: str
    """The token that a chat template writes for an image part."""
    prefix_ids: list[int]
    """The ids that the processor's own call puts in front of a text."""

    def __init__(self, model: ModelConfig) -> None:
        """Take the model's settings; nothing is loaded yet."""
        self._model = model

    @cached_property
    def processor(self) -> VisionProcessor:
        """The model's processor.

        Raises UserError where it cannot be had, and where luthier cannot train images with it.
        """
        processor = find_vision_processor(self._model)
        if processor is None:
            raise UserError(f"model.path={self._model.path}: the model reads no images.")
        return processor

    def __getattr__(self, name: str) -> Any:
        # Python asks here for attributes that are not there yet.
        if name == "placeholder":
            self.placeholder = self.processor.placeholder
        elif name == "prefix_ids":
            self.prefix_ids = self._find_prefix()
        else:
            raise AttributeError(name)
        return vars(self)[name]

    def _find_prefix(self) -> list[int]:
        """Return the ids in front of a text; no processor is loaded where there can be none."""
        if not load_tokenizer(self._model).num_special_tokens_to_add():
            return []
        try:
            return self.processor.prefix_ids
        except UserError:
            # Rows of text are then what the tokenizer makes of them; an image raises.
            return []

    def expand(self, image: Mapping[str, Any]) -> str:
        """Return the processor's text for an image of this `height` and `width`."""
        return self.processor.expand(image)

    def settings(self) -> dict[str, Any]:
        """Return what decides the texts, for JSON: the processor's files, and who reads them."""
        return {"transformers": version("transformers"), **self.hash_files()}

    def hash_files(self) -> dict[str, str]:
        """Return the SHA-256 of each of the processor's files by its name."""
        files = find_processor_files(self._model)
        return {file.name: hashlib.sha256(file.content).hexdigest() for file in files}

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": self._model}


def find_model_images(model: ModelConfig) -> ModelImages | None:
    """Return what a model makes of images; None for a model that reads none.

    Raises UserError where its config.json cannot be had or read.
    """
    if source.find_gguf_file(model.path) is not None:
        # Files of llama.cpp hold the text part alone.
        return None
    reads_images = getattr(read_model_config(model), "vision_config", None) is not None
    if model.processor and not reads_images:
        raise UserError(
            f"model.processor is for images, and the model {model.path} reads none. Remove it."
        )
    return ModelImages(model) if reads_images else None
