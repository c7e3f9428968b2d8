"""LoRA beside the weights of experts: x W + s (x L) R, where peft 0.21 adds s L R to W first.

The sum would be rounded to the format of W, so that small changes are lost in 16 bits; it would
be made for all experts in each forward, and be kept for the backward. `ExpertsLora` is peft's layer
for a parameter, with peft's names and saved weights. Within its forward the module of the experts
reads a `FactoredWeight` in place of the parameter, which stands for the sum in products.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora.layer import ParamWrapper
from torch.nn.functional import pad

from luthier.model.experts import find_experts
from luthier.model.quantized_experts import QuantizedExperts

if TYPE_CHECKING:
    from torch import Tensor

_PRODUCTS = ("matmul", "__matmul__", "mm", "bmm")
_GROUPED_PRODUCTS = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
"""The names of torch's and transformers' (5.23) functions for rows that are sorted by expert."""
_RANK_MULTIPLE = 8
"""A GPU's grouped products take rows of whole 16 bytes: a smaller rank is filled up with zeros."""
_METADATA = ("shape", "dtype", "device", "ndim", "itemsize", "is_cuda")
_OWN_KERNELS = ("deepgemm", "sonicmoe")
"""Implementations of transformers (5.23) that hand the weights to kernels, which need the sum."""


@dataclass(frozen=True)
class LoraTerm:
    """What one adapter adds to a weight of the shape [..., rows, columns]: scale * left @ right."""

    left: "Tensor"
    """[..., rows, rank]"""
    right: "Tensor"
    """[..., rank, columns]"""
    scale: float

    def map(self, change: "Callable[[Tensor], Tensor]") -> "LoraTerm":
        """Return the term with a change of both matrices."""
        return LoraTerm(change(self.left), change(self.right), self.scale)


