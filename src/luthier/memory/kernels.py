"""Stand-ins for the kernels of a GPU, so that a step on one can be simulated on any machine.

Tensors without content look like a CPU's everywhere, because torch cannot differentiate through
those of a device that it was not built for. So where kernels of a GPU keep other tensors than a
CPU's, the stand-ins here make what the GPU's would make.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import handle_torch_function

BLOCK_BYTES = {"cuda": 512, "cpu": 64, "mps": 256}
"""Bytes that the allocator of each type of device rounds up to."""
_FLASH_ALIGN, _MASK_ALIGN = 32, 16
"""The multiples to which flash-attention pads head sizes, and the efficient kernel masks."""


@contextmanager
def device_kernels(device_type: str, flash: bool = False) -> Iterator[None]:
    """Compute within the block as a device of this type would: cuda, or else the CPU.

    `flash`: attention by flash-attention's own kernels, which need no mask.
    """
    import bitsandbytes.autograd._functions as bnb
    from transformers import masking_utils
    from transformers.integrations import moe
    from trl.kernels import chunked_logprob

    from luthier.model.fused_head import TiledHead

    with ExitStack() as stack:
        # All tiles of the output layer use the same memory, so the first of each loop stands for
        # them: with thousands of tokens and 256,000 logits the others would take seconds.
        for name in ("project", "split"):
            loop = getattr(TiledHead, name)
            stack.enter_context(patch.object(TiledHead, name, _take_first(loop)))
        stack.enter_context(patch.object(moe, "_grouped_mm", grouped_mm))
        # Whether rows hold several documents cannot be seen in positions without values.
        stack.enter_context(
            patch.object(masking_utils, "find_packed_sequence_indices", _make_nothing)
        )
        if device_type == "cuda":
            # TRL: one Triton kernel works on a tile of logits in place, and products add up in
            # float32.
            for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
                stack.enter_context(patch.object(chunked_logprob, name, _make_nothing))
            # bitsandbytes: products in 8 bits, for which a CPU unpacks the weights.
            stack.enter_context(patch.object(bnb, "MatMul8bitFp", bnb.MatMul8bitLt))
            kernel = _attention_without_mask if flash else cuda_attention
            functional = torch.nn.functional
            stack.enter_context(patch.object(functional, "scaled_dot_product_attention", kernel))
        yield


def grouped_mm(x: torch.Tensor, weight: Any, offs: torch.Tensor) -> torch.Tensor:
    """Multiply groups of rows [rows, inputs] by the experts of a weight [experts, inputs, outputs].

    torch's own product takes 16 bits alone where there are no values. That of transformers takes
    all, but makes a gradient of frozen weights, too, which torch's does not.
    """
    if not isinstance(weight, torch.Tensor):
        result: torch.Tensor = handle_torch_function(grouped_mm, (weight,), x, weight, offs=offs)
        return result
    x = x.to(weight.dtype)
    if not weight.requires_grad:
        return x @ weight[0]
    product: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(x, weight, offs=offs)
    return product


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
    """Compute attention by the kernel that CUDA takes: flash without a mask, else efficient.

    A mask of truth values becomes one of numbers, which is kept for the backward. Shapes as in
    `torch.nn.functional.scaled_dot_product_attention`.
    """
    # Autocast does so for torch's own function, which this one stands in for.
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    size, is_half = query.shape[-1], query.dtype != torch.float32
    if attn_mask is None and is_half and value.shape[-1] == size <= 256:
        return _flash_attention(query, key, value, dropout_p, is_causal, scale)
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    mask = None if attn_mask is None else _additive_mask(attn_mask, query)
    outputs: tuple[torch.Tensor, ...] = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, True, dropout_p, is_causal, scale=scale
    )
    return outputs[0]


def scratch_bytes(device_type: str, operator: Any, args: tuple[Any, ...]) -> int:
    """Return the bytes that an operator of torch needs inside, beyond what it returns."""
    count_bytes = _SCRATCH_BYTES.get(operator._opname)
    return 0 if count_bytes is None else count_bytes(device_type, args)


def _take_first(loop: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Return a loop that ends after its first item."""
    return lambda *args: islice(loop(*args), 1)


def _make_nothing(*_: Any, **__: Any) -> None:
    """Stand in for a function that makes no tensor."""


def _attention_without_mask(query: torch.Tensor, *others: Any, **settings: Any) -> torch.Tensor:
    """Compute attention as flash-attention does, which takes documents' lengths for a mask."""
    settings |= {"attn_mask": None, "is_causal": True}
    return cuda_attention(query, *others[:2], **settings)


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Compute attention by flash-attention's kernel, which takes no mask."""
    # torch pads heads of other sizes before it calls the kernel.
    padding = -query.shape[-1] % 8
    if padding:
        pad = torch.nn.functional.pad
        query, key, value = (pad(tensor, (0, padding)) for tensor in (query, key, value))
    outputs: tuple[torch.Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout, is_causal, False, scale=scale
    )
    return outputs[0][..., : outputs[0].shape[-1] - padding]


def _additive_mask(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Return a mask of numbers in the queries' format, for each head, as the kernel takes it."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, 0.0)
    padding = -mask.shape[-1] % _MASK_ALIGN
    if padding:
        mask = torch.nn.functional.pad(mask, (0, padding))[..., : mask.shape[-1]]
    rows, heads, length = query.shape[0], query.shape[1], query.shape[2]
    return mask.expand(rows, heads, length, mask.shape[-1])


def _dequantized_bytes(device_type: str, args: tuple[Any, ...]) -> int:
    """Return the bytes of 4-bit weights that are unpacked for a product, and of their scales."""
    shape, absmax = args[2], args[3]
    return int(shape[0] * shape[1] * args[0].itemsize + absmax.numel() * absmax.itemsize)


def _flash_backward_bytes(device_type: str, args: tuple[Any, ...]) -> int:
    """Return the bytes of flash-attention's backward: none on a CPU.

    Gradients of the queries add up in float32; those of shared keys are made for each head.
    """
    if device_type != "cuda":
        return 0
    query, key = args[1], args[2]
    rows, heads, length, size = query.shape
    padded_size = -(-size // _FLASH_ALIGN) * _FLASH_ALIGN
    padded_length = -(-length // 128) * 128
    sums = rows * heads * padded_length * (padded_size + 1) * 4
    shared = 2 * query.numel() * query.itemsize if key.shape[1] != heads else 0
    return int(sums + shared)


_SCRATCH_BYTES: dict[str, Callable[[str, tuple[Any, ...]], int]] = {
    "gemm_4bit": _dequantized_bytes,
    "_scaled_dot_product_flash_attention_backward": _flash_backward_bytes,
    # The efficient kernel adds the gradients of the queries up in float32.
    "_scaled_dot_product_efficient_attention_backward": lambda _, args: int(args[1].numel() * 4),
    # Products of 8-bit numbers are whole numbers of 32 bits at first.
    "int8_scaled_mm": lambda _, args: int(args[0].shape[0] * args[1].shape[0] * 4),
}
"""Operators -> the bytes that they need on a type of device, by their arguments."""
