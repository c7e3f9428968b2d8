"""Adapters in float32 on any base, drawn from a seed: LoRA and peft's other methods by name."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.library_settings import LoraSettings
from luthier.config.methods import ADAPTERS, check_adapter
from luthier.errors import UserError
from luthier.model import embeddings
from luthier.model.adapter_targets import ALL_LINEAR, check_adapter_names, linear_layer_suffixes

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Adapters that do not start at nothing: LoftQ's correction, and parts of the base's weights.

_PREFIX = "base_model.model."
_ITERATIONS, _MORE = 4, 8
"""Power iterations and extra columns of the randomized decomposition."""


def apply_loftq(model: Any, original: Any, seed: int) -> None:
    """Start each LoRA pair at the best correction of its 4-bit layer's error.

    `original` is the model before quantization, by the same names. One round of LoftQ (Li et al.,
    https://arxiv.org/abs/2310.08659), with the scale of the adapter taken out. Raises UserError
    where a layer is missing in `original`.
    """
    import torch
    from peft.tuners.lora.bnb import Linear4bit

    weights = dict(original.named_parameters())
    with torch.no_grad(), torch.random.fork_rng(devices=_cuda(model)):
        torch.manual_seed(seed)
        for name, layer in model.named_modules():
            if isinstance(layer, Linear4bit):
                key = f"{name.removeprefix(_PREFIX)}.weight"
                if key not in weights:
                    raise UserError(
                        f"lora.init_lora_weights=loftq: the model before quantization has no {key}."
                    )
                _correct(layer, weights[key].data)


def record_initial_adapter(model: Any) -> None:
    """Keep the adapter as it starts, for `make_plain`: peft has taken it out of the base."""
    from peft import get_peft_model_state_dict

    start = get_peft_model_state_dict(model, save_embedding_layers=False)
    model.start_of_adapter = {
        name: weight.detach().float().cpu().clone()
        for name, weight in start.items()
        if _is_pair(name)
    }


def convert_to_plain_lora(model: Any, folder: Path) -> None:
    """Turn a saved adapter that started as a part of the base into one for the base as it was.

    What was taken out of the base at the start (A0, B0) goes into the adapter with its sign
    turned: twice the rank, no scale, and it fits wherever LoRA does. Other adapters stay as they
    are.
    """
    from safetensors.torch import load_file, save_file

    start = vars(model).get("start_of_adapter")
    if start is None:
        return
    weights = load_file(folder / "adapter_model.safetensors")
    scales = {f"{name}.": layer.scaling["default"] for name, layer in _layers(model)}
    for name, first in start.items():
        layer = name.partition("lora_")[0]
        weights[name] = _joined(name, weights[name], first, scales[layer])
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _write_config(folder / "adapter_config.json")


def _correct(layer: Any, wanted: Any) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit

    packed, rank = layer.base_layer.weight, layer.r["default"]
    got = dequantize_4bit(packed.data, packed.quant_state).float()
    error = wanted.to(got.device).float() - got
    columns = min(rank + _MORE, *error.shape)
    left, size, right = torch.svd_lowrank(error, q=columns, niter=_ITERATIONS)
    root = size[:rank].sqrt()
    layer.lora_A["default"].weight.data = (right[:, :rank] * root).T.contiguous()
    layer.lora_B["default"].weight.data = left[:, :rank] * root / layer.scaling["default"]


def _cuda(model: Any) -> set[int]:
    return {p.device.index for p in model.parameters() if p.device.type == "cuda"}


def _layers(model: Any) -> list[tuple[str, Any]]:
    from peft.tuners.lora.layer import LoraLayer

    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]


def _is_pair(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _joined(name: str, weight: Any, first: Any, scale: float) -> Any:
    import torch

    if ".lora_A." in name:
        return torch.cat([weight, first.to(weight.dtype)], dim=0)
    return torch.cat([weight, -first.to(weight.dtype)], dim=1) * scale


def _write_config(file: Path) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    ranks = {name: 2 * rank for name, rank in config["rank_pattern"].items()}
    config |= {
        "init_lora_weights": True,
        "use_rslora": False,
        "r": 2 * config["r"],
        "lora_alpha": 2 * config["r"],
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
    }
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# Trained weights in float32 inside a base of 16 bits, whatever peft makes them of.
#
# Under autocast mixed formats fit by themselves, but replies are generated without it.


def cast_trained_to_float32(model: Any) -> None:
    """Turn every trained weight of a `PeftModel` into float32 and let it stand in its base.

    Raises UserError for a trained bias that no layer can add in float32.
    """
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            # AdaLoRA's divisor: peft's cast of 16-bit weights makes a trained one of it.
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _let_copies_fit(model)
    _let_outputs_fit(model)
    _let_biases_fit(model)


def _let_copies_fit(model: Any) -> None:
    """Trained copies of whole layers convert at their edges."""
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.utils import ModulesToSaveWrapper

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            _convert(wrapper.original_module, wrapper.modules_to_save.values())
        elif isinstance(wrapper, LNTuningLayer):
            _convert(wrapper.base_layer, wrapper.ln_tuning_layers.values())


def _convert(original: Any, copies: Any) -> None:
    outside = next(original.parameters()).dtype
    for layer in copies:
        layer.register_forward_pre_hook(_to_float32)
        layer.register_forward_hook(partial(_to_dtype, outside))


def _to_float32(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if value.is_floating_point() else value for value in inputs)


def _to_dtype(dtype: Any, _layer: Any, _inputs: Any, output: Any) -> Any:
    return output.to(dtype)


def _let_outputs_fit(model: Any) -> None:
    """Several methods (IA3, RoAd, RandLoRA, ...) give float32 where they were given 16 bits."""
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, LoraLayer):
            layer.register_forward_hook(_as_given)


def _as_given(_layer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    given = inputs[0] if inputs else output
    return output.to(given.dtype) if given.is_floating_point() else output


def _let_biases_fit(model: Any) -> None:
    """A trained bias (`lora.bias`) is added outside of a layer that computes in 16 bits.

    bitsandbytes would round it to 16 bits for good, and torch refuses to mix formats.
    """
    import torch

    for name, layer in model.named_modules():
        bias = layer._parameters.get("bias")
        if bias is None or not bias.requires_grad or _agrees(layer, bias):
            continue
        if not isinstance(layer, torch.nn.Linear):
            raise UserError(
                f"lora.bias: the bias of {name} would train in float32 inside a layer of 16 bits, "
                "which only linear layers can do. Use lora.bias=lora_only, or model.dtype=float32."
            )
        layer.forward = partial(_add_bias_outside, layer)


def _agrees(layer: Any, bias: Any) -> bool:
    return layer._parameters["weight"].dtype == bias.dtype


class _WithoutBias:
    """A layer as it is, but for its bias."""

    bias = None

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _add_bias_outside(layer: Any, given: Any) -> Any:
    output = type(layer).forward(_WithoutBias(layer), given)
    return output + layer.bias.to(output.dtype)


# Heads of new tasks beside an adapter: they train whole and are saved with it.

HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS")
"""Tasks whose models have a head of their own, as peft calls them."""
HEAD_NAMES = ("classifier", "score")
"""What peft takes for the head of such a model."""


def head_settings(model: Any, settings: Mapping[str, Any], config: str) -> dict[str, Any]:
    """The fields of a config of peft's by which a head trains whole, is saved, and gets no adapter.

    That is peft's own head, and each layer that the checkpoint has no weights for (the model's
    `new_layers`, from `luthier.model.load.load_model`): a pooler or a head of another name would
    stay random and be lost with the run.
    """
    if settings["task_type"] not in HEAD_TASKS:
        return {}
    import peft

    asked = settings.get("modules_to_save") or ()
    whole = {*vars(model).get("new_layers", ()), *HEAD_NAMES, *asked}
    names = [name for name, _ in model.named_modules() if _is_in(name, whole)]
    found = {one for one in whole if any(f".{name}".endswith(f".{one}") for name in names)}
    given: dict[str, Any] = {"modules_to_save": sorted({*found, *asked})}
    excluded = settings.get("exclude_modules") or []
    if not isinstance(excluded, str):
        given["exclude_modules"] = sorted({*excluded, *names})
    known = getattr(peft, config).__dataclass_fields__
    return {name: value for name, value in given.items() if name in known}


def _is_in(name: str, layers: set[str]) -> bool:
    """Whether a layer is one of these, or within one."""
    return any(f".{layer}." in f".{name}." for layer in layers)


LUTHIER_SETTINGS = ("method", "plus_ratio", "loftq_config")
"""Settings that are none of peft's, or that luthier reads itself."""

