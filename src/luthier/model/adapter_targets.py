"""The names in an adapter's settings: each must match something, where peft would pass over it."""

import difflib
import importlib.util
import inspect
import json
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from luthier.config.methods import check_adapter
from luthier.config.schema import ModelConfig, RunConfig
from luthier.errors import UserError, format_override
from luthier.model.adapter_patterns import ALL_LINEAR, check_adapter_patterns, match_layers
from luthier.model.expert_adapters import check_layers_in_files
from luthier.model.experts import find_experts, find_routers, has_experts
from luthier.model.gguf import converted_folder
from luthier.model.model_class import find_text_modules, find_vision_modules, is_within
from luthier.model.source import find_gguf_file, local_folder
from luthier.storage.sizes import read_safetensors_header

_LAYER_NUMBER = re.compile(r"\.(\d+)\.")
_READ_WEIGHT = re.compile(r"\bself\.(\w+)\.weight\b(?!\.)")
"""How a class reads the weight of a layer in it, where it does not only ask for its format."""


def check_adapter_names(
    model: Any, settings: dict[str, Any], task_type: str, with_vision: bool = False
) -> None:
    """Raise UserError for a layer, a pattern or a number in `settings` that matches nothing.

    `settings` are fields of one of peft's configs, `task_type` is the model's task in peft's words,
    and `with_vision` says that towers and projectors for images train, too (`lora.vision`). Raises
    UserError, too, for an adapter on the output layer of a causal language model, which the losses
    read past.
    """
    names = [name for name, _ in model.named_modules()]
    check_adapter_patterns("lora.", settings, names)
    targets = settings.get("target_modules")
    chosen = find_target_layers(model, targets, with_vision) if targets else []
    if with_vision:
        _check_vision(model, chosen if targets else None)
    excluded = settings.get("exclude_modules") or []
    is_pattern = isinstance(excluded, str)
    for name in [excluded] if isinstance(excluded, str) else excluded:
        if not _find_layers("lora.exclude_modules", name, is_pattern, names):
            raise UserError(_no_match_message("lora.exclude_modules", name, names))
    _check_layer_numbers(settings.get("layers_to_transform"), chosen)
    parameters = find_target_parameters(model, settings.get("target_parameters") or (), chosen)
    for key in ("rank_pattern", "alpha_pattern"):
        _check_patterns(key, settings.get(key) or {}, [*chosen, *parameters])
    scope_saved_modules(model, settings.get("modules_to_save") or (), with_vision)
    if targets and targets != ALL_LINEAR:
        _refuse_bypassed_layers(model, chosen)
    _refuse_other_routers(model, chosen)
    output = model.get_output_embeddings()
    if task_type == "CAUSAL_LM" and targets != ALL_LINEAR and output is not None:
        name = layer_name(model, output)
        if name in chosen:
            # Losses multiply with the weight of the output layer, and not by its forward.
            raise UserError(
                f"lora.target_modules: {name} is the output layer, and the losses are computed "
                f"with its weight alone, so an adapter on it would never train.\nTrain it whole: "
                f"{format_override('lora.modules_to_save', [name])}."
            )


def _check_vision(model: Any, chosen: Sequence[str] | None) -> None:
    """Raise UserError where `lora.vision` opens nothing.

    `chosen` are the layers that get an adapter; None where peft chooses them by the model's type.
    """
    vision = find_vision_modules(model)
    if not vision:
        raise UserError(
            f"lora.vision=true: {type(model).__name__} has no tower for images. Remove it."
        )
    if chosen is None or any(is_within(name, part) for name in chosen for part in vision):
        return
    layers = [name for name, _ in _linear_layers(model)]
    inside = [name for name in layers if any(is_within(name, part) for part in vision)]
    endings = sorted({name.rpartition(".")[2] for name in inside})
    raise UserError(
        f"lora.vision=true: lora.target_modules names no layer of {', '.join(vision)}, so none of "
        f"them would train. Its linear layers: {', '.join(endings)}; or take {ALL_LINEAR}."
    )


def scope_saved_modules(model: Any, endings: Sequence[str], with_vision: bool = False) -> list[str]:
    """Return `lora.modules_to_save` such that peft trains no layer that the rows do not reach.

    peft 0.21 trains every layer whose name ends so, in a vision tower too: there each name becomes
    the whole names of the text part's layers; `with_vision`: also of those for images. Raises
    UserError for a name that matches none.
    """
    names = [name for name, _ in model.named_modules()]
    text = find_text_modules(model, with_vision)
    scoped: list[str] = []
    for ending in endings:
        layers = [name for name in names if name.endswith(ending)]
        if not layers:
            raise UserError(_no_match_message("lora.modules_to_save", ending, names))
        reached = [name for name in layers if name in text]
        if not reached:
            raise UserError(_unreached_message(model, "lora.modules_to_save", layers[0]))
        scoped += [ending] if reached == layers else reached
    return list(dict.fromkeys(scoped))


