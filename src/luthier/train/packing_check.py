"""The proof, on the model itself and before the first step, that packed documents stay apart.

Many model classes tell packed documents apart by their positions; others read positions and still
attend across (OPT, Falcon), count positions through, or carry a state along (Mamba and other
recurrent layers). None of them says so. A few tiny forwards do. Where they show a leak, the model's
layers get documents one by one, and then masks, until a measurement shows none.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from luthier.data.batching.collators import FlatteningCollator, PackingCollator, PaddingCollator
from luthier.data.batching.image_collators import ImageCollator, ImageInputs
from luthier.data.batching.token_rows import Document, TrainingRow
from luthier.data.seeded_random import random_bits
from luthier.errors import UserError
from luthier.model.packing_support import PACKING_ADVICE
from luthier.model.varlen_attention import attention_by_masks, is_varlen, use_masks
from luthier.train.document_masking import PackedDocuments, is_recurrent_layer

PackedLayout = PackingCollator | FlatteningCollator | ImageCollator
"""A layout of packed rows, perhaps with the images of their documents."""
NEIGHBOUR_TOKENS, PROBE_TOKENS = 12, 9
"""Tokens of the document that changes, and of the probe, which must not notice."""
# Rounding between two neighbours. Without int8 layers, `content` was 0 to the last bit on every
# class that keeps documents apart, in bfloat16 too, since the same kernels work on the same shapes;
# the smallest leak that was found was 4e-4, of one short convolution in a tiny random model.
CONTENT_TOLERANCE = 1e-5
# Rounding between two positions: at least this much, or so many times the format's epsilon.
POSITION_TOLERANCE = (1e-2, 32)
# Rounding between two kernels of attention: 2e-6 was the most that was found in float32.
MASK_TOLERANCE = 1e-4
# How many times the rounding between rows of one batch is rounding between documents too.
NOISE_FACTOR = 5


@dataclass(frozen=True)
class DocumentIsolation:
    """How far the logits of a packed document are from what they should be.

    Each is the largest over the document's tokens of the distance between two rows of logits, in
    parts of the length of the second one without its mean.
    """

    content: float
    """Beside the changed neighbour, against beside the first one."""
    position: float
    """At the end of a row against at the beginning of one, and there against in no packed row."""
    content_noise: float
    """The same as `content` for rows of an ordinary batch, which is what rounding does."""
    position_noise: float
    """The same as `position` for a row alone, against in a batch."""
    epsilon: float
    """The distance from 1 to the next number, in the coarser format of logits and embeddings."""
    mask: float = 0.0
    """With varlen attention: in a packed row, against in the same row with a mask."""
    dropped_varlen: str | None = None
    """Why a model that came with varlen attention computes with masks now; None where it does not.
    """
    is_flat: bool = False
    """Whether the model's own kernels keep documents apart in one flat row for each batch."""
    documents: PackedDocuments | None = None
    """What keeps documents apart where the class does not; it must be told of each packed batch."""
    has_leaking_images: bool = False
    """Whether documents of text are apart and those with images are not."""

    @property
    def content_allowed(self) -> float:
        """The largest `content` that may be rounding."""
        return CONTENT_TOLERANCE + NOISE_FACTOR * self.content_noise

    @property
    def position_allowed(self) -> float:
        """The largest `position` that may be rounding."""
        floor, times = POSITION_TOLERANCE
        noise = NOISE_FACTOR * max(self.position_noise, self.content_noise)
        return max(floor, times * self.epsilon) + noise

    @property
    def is_as_by_mask(self) -> bool:
        """Whether varlen attention computes what attention with a mask does, but for rounding."""
        floor = MASK_TOLERANCE + 32 * self.epsilon
        return self.mask <= floor + NOISE_FACTOR * max(self.position_noise, self.content_noise)

    @property
    def holds(self) -> bool:
        """Whether documents are apart; a NaN among the numbers means that they are not."""
        return self.content <= self.content_allowed and self.position <= self.position_allowed