_PLANNED = 2**31
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
    `task_type` is what the model does, as peft calls it: the head of a classifier (`SEQ_CLS`,
    `TOKEN_CLS`) trains whole and is saved with the adapter. `tokenizer` is for tokens that are
    named by their text, and `unquantized` gives the model's weights as they were, for LoftQ.
    Trained weights are float32; frozen ones keep their number formats. Gradients also reach the
    embeddings' output: gradient checkpointing needs it. Raises UserError for settings that peft
    refuses or cannot do on these weights, and for a name that matches no layer.
    """
    base: Any = model
    lora = LoraSettings(lora)
    _check(base, lora)
    settings = _settings(base, lora, task_type, tokenizer)
    base.requires_grad_(False)
    wrapped = _wrap(base, lora.method, settings, seed)
    cast_trained_to_float32(wrapped)
    embeddings.share_rows_with_heads(base)
    if lora.init_lora_weights == "loftq":
        if unquantized is None:
            raise UserError("lora.init_lora_weights=loftq needs the weights before quantization.")
        apply_loftq(wrapped, unquantized(), seed)
    if lora.splits_base_weights:
        record_initial_adapter(wrapped)
    # Its other rows never change; and peft would ask the hub for the base's config at each save.
    wrapped.save_pretrained = partial(wrapped.save_pretrained, save_embedding_layers=False)
    base.enable_input_require_grads()
    return wrapped


def quantization_bits(model: Any) -> int | None:
    """4 or 8 for a model whose layers bitsandbytes packs, None for others."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            return 4
        if isinstance(layer, Linear8bitLt):
            return 8
    return None


