"""Attention of packed rows that computes each document by itself, and no pair of two documents.

transformers keeps packed documents apart by a mask of (tokens, tokens), which costs the square of a
row. Here the mask is a list of where documents begin, and attention computes them one after the
other: on CUDA by torch's own kernel of variable length, elsewhere by torch's usual attention. Rows
that are not packed, and masks of any other form, take the path of `sdpa`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from luthier.model.device import AMPERE, VARLEN_ATTENTION

_UNSUPPORTED = ("softcap", "position_bias")
"""What classes may ask of attention, and kernels of variable length do not have."""


@dataclass(frozen=True, eq=False)
class DocumentSpans:
    """Where the documents of a batch lie, its rows laid end to end."""

    lengths: list[int]
    """The tokens of each document; those of all rows together are the batch."""
    ends: torch.Tensor
    """Shape (documents + 1,), int32, on the device of the batch: 0 and where each ends."""
    window: int | None
    """How many tokens a token attends to, itself among them; None for all before it."""


class DocumentMask(torch.Tensor):
    """An empty mask, shape (rows, 1, 0, 0), that carries the documents of a batch.

    It goes through a model like any other mask, and what is made of it carries them too. A class
    that computes with it fails, because it fits no scores.
    """

    spans: DocumentSpans

    @classmethod
    def of(cls, spans: DocumentSpans, rows: int) -> "DocumentMask":
        """Return the mask of a batch of so many rows."""
        empty = torch.empty(rows, 1, 0, 0, dtype=torch.bool, device=spans.ends.device)
        mask: DocumentMask = empty.as_subclass(cls)
        mask.spans = spans
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch, and hand the documents on to a mask that comes of it."""
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, DocumentMask) and args and isinstance(args[0], DocumentMask):
            result.spans = args[0].spans
        return result


def register_varlen_attention() -> None:
    """Make `varlen` an attention implementation of transformers, for masks and for layers."""
    # Where documents lie depends on values, which torch.compile cannot trace.
    AttentionInterface.register(VARLEN_ATTENTION, torch.compiler.disable(varlen_attention_forward))
    AttentionMaskInterface.register(VARLEN_ATTENTION, torch.compiler.disable(make_document_mask))


def make_document_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return the mask of a batch in transformers' `AttentionMaskInterface`.

    Packed rows of causal documents, with or without a sliding window, get an empty mask that
    carries their `DocumentSpans`; everything else gets the mask of `sdpa`.
    """
    is_packed = (
        attention_mask is None
        and not allow_is_causal_skip
        and not use_vmap
        and "allow_is_bidirectional_skip" not in kwargs
        and q_length == kv_length
        and isinstance(q_offset, int)
        and q_offset == kv_offset == 0
    )
    if is_packed:
        spans = _find_spans(mask_function, (batch_size, q_length), local_size, device)
        if spans is not None:
            return DocumentMask.of(spans, batch_size)
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def _find_spans(
    allows: Callable[..., Any], shape: tuple[int, int], window: int | None, device: Any
) -> DocumentSpans | None:
    """Return the documents that a mask function of transformers allows, or None for other masks.

    The function is asked of some diagonals alone. A token attends to the one before it within its
    document; then to all from the first of its window on, to none before that, and to none behind.
    """
    rows = torch.arange(shape[0], device=device)[:, None]
    at = torch.arange(shape[1], device=device)[None]
    head = torch.zeros_like(at[:, :1])

    def ask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        allowed: torch.Tensor = allows(rows, head, query, key).expand(shape[0], -1)
        return allowed

    begins = torch.ones(shape, dtype=torch.bool, device=device)
    begins[:, 1:] = ~ask(at[:, 1:], at[:, :-1])
    first = torch.where(begins, at, 0).cummax(dim=1).values
    if window is not None:
        first = torch.maximum(first, at - (window - 1))
    before = (first - 1).clamp(min=0)
    is_other = (
        ask(at[:, :-1], at[:, 1:]).any()
        | ~ask(at, first).all()
        | (ask(at, before) & (first > 0)).any()
    )
    # One copy from the device: each would wait for all that runs there.
    flags = torch.cat((begins.flatten(), is_other[None])).cpu()
    if flags[-1]:
        return None
    # The last flag is in the place of the end.
    flags[-1] = True
    ends = flags.nonzero().flatten()
    return DocumentSpans(ends.diff().tolist(), ends.int().to(device), window)


def varlen_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return what attention gives, shape (rows, length, heads, head size), and no weights.

    It is a function of transformers' `AttentionInterface`: queries, keys and values have the shape
    (rows, heads, length, head size), and keys and values may have fewer heads. Raises ValueError
    for what it cannot compute.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError("varlen attention has no attention sinks")
    if not isinstance(attention_mask, DocumentMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    spans = attention_mask.spans
    unsupported = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if unsupported:
        raise ValueError(f"varlen attention has no {unsupported[0]}")
    rows, _, length, head_size = query.shape
    value_size = value.shape[-1]
    if key.shape[2] != length or sum(spans.lengths) != rows * length:
        raise ValueError("varlen attention needs keys and values of the same tokens as the queries")
    # The kernels take heads of one size. The zeros are cut off again.
    if value_size < head_size:
        value = pad(value, (0, head_size - value_size))
    flat = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    scale = head_size**-0.5 if scaling is None else scaling
    if dropout == 0 and value_size <= head_size and _has_kernel(query):
        output = _attend_by_kernel(flat, spans, scale)
    else:
        output = _attend_by_document(flat, spans, scale, dropout)
    return output[..., :value_size].unflatten(0, (rows, length)).contiguous(), None


def _has_kernel(query: torch.Tensor) -> bool:
    """Return whether torch's kernel of variable length computes queries such as these."""
    if not query.is_cuda or query.shape[-1] > 256:
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    return dtype in (torch.bfloat16, torch.float16) and _device_has_kernel(query.device)