def find_target_parameters(
    model: Any, targets: Iterable[str], layers: Collection[str] = ()
) -> list[str]:
    """Return the names of the parameters that get an adapter by `lora.target_parameters`.

    `targets` are endings of names, `layers` those of the layers that get one anyway. Raises
    UserError for a target that matches nothing, or what no adapter goes on.
    """
    parameters = dict(model.named_parameters())
    matching: dict[str, None] = {}
    for target in targets:
        hits = [name for name in parameters if f".{name}".endswith(f".{target}")]
        if not hits:
            raise UserError(_no_match_message("lora.target_parameters", target, list(parameters)))
        for name in hits:
            layer = name.rpartition(".")[0]
            if layer in layers:
                raise UserError(
                    f"lora.target_parameters: {target} is in {layer}, which gets an adapter by "
                    "lora.target_modules. Remove it from one of the two."
                )
            if parameters[name].ndim not in (2, 3) and not hasattr(parameters[name], "quant_state"):
                raise UserError(
                    f"lora.target_parameters: {name} has the shape "
                    f"{list(parameters[name].shape)}, and LoRA goes on matrices."
                )
        matching.update(dict.fromkeys(hits))
    return list(matching)


def _refuse_other_routers(model: Any, chosen: Sequence[str]) -> None:
    """Raise UserError where a router is named that is no plain linear layer."""
    import torch

    routers = find_routers(model)
    for name in chosen:
        router = next((each for each in routers if f"{name}.".startswith(f"{each}.")), None)
        layer = model.get_submodule(name)
        # Some are linear layers that return pairs, which an adapter cannot be added to.
        own_forward = type(layer).forward is not torch.nn.Linear.forward
        is_own = own_forward and type(layer).__module__.startswith("transformers")
        if router is not None and (is_own or not isinstance(layer, torch.nn.Linear)):
            ending = ".".join(name.split(".")[-2:])
            raise UserError(
                f"lora.target_modules: {name} is the router of experts and no plain linear layer. "
                "Leave it out; or, to train it, name its weight: "
                f"{format_override('lora.target_parameters', [f'{ending}.weight'])}."
            )


def check_names_in_files(config: RunConfig) -> None:
    """Raise UserError for a layer of `lora` that neither the weight files nor the code name.

    It raises UserError, too, for what does not go on the experts that config.json names.

    It reads the heads of the files, or their index, and imports no library. Models whose weights
    are not here in safetensors are passed over: `check_adapter_names` asks the loaded model.
    """
    folder = _find_weights(config.model) if config.lora.is_enabled else None
    if folder is None:
        return
    weights = _read_weight_names(folder)
    layers = _layer_names(weights)
    _check_experts_in_files(config, folder, weights, layers)
    if not layers:
        return
    targets = config.lora.target_modules
    names = {"target_modules": targets if isinstance(targets, list) else []}
    names["modules_to_save"] = config.lora.modules_to_save
    for key, targets_of_key in names.items():
        for target in targets_of_key:
            is_named = bool(_find_layers(key, str(target), False, sorted(layers)))
            if not is_named and not _is_named_in_code(folder, str(target)):
                raise UserError(_no_match_message(f"lora.{key}", str(target), sorted(layers)))


def _find_weights(model: ModelConfig) -> Path | None:
    """Return the folder with a model's safetensors; of a GGUF file, what it was converted into."""
    folder = local_folder(model)
    if folder is None and (file := find_gguf_file(model.path)):
        converted = converted_folder(file)
        return converted if (converted / "config.json").is_file() else None
    return folder


def _check_experts_in_files(
    config: RunConfig, folder: Path, weights: list[str], layers: set[str]
) -> None:
    """Raise UserError for settings that experts do not take, and for parameters nobody names."""
    with suppress(OSError, ValueError):
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        is_mixture = isinstance(architecture, dict) and has_experts(architecture)
        for mistake in check_adapter(config.lora, config.quantization.bits, is_mixture):
            raise UserError(f"{mistake.key}: {mistake.text}")
        model_type = str(architecture.get("model_type")) if is_mixture else ""
        check_layers_in_files(config.lora, model_type, layers)
    for target in config.lora.target_parameters if weights else ():
        is_named = any(f".{name}".endswith(f".{target}") for name in weights)
        if not is_named and not _is_named_in_code(folder, target):
            attributes = _read_code_names(folder)
            raise UserError(
                _no_match_message("lora.target_parameters", target, [*weights, *attributes])
            )


