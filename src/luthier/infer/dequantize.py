"""4-bit layers unpacked for the time of a generation: on a CPU, once instead of once per token."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any


@contextmanager
def dequantized_layers(model: Any) -> Iterator[None]:
    """Let 4-bit layers and experts on a CPU multiply by weights unpacked once, within the block.

    The numbers are those of the layer itself, which unpacks its weights at every call: that is
    small beside a training step and most of the time of a generated token. It takes two bytes per
    weight in bfloat16; where less than twice that is free, and on a GPU, nothing changes.
    """
    layers, experts = _four_bit_on_cpu(model)
    if not layers or not _fits(layers, experts):
        yield
        return
    # On the instance, where it hides the class's method, so that `del` brings that back.
    for layer in layers:
        layer.forward = partial(_forward, layer, _weight(layer))
    try:
        with ExitStack() as stack:
            for module in experts:
                stack.enter_context(module.hold_unpacked())
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


def _four_bit_on_cpu(model: Any) -> tuple[list[Any], list[Any]]:
    """Return the linear layers and the modules of experts that are packed in 4 bits on a CPU."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return [], []
    # Imported only for a 4-bit model: bitsandbytes is optional.
    from bitsandbytes.nn import Linear4bit

    from luthier.model.quantized_experts import QuantizedExperts

    def on_cpu(layer_class: Any) -> list[Any]:
        layers = (layer for layer in model.modules() if isinstance(layer, layer_class))
        return [layer for layer in layers if next(layer.parameters()).device.type == "cpu"]

    return on_cpu(Linear4bit), on_cpu(QuantizedExperts)


def _fits(layers: list[Any], experts: list[Any]) -> bool:
    import psutil

    weights = sum(layer.in_features * layer.out_features for layer in layers)
    weights += sum(module.num_packed_weights for module in experts)
    # Two bytes a weight, and as much again must stay free for the cache and the activations.
    return 2 * weights * 2 < psutil.virtual_memory().available