def _check(model: Any, lora: LoraSettings) -> None:
    for mistake in check_adapter(lora, quantization_bits(model)):
        raise UserError(f"{mistake.key}: {mistake.text}")


def _settings(
    model: Any, lora: LoraSettings, task_type: str, tokenizer: Any | None
) -> dict[str, Any]:
    """The fields of peft's config; what is null takes its own default."""
    facts = ADAPTERS[lora.method]
    settings: dict[str, Any] = {"target_modules": ALL_LINEAR} if facts.all_linear else {}
    settings |= {"task_type": task_type}
    settings |= {name: value for name, value in lora.items() if value is not None}
    for name in LUTHIER_SETTINGS:
        settings.pop(name, None)
    if settings.get("init_lora_weights") == "loftq":
        # A saved adapter that says so would be drawn again where it is loaded.
        settings["init_lora_weights"] = True
    if settings.get("layers_to_transform") is not None and settings["target_modules"] == ALL_LINEAR:
        settings["target_modules"] = linear_layer_suffixes(
            model
        )  # peft takes numbers with a list alone
    check_adapter_names(model, settings, task_type)
    settings |= head_settings(model, settings, facts.config)
    return embeddings.unify_token_rows(model, lora.method, settings, tokenizer)


def _wrap(model: Any, method: str, settings: dict[str, Any], seed: int) -> Any:
    """Let peft put the adapter in; it draws from `seed`, and nobody else's numbers move."""
    import torch
    from peft import get_peft_model

    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return get_peft_model(model, _peft_config(method, settings))
    except (ValueError, TypeError, ImportError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"lora: {error}") from error


def _peft_config(method: str, settings: dict[str, Any]) -> "PeftConfig":
    import peft
    from peft.tuners.adalora import AdaLoraConfig

    if method == "adalora":
        return AdaLoraConfig(**{"total_step": _PLANNED} | settings)
    make: Any = getattr(peft, ADAPTERS[method].config)
    return make(**settings)