def _layer_names(weights: list[str]) -> set[str]:
    """Return the names of the layers that have these weights, and of all that holds them."""
    parts = [name.split(".")[:-1] for name in weights]
    return {".".join(part[: end + 1]) for part in parts for end in range(len(part))}


def _read_weight_names(folder: Path) -> list[str]:
    """Return the names of the weights in a folder's safetensors files."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    files = folder.glob("*.safetensors")
    return [name for file in files for name in read_safetensors_header(file).tensors]


def _is_named_in_code(folder: Path, target: str) -> bool:
    """Return whether the code of the model has an attribute of this name, or cannot be read.

    Some models rename weights when they are loaded, and tied layers have none in the files.
    """
    names = _read_code_names(folder)
    return not names or target.rpartition(".")[2] in names


def _read_code_names(folder: Path) -> set[str]:
    """Return the attributes in transformers' code of a model; empty where it cannot be read."""
    spec = importlib.util.find_spec("transformers")
    with suppress(OSError, ValueError, KeyError, TypeError):
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        models = Path(str(spec and spec.origin)).parent / "models" / model_type.replace("-", "_")
        texts = [file.read_text(encoding="utf-8") for file in models.glob("modeling_*.py")]
        return {name for text in texts for name in re.findall(r"\bself\.(\w+)", text)}
    return set()


def find_target_layers(
    model: Any, targets: str | list[str], with_vision: bool = False
) -> list[str]:
    """Return the names of the layers that get an adapter.

    `targets` is a pattern for whole names, a list of names' endings, or `all-linear`; the last two
    mean the layers that text reaches (`find_text_modules`), and `with_vision` those that images
    reach as well. Raises UserError for a target that matches no layer.
    """
    text = find_text_modules(model, with_vision)
    if targets == ALL_LINEAR:
        output, routers = model.get_output_embeddings(), find_routers(model)
        bypassed = set(find_bypassed_layers(model))
        return [
            name
            for name, layer in _linear_layers(model)
            if layer is not output
            and name in text
            and name not in bypassed
            and not any(f"{name}.".startswith(f"{router}.") for router in routers)
        ]
    names = [name for name, _ in model.named_modules()]
    is_pattern = isinstance(targets, str)
    target_list = [targets] if isinstance(targets, str) else targets
    matching: set[str] = set()
    for target in target_list:
        layers = _find_layers("lora.target_modules", target, is_pattern, names)
        if not layers:
            raise UserError(_no_layer_message(model, is_pattern, target))
        reached = layers if is_pattern else [name for name in layers if name in text]
        if not reached:
            raise UserError(_unreached_message(model, "lora.target_modules", layers[0]))
        matching.update(reached)
    return [name for name in names if name in matching]


def _unreached_message(model: Any, key: str, name: str) -> str:
    """Return the error's text for a layer that the rows of a run do not reach."""
    text = f"{key}: {name} is not in the part of the model that reads text, so "
    if any(is_within(name, part) for part in find_vision_modules(model)):
        return f"{text}rows of text would never train it. Leave it out, or set lora.vision=true."
    return f"{text}it would never train. Leave it out."


def linear_layer_suffixes(model: Any, with_vision: bool = False) -> list[str]:
    """Return the last parts of the names of the linear layers that `all-linear` means."""
    layers = find_target_layers(model, ALL_LINEAR, with_vision)
    return sorted({name.rpartition(".")[2] for name in layers})


def find_bypassed_layers(model: Any) -> list[str]:
    """Return the names of the linear layers that Mamba's mixers pass by.

    A mixer hands the weight of such a layer to a kernel, or multiplies with it, and does not call
    the layer: an adapter on it has no gradient there, and a packed weight is no matrix. In
    transformers 5.23 these are `out_proj` (in training, where the kernels are installed), and the
    `x_proj` and `dt_proj` of Mamba-1; peft 0.21 refuses `out_proj` on five model types.
    """
    mixers = [(name, mod) for name, mod in model.named_modules() if hasattr(mod, "conv1d")]
    read = {kind: _read_weights(kind) for kind in {type(mixer) for _, mixer in mixers}}
    return [
        f"{name}.{child}" if name else child
        for name, mixer in mixers
        for child in read[type(mixer)]
        if child in _linear_children(mixer)
    ]


def bypassed_layer_suffixes(model: Any) -> list[str]:
    """Return the endings, such as `mixer.out_proj`, of the names of `find_bypassed_layers`."""
    return sorted({".".join(name.split(".")[-2:]) for name in find_bypassed_layers(model)})