def check_isolation(
    model: Any,
    collator: PackedLayout,
    call: Callable[..., Any] | None = None,
    is_sharded: bool = False,
) -> DocumentIsolation:
    """Show that a document in a packed row gets the logits that it gets alone, and see to it.

    Two documents share rows, in either order; then one of them changes, and the logits of the other
    must not, and must be the same at both places. The bounds come from the same comparison between
    ordinary padded rows, so any number format and quantization is judged by its own rounding.

    Varlen attention must give what a mask gives, or the model is put back to masks, for good.

    A model that passes stays as it is. With varlen attention, flat rows are tried first where
    layers are recurrent. Otherwise its recurrent layers get one document a row, and
    then its attention masks of single documents, and it is measured after each; `documents` of the
    result then must know of every packed batch.

    `call` computes in place of the model where that is wrapped, for several devices say, and
    `is_sharded` says that weights are split over ranks. Weights, modes and random states stay as
    they are. Raises UserError where documents are not apart.
    """
    # Module by module: parts of a model may be frozen in evaluation mode, and `train()` would put
    # all of them into one.
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return _isolate(model, collator, call or model, is_sharded)
    except _NOT_PACKABLE as error:
        raise UserError(
            f"{_describe_model(model)} cannot train packed rows: {error}\n{_ADVICE}"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training


_NOT_PACKABLE = (ValueError, TypeError, NotImplementedError)
"""What model classes and kernels raise for batches that they cannot compute."""


def _isolate(
    model: Any,
    collator: PackedLayout,
    call: Callable[..., Any],
    is_sharded: bool,
) -> DocumentIsolation:
    """Return the measurement of a model that keeps documents apart, by itself or by what is added.

    Raises UserError where nothing helps.
    """
    base = _base_model(model)
    if (flat := _measure_flat_rows(model, collator, call)) is not None:
        return flat
    dropped = None
    first_error: Exception | None = None
    isolation: DocumentIsolation | None = None
    try:
        isolation = _measure_attention(model, collator, call)
        dropped = isolation.dropped_varlen
        if isolation.holds:
            return isolation
        leak = _describe_leak(isolation)
    except _NOT_PACKABLE as error:
        # Kernels that are missing, which layers that compute one document a row do not need.
        first_error, leak = error, str(error)
    documents = PackedDocuments(base, groups_by_length=not is_sharded)
    if documents.separate_recurrent_layers():
        isolation = _measure(model, collator, call, documents)
        if isolation.holds:
            return replace(isolation, documents=documents, dropped_varlen=dropped)
        leak = _describe_leak(isolation)
    elif first_error is not None:
        raise first_error
    if isolation is not None and isolation.has_leaking_images:
        documents.add_image_masks()
        isolation = _measure(model, collator, call, documents)
        if isolation.holds:
            return replace(isolation, documents=documents, dropped_varlen=dropped)
    documents.add_masks()
    for _ in range(2):
        # Classes that make no use of such masks say so by any exception.
        with suppress(Exception):
            isolation = _measure(model, collator, call, documents)
            if isolation.holds and isolation.is_as_by_mask:
                return replace(isolation, documents=documents, dropped_varlen=dropped)
        if not use_masks(base):
            break
        dropped = "the class computes with its masks"
    raise UserError(f"{_describe_model(model)} cannot train packed rows: {leak}.\n{_ADVICE}")


def _measure_flat_rows(
    model: Any, collator: PackedLayout, call: Callable[..., Any]
) -> DocumentIsolation | None:
    """Return the measurement of flat rows where recurrent layers keep their documents apart.

    Kernels of flash-linear-attention and causal-conv1d do, and need no padding behind documents.
    None for models with other attention than varlen, which would compute all pairs of a flat row.
    """
    base = _base_model(model)
    if not is_varlen(base) or not any(map(is_recurrent_layer, base.get_decoder().modules())):
        return None
    # Without the kernels transformers raises, in words of its own.
    with suppress(Exception):
        flat = _change_layout(collator, FlatteningCollator)
        isolation = _measure(model, flat, call)
        if isolation.holds and isolation.is_as_by_mask:
            return replace(isolation, is_flat=True)
    return None


def _measure_attention(
    model: Any, collator: PackedLayout, call: Callable[..., Any]
) -> DocumentIsolation:
    """Measure, and put a model back to masks where varlen attention computes something else."""
    base = _base_model(model)
    if not is_varlen(base):
        return _measure(model, collator, call)
    try:
        isolation = _measure(model, collator, call)
        if isolation.is_as_by_mask:
            return isolation
        reason = f"its logits differ by {isolation.mask:.2g} from those with a mask"
    # A class may compute with masks itself, and a kernel may not be made for this GPU.
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"
    use_masks(base)
    return replace(_measure(model, collator, call), dropped_varlen=reason)


def _measure(
    model: Any,
    collator: PackedLayout,
    call: Callable[..., Any],
    documents: PackedDocuments | None = None,
) -> DocumentIsolation:
    """Return how far the probe's logits move with its neighbour and its position.

    Where batches may have images, documents with one each are measured as well, and the worse of
    two numbers counts.
    """
    vocabulary = model.config.get_text_config().vocab_size
    isolation = _measure_documents(model, collator, call, documents, _sample_documents(vocabulary))
    if not isinstance(collator, ImageCollator):
        return isolation
    samples = _sample_image_documents(vocabulary, collator.images)
    other = _measure_documents(model, collator, call, documents, samples)
    names = ("content", "position", "content_noise", "position_noise", "epsilon", "mask")
    # NumPy's maximum keeps a NaN, which Python's may lose.
    worse: dict[str, Any] = {
        name: float(np.maximum(getattr(isolation, name), getattr(other, name))) for name in names
    }
    return DocumentIsolation(**worse, has_leaking_images=isolation.holds and not other.holds)


def _measure_documents(
    model: Any,
    collator: PackedLayout,
    call: Callable[..., Any],
    documents: PackedDocuments | None,
    samples: tuple[Document, Document, Document],
) -> DocumentIsolation:
    """Return the measurement of two neighbours and a probe."""
    embeddings = model.get_input_embeddings().weight
    device = embeddings.device
    first, second, probe = samples
    packed_as = _change_layout(collator)
    padded_as = _change_layout(collator, PaddingCollator)
    tokens = len(probe.input_ids)

    def logits(layout: Any, *rows: TrainingRow) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of the first and the last tokens of a batch, as many as the probe's."""
        batch = layout(rows)
        if documents is not None:
            expect_batch(documents, batch)
        flat_logits = _logits(call, batch, device).flatten(0, 1)
        return flat_logits[:tokens], flat_logits[-tokens:]

    packed = logits(packed_as, (probe, first), (first, probe))
    changed = logits(packed_as, (probe, second), (second, probe))
    in_batch, _ = logits(padded_as, (probe,), (first,))
    in_other_batch, _ = logits(padded_as, (probe,), (second,))
    alone, _ = logits(padded_as, (probe,))
    mask = 0.0
    if is_varlen(_base_model(model)):
        with attention_by_masks(_base_model(model)):
            masked = logits(packed_as, (probe, first), (first, probe))
        mask = max(_distance(a, b) for a, b in zip(packed, masked, strict=True))
    return DocumentIsolation(
        content=max(_distance(a, b) for a, b in zip(changed, packed, strict=True)),
        position=max(_distance(packed[1], packed[0]), _distance(packed[0], alone)),
        content_noise=_distance(in_other_batch, in_batch),
        position_noise=_distance(alone, in_batch),
        # Some classes (Mamba-2) return float32 logits of what they computed in 16 bits.
        epsilon=max(torch.finfo(dtype).eps for dtype in (alone.dtype, embeddings.dtype)),
        mask=mask,
    )


def expect_batch(documents: PackedDocuments, batch: Mapping[str, Any]) -> None:
    """Tell what keeps documents apart of the batch that is computed next, packed or not."""
    positions: torch.Tensor | None = batch.get("position_ids")
    # With M-RoPE those by which documents are known stand before those in several directions.
    if positions is not None and positions.dim() > 2:
        positions = positions[0]
    documents.expect_batch(positions, batch.get("token_type_ids", batch.get("mm_token_type_ids")))


def _change_layout(collator: Any, layout: Any = None) -> Any:
    """Return a collator for rows of any width, in another layout where one is named."""
    if isinstance(collator, ImageCollator):
        return ImageCollator(_change_layout(collator.layout, layout), collator.images)
    return (layout or type(collator))(collator.pad_token_id)


def _sample_documents(vocabulary: int) -> tuple[Document, Document, Document]:
    """Return two neighbours of one length that differ at every position, and a probe.

    Their tokens are drawn by chance, the same each time.
    """
    drawn = (random_bits(2 * NEIGHBOUR_TOKENS + PROBE_TOKENS, 0) % vocabulary).astype(np.int64)
    first, _, probe = np.split(drawn, [NEIGHBOUR_TOKENS, 2 * NEIGHBOUR_TOKENS])
    second = (first + 1 + vocabulary // 3) % vocabulary
    return Document(first, first), Document(second, second), Document(probe, probe)


IMAGE_PLACES = (3, 3, 5)
"""Tokens before the images of two neighbours and a probe. Places in the document that differ show
masks that look at another document's place."""


def _sample_image_documents(
    vocabulary: int, images: ImageInputs
) -> tuple[Document, Document, Document]:
    """Return two neighbours that differ in every token of text and every pixel, and a probe.

    Each has one image, of a size that takes few tokens.
    """
    size = images.choose_small_size()
    image_ids = np.array(images.encode_image(size))
    plain_ids = np.setdiff1d(np.arange(vocabulary), list(images.reserved_ids))
    documents = []
    samples = zip(_sample_documents(len(plain_ids)), IMAGE_PLACES, strict=True)
    for number, (document, place) in enumerate(samples):
        ids = np.insert(plain_ids[document.input_ids], place, image_ids)
        documents.append(Document(ids, ids, images=(_random_picture(size, number),)))
    first, second, probe = documents
    return first, second, probe


def _random_picture(size: Mapping[str, int], seed: int) -> bytes:
    """Return a PNG whose pixels are drawn by chance, of this `height` and `width`."""
    from PIL import Image

    shape = (size["height"], size["width"], 3)
    pixels = (random_bits(int(np.prod(shape)), seed) >> 56).astype(np.uint8).reshape(shape)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _logits(call: Callable[..., Any], batch: dict[str, Any], device: Any) -> torch.Tensor:
    """Return the logits of a batch, shape (rows, width, vocabulary)."""
    inputs = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name not in ("labels", "tokens")
    }
    logits: torch.Tensor = call(**inputs, use_cache=False).logits
    return logits


def _distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest distance between two rows of logits, as `DocumentIsolation` has it."""
    logits, expected = logits.cpu().double(), expected.cpu().double()
    # Logits mean the same with any number added to all of them, so their mean does not count.
    scale = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return float(((logits - expected).norm(dim=-1) / scale).max())


def _base_model(model: Any) -> Any:
    """Return the model of transformers, without an adapter's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _describe_model(model: Any) -> str:
    base = _base_model(model)
    attention = base.config.get_text_config()._attn_implementation
    return f"trainer.args.packing: {type(base).__name__} with model.attention={attention}"


_ADVICE = (
    f"{PACKING_ADVICE} "
    "Another model.attention, or the kernel packages that the model's warnings name, may help too."
)


def _describe_leak(isolation: DocumentIsolation) -> str:
    subject = "a document with images" if isolation.has_leaking_images else "a document"
    if isolation.content <= isolation.content_allowed:
        return (
            f"the logits of {subject} depend on its place in a packed row: they differ by "
            f"{isolation.position:.2g} ({isolation.position_allowed:.2g} may be rounding), so its "
            "positions are not its own"
        )
    return (
        f"other content in {subject} changes the logits of another by {isolation.content:.2g} "
        f"({isolation.content_allowed:.2g} may be rounding), so documents see each other"
    )
