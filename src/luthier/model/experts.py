"""The experts of a mixture-of-experts model and their routers, found by shape.

transformers 5 keeps the experts of a layer as parameters with three axes, one matrix for each
expert, on a module of no common class. A module of linear layers (one for each expert) holds none
of these and is none here: its experts are linear layers like any other.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

_WRAPPED = (".base_layer", ".original_module")
"""What peft puts behind the name of a module whose parameters it adapts (once for each of them), or
of which it trains a copy."""
_COPY = ".modules_to_save."
_ROUTER = re.compile(r"(^|_)(gate|router)$")
"""The names that routers have in transformers, beside those found by their shape."""

_WHAT_PACKS = (
    "Only quantization=nf4 or fp4 packs experts, of a model that does not come quantized and is "
    "not DBRX."
)


@dataclass(frozen=True)
class Experts:
    """The experts of one layer, or those of its parts that stand in one module."""

    name: str
    """The name of the module within its model."""
    shapes: dict[str, tuple[int, int, int]]
    """The parameters by name, in the module's order; the first axis counts the experts."""
    biases: tuple[str, ...]
    """The parameters with one vector for each expert. No adapter reaches them."""
    is_transposed: bool
    """Whether a matrix stands as [inputs, outputs] (gpt-oss, Llama 4), else [outputs, inputs].

    It is what the module says of itself. Where it says nothing it follows from the shapes; peft
    0.21 assumes [outputs, inputs] there, so that the matrices that it calls A and B change places.
    """

    @property
    def parameter_names(self) -> list[str]:
        """The whole names of the parameters within the model."""
        return [f"{self.name}.{name}" for name in self.shapes]

    @property
    def num_weights(self) -> int:
        """The number of weights in the matrices of all experts."""
        return sum(prod(shape) for shape in self.shapes.values())


def has_experts(config: Mapping[str, Any]) -> bool:
    """Return whether a model's config.json (a mapping, nested as it comes) names experts."""
    return any(count > 1 for count in _expert_counts(config))


def find_experts(model: Any) -> list[Experts]:
    """Return the experts of a model, in its order; the meta device is enough.

    Experts are parameters with three axes directly on a module that is no convolution and has a
    router beside it, in a model whose config counts experts. Empty for a dense model.
    """
    if not has_experts(model.config.to_dict()):
        return []
    modules = dict(model.named_modules())
    candidates = {name: _matrices(module) for name, module in modules.items()}
    candidates = {n: matrices for n, matrices in candidates.items() if matrices and _COPY not in n}
    experts = []
    for name, matrices in candidates.items():
        block = _block_name(name)
        if list(_block_routers(modules, block, candidates)):
            biases = [
                key
                for key, parameter in modules[name].named_parameters(recurse=False)
                if len(_shape(parameter)) == 2
                and _shape(parameter)[0] == next(iter(matrices.values()))[0]
            ]
            transposed = _is_transposed(modules, name, matrices, candidates)
            experts.append(Experts(name, matrices, tuple(biases), transposed))
    return experts


def find_routers(model: Any) -> list[str]:
    """Return the names of the modules that score experts, and of the gates of shared experts.

    Some are linear layers, some (Llama 4, Phi-3.5-MoE) are linear layers that return pairs, and
    some hold a linear layer or a bare weight: whatever is in a module of this list routes.
    """
    experts = {experts.name: experts.shapes for experts in find_experts(model)}
    modules = dict(model.named_modules())
    blocks = dict.fromkeys(_block_name(name) for name in experts)
    routers = [name for block in blocks for name in _block_routers(modules, block, experts)]
    return list(dict.fromkeys(routers))


def find_joined_experts(model: Any) -> dict[str, int]:
    """Return the modules that hold the matrices of all experts one below the other (DBRX).

    By their names, with their number of weights. No adapter for each expert goes on these, and
    `find_experts` does not have them.
    """
    import torch

    if not has_experts(model.config.to_dict()):
        return {}
    joined = {}
    for name, module in model.named_modules():
        if ".experts." not in f"{name}." or ".lora_" in name or _COPY in name:
            continue
        own = list(module.parameters(recurse=False))
        is_layer = isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        if len(own) > 1 and not is_layer and all(len(_shape(weight)) == 2 for weight in own):
            joined[name] = sum(prod(_shape(weight)) for weight in own)
    return joined if not find_experts(model) else {}


