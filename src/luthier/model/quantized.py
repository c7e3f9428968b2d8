"""Models that come quantized: known from config.json before anything is loaded.

Adapters train on them where a kernel is there that has a backward; some can be unpacked to whole
weights instead (`quantization=dequantize`).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from luthier.config.library_settings import LoraSettings, QuantizationSettings
from luthier.config.schema import ModelConfig, RunConfig
from luthier.errors import UserError
from luthier.model import source
from luthier.model.device import Machine

FP8_CAPABILITY = (8, 9)
"""The first CUDA compute capability that multiplies in fp8."""
_STARTS = (True, False, "gaussian")
"""`lora.init_lora_weights` that do not look at the weights."""


@dataclass(frozen=True)
class QuantizationFormat:
    """A way of quantizing that checkpoints come in."""

    name: str
    packages: tuple[str, ...] = ()
    """What it takes to load it."""
    trains: bool = False
    """Whether gradients go through its layers."""
    whole: str | None = None
    """The config class of transformers that unpacks it while loading."""


QUANTIZATION_FORMATS = {
    "bitsandbytes": QuantizationFormat("bitsandbytes", ("bitsandbytes",), trains=True),
    "gptq": QuantizationFormat("GPTQ", ("gptqmodel", "optimum"), trains=True),
    "awq": QuantizationFormat("AWQ", ("gptqmodel",), trains=True),
    "fp8": QuantizationFormat("fp8", ("kernels",), trains=True, whole="FineGrainedFP8Config"),
    "mxfp8": QuantizationFormat("mxfp8", whole="FineGrainedFP8Config"),
    "mxfp4": QuantizationFormat("mxfp4", whole="Mxfp4Config"),
    "compressed-tensors": QuantizationFormat(
        "compressed-tensors", ("compressed_tensors",), whole="CompressedTensorsConfig"
    ),
}


def check_quantized_model(config: RunConfig, machine: Machine) -> None:
    """Raise UserError where the model comes quantized in a way that this run cannot train.

    Takes a look at config.json; nothing is loaded.
    """
    found = read_quantization_config(config.model)
    dequantize = config.quantization.dequantize
    if found is None and not dequantize:
        return
    if found is None:
        raise UserError(
            f"quantization.dequantize: {config.model.path} is not quantized. Use quantization=none."
        )
    method = quantization_method(found)
    form = QUANTIZATION_FORMATS.get(method, QuantizationFormat(method))
    problem = (
        _cannot_unpack(form)
        if dequantize
        else _twice(form, config.quantization)
        or _no_backward(form)
        or _no_kernel(form, machine)
        or _wrong_adapter(form, config.lora)
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
        content = json.loads(_config_file(model).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise source.explain_hub_error(error, model.path, "model.path") or UserError(
            f"model.path={model.path}: its config.json cannot be read: {error}"
        ) from error
    below = content.get("text_config") or {}
    found: dict[str, Any] | None = content.get("quantization_config") or below.get(
        "quantization_config"
    )
    return found


def quantization_method(found: Mapping[str, Any]) -> str:
    """The way of quantizing that a `quantization_config` names."""
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return "bitsandbytes"
    return str(found.get("quant_method"))


def dequantize_config(model: ModelConfig) -> Any:
    """Return the `quantization_config` that makes `from_pretrained` give whole weights."""
    import transformers

    found = read_quantization_config(model) or {}
    make: Callable[..., Any] = getattr(
        transformers, str(QUANTIZATION_FORMATS[quantization_method(found)].whole)
    )
    return make(dequantize=True)


def cast_to_dtype(model: Any, dtype: str) -> Any:
    """Return an unpacked model with all weights in one number format.

    transformers leaves those that were never packed in the checkpoint's.
    """
    import torch

    return model.to(getattr(torch, dtype))


def _config_file(model: ModelConfig) -> Path:
    if source.is_local(model.path):
        return Path(model.path).expanduser() / "config.json"
    from huggingface_hub import hf_hub_download

    local = source.is_hub_unreachable()
    return Path(
        hf_hub_download(model.path, "config.json", revision=model.revision, local_files_only=local)
    )


def _cannot_unpack(form: QuantizationFormat) -> str | None:
    if form.whole is None:
        able = ", ".join(one.name for one in QUANTIZATION_FORMATS.values() if one.whole)
        return f"it cannot be unpacked while loading; {able} can. Use quantization=none."
    return _missing(form) if form.name == "compressed-tensors" else None


def _twice(form: QuantizationFormat, quantization: QuantizationSettings) -> str | None:
    if not quantization.is_enabled:
        return None
    whole = " or =dequantize, which gives whole weights" if form.whole else ""
    return (
        "it cannot be quantized again. Use quantization=none for it as it is"
        f"{whole}; or name the model that it was made from."
    )


def _no_backward(form: QuantizationFormat) -> str | None:
    if form.trains:
        return None
    if form.whole:
        return (
            "no gradient goes through its layers. Use quantization=dequantize, which makes whole "
            "weights of it while loading (in 16 bits: 2 bytes each)."
        )
    return "luthier cannot train on that. Name the model that it was made from."


def _no_kernel(form: QuantizationFormat, machine: Machine) -> str | None:
    if form.name == "fp8" and not _multiplies_fp8(machine):
        return (
            f"{machine.device} does not multiply in fp8. Use quantization=dequantize, which makes "
            "whole weights of it while loading."
        )
    return _missing(form)


def _multiplies_fp8(machine: Machine) -> bool:
    import torch

    return machine.device_type == "cuda" and torch.cuda.get_device_capability() >= FP8_CAPABILITY


def _missing(form: QuantizationFormat) -> str | None:
    missing = [name for name in form.packages if find_spec(name) is None]
    if not missing:
        return None
    names = " ".join(name.replace("_", "-") for name in missing)
    return f"its layers need {' and '.join(missing)}: pip install {names}"


def _wrong_adapter(form: QuantizationFormat, lora: LoraSettings) -> str | None:
    if not lora.is_enabled:
        return (
            "quantized weights cannot be trained. Add lora=default, or name the model that it was "
            "made from."
        )
    if form.name == "bitsandbytes":
        return None  # its layers are those of quantization=nf4 and int8
    if lora.method != "lora" or lora.use_dora:
        return "only plain LoRA trains on it: lora.method=lora and lora.use_dora=false."
    if lora.init_lora_weights not in _STARTS:
        start = f"lora.init_lora_weights={lora.init_lora_weights}"
        return f"{start} needs the weights themselves. Use true."
    return None
