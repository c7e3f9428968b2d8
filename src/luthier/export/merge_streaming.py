"""Adapters into a base, tensor by tensor: the model is never in memory whole.

What comes out has the base's own names, shapes and number formats. Where transformers makes a
weight of several tensors (experts), one expert at a time is read, changed and written back.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.config.library_settings import QuantizationSettings
from luthier.export.adapter_delta import (
    AdapterDelta,
    LoraWeights,
    add_deltas,
    dequantized_as_trained,
    read_adapter,
)
from luthier.export.model_layout import ModelLayout, NeedsMemoryMerge
from luthier.export.weight_conversion import (
    WeightGroup,
    group_tensors,
    is_reversible,
    revert_name,
)
from luthier.export.weight_files import DTYPES, FLOATS, TensorEntry, WeightFiles, write_weights

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = {torch: ours for ours, torch in DTYPES.items()}
"""torch's names of number formats -> those of safetensors."""


@dataclass(frozen=True)
class MergeUnit:
    """Tensors of the base that are read together, changed and written back."""

    group: WeightGroup
    expert: int | None = None
    """The expert whose tensors they are; None for all tensors of the group."""

    @property
    def sources(self) -> dict[str, list[str]]:
        """Return the tensors' names by the pattern of transformers that they have."""
        if self.expert is None:
            return self.group.sources
        return {pattern: [names[self.expert]] for pattern, names in self.group.sources.items()}

    @property
    def names(self) -> list[str]:
        """Return the tensors' names."""
        return [name for names in self.sources.values() for name in names]


@dataclass(frozen=True)
class MergedTensors:
    """Adapters, the base they go into, and what comes out."""

    base: WeightFiles
    layout: ModelLayout
    adapters: list[LoraWeights]
    units: dict[str, MergeUnit]
    """A tensor that changes -> what it is changed with; all others are copied."""
    added: dict[str, str]
    """A tensor that the base's files lack -> the weight of the model that it is."""
    groups: dict[str, WeightGroup]
    """A weight of the model -> the base's tensors that make it."""
    quantization: QuantizationSettings
    """How the base is packed before the adapters are added; empty for not at all."""
    planned: list[TensorEntry]
    rows: int | None
    """Rows of the embeddings, where they are more than the base's."""
    untied: bool
    """Whether input and output embeddings come apart."""
    _ready: "dict[str, Tensor]" = field(default_factory=dict)
    """Tensors that came out with one that was written, and are written next."""

    @property
    def size(self) -> int:
        """Bytes of all weights that come out."""
        return sum(entry.size for entry in self.planned)

    @property
    def dtype(self) -> str:
        """Return the number format of most weights, by torch's name."""
        return DTYPES[main_format(self.planned)]

    def write(self, folder: Path) -> Iterable[TensorEntry]:
        """Write the weight files; gives each weight when it is written."""
        formats = {entry.name: entry.dtype for entry in self.planned}
        return write_weights(folder, self.planned, lambda name: self._make(name, formats))

    def _make(self, name: str, formats: dict[str, str]) -> "Tensor | bytearray":
        """Return a tensor as it comes out, in float32 where it was merged."""
        if name in self._ready:
            return self._ready.pop(name)
        if name in self.added:
            return self._make_added(self.added[name])
        unit = self.units.get(name)
        if unit is None:
            # What nothing touches is written in its own format, bit by bit as in the base.
            unchanged = formats[name] == self.base.entries[name].dtype
            return self.base.read_bytes(name) if unchanged else self.base.read(name)
        self._ready.update(self._merge(unit, formats))
        return self._ready.pop(name)

    def _make_added(self, weight: str) -> "Tensor":
        """Return a weight that has no tensor of its own: a new head, or one that was tied."""
        import torch

        twin = next(
            (name for name in _tied_names(weight, self.layout) if name in self.groups), None
        )
        if twin is None:
            return self._change(weight, torch.empty(0))
        group = self.groups[twin]
        return self._change(weight, group.convert(self._read(MergeUnit(group)))[twin])

    def _merge(self, unit: MergeUnit, formats: dict[str, str]) -> "dict[str, Tensor]":
        tensors = self._read(unit)
        group = unit.group
        if unit.expert is None and self._can_go_by_expert(group):
            self._merge_stacked(unit, tensors, formats)
            merged = tensors
        else:
            weights = group.convert(tensors)
            for name in weights:
                weights[name] = self._change(name, weights[name], unit.expert)
            merged = group.restore(weights)
        return {
            name: value
            for pattern, names in unit.sources.items()
            for name, value in zip(names, merged[pattern], strict=True)
        }

    def _merge_stacked(
        self, unit: MergeUnit, tensors: "dict[str, list[Tensor]]", formats: dict[str, str]
    ) -> None:
        """Change tensors that hold all experts, in place: another copy is of one expert."""
        import torch

        for pattern, names in unit.sources.items():
            dtype = getattr(torch, DTYPES[formats[names[0]]])
            tensors[pattern] = [tensors[pattern][0].to(dtype)]
        for expert in range(self.layout.shapes[unit.group.targets[0]][0]):
            parts = {
                pattern: [values[0][expert : expert + 1]] for pattern, values in tensors.items()
            }
            weights = unit.group.convert(parts)
            for name in weights:
                weights[name] = self._change(name, weights[name], expert)
            for pattern, values in unit.group.restore(weights).items():
                tensors[pattern][0][expert : expert + 1] = values[0]

    def _can_go_by_expert(self, group: WeightGroup) -> bool:
        """Return whether stacked experts may be changed one after another."""
        return (
            group.has_experts_stacked
            and not (self.quantization.is_enabled and self._is_packed(group))
            and any(change.experts for name in group.targets for change, _ in self._changes(name))
        )

    def _is_packed(self, group: WeightGroup) -> bool:
        return not self.layout.packed.isdisjoint(group.targets)

    def _read(self, unit: MergeUnit) -> "dict[str, list[Tensor]]":
        return {
            pattern: [self.base.read(name) for name in names]
            for pattern, names in unit.sources.items()
        }

    def _changes(self, name: str) -> list[tuple[AdapterDelta, float]]:
        return [
            (adapter.changes[name], adapter.weight)
            for adapter in self.adapters
            if name in adapter.changes
        ]

    def _change(self, name: str, value: "Tensor", expert: int | None = None) -> "Tensor":
        """Return a weight of the model, or one expert's part of it, with what becomes of it."""
        import torch

        # Counters and position ids are no weights and stay as they are.
        if not value.is_floating_point():
            return value
        if self.quantization.is_enabled and name in self.layout.packed:
            is_turned = name.removesuffix(".weight") in self.layout.transposed
            value = dequantized_as_trained(value.float(), self.quantization, is_turned)
        changes = self._changes(name)
        if not changes:
            return self._grow_embedding(value, name)
        value = self._grow_embedding(value.float(), name)
        if expert is not None:
            changes = [(change.of_expert(expert), weight) for change, weight in changes]
            return add_deltas(value[0], changes)[None]
        if not any(change.experts for change, _ in changes):
            return add_deltas(value, changes)
        return torch.stack(
            [
                add_deltas(part, [(change.of_expert(n), weight) for change, weight in changes])
                for n, part in enumerate(value)
            ]
        )

    def _grow_embedding(self, value: "Tensor", name: str) -> "Tensor":
        """Return an embedding with empty rows for the new tokens; an adapter fills them."""
        import torch

        if self.rows is None or not _is_embedding(name, self.layout) or len(value) == self.rows:
            return value
        missing = self.rows - self.layout.shapes[name][0]
        return torch.cat([value, value.new_zeros((missing, *value.shape[1:]))])


