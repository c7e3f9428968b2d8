"""Models that come quantized: known from config.json before anything is loaded.

Adapters train on them where a kernel is there that has a backward; some can be dequantized while
loading instead (`quantization=dequantize`).
"""

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
    """Whether gradients go through its layers."""
    dequantize_class: str | None = None
    """The config class of transformers that dequantizes it while loading; None if nothing can."""


QUANTIZATION_FORMATS = {
    "bitsandbytes": QuantizationFormat("bitsandbytes", ("bitsandbytes",), trains=True),
    "gptq": QuantizationFormat("GPTQ", ("gptqmodel", "optimum"), trains=True),
    "awq": QuantizationFormat("AWQ", ("gptqmodel",), trains=True),
    "fp8": QuantizationFormat("fp8", ("kernels",), True, "FineGrainedFP8Config"),
    "mxfp8": QuantizationFormat("mxfp8", (), False, "FineGrainedFP8Config"),
    "mxfp4": QuantizationFormat("mxfp4", (), False, "Mxfp4Config"),
    "compressed-tensors": QuantizationFormat(
        "compressed-tensors", ("compressed_tensors",), False, "CompressedTensorsConfig"
    ),
}
"""The `quant_method` of a config.json -> its format."""


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
        problem = _dequantizing_problem(form)
    else:
        problem = _training_problem(form, config, machine) or _adapter_problem(form, config.lora)
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
    """Return the `quantization_config` that makes `from_pretrained` dequantize a model."""
    import transformers

    method = quantization_method(read_quantization_config(model) or {})
    name = str(QUANTIZATION_FORMATS[method].dequantize_class)
    make: Callable[..., Any] = getattr(transformers, name)
    return make(dequantize=True)


def cast_to_dtype(model: Any, dtype: str) -> Any:
    """Return a dequantized model with all weights in one number format.

    transformers leaves those that were never quantized in the checkpoint's.
    """
    import torch

    return model.to(getattr(torch, dtype))


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
        return f"it cannot be unpacked while loading; {able} can. Use quantization=none."
    return _missing_packages(form) if form.name == "compressed-tensors" else None


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
            "no gradient goes through its layers. Use quantization=dequantize, which makes whole "
            "weights of it while loading (in 16 bits: 2 bytes each)."
        )
    if not form.trains:
        return "luthier cannot train on that. Name the model that it was made from."
    if form.name == "fp8":
        import torch

        on_gpu = machine.device_type == "cuda"
        if not on_gpu or torch.cuda.get_device_capability() < FP8_CAPABILITY:
            return (
                f"{machine.device} does not multiply in fp8. Use quantization=dequantize, which "
                "makes whole weights of it while loading."
            )
    return _missing_packages(form)


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
