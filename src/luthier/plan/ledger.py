"""Bytes of tensors as a program makes and drops them, without asking an allocator."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS, GRADIENTS = "weights", "gradients"
Scratch = Callable[[Any, tuple[Any, ...], Any], int]
"""From an operator, its arguments and what it returns to the bytes that it needs meanwhile."""


@dataclass(frozen=True)
class Peak:
    """The moment with the most bytes, weights left out: how many, and of which kind."""

    bytes: int
    kinds: Mapping[str, int]
    """Bytes by the phase in which the tensors were made, and those of gradients in full."""


class Ledger(TorchDispatchMode):
    """Counts the storages that are alive while it is entered.

    Views and tensors changed in place share a storage, which counts once, for as long as anything
    holds it: autograd, a module, autocast's cache. Peaks are kept for several shares of the
    gradients at once, because sharding keeps a part of them on each process.
    """

    def __init__(self, block: int, shares: Iterable[float], scratch: Scratch) -> None:
        """Count in blocks of so many bytes; `scratch` tells what operators need inside."""
        super().__init__()
        self.phase = WEIGHTS
        self.kinds: Counter[str] = Counter()
        self.peaks = {share: Peak(0, {}) for share in shares}
        self._block, self._scratch = block, scratch
        self._alive: dict[int, list[Any]] = {}

    def add(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Count tensors that were made elsewhere, or that turn out to be of another kind."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key not in self._alive:
                self._begin(tensor.untyped_storage(), kind)
                continue
            entry = self._alive[key]
            self.kinds[entry[1]] -= entry[0]
            self.kinds[kind] += entry[0]
            entry[1] = kind

    def bytes(self, kind: str) -> int:
        """Bytes of a kind that are alive now."""
        return self.kinds[kind]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count what it returns."""
        made = func(*args, **(kwargs or {}))
        grown = False
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._alive:
                    self._begin(storage, self.phase)
                    grown = True
        inside = self._scratch(func, args, made)
        if grown or inside:
            self._look(inside)
        return made

    def _begin(self, storage: Any, kind: str) -> None:
        key = storage._cdata
        size = -(-storage.nbytes() // self._block) * self._block
        entry = [size, kind, None]

        def end(_: Any) -> None:
            del self._alive[key]
            self.kinds[entry[1]] -= size

        entry[2] = weakref.ref(storage, end)
        self._alive[key] = entry
        self.kinds[kind] += size

    def _look(self, inside: int) -> None:
        gradients = self.kinds[GRADIENTS]
        rest = self.kinds.total() - self.kinds[WEIGHTS] - gradients + inside
        for share, peak in self.peaks.items():
            now = rest + int(share * gradients)
            if now > peak.bytes:
                kinds = dict(self.kinds)
                kinds[self.phase] = kinds.get(self.phase, 0) + inside
                self.peaks[share] = Peak(now, kinds)
