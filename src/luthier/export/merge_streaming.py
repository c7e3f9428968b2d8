"""Adapters into a base, tensor by tensor: the model is never in memory whole."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.config.library_settings import QuantizationSettings
from luthier.export.adapter_delta import (
    LoraWeights,
    add_deltas,
    dequantized_as_trained,
    read_adapter,
)
from luthier.export.model_layout import ModelLayout, NeedsMemoryMerge
from luthier.export.weight_files import DTYPES, FLOATS, TensorEntry, WeightFiles, write_weights

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = {torch: ours for ours, torch in DTYPES.items()}
"""torch's names of number formats -> those of safetensors."""


@dataclass(frozen=True)
class MergedTensor:
    """Adapters, the base they go into, and what comes out."""

    base: WeightFiles
    layout: ModelLayout
    adapters: list[LoraWeights]
    names: dict[str, str]
    """A weight's name -> its name in the base's files."""
    quantization: QuantizationSettings
    """How the base is packed before the adapters are added; empty for not at all."""
    planned: list[TensorEntry]
    rows: int | None
    """Rows of the embeddings, where they are more than the base's."""
    untied: bool
    """Whether input and output embeddings come apart."""

    @property
    def size(self) -> int:
        """Bytes of all weights that come out."""
        return sum(entry.size for entry in self.planned)

    @property
    def dtype(self) -> str:
        """Return the number format of most weights, by torch's name."""
        return DTYPES[main_format(self.planned)]

    def weight(self, name: str) -> "Tensor":
        """Return a weight as it comes out, in float32 where it was merged."""
        import torch

        # The files hold a tied matrix once; its second name reads the first one's bytes.
        source = self.layout.tied.get(name, name) if name not in self.names else name
        # The base has no such weight, and the adapter replaces it: a head that was trained anew.
        if source not in self.names:
            change = next(
                adapter.changes[name] for adapter in self.adapters if name in adapter.changes
            )
            return change.on(torch.empty(0))
        value = self.base.read(self.names[source])
        # Counters and position ids are no weights and stay as they are.
        if not value.is_floating_point():
            return value
        layer = name.removesuffix(".weight")
        if self.quantization.is_enabled and layer in self.layout.packed:
            is_turned = layer in self.layout.transposed
            value = dequantized_as_trained(value.float(), self.quantization, is_turned)
        changed = [adapter for adapter in self.adapters if name in adapter.changes]
        if not changed:
            # What no adapter touches is written in its own format, bit by bit as in the base.
            return self._grow_embedding(value, name)
        return add_deltas(self._grow_embedding(value.float(), name), name, self.adapters)

    def write(self, folder: Path) -> Iterable[TensorEntry]:
        """Write the weight files; gives each weight when it is written."""
        return write_weights(folder, self.planned, self.weight)

    def _grow_embedding(self, value: "Tensor", name: str) -> "Tensor":
        """Return an embedding with empty rows for the new tokens; an adapter fills them."""
        import torch

        shape = self.layout.shapes[name]
        if self.rows is None or value.shape[0] == self.rows or not _is_embedding(name, self.layout):
            return value
        return torch.cat([value, value.new_zeros((self.rows - shape[0], *value.shape[1:]))])