def _refuse_bypassed_layers(model: Any, chosen: Sequence[str]) -> None:
    """Raise UserError where a layer is named on which an adapter would do nothing."""
    bypassed = [name for name in find_bypassed_layers(model) if name in set(chosen)]
    if bypassed:
        endings = sorted({name.rpartition(".")[2] for name in bypassed})
        raise UserError(
            f"lora.target_modules: an adapter on {bypassed[0]} would do nothing where Mamba's "
            "kernels run, because they read the layer's weight and pass its adapter by.\nLeave "
            f"out {', '.join(endings)}, or take {ALL_LINEAR}, which leaves such layers out."
        )


def _linear_children(module: Any) -> set[str]:
    """Return the names of the linear layers right below a module."""
    return {name for name, _ in _linear_layers(module) if name and "." not in name}


def _read_weights(mixer_class: type) -> list[str]:
    """Return the names of the layers whose weight the forward of a class reads, in its source."""
    try:
        methods = [getattr(mixer_class, name) for name in dir(mixer_class) if "forward" in name]
        source = "".join(inspect.getsource(method) for method in methods)
    except (OSError, TypeError):
        # Without its source: what all mixers with a kernel pass by.
        return ["out_proj"]
    return sorted(set(_READ_WEIGHT.findall(source)))


def layer_name(model: Any, layer: Any) -> str:
    """Return the name of a layer within a model."""
    return next(name for name, module in model.named_modules() if module is layer)


def _find_layers(key: str, target: str, is_pattern: bool, names: Sequence[str]) -> list[str]:
    """Match as peft does: one string is a regular expression, a list holds names' endings."""
    if is_pattern:
        return match_layers(key, target, names, target, "fullmatch")
    return [name for name in names if name == target or name.endswith(f".{target}")]


def _check_layer_numbers(layer_numbers: int | list[int] | None, chosen: Sequence[str]) -> None:
    """Raise UserError for the number of a layer that the model does not have."""
    numbers = {int(digits) for name in chosen for digits in _LAYER_NUMBER.findall(name)}
    for number in [layer_numbers] if isinstance(layer_numbers, int) else layer_numbers or ():
        if number not in numbers:
            raise UserError(
                f"lora.layers_to_transform: there is no layer {number} with such modules; layers "
                f"are counted from {min(numbers, default=0)} to {max(numbers, default=0)}."
            )


def _check_patterns(key: str, patterns: Iterable[str], chosen: Sequence[str]) -> None:
    """Match as peft does, which takes the default where a pattern matches nothing."""
    for pattern in patterns:
        if not match_layers(f"lora.{key}", pattern, chosen, rf"(.*\.)?({pattern})$", "match"):
            raise UserError(_no_match_message(f"lora.{key}", pattern, chosen))


def _no_match_message(key: str, name: str, layers: Sequence[str]) -> str:
    """Return the error's text for a name that matches no layer, with the nearest name."""
    names = {*layers, *(layer.rpartition(".")[2] for layer in layers)} - {""}
    near = difflib.get_close_matches(name, sorted(names), n=1)
    # Layers of a list have numbers as their last names.
    last_names = sorted(each for each in names if not re.search(r"\.|^\d+$", each))
    more = ", ..." if len(last_names) > 20 else ""
    hint = f"Did you mean {near[0]}?" if near else f"It has {', '.join(last_names[:20])}{more}."
    return f"{key}: nothing in the model is named {name}. {hint}"


def _no_layer_message(model: Any, is_pattern: bool, target: str) -> str:
    """Return the error's text for a target without a layer, with the linear layers."""
    names = sorted({name.rpartition(".")[2] for name, _ in _linear_layers(model)})
    near = difflib.get_close_matches(target, names, n=1)
    if is_pattern:
        text = f"lora.target_modules={target}: as a pattern for whole names this matches no layer."
        hint = f"\nFor layers by their last name write a list: [{near[0]}]." if near else ""
    else:
        text = f"lora.target_modules: no layer is named {target}."
        hint = f" Did you mean {near[0]}?" if near else ""
    text = f"{text}{hint}\nThe model's linear layers: {', '.join(names)}; or take {ALL_LINEAR}."
    if not is_pattern and find_experts(model):
        text += " Its experts are parameters and no layers: lora.experts=true trains them."
    return text


def _linear_layers(model: Any) -> list[tuple[str, Any]]:
    """Return the linear layers by name; GPT-2's keep their matrix transposed."""
    import torch
    from transformers.pytorch_utils import Conv1D

    classes = (torch.nn.Linear, Conv1D)
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, classes)]
