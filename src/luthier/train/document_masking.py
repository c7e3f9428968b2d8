"""Packed documents kept apart in model classes that do not do so by themselves.

Layers that carry a state along (state-space layers, gated linear attention, short convolutions) get
each document as a row of its own. Classes whose attention masks do not look at the positions
(gpt-oss, Falcon, OPT) get masks of single documents. Nothing of it is in the weights or the config.
"""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

_KERNEL_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Where documents lie in a flat row, which layers that get one document a row must not read."""

_CONTAINERS = (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict, BaseTunerLayer)
"""Modules that may hold a convolution and are no layers; adapters are among them."""


class PackedDocuments:
    """Where the documents lie in the batch that a decoder computes, and what keeps them apart.

    `expect_batch` comes before each packed batch, and the backward of a batch before the next one,
    as recomputed activations need its documents, too. A call of the decoder that was not announced
    (generation, padded rows) computes as if nothing had been changed.
    """

    def __init__(self, model: Any, groups_by_length: bool = True) -> None:
        """Watch the decoder of a model of transformers, without wrappers around it.

        `groups_by_length=False` makes each layer compute all documents in one call, however much
        padding that takes: where weights are split over ranks, all must make the same calls.
        """
        self.recurrent_layers = 0
        """How many layers compute one document a row."""
        self.adds_masks = False
        """Whether attention gets masks of single documents."""
        self.adds_image_masks = False
        """Whether batches with images get such masks in layers with a sliding window."""
        self.positions: torch.Tensor | None = None
        """Shape (rows, width), from 0 in each document; None for a batch that is not packed."""
        self._expected: torch.Tensor | None = None
        self._expected_types: torch.Tensor | None = None
        self._groups_by_length = groups_by_length
        self._groups: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self._order: torch.Tensor | None = None
        # transformers 5.23: that of Nemotron 3 Omni has an output layer, and losses call what lies
        # below it.
        self._decoder = model.get_decoder().get_decoder()
        self._decoder.register_forward_pre_hook(self._begin_batch, with_kwargs=True)

    def __str__(self) -> str:
        """Return what keeps documents apart, as a line of the run."""
        done = []
        if self.recurrent_layers:
            layers = f"{self.recurrent_layers} of {self._decoder.config.num_hidden_layers} layers"
            done.append(f"{layers} carry a state and run document by document")
        if self.adds_masks:
            done.append("attention gets masks of single documents")
        if self.adds_image_masks:
            done.append("attention to images gets masks of single documents")
        return "; ".join(done)

    def expect_batch(
        self, positions: torch.Tensor | None, token_types: torch.Tensor | None = None
    ) -> None:
        """Take the `position_ids` of the next batch, shape (rows, width); None for none.

        `token_types`, of the same shape, are 1 where a token stands for an image; None for a batch
        without images.
        """
        self._expected, self._expected_types = positions, token_types

    def separate_recurrent_layers(self) -> int:
        """Make every layer that carries a state compute one document a row; return how many do.

        Those are the layers with a convolution of their own, which is how the recurrent layers of
        transformers begin. The result is that of documents as rows of a batch, with any kernel.
        """
        layers = [module for module in self._decoder.modules() if is_recurrent_layer(module)]
        for layer in layers:
            layer.forward = _DocumentForward(self, layer.forward)
        self.recurrent_layers = len(layers)
        return len(layers)

    def add_masks(self) -> None:
        """Give the decoder masks of single documents, as transformers makes them for its class."""
        self.adds_masks = True

    def add_image_masks(self) -> None:
        """Give layers with a sliding window, in batches with images, masks of single documents.

        In Gemma 3 and 4 the tokens of an image see each other. transformers 5.23 looks the image of
        a token up at its place in the document, so of another document in the same row.
        """
        self.adds_image_masks = True

    def _begin_batch(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the decoder computes: take the announced positions, and add masks."""
        self.positions, self._expected = self._expected, None
        types, self._expected_types = self._expected_types, None
        self._groups = self._order = None
        if self.positions is None:
            return None
        masks: Any = None
        if self.adds_masks:
            masks = self._make_masks(decoder)
        elif self.adds_image_masks and types is not None:
            masks = self._make_image_masks(decoder, types, kwargs.get("attention_mask"))
        return None if masks is None else (args, kwargs | {"attention_mask": masks})

    def _make_masks(self, decoder: Any) -> Any:
        """Return the masks of a decoder for the documents of the batch."""
        from transformers.masking_utils import create_masks_for_generate

        embeddings = self._empty_embeddings(decoder)
        return create_masks_for_generate(
            decoder.config, embeddings, None, None, position_ids=self.positions
        )

    def _make_image_masks(self, decoder: Any, types: torch.Tensor, masks: Any) -> Any:
        """Return a decoder's masks with another one for layers with a sliding window.

        It is that of the class, Gemma's: tokens see what is in the window, before them or of their
        own image. None where the class made no mask for such layers.
        """
        from transformers.masking_utils import (
            and_masks,
            blockwise_overlay,
            create_causal_mask,
            packed_sequence_mask_function,
            sliding_window_overlay,
        )

        if not isinstance(masks, dict) or "sliding_attention" not in masks:
            return None
        assert self.positions is not None
        documents = (self.positions == 0).cumsum(dim=1)
        # Without positions the indices of the functions are those of the batch.
        sliding_mask = create_causal_mask(
            decoder.config,
            self._empty_embeddings(decoder),
            None,
            None,
            or_mask_function=blockwise_overlay(number_images(types)),
            and_mask_function=and_masks(
                packed_sequence_mask_function(documents),
                sliding_window_overlay(decoder.config.sliding_window),
            ),
        )
        return masks | {"sliding_attention": sliding_mask}

    def _empty_embeddings(self, decoder: Any) -> torch.Tensor:
        """Return what is read for its shape, its format and its device alone."""
        assert self.positions is not None
        weight = decoder.get_input_embeddings().weight
        device = self.positions.device
        return torch.empty((*self.positions.shape, 0), dtype=weight.dtype, device=device)

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Return values of shape (rows, width, ...) as batches of documents of like length.

        Each has one document a row, and repeats of a document's last value behind it.
        """
        flat = values.flatten(0, 1)
        return [flat[index] for index, _ in self._group_documents()]

    def join(self, batches: list[torch.Tensor]) -> torch.Tensor:
        """Return what `split` gave, back in its rows and without the repeats."""
        assert self.positions is not None
        groups = self._group_documents()
        pieces = [batch[used] for batch, (_, used) in zip(batches, groups, strict=True)]
        return torch.cat(pieces)[self._order].unflatten(0, tuple(self.positions.shape))

    def _group_documents(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return, for each group of documents, the places of their tokens and which are no repeats.

        A group holds the lengths up to a power of two, so that less than half of it is repeats.
        """
        if self._groups is not None:
            return self._groups
        assert self.positions is not None
        device = self.positions.device
        # Position 0 begins a document, and so does a row.
        begins = self.positions == 0
        begins[:, 0] = True
        starts = begins.flatten().nonzero().flatten().cpu()
        lengths = torch.cat((starts, starts.new_tensor([begins.numel()]))).diff()
        sizes = torch.zeros_like(lengths)
        if self._groups_by_length:
            sizes = torch.tensor([(length - 1).bit_length() for length in lengths.tolist()])
        groups = []
        for size in sizes.unique():
            start, length = starts[sizes == size, None], lengths[sizes == size, None]
            offsets = torch.arange(int(length.max()))
            index = start + torch.minimum(offsets, length - 1)
            groups.append((index.to(device), (offsets < length).to(device)))
        self._groups = groups
        self._order = torch.cat([index[used] for index, used in groups]).argsort()
        return groups


