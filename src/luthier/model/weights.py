"""A model's weights on this machine, quantized if asked for, and safe to train."""

import os
from typing import TYPE_CHECKING, Any

from luthier.config.schema import ModelConfig
from luthier.environment import hush_kernels
from luthier.errors import UserError
from luthier.model import gguf, hub, prequantized, source
from luthier.model.machine import Machine
from luthier.model.randomness import random_state_kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    config: ModelConfig,
    quantization: dict[str, Any],
    machine: Machine,
    full: bool = False,
    kind: str = "AutoModelForCausalLM",
    **own: Any,
) -> "PreTrainedModel":
    """Return the model on `machine`, in evaluation mode, ready to get an adapter or to train.

    `quantization` holds fields of `transformers.BitsAndBytesConfig`, or `dequantize` for a model
    that comes quantized (`prequantized.check` says which can be); empty for none. With `full`
    (every weight trains) the weights are float32 whatever the machine computes in: in bfloat16
    small updates round to nothing. Its `new_layers` are those that the checkpoint has no weights
    for. `kind` is the class of transformers that picks the model's, and
    `own` holds further arguments of its `from_pretrained`. Raises UserError where the model cannot
    be had.
    """
    import transformers

    file = source.gguf_file(config.path)
    with random_state_kept():
        place = config.path if file is None else gguf.convert(file)
    hush_kernels()
    try:
        settings = _settings(config, quantization, machine, full) | own
        model, loaded = getattr(transformers, kind).from_pretrained(
            place, **settings, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise _explain(error, config, machine) from error
    if _unpacks(quantization):
        model = prequantized.in_one_format(model, settings["dtype"])
    model.config.use_cache = False
    model.new_layers = _new_layers(loaded)
    keep_trainable(model)
    return model


def _new_layers(loaded: dict[str, Any]) -> list[str]:
    """The layers that the checkpoint has no weights for, such as the head of a new task."""
    new = {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}
    return sorted({name.rpartition(".")[0] for name in new})


def keep_trainable(model: Any) -> None:
    """Keep 4-bit layers on the kernels that have a backward; do it before the first forward.

    On a CPU with AVX512-BF16, bitsandbytes repacks a 4-bit layer's weights at the first forward in
    evaluation mode without gradients, for a kernel without a backward. Training after that gets
    wrong gradients without an error (docs/model.md has the measurements).
    """
    from bitsandbytes.nn.modules import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def _settings(
    config: ModelConfig, quantization: dict[str, Any], machine: Machine, full: bool
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained`; `model.kwargs` has the last word."""
    local = source.needs_hub(config.path) and hub.is_out_of_reach()
    settings: dict[str, Any] = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "local_files_only": local,
        # transformers looks for an adapter beside the model, with settings of its own.
        "adapter_kwargs": {"local_files_only": local},
        "dtype": "float32" if full else machine.dtype,
        "attn_implementation": machine.attention,
    }
    if not _is_sharded():
        settings["device_map"] = {"": machine.device}
    if _unpacks(quantization):
        settings["quantization_config"] = prequantized.unpacking(config)
    elif quantization:
        settings["quantization_config"] = _quantization(quantization, machine)
    return settings | config.kwargs


def _unpacks(quantization: dict[str, Any]) -> bool:
    return quantization.get("dequantize") is True


def _quantization(quantization: dict[str, Any], machine: Machine) -> Any:
    """Return the config; 4-bit layers multiply in the machine's number format if none is given."""
    from transformers import BitsAndBytesConfig

    settings = {"bnb_4bit_compute_dtype": machine.dtype} | quantization
    make: Any = BitsAndBytesConfig
    return make(**settings)


def _is_sharded() -> bool:
    """Whether FSDP or DeepSpeed will place the weights: then nobody else may."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return any(os.environ.get(name, "false").lower() == "true" for name in names)


def _explain(error: Exception, config: ModelConfig, machine: Machine) -> Exception:
    """Return the error in the user's words, or as it was if it is none of the user's."""
    problem = hub.explain(error, config.path, "model.path")
    if problem is not None:
        return problem
    text = str(error)
    if "out of memory" in text.lower():
        return UserError(
            f"model.path={config.path} does not fit into the memory of {machine.device}.\n"
            "Use quantization=nf4 (about a third of the memory of bfloat16), or a smaller model."
        )
    if isinstance(error, RuntimeError):
        return error
    if "trust_remote_code" in text:
        text = (
            "its repository brings Python code of its own.\n"
            "Read that code, then allow it: model.trust_remote_code=true"
        )
    return UserError(f"model.path={config.path}: the model cannot be loaded: {text}")
