"""Models that come quantized: known from config.json before anything is loaded.

Adapters train on them where a kernel is there that has a backward; some can be dequantized while
loading instead (`quantization=dequantize`).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from luthier.config.library_settings import LoraSettings
from luthier.config.schema import ModelConfig, RunConfig
from luthier.errors import UserError
from luthier.model import source
from luthier.model.device import Machine
from luthier.model.model_files import read_config_file

FP8_CAPABILITY = (8, 9)
"""The first CUDA compute capability that multiplies in fp8."""
_STARTS_WITHOUT_WEIGHTS = (True, False, "gaussian")
"""Values of `lora.init_lora_weights` that do not look at the weights."""


@dataclass(frozen=True)
class QuantizationFormat:
    """A quantization that checkpoints come in."""

    name: str
    packages: tuple[str, ...] = ()
    """The packages that loading it takes."""
    trains: bool = False
    """Whether adapters train on its layers: transformers has a backward, and peft a layer."""
    dequantize_class: str | None = None
    """The config class of transformers that dequantizes it while loading; None if nothing can."""
    reason: str | None = None
    """Why nothing trains on it as it is."""


_NO_BACKWARD = "no gradient goes through its layers"
_NO_ADAPTER = "peft has no adapter for its layers"
QUANTIZATION_FORMATS = {
    "bitsandbytes": QuantizationFormat(
        "bitsandbytes", ("bitsandbytes",), True, "BitsAndBytesConfig"
    ),
    "gptq": QuantizationFormat("GPTQ", ("gptqmodel", "optimum"), trains=True),
    "awq": QuantizationFormat("AWQ", ("gptqmodel",), trains=True),
    "aqlm": QuantizationFormat("AQLM", ("aqlm",), trains=True),
    "hqq": QuantizationFormat("HQQ", ("hqq",), trains=True),
    "torchao": QuantizationFormat("torchao", ("torchao",), trains=True),
    "fp8": QuantizationFormat("fp8", ("kernels",), True, "FineGrainedFP8Config"),
    "mxfp8": QuantizationFormat("mxfp8", (), False, "FineGrainedFP8Config", _NO_BACKWARD),
    "mxfp4": QuantizationFormat("mxfp4", (), False, "Mxfp4Config", _NO_BACKWARD),
    "metal": QuantizationFormat("metal", (), False, "MetalConfig", _NO_BACKWARD),
    "compressed-tensors": QuantizationFormat(
        "compressed-tensors", ("compressed_tensors",), False, "CompressedTensorsConfig",
        "its layers are unpacked at their first forward, one by one and for good",
    ),
    "auto-round": QuantizationFormat("AutoRound", reason=_NO_BACKWARD),
    "bitnet": QuantizationFormat("BitNet", reason=_NO_ADAPTER),
    "eetq": QuantizationFormat("EETQ", reason=_NO_ADAPTER),
    "fbgemm_fp8": QuantizationFormat("fbgemm_fp8", reason=_NO_BACKWARD),
    "fouroversix": QuantizationFormat("fouroversix", reason=_NO_ADAPTER),
    "fp_quant": QuantizationFormat("FP-Quant", reason=_NO_ADAPTER),
    "gemma": QuantizationFormat("Gemma's own", reason=_NO_BACKWARD),
    "gguf": QuantizationFormat("GGUF", reason="such a model is loaded by its file: x.gguf"),
    "higgs": QuantizationFormat("HIGGS", reason=_NO_BACKWARD),
    "modelopt": QuantizationFormat("ModelOpt", reason="transformers 5.23 does not read it"),
    "nvfp4": QuantizationFormat("nvfp4", reason="transformers 5.23 does not read such files"),
    "quanto": QuantizationFormat("quanto", reason=_NO_ADAPTER),
    "quark": QuantizationFormat("Quark", reason=_NO_BACKWARD),
    "sinq": QuantizationFormat("SINQ", reason=_NO_ADAPTER),
    "spqr": QuantizationFormat("SpQR", reason=_NO_BACKWARD),
    "vptq": QuantizationFormat("VPTQ", reason=_NO_BACKWARD),
}  # fmt: skip
"""The `quant_method` of a config.json -> its format: all of transformers 5.23, and ModelOpt."""


def check_quantized_model(config: RunConfig, machine: Machine) -> None:
    """Raise UserError where the model comes quantized in a format that this run cannot train.

    Takes a look at config.json; nothing is loaded.
    """
    quantization = read_quantization_config(config.model)
    dequantize = config.quantization.dequantize
    if quantization is None and not dequantize:
        return
    if quantization is None:
        raise UserError(
            f"quantization.dequantize: {config.model.path} is not quantized. Use quantization=none."
        )
    method = quantization_method(quantization)
    form = QUANTIZATION_FORMATS.get(method, QuantizationFormat(method))
    if dequantize:
        problem = compressed_tensors_problem(config.model) or _dequantizing_problem(form)
    else:
        problem = (
            _training_problem(form, config, machine)
            or _variant_problem(quantization)
            or _adapter_problem(form, config.lora)
        )
    if problem:
        raise UserError(f"model.path={config.model.path} comes quantized ({form.name}): {problem}")


def read_quantization_config(model: ModelConfig) -> dict[str, Any] | None:
    """Return the `quantization_config` in a model's config.json; None if it has none.

    Raises UserError where the hub does not give the file.
    """
    if source.find_gguf_file(model.path) is not None:
        return None
    try:
        content = read_config_json(model)
    except OSError as error:
        raise source.explain_hub_error(error, model.path, "model.path") or UserError(
            f"model.path={model.path}: its config.json cannot be read: {error}"
        ) from error
    # Models of several parts, such as vision models, may keep it with their language model.
    text_config = content.get("text_config") or {}
    quantization: dict[str, Any] | None = content.get("quantization_config")
    return quantization or text_config.get("quantization_config")


def quantization_method(quantization: Mapping[str, Any]) -> str:
    """Return the method that a `quantization_config` names, a key of `QUANTIZATION_FORMATS`."""
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        return "bitsandbytes"
    return str(quantization.get("quant_method"))


def dequantize_config(model: ModelConfig) -> Any:
    """Return the `quantization_config` that makes `from_pretrained` dequantize a model.

    None for bitsandbytes, whose weights are unpacked when all are there. Raises UserError where
    transformers would unpack them wrongly.
    """
    import transformers

    if problem := compressed_tensors_problem(model):
        raise UserError(f"model.path={model.path} comes quantized (compressed-tensors): {problem}")
    method = quantization_method(read_quantization_config(model) or {})
    name = QUANTIZATION_FORMATS[method].dequantize_class
    if name is None or method == "bitsandbytes":
        return None
    make: Callable[..., Any] = getattr(transformers, name)
    return make(dequantize=True)


def finish_dequantizing(model: Any, dtype: str) -> Any:
    """Return a model that was dequantized while loading, as one that never was quantized.

    All weights are in one number format (transformers leaves those that were never quantized in the
    checkpoint's), and the model is saved under the names of an unquantized checkpoint.
    """
    import torch

    if getattr(model, "is_quantized", False):
        model = model.dequantize()  # bitsandbytes unpacks when all weights are there
    _save_unquantized(model)
    remove_quantization_mark(model.config)
    return model.to(getattr(torch, dtype))


def _save_unquantized(model: Any) -> None:
    """Have `save_pretrained` write the weights as they are.

    transformers 5.23 reverses on saving what it did on loading, dequantizing included: fp8 is
    quantized again without a mark in config.json, mxfp4 is saved unpacked under the names of its
    packed bytes, and mixtures stop in "Undefined Operation encountered!".
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    def identify(conversion: Any) -> tuple[Any, ...]:
        return (conversion.scope_prefix, *conversion._original_target_patterns)

    unquantized = {identify(each): each for each in get_model_conversion_mapping(model)}
    conversions = []
    for conversion in getattr(model, "_weight_conversions", None) or []:
        steps = getattr(conversion, "operations", [])
        if not any(hasattr(step, "hf_quantizer") for step in steps):
            conversions.append(conversion)
        elif len(steps) > 1:
            conversions.append(unquantized[identify(conversion)])
    model._weight_conversions = conversions


def remove_quantization_mark(architecture: Any) -> None:
    """Remove the `quantization_config` of a configuration and of its text part (Kimi K2.5)."""
    for part in (architecture, architecture.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def read_config_json(model: ModelConfig) -> dict[str, Any]:
    """Return a model's config.json; OSError where it cannot be had, UserError for a damaged one."""
    content = read_config_file(_config_file(model))
    if content is None:
        raise FileNotFoundError("there is no config.json")
    return content


def _config_file(model: ModelConfig) -> Path:
    """Return the config.json of a model on this machine, fetched from the hub where it is not."""
    if source.is_local(model.path):
        return Path(model.path).expanduser() / "config.json"
    from huggingface_hub import hf_hub_download

    local = source.is_hub_unreachable()
    return Path(
        hf_hub_download(model.path, "config.json", revision=model.revision, local_files_only=local)
    )


def _dequantizing_problem(form: QuantizationFormat) -> str | None:
    """Return why a model cannot be dequantized while loading; None if it can."""
    if form.dequantize_class is None:
        formats = QUANTIZATION_FORMATS.values()
        able = ", ".join(other.name for other in formats if other.dequantize_class)
        advice = (
            "Use quantization=none." if form.trains else "Name the model that it was made from."
        )
        return f"it cannot be unpacked while loading; {able} can. {advice}"
    return None if form.trains and form.name == "fp8" else _missing_packages(form)


# What transformers 5.23 unpacks of compressed-tensors' schemes, tried with compressed-tensors 0.20.
# Experts in other schemes come out wrong without an error (NVFP4 without the scale of the matrix,
# by a factor of thousands), or loading stops in a traceback.
_DENSE_FORMATS = (
    "pack-quantized", "float-quantized", "int-quantized", "naive-quantized",
    "nvfp4-pack-quantized",
)  # fmt: skip
_EXPERT_NAMES = ("model.layers.9.mlp.experts.0.up_proj", "model.layers.9.mlp.experts.0.down_proj")
_EXPERT_COUNTS = re.compile(r"(^|_)(num|n)_(\w+_)?experts$")
"""Keys of a config.json that count the experts of a mixture."""


def compressed_tensors_problem(model: ModelConfig) -> str | None:
    """Return why transformers cannot unpack a compressed-tensors checkpoint; None if it can."""
    quantization = read_quantization_config(model) or {}
    if quantization_method(quantization) != "compressed-tensors":
        return None
    groups = list((quantization.get("config_groups") or {}).values())
    of_experts = [group for group in groups if _names_experts(group)]
    dense = [group for group in groups if not _names_experts(group)]
    if (quantization.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return f"transformers 5.23 does not unpack sparse weights. {_NAME_ORIGINAL}"
    if len(dense) > 1 or len(of_experts) > 1:
        return f"transformers 5.23 unpacks one scheme for all layers, not several. {_NAME_ORIGINAL}"
    for group in groups:
        weights, form = _weights_scheme(group, quantization)
        if form not in _DENSE_FORMATS or weights.get("actorder") in ("group", True):
            scheme = _describe_scheme(weights, form)
            return f"luthier has not tried its scheme ({scheme}). {_NAME_ORIGINAL}"
    if not _packs_experts(model, quantization):
        return None
    for group in of_experts or dense:
        weights, form = _weights_scheme(group, quantization)
        if not _unpacks_experts(weights, form):
            scheme = _describe_scheme(weights, form)
            return f"transformers 5.23 does not unpack experts in {scheme}. {_NAME_ORIGINAL}"
    return None


_NAME_ORIGINAL = "Name the model that it was made from."


def _names_experts(group: Mapping[str, Any]) -> bool:
    """Return whether a group is the one that transformers takes for that of the experts."""
    return any(str(t).startswith("re:") and "experts" in t for t in group.get("targets") or [])


def _packs_experts(model: ModelConfig, quantization: Mapping[str, Any]) -> bool:
    """Return whether the model is a mixture whose experts are not among those left unquantized."""
    content = read_config_json(model)
    if not any(map(_EXPERT_COUNTS.search, [*content, *(content.get("text_config") or {})])):
        return False
    patterns = [p for p in quantization.get("ignore") or [] if p.startswith("re:")]
    return not any(
        re.match(p.removeprefix("re:"), name) for p in patterns for name in _EXPERT_NAMES
    )


def _weights_scheme(
    group: Mapping[str, Any], quantization: Mapping[str, Any]
) -> tuple[Mapping[str, Any], str]:
    """Return how the weights of a group are quantized, and the format of their tensors."""
    return group.get("weights") or {}, str(group.get("format") or quantization.get("format"))


def _unpacks_experts(weights: Mapping[str, Any], form: str) -> bool:
    """Return whether transformers 5.23 unpacks the experts of a mixture in a scheme."""
    if weights.get("type") == "float":
        return weights.get("num_bits") == 8 and weights.get("strategy") in ("channel", "tensor")
    return form == "pack-quantized" and bool(weights.get("symmetric", True))


def _describe_scheme(weights: Mapping[str, Any], form: str) -> str:
    keys = ("num_bits", "type", "strategy", "symmetric", "actorder")
    return ", ".join([form, *(f"{key}={weights[key]}" for key in keys if key in weights)])


def _training_problem(form: QuantizationFormat, config: RunConfig, machine: Machine) -> str | None:
    """Return why nothing can train on a model as it comes; None if something can."""
    if config.quantization.is_enabled:
        unpacked = " or =dequantize, which gives whole weights" if form.dequantize_class else ""
        return (
            "it cannot be quantized again. Use quantization=none for it as it is"
            f"{unpacked}; or name the model that it was made from."
        )
    if not form.trains and form.dequantize_class:
        return (
            f"{form.reason}. Use quantization=dequantize, which makes whole weights of it while "
            "loading (in 16 bits: 2 bytes each)."
        )
    if not form.trains:
        reason = form.reason or "luthier does not know that format"
        return f"{reason}. Name the model that it was made from."
    if form.name == "HQQ" and machine.device_type != "cuda":
        return f"transformers has no kernel for it on {machine.device}. {_NAME_ORIGINAL}"
    if form.name == "fp8":
        import torch

        on_gpu = machine.device_type == "cuda"
        if not on_gpu or torch.cuda.get_device_capability() < FP8_CAPABILITY:
            return (
                f"{machine.device} does not multiply in fp8. Use quantization=dequantize, which "
                "makes whole weights of it while loading."
            )
    return _missing_packages(form)


def _variant_problem(quantization: Mapping[str, Any]) -> str | None:
    """Return why nothing trains on this variant of a format that trains; None if something does."""
    if quantization_method(quantization) != "torchao":
        return None
    kind = next(iter((quantization.get("quant_type") or {}).values()), None) or {}
    name = str(kind.get("_type") if isinstance(kind, Mapping) else kind)
    # As transformers 5.23 reads it.
    if "8weight" in name.lower():
        return None
    return f"no gradient goes through {name}, only through 8 bits. {_NAME_ORIGINAL}"


def _adapter_problem(form: QuantizationFormat, lora: LoraSettings) -> str | None:
    """Return why this adapter cannot train on quantized weights; None if it can."""
    if not lora.is_enabled:
        return (
            "quantized weights cannot be trained. Add lora=default, or name the model that it was "
            "made from."
        )
    if form.name == "bitsandbytes":
        return None  # its layers are those of quantization=nf4 and int8
    if lora.method != "lora" or lora.use_dora:
        return "only plain LoRA trains on it: lora.method=lora and lora.use_dora=false."
    if lora.init_lora_weights not in _STARTS_WITHOUT_WEIGHTS:
        start = f"lora.init_lora_weights={lora.init_lora_weights}"
        return f"{start} needs the weights themselves. Use true."
    return None


def _missing_packages(form: QuantizationFormat) -> str | None:
    """Return which packages are missing for a format, and how to install them; None for none."""
    missing = [name for name in form.packages if find_spec(name) is None]
    if not missing:
        return None
    names = " ".join(name.replace("_", "-") for name in missing)
    return f"its layers need {' and '.join(missing)}: pip install {names}"