class FactoredWeight:
    """A weight and what adapters add to it, which torch's products multiply by one after the other.

    It is no tensor: torch hands it to `__torch_function__`, and a kernel that knows tensors alone
    refuses it. What is no product of matrices is computed with the sum, in the weight's format.
    """

    def __init__(self, weight: "Tensor", terms: list[LoraTerm]) -> None:
        """Take a weight with two axes or three (one matrix for each expert), and its terms."""
        self.weight = weight
        self.terms = terms

    def __getattr__(self, name: str) -> Any:
        """Return what is the same for the sum as for the weight, or an attribute of the sum."""
        if name in _METADATA:
            return getattr(self.weight, name)
        if name.startswith("_") or name == "data_ptr":
            raise AttributeError(name)
        return getattr(self.sum(), name)

    def __getitem__(self, index: Any) -> Any:
        """Return the weight of an expert, by its number, or of several, by a tensor of numbers."""
        is_number = isinstance(index, int | torch.Tensor)
        if not is_number or self.weight.ndim != 3 or getattr(index, "dtype", None) == torch.bool:
            return self.sum()[index]
        return FactoredWeight(self.weight[index], [t.map(lambda m: m[index]) for t in self.terms])

    def transpose(self, first: int, second: int) -> Any:
        """Return the weight with two axes in each other's place."""
        axes, count = {first % self.weight.ndim, second % self.weight.ndim}, self.weight.ndim
        if axes != {count - 2, count - 1}:
            return self.sum().transpose(first, second)
        terms = [LoraTerm(t.right.mT, t.left.mT, t.scale) for t in self.terms]
        return FactoredWeight(self.weight.mT, terms)

    def float(self) -> "FactoredWeight":
        """Return the weight in float32."""
        return FactoredWeight(self.weight.float(), [t.map(torch.Tensor.float) for t in self.terms])

    def sum(self) -> "Tensor":
        """Return the weight with all that is added to it, in its number format."""
        total = self.weight
        # Autocast would round the sum to its own format.
        with torch.autocast(total.device.type, enabled=False):
            for term in self.terms:
                left, right = term.left.to(total.dtype), term.right.to(total.dtype)
                add: Any = torch.baddbmm if total.ndim == 3 else torch.addmm
                total = add(total, left, right, alpha=term.scale)
        return total

    @classmethod
    def __torch_function__(
        cls, function: Any, _: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute one of torch's functions that was called with such a weight."""
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        factors = [isinstance(value, cls) for value in args]
        if factors == [False, True] and name in _PRODUCTS:
            return args[1]._multiply(args[0], function)
        if factors == [False, True] and name in _GROUPED_PRODUCTS:
            return args[1]._multiply_groups(args[0], function, kwargs)
        if factors == [True, False] and name == "bmm":
            return args[0].transpose(1, 2)._multiply(args[1].mT, function).mT
        if factors[:2] == [False, True] and name == "linear":
            bias = kwargs.get("bias", args[2] if len(args) > 2 else None)
            return args[1]._multiply_linear(args[0], function, bias)
        plain = [value.sum() if isinstance(value, cls) else value for value in args]
        named = {key: v.sum() if isinstance(v, cls) else v for key, v in kwargs.items()}
        return function(*plain, **named)

    def _multiply(self, x: "Tensor", product: Any) -> "Tensor":
        """Return x times the sum."""
        output: Tensor = product(x, self.weight)
        for term in self.terms:
            change = product(product(x.to(term.left.dtype), term.left) * term.scale, term.right)
            output = (output + change).to(output.dtype)
        return output

    def _multiply_groups(self, x: "Tensor", product: Any, settings: dict[str, Any]) -> "Tensor":
        """Return each group of the rows of x times the sum of its expert."""
        output: Tensor = product(x, self.weight, **settings)
        offsets = settings["offs"]
        for term in self.terms:
            missing = -term.left.shape[-1] % _RANK_MULTIPLE
            left, right = pad(term.left, (0, missing)), pad(term.right, (0, 0, 0, missing))
            change = product(x.to(left.dtype), left, offs=offsets) * term.scale
            output = (output + product(change, right, offs=offsets)).to(output.dtype)
        return output

    def _multiply_linear(self, x: "Tensor", linear: Any, bias: "Tensor | None") -> "Tensor":
        """Return x times the transposed sum, and a bias."""
        output: Tensor = linear(x, self.weight, bias)
        for term in self.terms:
            change = linear(linear(x.to(term.right.dtype), term.right) * term.scale, term.left)
            output = (output + change).to(output.dtype)
        return output


class ExpertsLora(ParamWrapper):
    """peft's LoRA of one parameter of experts, computed beside it."""

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Have the module read the weight with what the active adapters add to it."""
        terms = [self._make_term(name) for name in active_adapters if name in self.lora_A]
        experts: Any = self.get_base_layer()
        name = self.parameter_name
        if terms and isinstance(experts, QuantizedExperts):
            with experts.adding(name, partial(_put_together, experts, terms)):
                yield
        elif terms and self.get_param().itemsize > 1:
            # A value in the module's own dict hides the parameter of that name.
            attributes = vars(experts)
            hidden = {name: attributes[name]} if name in attributes else {}
            attributes[name] = _put_together(experts, terms, self.get_param())
            try:
                yield
            finally:
                # Activation checkpointing ends a forward by an exception when it has what it needs.
                del attributes[name]
                attributes.update(hidden)
        else:
            with super()._activate_lora(active_adapters):
                yield

    def _make_term(self, adapter: str) -> LoraTerm:
        """Return what an adapter adds; under autocast in its format, else in the adapter's own."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        device = a.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            a, b = a.to(dtype), b.to(dtype)
        # peft 0.21 (`get_delta_factors`): in A the experts follow one another, each with its ranks;
        # in B each rank has the experts next to one another.
        a = a.reshape(self.num_experts, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1).contiguous()
        left, right = (b, a) if self._did_swap_in_out_features else (a.mT, b.mT)
        return LoraTerm(left, right, self.scaling[adapter])


class QuantizedExpertsLora(ExpertsLora):
    """LoRA of one parameter that is packed in 4 bits."""

    def get_param(self) -> "Tensor":
        """Return a tensor with the shape, format and device of the parameter, without values."""
        experts: Any = self.get_base_layer()
        packed = experts._parameters[self.parameter_name]
        state = getattr(packed, "quant_state", None)
        shape, dtype = (packed.shape, packed.dtype) if state is None else (state.shape, state.dtype)
        one = torch.empty((), dtype=experts.compute_dtype or dtype, device=packed.device)
        return one.expand(shape)

    def correct_error(
        self, original: "Tensor", decompose: "Callable[[Tensor, int], tuple[Tensor, Tensor]]"
    ) -> None:
        """Set A and B to what is lost of each expert in 4 bits, as far as their rank goes.

        `original` is the parameter before it was packed; `decompose` gives two matrices of a rank
        for each matrix of a difference.
        """
        experts: Any = self.get_base_layer()
        packed = experts._parameters[self.parameter_name]
        state = packed.quant_state
        dequantized = dequantize_4bit(packed.data, state).reshape(state.shape).float()
        error = original.to(dequantized.device).float() - dequantized
        left, right = decompose(error, self.r["default"])
        scale = self.scaling["default"]
        # The layout of `_make_term`, turned back.
        b, a = (left, right) if self._did_swap_in_out_features else (right.mT, left.mT)
        self.lora_A["default"].weight.data = a.flatten(0, 1).contiguous()
        self.lora_B["default"].weight.data = b.permute(1, 2, 0).flatten(1).contiguous() / scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: what is added to an unpacked copy would be lost."""
        raise NotImplementedError("an adapter cannot be added into experts in 4 bits")


def _put_together(experts: Any, terms: list[LoraTerm], weight: "Tensor") -> Any:
    """Return what a module of experts reads in place of a weight."""
    factored = FactoredWeight(weight, terms)
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    return factored.sum() if implementation in _OWN_KERNELS else factored


def adapt_experts(model: Any) -> Any:
    """Return the model in which peft has put LoRA on experts, so that luthier's layers compute it.

    LoRA on other parameters stays peft's.
    """
    experts = {id(model.get_submodule(group.name)) for group in find_experts(model)}
    for layer in model.modules():
        if type(layer) is ParamWrapper and id(layer.get_base_layer()) in experts:
            is_packed = isinstance(layer.get_base_layer(), QuantizedExperts)
            layer.__class__ = QuantizedExpertsLora if is_packed else ExpertsLora
    return model


def restore_peft_layers(model: Any) -> None:
    """Give a model's LoRA on experts back to peft's layer: peft 0.21 asks for its class by name.

    It does so where a second adapter is put on. `adapt_experts` turns them again.
    """
    for layer in model.modules():
        if isinstance(layer, ExpertsLora):
            layer.__class__ = ParamWrapper