def plan_merge(
    base: Path,
    layout: ModelLayout,
    folders: list[tuple[Path, float]],
    quantization: QuantizationSettings,
    dtype: str | None,
) -> MergedTensors:
    """Return what a merge will read and write. `folders`: adapters with their weights.

    Raises NeedsMemoryMerge where it cannot be done tensor by tensor, UserError for damaged files.
    """
    checkpoint = WeightFiles(base)
    adapters = [read_adapter(folder, layout, weight) for folder, weight in folders]
    _share_tied_rows(adapters, layout)
    untied = _is_untied(adapters, layout)
    rows = _rows_needed(adapters, layout)
    changed = {name for adapter in adapters for name in adapter.changes}
    if quantization.is_enabled:
        changed |= layout.packed
    if rows is not None:
        changed |= {name for name in layout.shapes if _is_embedding(name, layout)}
    file_shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
    groups = {
        target: group
        for group in group_tensors(file_shapes, layout.model)
        for target in group.targets
    }
    added = _find_added(groups, changed, layout, untied)
    units = _plan_units(groups, changed, layout, quantization, file_shapes)
    planned = _plan_entries(checkpoint, layout, groups, units, added, rows, dtype)
    return MergedTensors(
        checkpoint, layout, adapters, units, added, groups, quantization, planned, rows, untied
    )


def main_format(entries: Iterable[TensorEntry]) -> str:
    """Return the format of most numbers."""
    counts: dict[str, int] = {}
    for entry in entries:
        if entry.dtype in FLOATS:
            counts[entry.dtype] = counts.get(entry.dtype, 0) + math.prod(entry.shape)
    return max(counts, key=lambda name: counts[name]) if counts else "F32"