def number_images(token_types: torch.Tensor) -> torch.Tensor:
    """Return the number of the image of each token in its row, -1 for text; shape (rows, width)."""
    is_image = token_types == 1
    begins = is_image.clone()
    begins[:, 1:] &= ~is_image[:, :-1]
    return torch.where(is_image, begins.cumsum(dim=1) - 1, -1)


class _DocumentForward:
    """The forward of a layer that computes one document a row where a batch is packed."""

    def __init__(self, documents: PackedDocuments, forward: Any) -> None:
        self._documents, self._forward = documents, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer; a batch that is not packed as it is."""
        documents, count = self._documents, len(args)
        if documents.positions is None:
            return self._forward(*args, **kwargs)
        shape = documents.positions.shape
        named = {name: kwargs[name] for name in kwargs if name not in _KERNEL_ARGUMENTS}
        values = [*args, *named.values()]
        split = {
            place: documents.split(value)
            for place, value in enumerate(values)
            if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[:2] == shape
        }
        if not split:
            raise ValueError("a recurrent layer gets no values by token")
        results = []
        for group in range(len(next(iter(split.values())))):
            chosen = [
                split[place][group] if place in split else value
                for place, value in enumerate(values)
            ]
            results.append(
                self._forward(*chosen[:count], **dict(zip(named, chosen[count:], strict=True)))
            )
        if not isinstance(results[0], tuple):
            return documents.join(results)
        return tuple(
            documents.join(list(column)) if isinstance(column[0], torch.Tensor) else column[0]
            for column in zip(*results, strict=True)
        )


def is_recurrent_layer(module: torch.nn.Module) -> bool:
    """Tell whether a module is a layer with a convolution over the tokens of a row."""
    if isinstance(module, _CONTAINERS):
        return False
    for child in module.children():
        # An adapter may stand around the convolution.
        base = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
        if isinstance(base, torch.nn.Conv1d):
            return True
    return False
