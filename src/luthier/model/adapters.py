"""Adapters in float32 on any base, drawn from a seed: LoRA and peft's other methods by name.

`add_adapter` wraps a model; below it are the starts that look at the weights (LoftQ, PiSSA and its
like), what lets float32 weights train inside a base of 16 bits, and the heads of new tasks.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.library_settings import LoraSettings
from luthier.config.methods import ADAPTERS, check_adapter
from luthier.errors import UserError
from luthier.model import embeddings, expert_adapters
from luthier.model.adapter_patterns import ALL_LINEAR
from luthier.model.adapter_targets import (
    bypassed_layer_suffixes,
    check_adapter_names,
    find_target_layers,
    linear_layer_suffixes,
    scope_saved_modules,
)
from luthier.model.experts import find_experts, find_routers
from luthier.model.model_class import find_text_modules

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS")
"""Tasks, in peft's words, whose models have a head that trains whole and is saved."""
HEAD_NAMES = ("classifier", "score")
"""The names of layers that peft takes for the head of such a model."""
LUTHIER_SETTINGS = ("method", "plus_ratio", "experts", "vision", "loftq_config")
"""Settings in `lora` that are not fields of peft's configs, or that luthier reads itself."""
_PREFIX = "base_model.model."
_POWER_ITERATIONS, _EXTRA_COLUMNS = 4, 8
"""Power iterations and extra columns of the randomized decomposition for LoftQ."""
_PROVISIONAL_STEPS = 2**31
"""AdaLoRA's steps until the training says how many they are (`adapter_training`)."""


def add_adapter(
    model: "PreTrainedModel",
    lora: Mapping[str, Any],
    seed: int,
    task_type: str = "CAUSAL_LM",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    unquantized: Callable[[], Any] | None = None,
) -> "PeftModel":
    """Freeze `model` and wrap it with a fresh adapter: the same seed, the same weights.

    `lora` holds `method` (LoRA if there is none) and fields of that method's config in peft;
    `task_type` is the task in peft's words: the head of a classifier (`SEQ_CLS`, `TOKEN_CLS`)
    trains whole and is saved with the adapter. `tokenizer` is for tokens that are named by their
    text, and `unquantized` gives the model's weights as they were, for LoftQ. Trained weights are
    float32; frozen ones keep their number formats. Gradients also reach the embeddings' output:
    activation checkpointing needs it. Raises UserError for settings that peft refuses or cannot do
    on these weights, and for a name that matches no layer.
    """
    base: Any = model
    lora = LoraSettings(lora)
    has_experts = bool(find_experts(base))
    for mistake in check_adapter(lora, quantization_bits(base), has_experts):
        raise UserError(f"{mistake.key}: {mistake.text}")
    settings = _peft_settings(base, lora, task_type, tokenizer)
    base.requires_grad_(False)
    wrapped = _insert_adapter(base, lora.method, settings, seed)
    cast_trained_to_float32(wrapped)
    embeddings.share_rows_with_heads(base)
    if lora.init_lora_weights == "loftq":
        if unquantized is None:
            raise UserError("lora.init_lora_weights=loftq needs the weights before quantization.")
        apply_loftq(wrapped, unquantized(), seed)
    if lora.splits_base_weights:
        record_initial_adapter(wrapped)
    # The other rows of the embeddings never change; and peft 0.21 would ask the hub for the base's
    # config at each save, to see whether the vocabulary grew.
    wrapped.save_pretrained = partial(wrapped.save_pretrained, save_embedding_layers=False)
    # TRL 1.16 calls it again.
    base.enable_input_require_grads = partial(_require_input_gradients, base)
    base.enable_input_require_grads()
    return wrapped


def _require_input_gradients(base: Any) -> None:
    """Have embeddings return what has a gradient: those of a tower only where it trains.

    transformers 5.23 would have the backward pass run through a frozen tower as well.
    """
    type(base).enable_input_require_grads(base)
    others = [base.get_submodule(name) for name in find_text_modules(base).others]
    frozen = [part for part in others if not any(p.requires_grad for p in part.parameters())]
    hooks = {key for part in frozen for layer in part.modules() for key in layer._forward_hooks}
    for hook in vars(base).get("_require_grads_hooks", ()):
        if hook.id in hooks:
            hook.remove()