def plan_merge(
    base: Path,
    layout: ModelLayout,
    folders: list[tuple[Path, float]],
    quantization: QuantizationSettings,
    dtype: str | None,
) -> MergedTensor:
    """Return what a merge will read and write. `folders`: adapters with their weights.

    Raises NeedsMemoryMerge where it cannot be done tensor by tensor, UserError for damaged files.
    """
    checkpoint = WeightFiles(base)
    adapters = [read_adapter(folder, layout, weight) for folder, weight in folders]
    names = _map_file_names(checkpoint, layout)
    _share_tied_rows(adapters, layout)
    untied = _is_untied(adapters, layout)
    changed_names = {name for adapter in adapters for name in adapter.changes}
    # Of tied weights the first name alone is written, unless the adapters pull the two apart.
    out = [name for name in layout.shapes if name not in layout.tied or untied]
    missing = [
        name
        for name in out
        if layout.tied.get(name, name) not in names and name not in changed_names
    ]
    if missing:
        raise NeedsMemoryMerge(f"the base's files have no {missing[0]}")
    needed = max([0, *(adapter.rows for adapter in adapters)])
    have = layout.shapes[layout.inputs][0]
    rows = needed if needed > have else None
    if rows and len(adapters) > 1:
        # Each adapter numbered its new tokens from the same row on, so the same row means two
        # things.
        raise NeedsMemoryMerge("several adapters with new tokens: their rows cannot be added")
    # Some models keep a few weights in float32 on purpose; `dtype` is for the format of most.
    main = main_format(checkpoint.entries.values())
    formats = {name: _choose_format(name, names, layout, checkpoint, main, dtype) for name in out}
    shapes = {name: layout.shapes[name] for name in out}
    if rows is not None:
        grown = [name for name in out if _is_embedding(name, layout)]
        shapes |= {name: (rows, *shapes[name][1:]) for name in grown}
    planned = [TensorEntry(name, formats[name], shapes[name]) for name in out]
    return MergedTensor(checkpoint, layout, adapters, names, quantization, planned, rows, untied)


def main_format(entries: Iterable[TensorEntry]) -> str:
    """Return the format of most numbers."""
    counts: dict[str, int] = {}
    for entry in entries:
        if entry.dtype in FLOATS:
            counts[entry.dtype] = counts.get(entry.dtype, 0) + math.prod(entry.shape)
    return max(counts, key=lambda name: counts[name]) if counts else "F32"


def _map_file_names(base: WeightFiles, layout: ModelLayout) -> dict[str, str]:
    """Return each weight's name in the files: files of a headless model leave out its prefix."""
    names = {}
    for name in layout.shapes:
        for written in (name, name.removeprefix(layout.prefix)):
            if written in base.entries:
                names[name] = written
                break
    return names


def _choose_format(
    name: str,
    names: dict[str, str],
    layout: ModelLayout,
    base: WeightFiles,
    main: str,
    dtype: str | None,
) -> str:
    """Return the format to write a weight in: its own, or `dtype` where it has the base's."""
    source = names.get(name) or names.get(layout.tied.get(name, name))
    stored_format = main if source is None else base.entries[source].dtype
    return FORMATS[dtype] if dtype is not None and stored_format == main else stored_format


def _is_embedding(name: str, layout: ModelLayout) -> bool:
    """Return whether a weight has a row for each token: the inputs' and an output layer like it."""
    shape = layout.shapes[name]
    head = name.endswith(("lm_head.weight", "embed_out.weight", "lm_head.bias"))
    return name == layout.inputs or (head and shape[0] == layout.shapes[layout.inputs][0])


def _share_tied_rows(adapters: list[LoraWeights], layout: ModelLayout) -> None:
    """Single rows of tied embeddings train as one, and are saved for one name."""
    pairs = {**layout.tied, **{first: name for name, first in layout.tied.items()}}
    for adapter in adapters:
        for name, change in list(adapter.changes.items()):
            if change.rows and name in pairs:
                adapter.changes.setdefault(pairs[name], change)


def _is_untied(adapters: list[LoraWeights], layout: ModelLayout) -> bool:
    """Return whether two names of one matrix are changed in different ways."""
    import torch

    for name, first in layout.tied.items():
        for adapter in adapters:
            pair = adapter.changes.get(name), adapter.changes.get(first)
            # Both lack a change, or _share_tied_rows gave them the same one.
            if pair[0] is pair[1]:
                continue
            if pair[0] is None or pair[1] is None:
                return True
            sides = pair[0].whole, pair[1].whole
            if sides[0] is None or sides[1] is None or not torch.equal(sides[0], sides[1]):
                return True
    return False