@cache
def _device_has_kernel(device: torch.device) -> bool:
    """Return whether torch has the kernel for this GPU: NVIDIA's, from Ampere on."""
    is_nvidia = torch.version.cuda is not None and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device)[0] >= AMPERE


def _attend_by_kernel(
    states: list[torch.Tensor], spans: DocumentSpans, scale: float
) -> torch.Tensor:
    """Attend by FlashAttention as torch brings it; see `_attend_by_document` for the shapes."""
    from torch.nn.attention.varlen import varlen_attn

    # Autocast does not know the kernel, which takes 16 bits alone.
    if torch.is_autocast_enabled("cuda"):
        states = [tensor.to(torch.get_autocast_dtype("cuda")) for tensor in states]
    size = states[0].shape[-1]
    if size % 8:
        states = [pad(tensor, (0, -size % 8)) for tensor in states]
    longest, window = max(spans.lengths), spans.window
    before = -1 if window is None or window >= longest else window - 1
    # A model may be split over several GPUs.
    ends = spans.ends.to(states[0].device)
    output: Any = varlen_attn(
        *states,
        ends,
        ends,
        longest,
        longest,
        scale=scale,
        window_size=(before, 0),
        enable_gqa=states[0].shape[1] != states[1].shape[1],
    )
    return output[..., :size]


def _attend_by_document(
    states: list[torch.Tensor], spans: DocumentSpans, scale: float, dropout: float
) -> torch.Tensor:
    """Attend by torch's usual attention, one document after the other.

    `states` are queries, keys and values of shape (tokens, heads, head size); the result has the
    shape of the queries.
    """
    query, key, value = states
    repeats = query.shape[1] // key.shape[1]
    # On GPUs only flash attention in 16 bits shares heads; other kernels would keep the scores.
    if repeats > 1 and query.device.type != "cpu":
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    settings: dict[str, Any] = {
        "scale": scale,
        "dropout_p": dropout,
        "enable_gqa": query.shape[1] > key.shape[1],
    }
    # The backward of a split is one concatenation; that of slices fills a whole tensor for each.
    documents = zip(*(tensor.split(spans.lengths) for tensor in (query, key, value)), strict=True)
    masks: dict[tuple[int, int], torch.Tensor] = {}
    outputs = []
    for document in documents:
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in document)
        if spans.window is None or query.shape[2] <= spans.window:
            output = scaled_dot_product_attention(query, key, value, is_causal=True, **settings)
        else:
            output = _attend_in_window((query, key, value), spans.window, masks, settings)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def _attend_in_window(
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    window: int,
    masks: dict[tuple[int, int], torch.Tensor],
    settings: dict[str, Any],
) -> torch.Tensor:
    """Attend within a sliding window, in blocks of its size; shapes (1, heads, length, head size).

    `masks` holds the masks of blocks of each size.
    """
    query, key, value = states
    outputs = []
    for start in range(0, query.shape[2], window):
        stop = min(start + window, query.shape[2])
        begin = max(0, start - window + 1)
        size = (stop - start, stop - begin)
        if size not in masks:
            allowed = torch.ones(size, dtype=torch.bool, device=query.device)
            shift = start - begin
            masks[size] = allowed.tril(shift).triu(shift - window + 1)
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, begin:stop],
                value[:, :, begin:stop],
                attn_mask=masks[size],
                **settings,
            )
        )
    return torch.cat(outputs, dim=2)


def use_masks(model: Any) -> list[Any]:
    """Put a model with varlen attention back to masks and `sdpa`; return its changed configs."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    changed = []
    for config in configs:
        if config._attn_implementation == VARLEN_ATTENTION:
            # transformers' own setter would change the towers of a model with images as well.
            config._attn_implementation_internal = "sdpa"
            changed.append(config)
    return changed


@contextmanager
def attention_by_masks(model: Any) -> Iterator[None]:
    """Let a model with varlen attention compute with masks and `sdpa` within the block."""
    changed = use_masks(model)
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation_internal = VARLEN_ATTENTION


def is_varlen(model: Any) -> bool:
    """Return whether the text part of a model has varlen attention."""
    name: str = model.config.get_text_config()._attn_implementation
    return name == VARLEN_ATTENTION
