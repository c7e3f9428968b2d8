"""Images beside the tokens of a batch: pixels, grids, and what depends on them.

It runs in the loader's workers, where the pictures are decoded too.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from luthier.data.batching.collators import Batch
from luthier.data.batching.token_rows import TrainingRow
from luthier.data.images.decode import decode_stored_image

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from luthier.data.batching.collators import FlatteningCollator, PackingCollator, PaddingCollator

GRIDS = ("image_grid_thw", "image_grid_hws")
"""Inputs with an entry for each image, from which its positions are counted."""
POSITION_DIRECTIONS = 3
"""Time, height and width."""


class ImageInputs(Protocol):
    """What a model's processor makes of pictures: `model.vision_processor.VisionProcessor`."""

    @property
    def has_own_positions(self) -> bool:
        """Whether images have positions in several directions (M-RoPE)."""
        ...

    @property
    def reserved_ids(self) -> frozenset[int]:
        """The ids of control tokens, those of images among them."""
        ...

    def choose_small_size(self) -> dict[str, int]:
        """Return the `height` and `width` of an image that takes few tokens."""
        ...

    def encode_image(self, image: Mapping[str, Any]) -> list[int]:
        """Return the ids that stand for an image of this `height` and `width`."""
        ...

    def pixel_inputs(self, images: "Sequence[Sequence[Image]]") -> "dict[str, Tensor]":
        """Return the model's inputs for the images of a batch, one sequence a document."""
        ...

    def token_type_inputs(self, input_ids: "Tensor") -> "dict[str, Tensor]":
        """Return what says of each token whether it stands for an image."""
        ...

    def position_ids(self, input_ids: "Tensor", pixels: "Mapping[str, Tensor]") -> "Tensor | None":
        """Return the positions of one document, of shape (directions, tokens)."""
        ...


class ImageCollator:
    """Lays out rows as another collator does, with the images of their documents.

    A batch has what the model's forward takes besides: `pixel_values` and whatever else the
    processor's own call gives for these documents, in their order, and the types of tokens; a
    batch without images has none of these. Packed batches of models with positions in several
    directions (M-RoPE) have `position_ids` of shape (1 + directions, rows, width), those by which
    documents are known first.
    """

    def __init__(
        self, layout: "PaddingCollator | PackingCollator | FlatteningCollator", images: ImageInputs
    ) -> None:
        """`layout` lays out the tokens, `images` makes the inputs of pictures."""
        self.layout = layout
        self.images = images

    @property
    def pad_token_id(self) -> int:
        """The id that fills rows up."""
        return self.layout.pad_token_id

    def __call__(self, rows: Sequence[TrainingRow]) -> Batch:
        """Lay out rows; ValueError where the layout gives one, UserError for a broken image."""
        batch = self.layout(rows)
        documents = [document for row in rows for document in row]
        pictures = [decode_images(document.images) for document in documents]
        pixels = self.images.pixel_inputs(pictures)
        if pixels:
            batch |= pixels | self.images.token_type_inputs(batch["input_ids"])
        if "position_ids" in batch and self.images.has_own_positions:
            counts = list(map(len, pictures))
            batch["position_ids"] = self._position_ids(batch["position_ids"], rows, counts, pixels)
        return batch

    def _position_ids(
        self,
        text_positions: "Tensor",
        rows: Sequence[TrainingRow],
        counts: Sequence[int],
        pixels: "Mapping[str, Tensor]",
    ) -> "Tensor":
        """Return the positions of packed rows, each document's counted from its own beginning.

        `counts` are the images of each document. Padding counts as text does.
        """
        import torch

        # Those of documents without images are the same in every direction.
        positions = text_positions[None].repeat(1 + POSITION_DIRECTIONS, 1, 1)
        is_flat = len(text_positions) != len(rows)
        first = number = start = 0
        for line, row in enumerate(rows):
            start = start if is_flat else 0
            for document in row:
                stop, last = start + len(document.input_ids), first + counts[number]
                if counts[number]:
                    grids = {name: pixels[name][first:last] for name in GRIDS if name in pixels}
                    ids = torch.from_numpy(document.input_ids.astype(np.int64))
                    own = self.images.position_ids(ids, grids)
                    positions[1:, 0 if is_flat else line, start:stop] = own
                start, first, number = stop, last, number + 1
        return positions


def decode_images(files: Sequence[bytes]) -> "list[Image]":
    """Return the pictures of a document or a prompt; UserError for one that cannot be decoded."""
    return list(map(decode_stored_image, files))
