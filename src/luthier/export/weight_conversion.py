"""Which tensors of a checkpoint make which weights of the model, and the way back.

transformers 5 renames and fuses weights while it loads them: `experts.0.gate_proj.weight` and its
like become one `experts.gate_up_proj` (transformers/conversion_mapping.py). Its own operations are
run here on one expert's tensors at a time, or on one weight, so that nothing else is in memory.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightGroup:
    """Tensors of a checkpoint, and the weights of the model that they make together."""

    sources: dict[str, list[str]]
    """Pattern of transformers -> the tensors of that pattern, in their order: one for each expert,
    or a single one."""
    targets: list[str]
    """The model's weights, in the order of the conversion's targets."""
    model: Any
    """The model on torch's meta device: some operations ask for its shapes or its config."""
    conversion: Any = None
    """transformers' `WeightConverter`; None where the tensor is only renamed."""
    operations: list[Any] = field(default_factory=list)
    """The operations of `conversion` as they apply to these shapes."""

    @property
    def names(self) -> list[str]:
        """Return the names of all tensors in the checkpoint."""
        return [name for names in self.sources.values() for name in names]

    @property
    def has_tensor_per_expert(self) -> bool:
        """Return whether each expert has tensors of its own, and the others have no part in it."""
        from transformers.core_model_loading import MergeModulelist

        counts = {len(names) for names in self.sources.values()}
        first = self.operations[0] if self.operations else None
        is_list = isinstance(first, MergeModulelist) and first.dim == 0
        return is_list and len(counts) == 1 and _leave_first_axis(self.operations[1:])

    @property
    def has_experts_stacked(self) -> bool:
        """Return whether the tensors hold all experts along their first axis, each by itself."""
        is_single = all(len(names) == 1 for names in self.sources.values())
        return is_single and _leave_first_axis(self.operations)

    def convert(self, tensors: "Mapping[str, list[Tensor]]") -> "dict[str, Tensor]":
        """Return the model's weights, by name; `tensors` has those of each pattern."""
        if self.conversion is None:
            return {self.targets[0]: next(iter(tensors.values()))[0]}
        patterns = self.conversion.target_patterns
        values = self._run(self.operations, tensors, self.conversion.source_patterns, patterns)
        return {
            target: _only(values[pattern])
            for target, pattern in zip(self.targets, patterns, strict=True)
        }

    def restore(self, weights: "Mapping[str, Tensor]") -> "dict[str, list[Tensor]]":
        """Return the checkpoint's tensors of each pattern out of the model's weights."""
        if self.conversion is None:
            return {pattern: [weights[self.targets[0]]] for pattern in self.sources}
        patterns = self.conversion.source_patterns
        # A pattern may be written as a regular expression, and what the reversed conversion makes
        # has names: transformers cleans them up when a conversion is made.
        reverse = self.conversion.reverse_transform()
        inputs = {
            pattern: [weights[target]]
            for pattern, target in zip(reverse.source_patterns, self.targets, strict=True)
        }
        operations = [operation.reverse_op for operation in reversed(self.operations)]
        values = self._run(operations, inputs, reverse.source_patterns, reverse.target_patterns)
        restored: dict[str, list[Tensor]] = {}
        for pattern, name in zip(patterns, reverse.target_patterns, strict=True):
            if pattern not in self.sources:
                continue
            if "*" in name:
                numbered = (name.replace("*", str(n)) for n in range(len(self.sources[pattern])))
                restored[pattern] = [_only(values[key]) for key in numbered if key in values]
            else:
                restored[pattern] = [_only(values[name])]
        return restored

    def _run(
        self,
        operations: list[Any],
        tensors: "Mapping[str, list[Tensor]]",
        sources: list[str],
        targets: list[str],
    ) -> dict[str, Any]:
        # As WeightConverter.convert (transformers 5.23) runs them; it also needs the tensors of all
        # experts, and gives numbers of its own to what comes out.
        values: dict[str, Any] = dict(tensors)
        for operation in operations:
            values = operation.convert(
                values,
                source_patterns=sources,
                target_patterns=targets,
                full_layer_name=self.targets[0],
                model=self.model,
                config=self.model.config,
                missing_keys=None,
            )
        return values


