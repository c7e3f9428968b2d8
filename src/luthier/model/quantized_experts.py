"""Experts packed in 4 bits: the parameters with three axes that bitsandbytes' layers leave out.

A packed parameter keeps its name and is a `Params4bit`, as the weight of a `Linear4bit` is. What
reads it as an attribute gets it unpacked; within the module's forward it is unpacked once, with
what an adapter adds to it, and dropped when the forward ends.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from luthier.model.experts import find_experts

if TYPE_CHECKING:
    from torch import Tensor

_QUANTIZER = "bitsandbytes_4bit"
"""The name by which transformers finds the quantizer of a 4-bit model."""


class QuantizedExperts(torch.nn.Module):
    """What is put before the class of a module whose parameters are packed (`quantize_experts`)."""

    packed_names: tuple[str, ...]
    """The names of the parameters that are packed."""
    compute_dtype: "torch.dtype | None"
    """The number format of products; None for that in which the parameters were before."""
    _unpacked: dict[str, Any] | None = None
    """What the running forward has unpacked, with what adapters add; None outside of a forward."""
    _added: "dict[str, Callable[[Tensor], Any]]"
    """What makes of a parameter the weight with what adapters add to it in the running forward."""
    _held: "dict[str, Tensor] | None" = None
    """What stays unpacked from one forward to the next (`hold_unpacked`)."""

    def forward(self, hidden_states: "Tensor", *args: Any, **kwargs: Any) -> Any:
        """Return what the module's own forward makes of the unpacked parameters, run once."""
        # As a Linear4bit does (bitsandbytes 0.50): it computes in its own format, and returns the
        # input's.
        dtype = hidden_states.dtype
        self._unpacked = {}
        try:
            output = super().forward(hidden_states.to(self.compute_dtype or dtype), *args, **kwargs)
        finally:
            # Activation checkpointing ends a forward by an exception when it has what it needs.
            self._unpacked = None
        return output.to(dtype)

    def dequantize(self, name: str) -> "Tensor":
        """Return a packed parameter unpacked, [experts, rows, columns], in the compute format."""
        packed: Any = self._parameters[name]
        weight: Tensor = dequantize_4bit(packed.data, packed.quant_state)
        # bitsandbytes 0.50 turns what comes of one byte.
        weight = weight.reshape(packed.quant_state.shape)
        return weight.to(self.compute_dtype or weight.dtype)

    @property
    def num_packed_weights(self) -> int:
        """The number of weights that are packed."""
        packed: list[Any] = [self._parameters[name] for name in self.packed_names]
        return sum(prod(parameter.quant_state.shape) for parameter in packed)

    @contextmanager
    def adding(self, name: str, add: "Callable[[Tensor], Any]") -> Iterator[None]:
        """Have the forwards within the block read what `add` makes of the unpacked parameter."""
        self._added[name] = add
        try:
            yield
        finally:
            del self._added[name]

    @contextmanager
    def hold_unpacked(self) -> Iterator[None]:
        """Let the parameters stay unpacked between the forwards of a block that trains nothing.

        They take all their bytes in the compute format.
        """
        self._held = {}
        try:
            yield
        finally:
            self._held = None

    def _read(self, name: str) -> Any:
        """Return a parameter as an attribute of this module: unpacked, in the compute format."""
        parameter: Any = self._parameters[name]
        is_packed = getattr(parameter, "quant_state", None) is not None
        if self._unpacked is None:
            return self.dequantize(name) if is_packed else parameter
        if name not in self._unpacked:
            weight = (
                self._unpack(name)
                if is_packed
                else parameter.to(self.compute_dtype or parameter.dtype)
            )
            add = self._added.get(name)
            self._unpacked[name] = weight if add is None else add(weight)
        return self._unpacked[name]

    def _unpack(self, name: str) -> "Tensor":
        """Return a packed parameter unpacked, the one that is held where one is."""
        if self._held is None or torch.is_grad_enabled():
            return self.dequantize(name)
        if name not in self._held:
            self._held[name] = self.dequantize(name)
        return self._held[name]


