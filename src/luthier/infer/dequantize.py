"""4-bit layers unpacked for the time of a generation: on a CPU, once instead of once per token."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def dequantized_layers(model: Any) -> Iterator[None]:
    """Let 4-bit layers on a CPU multiply by weights that are unpacked once, within the block.

    The numbers are those of the layer itself, which unpacks its weights at every call: that is
    small beside a training step and most of the time of a generated token. It takes two bytes per
    weight in bfloat16; where less than twice that is free, and on a GPU, nothing changes.
    """
    layers = _four_bit_on_cpu(model)
    if not layers or not _fits(layers):
        yield
        return
    # On the instance, where it hides the class's method, so that `del` brings that back.
    for layer in layers:
        layer.forward = partial(_forward, layer, _weight(layer))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: Any, weight: Any, x: Any) -> Any:
    from torch.nn.functional import linear

    # As bitsandbytes (0.50) does: it computes in the layer's own format and returns the input's.
    bias = None if layer.bias is None else layer.bias.to(weight.dtype)
    return linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def _weight(layer: Any) -> Any:
    from bitsandbytes.functional import dequantize_4bit

    # The packed weight is flat: its shape and format are in its quantization state.
    state = layer.weight.quant_state
    weight = dequantize_4bit(layer.weight.data, state).to(layer.compute_dtype or state.dtype)
    return weight.reshape(state.shape)


def _four_bit_on_cpu(model: Any) -> list[Any]:
    if not getattr(model, "is_loaded_in_4bit", False):
        return []
    # Imported only for a 4-bit model: bitsandbytes is optional.
    from bitsandbytes.nn import Linear4bit

    return [
        layer
        for layer in model.modules()
        if isinstance(layer, Linear4bit) and layer.weight.device.type == "cpu"
    ]


def _fits(layers: list[Any]) -> bool:
    import psutil

    need = sum(2 * layer.in_features * layer.out_features for layer in layers)
    # Two bytes a weight, and as much again must stay free for the cache and the activations.
    return need * 2 < psutil.virtual_memory().available