def quantization_bits(model: Any) -> int | None:
    """Return 4 or 8 for a model whose layers bitsandbytes has quantized, None for others."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            return 4
        if isinstance(layer, Linear8bitLt):
            return 8
    return None


def _peft_settings(
    model: Any, lora: LoraSettings, task_type: str, tokenizer: Any | None
) -> dict[str, Any]:
    """Return the fields of peft's config; a setting that is null takes peft's own default."""
    facts = ADAPTERS[lora.method]
    settings: dict[str, Any] = {"target_modules": ALL_LINEAR} if facts.all_linear else {}
    settings |= {"task_type": task_type}
    # A null stands for peft's own default, and peft takes it for a value.
    settings |= {name: value for name, value in lora.items() if value is not None}
    for name in LUTHIER_SETTINGS:
        settings.pop(name, None)
    if settings.get("init_lora_weights") == "loftq":
        # A saved adapter that says so would be drawn again where it is loaded.
        settings["init_lora_weights"] = True
    has_layer_numbers = settings.get("layers_to_transform") is not None
    if has_layer_numbers and settings["target_modules"] == ALL_LINEAR:
        # peft 0.21 takes layers_to_transform with a list of names alone.
        settings["target_modules"] = linear_layer_suffixes(model, lora.vision)
    elif settings.get("target_modules") == ALL_LINEAR and find_routers(model):
        # peft's own all-linear takes routers, too.
        layers = find_target_layers(model, ALL_LINEAR, lora.vision)
        names = [name for name, _ in model.named_modules()]
        settings["target_modules"] = expert_adapters.shortest_names(layers, names)
    if settings.get("modules_to_save"):
        saved = scope_saved_modules(model, settings["modules_to_save"], lora.vision)
        settings["modules_to_save"] = saved
    settings |= expert_adapters.expert_settings(model, lora, settings)
    check_adapter_names(model, settings, task_type, lora.vision)
    settings |= _without_bypassed_layers(model, settings)
    settings |= head_settings(model, settings, facts.config)
    settings |= _without_other_parts(model, settings, facts.config, lora.vision)
    return embeddings.unify_token_rows(model, lora.method, settings, tokenizer)


def _without_bypassed_layers(model: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `exclude_modules` that keep peft's own `all-linear` off Mamba's kernels."""
    endings = bypassed_layer_suffixes(model) if settings.get("target_modules") else []
    if not endings:
        return {}
    excluded = settings.get("exclude_modules") or []
    if isinstance(excluded, str):
        return {"exclude_modules": rf"(?:{excluded})|{_endings_pattern(endings)}"}
    return {"exclude_modules": sorted({*excluded, *endings})}


def _without_other_parts(
    model: Any, settings: Mapping[str, Any], config_class: str, with_vision: bool
) -> dict[str, Any]:
    """Return the `exclude_modules` that keep peft off the parts that the rows do not reach.

    It is a pattern, since peft 0.21 knows no beginnings of names. A pattern in `target_modules`
    names whole names, and means what it says.
    """
    import peft

    targets = settings.get("target_modules")
    others = find_text_modules(model, with_vision).others
    is_supported = "exclude_modules" in getattr(peft, config_class).__dataclass_fields__
    if not others or not is_supported or (isinstance(targets, str) and targets != ALL_LINEAR):
        return {}
    patterns = [rf"(?:{'|'.join(re.escape(name) for name in others)})(?:\..*)?"]
    if excluded := settings.get("exclude_modules"):
        is_pattern = isinstance(excluded, str)
        patterns.append(f"(?:{excluded})" if is_pattern else _endings_pattern(excluded))
    return {"exclude_modules": "|".join(patterns)}


def _endings_pattern(endings: Iterable[str]) -> str:
    """Return the pattern of the names that end as one of these does, in whole parts."""
    return rf"(?:.*\.)?(?:{'|'.join(re.escape(ending) for ending in endings)})"


def _insert_adapter(model: Any, method: str, settings: dict[str, Any], seed: int) -> Any:
    """Let peft put the adapter in: it draws from `seed`, and no other random numbers move."""
    import peft
    import torch

    from luthier.model.expert_lora import adapt_experts

    if method == "adalora":
        settings = {"total_step": _PROVISIONAL_STEPS} | settings
    make_config: Any = getattr(peft, ADAPTERS[method].config)
    names = expert_adapters.read_base_names(model)
    dropout = settings.get("lora_dropout", 0.0)
    if method == "lora" and (settings.get("target_parameters") or names.taken):
        settings = settings | {"lora_dropout": 0.0}
    try:
        with torch.random.fork_rng(devices=_cuda_devices(model)), warnings.catch_warnings():
            # peft 0.21 looks for the patterns of parameters among layers.
            warnings.filterwarnings("ignore", message=".*keys did not match any targeted module")
            torch.manual_seed(seed)
            with expert_adapters.unconverted_targets():
                wrapped = adapt_experts(peft.get_peft_model(model, make_config(**settings)))
    except (ValueError, TypeError, ImportError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"lora: {error}") from error
    if method == "lora":
        if settings.get("lora_dropout", 0.0) != dropout:
            expert_adapters.set_dropout(wrapped, dropout)
        expert_adapters.make_config_portable(wrapped, names)
    return wrapped