def group_tensors(shapes: Mapping[str, Shape], model: Any) -> list[WeightGroup]:
    """Return the tensors of a checkpoint in groups, as transformers loads them into `model`.

    `shapes` are those of the checkpoint's tensors, by name; `model` is on torch's meta device. A
    tensor that the model has no place for is in no group.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    weights = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    sources_by_name: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    # In transformers' own order: it is that of the experts, and some renamings wait for others.
    for name in sorted(shapes, key=dot_natural_key):
        renamed, pattern = _rename(name, renamings, converters, model, weights)
        if renamed not in weights:
            continue
        conversion = None if pattern is None else by_pattern[pattern]
        _, sources = sources_by_name.setdefault(renamed, (conversion, {}))
        sources.setdefault(pattern or name, []).append(name)
    return [
        _make_group(first, conversion, sources, shapes, model, weights)
        for first, (conversion, sources) in sources_by_name.items()
    ]


def revert_name(weight: str, model: Any) -> str:
    """Return what a checkpoint calls a weight of the model that it has no tensor for yet.

    It is the model's own name where transformers would not read the reverted one back.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    reverted = apply_renamings(weight, [one.reverse_transform() for one in reversed(renamings)])
    return reverted if apply_renamings(reverted, renamings) == weight else weight


def _rename(
    name: str, renamings: list[Any], converters: list[Any], model: Any, weights: dict[str, Shape]
) -> tuple[str, str | None]:
    """Return the weight that a tensor is (the first part) of, and the pattern that matched."""
    from transformers.core_model_loading import rename_source_key

    prefix = model.base_model_prefix
    renamed, pattern = rename_source_key(name, renamings, converters, prefix, weights)
    if renamed not in weights and name in weights:
        return rename_source_key(name, [], [], prefix, weights)
    return renamed, pattern


def _make_group(
    first: str,
    conversion: Any,
    sources: dict[str, list[str]],
    shapes: Mapping[str, Shape],
    model: Any,
    weights: dict[str, Shape],
) -> WeightGroup:
    if conversion is None:
        return WeightGroup(sources, [first], model)
    pattern, *others = conversion.target_patterns
    targets = [first, *(first.replace(pattern, other, 1) for other in others)]
    source = shapes[next(iter(sources.values()))[0]]
    operations = _settle(conversion.operations, source, weights[first])
    return WeightGroup(sources, targets, model, conversion, operations)


def _settle(operations: list[Any], source: Shape, target: Shape) -> list[Any]:
    """Return operations that ask for no shape.

    transformers' (5.23) `Transpose(check_dims=True)` turns a tensor only where that makes it fit,
    and so turns nothing on the way back: Qwen3-VL-MoE's experts came out of a save in another
    layout than that of its checkpoint.
    """
    from transformers.core_model_loading import Transpose

    settled = []
    for operation in operations:
        if isinstance(operation, Transpose) and operation.check_dims:
            if source == target:
                continue
            operation = Transpose(operation.dim0, operation.dim1)
        settled.append(operation)
    return settled


def _leave_first_axis(operations: list[Any]) -> bool:
    """Return whether each slice along the first axis can go through the operations alone."""
    from transformers.core_model_loading import Chunk, Concatenate, Interleave, Transpose

    axes = []
    for operation in operations:
        if isinstance(operation, Transpose):
            axes += [operation.dim0, operation.dim1]
        elif isinstance(operation, Chunk | Concatenate | Interleave):
            axes.append(operation.dim)
        else:
            return False
    return all(axis > 0 for axis in axes)


def _only(value: Any) -> "Tensor":
    return value[0] if isinstance(value, list) else value


def is_reversible(group: WeightGroup, shapes: Mapping[str, Shape]) -> bool:
    """Return whether `restore` undoes `convert`, tried with numbered entries on one expert."""
    import torch

    if group.conversion is None:
        return len(group.names) == 1
    per_expert, stacked = group.has_tensor_per_expert, group.has_experts_stacked
    tensors: dict[str, list[Tensor]] = {}
    start = 0
    for pattern, names in group.sources.items():
        tensors[pattern] = []
        for name in names[:1] if per_expert else names:
            shape = (1, *shapes[name][1:]) if stacked else shapes[name]
            size = torch.Size(shape).numel()
            tensors[pattern].append(torch.arange(start, start + size).reshape(shape))
            start += size
    try:
        one = copy.copy(tensors)
        restored = group.restore(group.convert(one))
    except (ValueError, KeyError, RuntimeError, NotImplementedError, AttributeError):
        return False
    return all(
        len(restored[pattern]) == len(values)
        and all(torch.equal(a, b) for a, b in zip(restored[pattern], values, strict=True))
        for pattern, values in tensors.items()
    )
