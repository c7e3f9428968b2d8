"""LoRA on the experts of a mixture: which of them, at which rank, and as plain peft loads it.

peft adapts experts by `target_parameters`. Two things of peft 0.21 stand in the way. Its layer for
parameters takes no dropout. And on some model types (DeepSeek-V3, GLM4-MoE, Qwen3-Next and others)
it takes `gate_proj`, `up_proj`, `down_proj` and `gate` in `target_modules` for the experts of
transformers 4, whatever they name: dense layers and shared experts lose their adapter, and the
router gets one, when an adapter is made and again when it is loaded. So luthier keeps peft from
converting what it makes itself, and saves such layers as `target_parameters`, which peft leaves.
"""

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.config.library_settings import LoraSettings
from luthier.errors import UserError, format_override
from luthier.model.adapter_patterns import ALL_LINEAR, match_layers
from luthier.model.experts import Experts, find_experts, find_joined_experts, find_routers
from luthier.model.model_class import find_text_modules

_PREFIX = "base_model.model."
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")
_WEIGHT = ".weight"
_COPIED = ".original_module"
"""What peft puts behind the name of a module of which it trains a copy."""
_WRAPPED = ".base_layer"
"""What peft puts behind the name of a module whose parameters it adapts."""
_CONVERTED_LAYERS = ("gate_proj", "up_proj", "down_proj")
_CONVERTED_TYPES = frozenset({
    *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1"),
    *("ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe"),
    *("glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe", "qwen3_moe"),
    *("qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker"),
    "solar_open",
})  # fmt: skip
"""The `model_type` of models on which peft 0.21 takes layers of these names for experts."""
_DENSE_LAYER = re.compile(
    rf"(?!.*\.experts\.\d+\.).*\.layers\.\d+\..*\.({'|'.join(_CONVERTED_LAYERS)})"
)
"""A layer of such a name that is none of the experts in a checkpoint's files."""