def _find_added(
    groups: Mapping[str, WeightGroup], changed: set[str], layout: ModelLayout, untied: bool
) -> dict[str, str]:
    """Return the weights that the base's files have no tensor for, by the names they will get."""
    added = {}
    for name in layout.shapes:
        twins = _tied_names(name, layout)
        is_there = name in groups or (not untied and any(twin in groups for twin in twins))
        # Of weights that stay tied the first name alone is written.
        if is_there or (not untied and name in layout.tied):
            continue
        if name not in changed and not any(twin in groups for twin in twins):
            raise NeedsMemoryMerge(f"the base's files have no {name}")
        added[revert_name(name, layout.model)] = name
    return added


def _plan_units(
    groups: Mapping[str, WeightGroup],
    changed: set[str],
    layout: ModelLayout,
    quantization: QuantizationSettings,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, MergeUnit]:
    """Return how each tensor that changes is changed; NeedsMemoryMerge where there is no way."""
    reversible: dict[tuple[str, ...], bool] = {}
    units: dict[str, MergeUnit] = {}
    for name, group in groups.items():
        if name not in changed or group.names[0] in units:
            continue
        # One layer's experts are converted as another's are.
        key = (*group.sources, *map(str, (shapes[source] for source in group.names)))
        if group.conversion is None:
            key = tuple(group.names)
        if not reversible.setdefault(key, is_reversible(group, shapes)):
            raise NeedsMemoryMerge(f"transformers cannot write {name} as the base's files have it")
        # The blocks of a packed parameter run over all experts, so these are rounded together.
        whole = quantization.is_enabled and not layout.packed.isdisjoint(group.targets)
        if group.has_tensor_per_expert and not whole:
            count = len(next(iter(group.sources.values())))
            each = [MergeUnit(group, expert) for expert in range(count)]
        else:
            each = [MergeUnit(group)]
        units |= {source: unit for unit in each for source in unit.names}
    return units


def _plan_entries(
    base: WeightFiles,
    layout: ModelLayout,
    groups: Mapping[str, WeightGroup],
    units: Mapping[str, MergeUnit],
    added: Mapping[str, str],
    rows: int | None,
    dtype: str | None,
) -> list[TensorEntry]:
    """Return the tensors that come out, those that are made together next to one another."""
    # Some models keep a few weights in float32 on purpose; `dtype` is for the format of most.
    main = main_format(base.entries.values())
    used = {name for group in groups.values() for name in group.names}
    # What the model's class has no place for (draft heads, for one) is part of the checkpoint too,
    # unless the class is another one, with a head in place of the base's.
    is_own_class = layout.architecture in (layout.base_architectures or [])
    order: dict[str, None] = {}
    for name in base.entries:
        if name in used or is_own_class:
            together = units[name].names if name in units else [name]
            order |= dict.fromkeys(together)
    planned = []
    for name in [*order, *added]:
        entry = base.entries.get(name)
        weight = added.get(name) or (units[name].group.targets[0] if name in units else "")
        shape = layout.shapes[weight] if entry is None else entry.shape
        if rows is not None and weight and _is_embedding(weight, layout):
            shape = (rows, *shape[1:])
        twin = None if entry else _find_twin(weight, layout, groups)
        entry = base.entries[groups[twin].names[0]] if twin else entry
        stored = main if entry is None else entry.dtype
        form = FORMATS[dtype] if dtype is not None and stored == main else stored
        planned.append(TensorEntry(name, form, shape))
    return planned


def _find_twin(weight: str, layout: ModelLayout, groups: Mapping[str, WeightGroup]) -> str | None:
    """Return the weight in the base's files that this one, which is in none, was tied to."""
    return next((name for name in _tied_names(weight, layout) if name in groups), None)


def _tied_names(name: str, layout: ModelLayout) -> list[str]:
    """Return the other names of a weight's matrix, its first name first."""
    first = layout.tied.get(name, name)
    names = [first, *(other for other, head in layout.tied.items() if head == first)]
    return [other for other in names if other != name]


def _rows_needed(adapters: list[LoraWeights], layout: ModelLayout) -> int | None:
    """Return the rows of the embeddings where the adapters need more than the base has."""
    needed = 0
    for adapter in adapters:
        for name, change in adapter.changes.items():
            if change.whole is not None and _is_embedding(name, layout):
                needed = max(needed, change.whole.shape[0])
            needed = max([needed, *(row + 1 for row in change.rows)])
    if needed <= layout.shapes[layout.inputs][0]:
        return None
    if len(adapters) > 1:
        # Each adapter numbered its new tokens from the same row on, so the same row means two
        # things.
        raise NeedsMemoryMerge("several adapters with new tokens: their rows cannot be added")
    return needed


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