def _cuda_devices(model: Any) -> set[int]:
    """Return the numbers of the GPUs that hold weights: their generators are kept, too."""
    return {p.device.index for p in model.parameters() if p.device.type == "cuda"}


# Adapters that start at something: LoftQ's correction, and parts of the base's weights.


def apply_loftq(model: Any, original: Any, seed: int) -> None:
    """Start each LoRA pair at the best correction of its 4-bit layer's error, or of each expert's.

    `original` is the model before quantization, by the same names. One round of LoftQ (Li et al.,
    https://arxiv.org/abs/2310.08659), with the scale of the adapter taken out. Raises UserError
    where a layer is missing in `original`.
    """
    import torch
    from peft.tuners.lora.bnb import Linear4bit

    from luthier.model.expert_lora import QuantizedExpertsLora

    weights = dict(original.named_parameters())
    with torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(model)):
        torch.manual_seed(seed)
        for name, layer in model.named_modules():
            if not isinstance(layer, Linear4bit | QuantizedExpertsLora):
                continue
            # peft wraps a module once for each of its parameters.
            module = name.removeprefix(_PREFIX).replace(".base_layer", "")
            key = f"{module}.{getattr(layer, 'parameter_name', 'weight')}"
            if key not in weights:
                raise UserError(
                    f"lora.init_lora_weights=loftq: the model before quantization has no {key}."
                )
            if isinstance(layer, Linear4bit):
                _correct_error(layer, weights[key].data)
            else:
                layer.correct_error(weights[key].data, _decompose)


def _correct_error(layer: Any, original: Any) -> None:
    """Set a LoRA pair to the truncated decomposition of its layer's quantization error."""
    from bitsandbytes.functional import dequantize_4bit

    weight = layer.base_layer.weight
    dequantized = dequantize_4bit(weight.data, weight.quant_state).float()
    error = original.to(dequantized.device).float() - dequantized
    left, right = _decompose(error, layer.r["default"])
    layer.lora_A["default"].weight.data = right.contiguous()
    layer.lora_B["default"].weight.data = left / layer.scaling["default"]


def _decompose(error: Any, rank: int) -> tuple[Any, Any]:
    """Return [..., rows, rank] and [..., rank, columns], whose product is nearest to `error`."""
    import torch

    columns = min(rank + _EXTRA_COLUMNS, *error.shape[-2:])
    left, size, right = torch.svd_lowrank(error, q=columns, niter=_POWER_ITERATIONS)
    root = size[..., None, :rank].sqrt()
    return left[..., :rank] * root, (right[..., :rank] * root).mT


def record_initial_adapter(model: Any) -> None:
    """Keep the adapter as it starts, for `convert_to_plain_lora`: peft took it out of the base."""
    from peft import get_peft_model_state_dict

    start = get_peft_model_state_dict(model, save_embedding_layers=False)
    model.start_of_adapter = {
        name: weight.detach().float().cpu().clone()
        for name, weight in start.items()
        if ".lora_A." in name or ".lora_B." in name
    }


