"""Trained weights in float32 inside a base of 16 bits, whatever peft makes them of.

Under autocast mixed formats fit by themselves, but replies are generated without it.
"""

from functools import partial
from typing import Any

from luthier.errors import UserError


def train_in_float32(model: Any) -> None:
    """Turn every trained weight of a `PeftModel` into float32 and let it stand in its base.

    Raises UserError for a trained bias that no layer can add in float32.
    """
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            # AdaLoRA's divisor: peft's cast of 16-bit weights makes a trained one of it.
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _let_copies_fit(model)
    _let_outputs_fit(model)
    _let_biases_fit(model)


def _let_copies_fit(model: Any) -> None:
    """Trained copies of whole layers convert at their edges."""
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.utils import ModulesToSaveWrapper

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            _convert(wrapper.original_module, wrapper.modules_to_save.values())
        elif isinstance(wrapper, LNTuningLayer):
            _convert(wrapper.base_layer, wrapper.ln_tuning_layers.values())


def _convert(original: Any, copies: Any) -> None:
    outside = next(original.parameters()).dtype
    for layer in copies:
        layer.register_forward_pre_hook(_to_float32)
        layer.register_forward_hook(partial(_to_dtype, outside))


def _to_float32(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if value.is_floating_point() else value for value in inputs)


def _to_dtype(dtype: Any, _layer: Any, _inputs: Any, output: Any) -> Any:
    return output.to(dtype)


def _let_outputs_fit(model: Any) -> None:
    """Several methods (IA3, RoAd, RandLoRA, ...) give float32 where they were given 16 bits."""
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, LoraLayer):
            layer.register_forward_hook(_as_given)


def _as_given(_layer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    given = inputs[0] if inputs else output
    return output.to(given.dtype) if given.is_floating_point() else output


def _let_biases_fit(model: Any) -> None:
    """A trained bias (`lora.bias`) is added outside of a layer that computes in 16 bits.

    bitsandbytes would round it to 16 bits for good, and torch refuses to mix formats.
    """
    import torch

    for name, layer in model.named_modules():
        bias = layer._parameters.get("bias")
        if bias is None or not bias.requires_grad or _agrees(layer, bias):
            continue
        if not isinstance(layer, torch.nn.Linear):
            raise UserError(
                f"lora.bias: the bias of {name} would train in float32 inside a layer of 16 bits, "
                "which only linear layers can do. Use lora.bias=lora_only, or model.dtype=float32."
            )
        layer.forward = partial(_add_bias_outside, layer)


def _agrees(layer: Any, bias: Any) -> bool:
    return layer._parameters["weight"].dtype == bias.dtype


class _WithoutBias:
    """A layer as it is, but for its bias."""

    bias = None

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _add_bias_outside(layer: Any, given: Any) -> Any:
    output = type(layer).forward(_WithoutBias(layer), given)
    return output + layer.bias.to(output.dtype)