@cache
def _quantized_class(plain: Any, names: tuple[str, ...]) -> type:
    """Return a module's class behind `QuantizedExperts`, with its parameters as properties."""
    readers = {name: property(partial(QuantizedExperts._read, name=name)) for name in names}
    return type(f"Quantized{plain.__name__}", (QuantizedExperts, plain), readers)


def quantize_experts(module: Any, names: list[str], settings: Any) -> None:
    """Have parameters of a module packed as soon as they are loaded or moved to a device.

    `settings` is the `BitsAndBytesConfig`; biases keep their number format.
    """
    for name in names:
        module._parameters[name] = Params4bit(
            module._parameters[name].data,
            requires_grad=False,
            compress_statistics=settings.bnb_4bit_use_double_quant,
            quant_type=settings.bnb_4bit_quant_type,
            quant_storage=settings.bnb_4bit_quant_storage,
        )
    plain: Any = type(module)
    module.__class__ = _quantized_class(plain, tuple(module._parameters))
    module.packed_names = tuple(names)
    module.compute_dtype = settings.bnb_4bit_compute_dtype
    module._added = {}


def find_packed_experts(model: Any) -> list[str]:
    """Return the names of the parameters of experts that are packed, or will be while loading."""
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, QuantizedExperts)
        for key in module.packed_names
    ]


# Loading: each parameter is packed when its tensors have been read, before the next one is.


@contextmanager
def pack_experts() -> Iterator[None]:
    """Let transformers pack experts, too, where it loads a model in 4 bits within the block.

    transformers 5.23 packs linear layers alone: the experts of a mixture, which are most of its
    weights, stay in 16 bits without a word.
    """
    before = AUTO_QUANTIZER_MAPPING[_QUANTIZER]
    AUTO_QUANTIZER_MAPPING[_QUANTIZER] = ExpertsQuantizer
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING[_QUANTIZER] = before


class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """transformers' quantizer for 4 bits, which packs experts as well as linear layers."""

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any, **kwargs: Any
    ) -> None:
        experts = [] if self.pre_quantized else find_experts(model)
        if not self.pre_quantized:
            _plain_falcon_layers(model)
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        for group in experts:
            if should_convert_module(group.name, self.modules_to_not_convert):
                module = model.get_submodule(group.name)
                quantize_experts(module, list(group.shapes), self.quantization_config)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter is packed when it is loaded."""
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, QuantizedExperts):
            return isinstance(module._parameters.get(name), Params4bit)
        return super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> Any:
        """Return the operation that packs what was loaded."""
        return _ExpertsQuantize(self)


def _plain_falcon_layers(model: Any) -> None:
    """Make Falcon's linear layers torch's own, which compute the same.

    transformers 5.23 passes without a word over other classes than that, and packed nothing.
    """
    for layer in model.modules():
        if type(layer).__name__ == "FalconLinear":
            layer.__class__ = torch.nn.Linear


class _ExpertsQuantize(Bnb4bitQuantize):
    """Packs what was loaded: experts here, linear layers as transformers does."""

    def convert(self, input_dict: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Return the packed parameters by name."""
        packed: dict[str, Any] = {}
        others = {}
        for full_name, values in input_dict.items():
            module, name = get_module_from_name(model, full_name)
            if not isinstance(module, QuantizedExperts):
                others[full_name] = values
                continue
            value = values[0] if isinstance(values, list) else values
            template: Any = module._parameters[name]
            packed[full_name] = Params4bit(value, requires_grad=False, **template.__dict__).to(
                value.device
            )
            # Else transformers would draw its parameters anew: it looks for marks on what it reads.
            module._is_hf_initialized = True
        return packed | super().convert(others, model=model, **kwargs)