def convert_to_plain_lora(model: Any, folder: Path) -> None:
    """Turn a saved adapter that started as a part of the base into one for the base as it was.

    The matrices that were taken out of the base at the start (A0, B0) go into the adapter with
    their sign turned: twice the rank, no scale, and it fits wherever LoRA does. Other adapters stay
    as they are.
    """
    import torch
    from peft.tuners.lora.layer import LoraLayer
    from safetensors.torch import load_file, save_file

    start = vars(model).get("start_of_adapter")
    if start is None:
        return
    weights = load_file(folder / "adapter_model.safetensors")
    scales = {
        f"{name}.": layer.scaling["default"]
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    for name, initial in start.items():
        weight = weights[name]
        if ".lora_A." in name:
            weights[name] = torch.cat([weight, initial.to(weight.dtype)], dim=0)
        else:
            scale = scales[name.partition("lora_")[0]]
            weights[name] = torch.cat([weight, -initial.to(weight.dtype)], dim=1) * scale
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    ranks = {name: 2 * rank for name, rank in config["rank_pattern"].items()}
    # Ranks and alphas are equal, so that the scale is one.
    config |= {
        "init_lora_weights": True,
        "use_rslora": False,
        "r": 2 * config["r"],
        "lora_alpha": 2 * config["r"],
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
    }
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# Trained weights in float32 inside a base of 16 bits, whatever peft makes of them. Under autocast
# mixed formats fit by themselves, but replies are generated without it.


def cast_trained_to_float32(model: Any) -> None:
    """Turn every trained weight of a `PeftModel` into float32 and make it fit into its base.

    Raises UserError for a trained bias that no layer can add in float32.
    """
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            # AdaLoRA's divisor: peft 0.21 casts 16-bit weights into new, trained parameters, and
            # this one must not train.
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _convert_trained_copies(model)
    _convert_outputs(model)
    _add_biases_outside(model)


def _convert_trained_copies(model: Any) -> None:
    """Have trained copies of whole layers take float32 in, and give the base's format out."""
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.utils import ModulesToSaveWrapper

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            original, copies = wrapper.original_module, wrapper.modules_to_save
        elif isinstance(wrapper, LNTuningLayer):
            original, copies = wrapper.base_layer, wrapper.ln_tuning_layers
        else:
            continue
        dtype = next((weight.dtype for weight in original.parameters()), None)
        if dtype is None:
            continue  # some norms of Gemma 4 have no weights, and nothing trains in a copy
        for layer in copies.values():
            layer.register_forward_pre_hook(_to_float32)
            layer.register_forward_hook(partial(_to_dtype, dtype))


def _to_float32(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if value.is_floating_point() else value for value in inputs)


def _to_dtype(dtype: Any, _layer: Any, _inputs: Any, output: Any) -> Any:
    return output.to(dtype)


def _convert_outputs(model: Any) -> None:
    """Have the layers of several methods (IA3, RoAd, RandLoRA, ...) return their input's format.

    They return float32 where their input has 16 bits.
    """
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, LoraLayer):
            layer.register_forward_hook(_to_input_dtype)


def _to_input_dtype(_layer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    layer_input = inputs[0] if inputs else output
    return output.to(layer_input.dtype) if layer_input.is_floating_point() else output


def _add_biases_outside(model: Any) -> None:
    """Have trained biases (`lora.bias`) added outside of layers that compute in 16 bits.

    bitsandbytes would round them to 16 bits for good, and torch refuses to mix formats.
    """
    import torch

    for name, layer in model.named_modules():
        bias = layer._parameters.get("bias")
        if bias is None or not bias.requires_grad:
            continue
        if layer._parameters["weight"].dtype == bias.dtype:
            continue
        if not isinstance(layer, torch.nn.Linear):
            raise UserError(
                f"lora.bias: the bias of {name} would train in float32 inside a layer of 16 bits, "
                "which only linear layers can do. Use lora.bias=lora_only, or model.dtype=float32."
            )
        layer.forward = partial(_add_bias_outside, layer)


class _WithoutBias:
    """A layer with all its attributes but its bias."""

    bias = None

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _add_bias_outside(layer: Any, layer_input: Any) -> Any:
    output = type(layer).forward(_WithoutBias(layer), layer_input)
    return output + layer.bias.to(output.dtype)


# Heads of new tasks beside an adapter: they train whole and are saved with it.


def head_settings(model: Any, settings: Mapping[str, Any], config_class: str) -> dict[str, Any]:
    """Return fields of a peft config by which heads train whole, are saved, and get no adapter.

    These are peft's own heads, and each layer that the checkpoint has no weights for (the model's
    `new_layers`, from `luthier.model.load.load_model`): a pooler or a head of another name would
    stay random and be lost with the run. `config_class` names the class of peft; the fields are
    empty for a task without a head.
    """
    if settings["task_type"] not in HEAD_TASKS:
        return {}
    import peft

    saved = settings.get("modules_to_save") or ()
    heads = {*vars(model).get("new_layers", ()), *HEAD_NAMES, *saved}
    # The names of these layers, and of all within them.
    names = [
        name
        for name, _ in model.named_modules()
        if any(f".{head}." in f".{name}." for head in heads)
    ]
    present = {head for head in heads if any(f".{name}".endswith(f".{head}") for name in names)}
    fields: dict[str, Any] = {"modules_to_save": sorted({*present, *saved})}
    excluded = settings.get("exclude_modules") or []
    if not isinstance(excluded, str):
        fields["exclude_modules"] = sorted({*excluded, *names})
    supported = getattr(peft, config_class).__dataclass_fields__
    return {name: value for name, value in fields.items() if name in supported}
