"""Values of what a vision tower computes its shapes from, in a step of tensors without content.

Towers look into their inputs: how many patches each picture has, which tiles are only padding,
where in the ids the images stand. So the inputs of a simulated step have values beside their
shapes, and so has whatever is computed from these alone. Weights have none, and no feature either.
"""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

MOST_NUMBERS = 2**27
"""The numbers of the largest tensor whose values are followed."""
_DYNAMIC = ("nonzero", "masked_select", "unique_dim", "_unique2", "repeat_interleave")
"""Operators of ATen whose result has a shape that depends on values."""


class IndexValues(TorchDispatchMode):
    """Follows the values of some tensors within a FakeTensorMode, which it is entered after."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        """`fake_mode` is the mode that makes the tensors without content."""
        super().__init__()
        self._fake_mode = fake_mode
        self._values = WeakTensorKeyDictionary()

    def make_input(self, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor without content for one with, whose values are followed."""
        with _disable_current_modes():
            fake: torch.Tensor = self._fake_mode.from_tensor(value.detach())
        self._values[fake] = value
        return fake

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator on shapes, and on values where all of its tensors have some."""
        kwargs = kwargs or {}
        name = func._opname
        if name == "_local_scalar_dense" and args[0] in self._values:
            with _disable_current_modes():
                return self._values[args[0]].item()
        if name == "index":
            args = (args[0], [n for index in args[1] for n in self._as_numbers(index)], *args[2:])
        known, result = self._compute(func, args, kwargs)
        # A truth value such as that of `torch.equal` is no tensor.
        if known and (name in _DYNAMIC or isinstance(result, bool)):
            return tree_map(self._make_output, result)
        output = func(*args, **kwargs)
        self._remember(func, args, output, result if known else None)
        return output

    def _compute(self, func: Any, args: Any, kwargs: Any) -> tuple[bool, Any]:
        """Return whether all tensors of an operator have values, and its result of them."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not all(map(self._has_value, tensors)):
            return False, None
        if not tensors and not _is_small_factory(func, args, kwargs):
            return False, None
        args, kwargs = tree_map(self._value_of, (args, kwargs))
        with _disable_current_modes(), torch.no_grad():
            return True, func(*args, **kwargs)

    def _has_value(self, tensor: torch.Tensor) -> bool:
        # What a model makes of Python numbers is no tensor without content yet.
        return tensor in self._values or not isinstance(tensor, FakeTensor)

    def _value_of(self, leaf: Any) -> Any:
        return self._values[leaf] if isinstance(leaf, FakeTensor) else leaf

    def _make_output(self, value: Any) -> Any:
        return self.make_input(value) if isinstance(value, torch.Tensor) else value

    def _as_numbers(self, index: Any) -> list[Any]:
        """Return an index of truth values as the places of its true entries along each axis."""
        if index is None or index.dtype is not torch.bool or index not in self._values:
            return [index]
        with _disable_current_modes():
            places = self._values[index].nonzero().unbind(1)
        return [self.make_input(place) for place in places]

    def _remember(self, func: Any, args: Any, output: Any, result: Any) -> None:
        """Keep the values of an operator's outputs, and forget those that it wrote over."""
        fakes, values = tree_leaves(output), tree_leaves(result)
        for number, fake in enumerate(fakes):
            if not isinstance(fake, torch.Tensor):
                continue
            value = values[number] if result is not None else None
            if isinstance(value, torch.Tensor) and value.numel() <= MOST_NUMBERS:
                self._values[fake] = value
            else:
                self._values.pop(fake, None)
        if result is None and func._schema.is_mutable:
            for argument, fake in zip(func._schema.arguments, args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(fake, torch.Tensor):
                    self._values.pop(fake, None)


def make_tensor(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Make a tensor as `torch.tensor` does, also of a list of tensors without content.

    torch 2.13 looks into the memory of these, and Qwen-VL collects its offsets so.
    """
    if isinstance(data, list):
        data = [each.item() if isinstance(each, torch.Tensor) else each for each in data]
    return _TORCH_TENSOR(data, *args, **kwargs)


_TORCH_TENSOR = torch.tensor


def _is_small_factory(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether an operator without tensors makes values that shapes may depend on."""
    if func._opname in ("empty", "empty_strided", "rand", "randn", "randint"):
        return False
    sizes = args[0] if args and isinstance(args[0], list | tuple) else ()
    numbers = 1
    for size in sizes:
        numbers *= int(size)
    return numbers <= MOST_NUMBERS