def shortest_names(chosen: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the shortest endings of names that match all of `chosen` and nothing else of `names`.

    An ending begins behind a dot, as peft matches them; else it is the whole name.
    """
    chosen = set(chosen)
    others = {ending for name in names if name not in chosen for ending in _endings(name)}
    return sorted({next(e for e in _endings(name) if e not in others) for name in chosen})


def _endings(name: str) -> Iterator[str]:
    """Return the endings of a name that begin behind a dot, the shortest first, then itself."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))


def choose_experts(model: Any, lora: LoraSettings, settings: Mapping[str, Any]) -> list[Experts]:
    """Return the experts of a model that LoRA trains by `lora.experts` and the settings for layers.

    `settings` are the fields of peft's config: `exclude_modules`, `layers_to_transform` and
    `modules_to_save` mean experts as well as layers, where peft looks at linear layers alone.
    """
    experts = find_experts(model) if lora.trains_experts else []
    if experts:
        text_part = find_text_modules(model)
        experts = [group for group in experts if group.name in text_part]
    left_out = _find_left_out([group.name for group in experts], settings)
    return [group for group in experts if group.name not in left_out]


def _find_left_out(names: list[str], settings: Mapping[str, Any]) -> set[str]:
    """Return those of the names to which an adapter with these settings does not go."""
    excluded = settings.get("exclude_modules") or []
    left_out: set[str] = set()
    if isinstance(excluded, str):
        key = "lora.exclude_modules"
        left_out.update(match_layers(key, excluded, names, excluded, "fullmatch"))
    else:
        left_out.update(n for n in names if any(f".{n}".endswith(f".{e}") for e in excluded))
    for name in settings.get("modules_to_save") or ():
        left_out.update(n for n in names if re.match(rf"(^|.*\.){name}($|\..*)", n))
    numbers = settings.get("layers_to_transform")
    if numbers is not None:
        numbers = {numbers} if isinstance(numbers, int) else {*numbers}
        left_out.update(n for n in names if _layer_number(n) not in numbers)
    return left_out


def _layer_number(name: str) -> int | None:
    match = _LAYER_NUMBER.search(name)
    return None if match is None else int(match[1])


def expert_settings(model: Any, lora: LoraSettings, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of peft's config that put LoRA on experts; empty where none gets it.

    A rank of their own comes with an alpha by which their scale is that of the other layers;
    under rsLoRA alpha stays, as the scale follows the rank there. Patterns that are set win.
    """
    experts = choose_experts(model, lora, settings)
    if not experts:
        return {}
    chosen = [name for group in experts for name in group.parameter_names]
    targets = shortest_names(chosen, [name for name, _ in model.named_parameters()])
    fields: dict[str, Any] = {
        "target_parameters": sorted({*(settings.get("target_parameters") or ()), *targets})
    }
    rank = lora.experts
    if isinstance(rank, bool) or rank is None:
        return fields
    default_rank, alpha = settings.get("r", 8), settings.get("lora_alpha", 8)
    if not settings.get("use_rslora"):
        alpha = alpha * rank / default_rank
    for key, value in (("rank_pattern", rank), ("alpha_pattern", alpha)):
        own = {re.escape(name): value for name in targets}
        # peft takes the first pattern that matches.
        users = settings.get(key) or {}
        fields[key] = {**users, **{name: each for name, each in own.items() if name not in users}}
    return fields


def describe_experts(model: Any, lora: LoraSettings) -> str | None:
    """Return one line on what becomes of a model's experts; None without experts or adapter.

    `model` has its adapter, whose settings are `lora`.
    """
    import peft

    if not isinstance(model, peft.PeftModel):
        return None
    base: Any = model.get_base_model()
    experts = find_experts(base)
    joined = find_joined_experts(base)
    if not experts and not joined:
        return None
    weights = sum(group.num_weights for group in experts) + sum(joined.values())
    share = f"{weights / (weights + _count_linear_weights(base)):.0%} of the layers' weights"
    ranks = _expert_ranks(base, experts)
    if joined:
        # Whatever peft wraps a module in stands below the module of all experts.
        blocks = {name.partition(".experts")[0] + ".experts" for name in joined}
        trains = any(_trains(base.get_submodule(block)) for block in blocks)
        what = "train" if trains else "stay as they are"
        return f"{share}, {what}: no adapter for each expert goes on matrices that hold all of them"
    if ranks:
        low, high = min(ranks.values()), max(ranks.values())
        text = f"{share}, rank {low} each" if low == high else f"{share}, ranks {low} to {high}"
        modules = {name.rpartition(".")[0] for name in ranks}
        if len(modules) < len(experts):
            text += f", in {len(modules)} of {len(experts)} layers"
    elif any(_trains(base.get_submodule(group.name.removesuffix(_COPIED))) for group in experts):
        text = f"{share}, all of them train (lora.modules_to_save)"
    else:
        text = f"{share}, stay as they are: {_why_frozen(lora)}"
    routers = [router for router in find_routers(base) if _trains(base.get_submodule(router))]
    return f"{text}; {routers[0]} is a router and trains" if routers else text


def _why_frozen(lora: LoraSettings) -> str:
    """Return why no adapter goes on experts."""
    if lora.method != "lora":
        return f"{lora.method} reaches linear layers only"
    if lora.experts is False:
        return "lora.experts=false"
    if lora.trains_experts:
        return "the settings leave out all of them"
    key = "target_parameters" if lora.target_parameters else "target_modules"
    return f"lora.{key} names others, and lora.experts=true adds them"


def _count_linear_weights(model: Any) -> int:
    """Return the weights in a model's linear layers, but adapters and the output layer."""
    import torch
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    output = getattr(output, "base_layer", output)
    return sum(
        layer.nx * layer.nf if isinstance(layer, Conv1D) else layer.in_features * layer.out_features
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear | Conv1D)
        and layer is not output
        and ".lora_" not in name
    )


def _expert_ranks(model: Any, experts: list[Experts]) -> dict[str, int]:
    """Return the ranks of the adapters on experts, by the names of their parameters."""
    from peft.tuners.lora.layer import ParamWrapper

    names = {group.name.replace(_WRAPPED, "") for group in experts}
    ranks = {}
    for name, layer in model.named_modules():
        plain = name.replace(_WRAPPED, "")
        if isinstance(layer, ParamWrapper) and plain in names:
            ranks[f"{plain}.{layer.parameter_name}"] = layer.r["default"]
    return ranks


def _trains(module: Any) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


@contextmanager
def unconverted_targets() -> Iterator[None]:
    """Keep peft from reading layers that are named as experts of transformers 4 were.

    peft 0.21: utils/transformers_weight_conversion.py, `_convert_peft_config_moe`.
    """
    from peft.utils import transformers_weight_conversion as conversion

    before = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = _leave_config
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = before


def _leave_config(*_: Any, **__: Any) -> None:
    """Do nothing, in place of peft's conversion."""


def names_taken_by_peft(model: Any) -> set[str]:
    """Return the names of layers that peft takes for experts on this type of model."""
    import peft
    import torch
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    names = {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    # Some are refused by themselves: all together show what peft does with each.
    names |= {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
    config = peft.LoraConfig(target_modules=sorted(names))
    convert_peft_config_for_transformers(config, model, None)
    return names - set(config.target_modules or ())


@dataclass(frozen=True)
class BaseNames:
    """The names in a model before peft renames what it wraps."""

    layers: list[str]
    parameters: list[str]
    taken: set[str]
    """The names of layers that peft takes for experts."""


def read_base_names(model: Any) -> BaseNames:
    """Return the names that `make_config_portable` looks for, of a model without an adapter."""
    return BaseNames(
        [name for name, _ in model.named_modules()],
        [name for name, _ in model.named_parameters()],
        names_taken_by_peft(model),
    )


def set_dropout(wrapped: Any, dropout: float) -> None:
    """Give a LoRA without dropout what `lora.lora_dropout` says, but for adapters on parameters.

    peft refuses an adapter on parameters whose config has a dropout, so the config has none. An
    adapter that has trained needs none.
    """
    import torch
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    for layer in wrapped.modules():
        if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper):
            for name in layer.lora_dropout:
                layer.lora_dropout[name] = torch.nn.Dropout(dropout)


def make_config_portable(wrapped: Any, base: BaseNames) -> list[str]:
    """Have the adapter's config name each layer so that plain peft loads all of them.

    Layers that peft would take for experts are named as parameters: the weights of both kinds of
    adapters have the same names and shapes. Returns the names of these layers.
    """
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    config = wrapped.peft_config["default"]
    if not base.taken:
        return []
    layers = {
        name.removeprefix(_PREFIX): layer
        for name, layer in wrapped.named_modules()
        if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper)
    }
    taken = [name for name in layers if name.rpartition(".")[2] in base.taken]
    # A pattern would be read as the last names of what it matches, in any layer.
    config.target_modules = set(shortest_names(set(layers) - set(taken), base.layers))
    if taken:
        _refuse_unportable(config.to_dict(), taken)
        weights = [f"{name}{_WEIGHT}" for name in taken]
        own = shortest_names(weights, base.parameters)
        config.target_parameters = sorted({*(config.target_parameters or ()), *own})
    for name in taken:
        # The pattern of a layer matches no parameter in it.
        pattern = f"{re.escape(name)}({re.escape(_WEIGHT)})?"
        rank, alpha = layers[name].r["default"], layers[name].lora_alpha["default"]
        if rank != config.r:
            config.rank_pattern = {pattern: rank, **config.rank_pattern}
        if alpha != config.lora_alpha:
            config.alpha_pattern = {pattern: alpha, **config.alpha_pattern}
    return taken


def check_layers_in_files(lora: LoraSettings, model_type: str, layers: Iterable[str]) -> None:
    """Raise UserError where a saved adapter would lose what it has on layers that peft takes.

    `layers` are the names of layers in a checkpoint's files. It is asked before a load;
    `make_config_portable` asks the same of the loaded model.
    """
    if lora.method != "lora" or model_type not in _CONVERTED_TYPES:
        return
    if lora.target_parameters and not lora.target_modules:
        return
    dense = sorted(name for name in layers if _DENSE_LAYER.fullmatch(name))
    targets = lora.target_modules
    if isinstance(targets, list) and targets:
        dense = [name for name in dense if any(f".{name}".endswith(f".{t}") for t in targets)]
    elif targets and targets != ALL_LINEAR:
        dense = match_layers("lora.target_modules", str(targets), dense, str(targets), "fullmatch")
    left_out = _find_left_out(dense, lora)
    taken = [name for name in dense if name not in left_out]
    if taken:
        _refuse_unportable(lora, taken)


def _refuse_unportable(settings: Mapping[str, Any], taken: list[str]) -> None:
    """Raise UserError for settings that peft has for linear layers, and not for parameters."""
    for key, name in (("use_dora", "DoRA"), ("lora_bias", "A bias of LoRA's B")):
        if settings.get(key):
            endings = sorted({layer.rpartition(".")[2] for layer in taken})
            raise UserError(
                f"lora.{key}: peft takes {', '.join(endings)} of this type of model for experts "
                f"when it loads an adapter. {name} does not survive that on {taken[0]}.\n"
                f"Leave them out: {format_override('lora.exclude_modules', endings)}."
            )


def load_adapter(model: Any, folder: "str | Path", name: str = "default") -> Any:
    """Return a model with the adapter of a folder on it, as peft's `from_pretrained` gives it.

    `model` is a base, or a `PeftModel` that gets one more adapter, `name`. Linear layers that the
    adapter names as parameters (`make_config_portable`) get an adapter for linear layers, which
    also goes on packed weights; experts in 4 bits get the one that goes on them.
    """
    import peft

    from luthier.model.expert_lora import adapt_experts

    settings: Any = peft.PeftConfig.from_pretrained(str(folder))
    with _read_as_layers(model, settings):
        if isinstance(model, peft.PeftModel):
            model.load_adapter(str(folder), name, peft_config=settings)
        else:
            model = peft.PeftModel.from_pretrained(model, str(folder), name, config=settings)
    return adapt_experts(model)


def add_drawn_adapter(model: Any, name: str, config: Any) -> None:
    """Put one more adapter on a `PeftModel`, with newly drawn weights, as its `add_adapter` does.

    `config` is that of an adapter which is on the model, and stays as it is.
    """
    from luthier.model.expert_lora import adapt_experts

    settings = copy.deepcopy(config)
    with _read_as_layers(model, settings):
        type(model).add_adapter(model, name, settings)
    adapt_experts(model)


@contextmanager
def _read_as_layers(model: Any, settings: Any) -> Iterator[None]:
    """Let peft put the adapter of `settings` on a model, linear layers named as parameters too.

    Changes `settings`. LoRA on experts that is on the model is peft's own within the block.
    """
    from luthier.model.expert_lora import restore_peft_layers

    layers = _layers_named_as_parameters(model, getattr(settings, "target_parameters", None) or ())
    # peft 0.21 wants all adapters of a model to name the same parameters.
    present = list(getattr(model, "peft_config", {}).values())
    before = [getattr(config, "target_parameters", None) for config in present]
    if layers:
        linear = {f"{layer}{_WEIGHT}" for layer in layers}
        for config in (settings, *present):
            named = getattr(config, "target_parameters", None) or ()
            config.target_parameters = [t for t in named if not _matches(t, linear)] or None
        settings.target_modules = {*settings.target_modules, *layers}
    restore_peft_layers(model)
    try:
        with unconverted_targets() if layers else nullcontext():
            yield
    finally:
        if layers:
            for config, parameters in zip(present, before, strict=True):
                config.target_parameters = parameters


def _layers_named_as_parameters(model: Any, targets: Collection[str]) -> list[str]:
    """Return the linear layers whose weight is named by one of an adapter's target parameters."""
    import torch

    names = [
        name.removeprefix(_PREFIX).removesuffix(_WRAPPED)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    return [name for name in names if any(_matches(t, [f"{name}{_WEIGHT}"]) for t in targets)]


def _matches(target: str, names: Iterable[str]) -> bool:
    """Return whether a target parameter means one of the names, as peft matches them."""
    return any(f".{name}".endswith(f".{target}") for name in names)
