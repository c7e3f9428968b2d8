"""What differs between devices in one training step, so that a step of one can be tried on any.

Tensors without content look like a CPU's everywhere, because torch cannot differentiate through
those of a device that it was not built for. So where kernels of a GPU keep other tensors than a
CPU's, the stand-ins here make what the GPU's would make.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

BLOCK_BYTES = {"cuda": 512, "cpu": 64, "mps": 256}
"""Bytes that allocators round up to."""
_FLASH_ALIGN, _MASK_ALIGN = 32, 16


@contextmanager
def device_kernels(kind: str, flash: bool = False) -> Iterator[None]:
    """Compute as a device of this kind would: cuda, or else the CPU.

    `flash`: attention by flash-attention's own kernels, which need no mask.
    """
    from transformers import masking_utils
    from transformers.integrations import moe

    with ExitStack() as stack:
        # Products of experts: torch's own without values takes 16 bits alone, the other any format.
        stack.enter_context(patch.object(moe, "_can_use_grouped_mm", _none))
        # Whether rows hold several documents cannot be seen in positions without values.
        stack.enter_context(patch.object(masking_utils, "find_packed_sequence_indices", _none))
        if kind == "cuda":
            _on_gpu(stack, flash)
        yield


def _on_gpu(stack: ExitStack, flash: bool) -> None:
    import bitsandbytes.autograd._functions as bnb
    from trl.kernels import chunked_logprob

    # TRL: one Triton kernel works on a tile of logits in place, and products add up in float32.
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        stack.enter_context(patch.object(chunked_logprob, name, _none))
    # bitsandbytes: products in 8 bits, for which a CPU unpacks the weights.
    stack.enter_context(patch.object(bnb, "MatMul8bitFp", bnb.MatMul8bitLt))
    kernel = _without_mask if flash else cuda_attention
    stack.enter_context(patch.object(torch.nn.functional, "scaled_dot_product_attention", kernel))


def cuda_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's attention by the kernel that CUDA takes: flash without a mask, else efficient.

    A mask of truth values becomes one of numbers, which is kept for the backward. Shapes as in
    `torch.nn.functional.scaled_dot_product_attention`.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    size, half = query.shape[-1], query.dtype != torch.float32
    if attn_mask is None and half and value.shape[-1] == size <= 256:
        return _flash(query, key, value, dropout_p, is_causal, scale)
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    mask = None if attn_mask is None else _mask_of_numbers(attn_mask, query)
    made: tuple[torch.Tensor, ...] = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, True, dropout_p, is_causal, scale=scale
    )
    return made[0]


def scratch_counter(kind: str) -> Any:
    """Return what tells the bytes that operators need inside, beyond what they return."""

    def needed(func: Any, args: tuple[Any, ...], made: Any) -> int:
        find = _SCRATCH.get(func._opname)
        return 0 if find is None else find(kind, args, made)

    return needed


def _none(*_: Any, **__: Any) -> None:
    """Stand in for what makes no tensor."""


def _without_mask(query: torch.Tensor, *others: Any, **settings: Any) -> torch.Tensor:
    settings |= {"attn_mask": None, "is_causal": True}
    return cuda_attention(query, *others[:2], **settings)


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    missing = -query.shape[-1] % 8
    if missing:
        pad = torch.nn.functional.pad
        query, key, value = (pad(part, (0, missing)) for part in (query, key, value))
    made: tuple[torch.Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout, is_causal, False, scale=scale
    )
    return made[0][..., : made[0].shape[-1] - missing]


def _mask_of_numbers(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, 0.0)
    missing = -mask.shape[-1] % _MASK_ALIGN
    if missing:
        mask = torch.nn.functional.pad(mask, (0, missing))[..., : mask.shape[-1]]
    rows, heads, length = query.shape[0], query.shape[1], query.shape[2]
    return mask.expand(rows, heads, length, mask.shape[-1])


def _unpacked(kind: str, args: tuple[Any, ...], made: Any) -> int:
    """4-bit weights are unpacked for a product, scales first."""
    shape, absmax = args[2], args[3]
    elements = shape[0] * shape[1]
    return int(elements * args[0].itemsize + absmax.numel() * absmax.itemsize)


def _flash_backward(kind: str, args: tuple[Any, ...], made: Any) -> int:
    """Gradients of the queries add up in float32; those of shared keys are made for each head."""
    if kind != "cuda":
        return 0
    query, key = args[1], args[2]
    rows, heads, length, size = query.shape
    wide = -(-size // _FLASH_ALIGN) * _FLASH_ALIGN
    long = -(-length // 128) * 128
    sums = rows * heads * long * (wide + 1) * 4
    shared = 2 * query.numel() * query.itemsize if key.shape[1] != heads else 0
    return int(sums + shared)


def _efficient_backward(kind: str, args: tuple[Any, ...], made: Any) -> int:
    query = args[1]
    return int(query.numel() * 4)


def _int8_product(kind: str, args: tuple[Any, ...], made: Any) -> int:
    """Products of 8-bit numbers are whole numbers of 32 bits at first."""
    return int(args[0].shape[0] * args[1].shape[0] * 4)


_SCRATCH = {
    "gemm_4bit": _unpacked,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "int8_scaled_mm": _int8_product,
}