def unpacked_expert_bytes(model: Any) -> dict[str, int]:
    """Return the bytes of the experts that are not quantized, by number format (`bfloat16`)."""
    sizes: dict[str, int] = {}
    weights = [
        weight
        for experts in find_experts(model)
        for name, weight in model.get_submodule(experts.name).named_parameters(recurse=False)
        if name in experts.shapes
    ]
    for name in find_joined_experts(model):
        weights.extend(model.get_submodule(name).parameters(recurse=False))
    for weight in weights:
        # Only weights that bitsandbytes packs have the attribute, even before they are loaded;
        # those of fp8 have one byte.
        if not hasattr(weight, "quant_state") and weight.itemsize > 1:
            name = str(weight.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + weight.numel() * weight.itemsize
    return sizes


def describe_unpacked_experts(sizes: Mapping[str, int]) -> str | None:
    """Return what to say of experts that quantization leaves as they are; None if there are none.

    `sizes` are those of `unpacked_expert_bytes`.
    """
    if not sizes:
        return None
    each = " and ".join(f"{name}: {size / 1e9:,.2f} GB" for name, size in sizes.items())
    return f"experts stay in {each}. {_WHAT_PACKS}"


def _expert_counts(config: Mapping[str, Any]) -> Iterator[int]:
    """Return the numbers under keys such as num_local_experts and n_routed_experts."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _expert_counts(value)
        elif str(key).endswith("experts"):
            counts = value if isinstance(value, list | tuple) else [value]
            yield from (count for count in counts if isinstance(count, int))


def _matrices(module: Any) -> dict[str, tuple[int, int, int]]:
    """Return the shapes of a module's own parameters that hold one matrix for each expert."""
    from torch.nn.modules.conv import _ConvNd

    if isinstance(module, _ConvNd):
        return {}
    shapes = {name: _shape(parameter) for name, parameter in module.named_parameters(recurse=False)}
    return {
        name: (shape[0], shape[1], shape[2])
        for name, shape in shapes.items()
        if len(shape) == 3 and shape[0] > 1
    }


def _shape(parameter: Any) -> tuple[int, ...]:
    """Return the shape of a parameter; of one that bitsandbytes packed or ZeRO sliced, before."""
    state = getattr(parameter, "quant_state", None)
    shape = parameter.shape if state is None else state.shape
    return tuple(getattr(parameter, "ds_shape", shape))


def _block_name(name: str) -> str:
    """Return the name of the module that holds experts and their router."""
    for wrapped in _WRAPPED:
        name = name.replace(wrapped, "")
    return name.rpartition(".")[0]


def _block_routers(
    modules: Mapping[str, Any], block: str, candidates: Mapping[str, Any]
) -> Iterator[str]:
    """Return the modules of a block that give one score for each expert, or one score."""
    import torch

    counts = {
        shape[0]
        for name, matrices in candidates.items()
        if _block_name(name) == block
        for shape in matrices.values()
    }
    for child, module in modules[block].named_children():
        name = f"{block}.{child}" if block else child
        shapes = [shape for shape in map(_shape, module.parameters()) if len(shape) == 2]
        if any(f"{other}.".startswith(f"{name}.") for other in candidates) or not shapes:
            continue
        is_gate = isinstance(module, torch.nn.Linear) and module.out_features == 1
        is_named = bool(_ROUTER.search(child)) and shapes[-1][0] <= 2 * max(counts)
        if is_gate or is_named or {shape[0] for shape in shapes} <= counts:
            yield name


def _is_transposed(
    modules: Mapping[str, Any],
    name: str,
    matrices: Mapping[str, tuple[int, int, int]],
    candidates: Mapping[str, Any],
) -> bool:
    """Return whether a module's matrices stand as [inputs, outputs]."""
    declared = getattr(modules[name], "is_transposed", None)
    if declared is not None:
        return bool(declared)
    routers = _block_routers(modules, _block_name(name), candidates)
    inputs = {_shape(weight)[-1] for router in routers for weight in modules[router].parameters()}
    # The first matrix takes what the router takes; with one alone nothing tells which it is.
    _, rows, columns = next(iter(matrices.values()))
    return len(matrices) > 1 and rows in inputs and columns not in inputs
