"""A model's weights on this machine, quantized if asked for, and safe to train."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.library_settings import QuantizationSettings
from luthier.config.schema import ModelConfig
from luthier.environment import quiet_bitsandbytes
from luthier.errors import UserError
from luthier.model import gguf, quantized, source
from luthier.model.artifact import ADAPTER_CONFIG_FILE, Artifact, wrong_base_message
from luthier.model.device import Machine, preserve_random_state
from luthier.storage.sizes import read_safetensors_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASK_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
"""What a model does, as peft calls it -> the class of transformers that such models load by."""


def auto_class(task: str) -> Any:
    """Return the class of transformers that picks a model's own class for `task`.

    `task` is a key of `TASK_CLASSES`. Whatever loads or builds a model asks here, so that this
    function alone decides which class a model gets.
    """
    import transformers

    return getattr(transformers, TASK_CLASSES[task])


def load_model(
    config: ModelConfig,
    quantization: Mapping[str, Any],
    machine: Machine,
    full: bool = False,
    task: str = "CAUSAL_LM",
    **own: Any,
) -> "PreTrainedModel":
    """Return the model on `machine`, in evaluation mode, ready to get an adapter or to train.

    `quantization` holds fields of `transformers.BitsAndBytesConfig`, or `dequantize` for a model
    that comes quantized (`prequantized.check` says which can be); empty for none. With `full`
    (every weight trains) the weights are float32 whatever the machine computes in: in bfloat16
    small updates round to nothing. Its `new_layers` are those that the checkpoint has no weights
    for. `task` is what the model does, a key of `TASK_CLASSES`, and `own` holds further arguments
    of `from_pretrained`. Raises UserError where the model cannot be had.
    """
    quantization = QuantizationSettings(quantization)
    file = source.find_gguf_file(config.path)
    with preserve_random_state():
        place = config.path if file is None else gguf.convert_model(file)
    quiet_bitsandbytes()
    try:
        settings = _settings(config, quantization, machine, full) | own
        model, loaded = auto_class(task).from_pretrained(
            place, **settings, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise _explain(error, config, machine) from error
    if quantization.dequantize:
        model = quantized.cast_to_dtype(model, settings["dtype"])
    model.config.use_cache = False
    model.new_layers = _new_layers(loaded)
    keep_backward_kernels(model)
    return model


def _new_layers(loaded: dict[str, Any]) -> list[str]:
    """The layers that the checkpoint has no weights for, such as the head of a new task."""
    new = {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}
    return sorted({name.rpartition(".")[0] for name in new})


def keep_backward_kernels(model: Any) -> None:
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
    config: ModelConfig, quantization: QuantizationSettings, machine: Machine, full: bool
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained`; `model.kwargs` has the last word."""
    local = source.needs_hub(config.path) and source.is_hub_unreachable()
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
    if quantization.dequantize:
        settings["quantization_config"] = quantized.dequantize_config(config)
    elif quantization.is_enabled:
        settings["quantization_config"] = _quantization(quantization, machine)
    return settings | config.kwargs


def _quantization(quantization: QuantizationSettings, machine: Machine) -> Any:
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
    problem = source.explain_hub_error(error, config.path, "model.path")
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


# An artifact's weights on this machine, with its adapter, ready to answer.

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"

LABELS_FILE = "labels.json"
"""The file beside a classifier's or tagger's adapter that names its labels."""


def load_trained(
    artifact: Artifact,
    machine: Machine,
    tokenizer: Any,
    quantization: Mapping[str, Any] | None = None,
    **own: Any,
) -> Any:
    """Return the model with its adapter, in evaluation mode, none of it training.

    `quantization`: fields of `BitsAndBytesConfig`; None for what the artifact was trained in.
    `own`: further arguments of `from_pretrained`. Raises UserError where the adapter does not go on
    its base.
    """
    if artifact.adapter is not None and not (artifact.adapter / ADAPTER_WEIGHTS_FILE).is_file():
        raise UserError(f"{artifact.name}: {artifact.adapter} has no {ADAPTER_WEIGHTS_FILE}.")
    packed = artifact.quantization if quantization is None else quantization
    own = {**label_settings(artifact), **own}
    model: Any = load_model(artifact.base, packed, machine, task=artifact.task, **own)
    if artifact.adapter is not None:
        _grow(model, tokenizer)
        model = attach_adapter(model, artifact)
    model.requires_grad_(False)
    return model.eval()


def label_settings(artifact: Artifact) -> dict[str, Any]:
    """What the base of an adapter must be told of its labels, as arguments of `from_pretrained`."""
    if artifact.adapter is None or not (artifact.adapter / LABELS_FILE).is_file():
        return {"num_labels": 1} if artifact.is_reward else {}
    found: dict[str, Any] = json.loads((artifact.adapter / LABELS_FILE).read_text("utf-8"))
    # JSON has names for keys, and from_pretrained takes arguments as they are.
    return found | {"id2label": {int(key): name for key, name in found["id2label"].items()}}


def attach_adapter(model: Any, artifact: Artifact) -> Any:
    """Return the base with the artifact's adapter on it, its weights as they were saved.

    Raises UserError where the adapter does not go on this base.
    """
    from peft import PeftModel

    folder = artifact.adapter
    assert folder is not None
    try:
        with warnings.catch_warnings():
            # Missing weights are looked for below, and are an error.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            tuned = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(_other_base(artifact, folder, _first_line(error))) from error
    _check_whole(artifact, folder, tuned)
    return tuned


def _grow(model: Any, tokenizer: Any) -> None:
    """Make room for tokens that the training added; their rows come with the adapter."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(highest + 1, mean_resizing=False)


def _check_whole(artifact: Artifact, folder: Path, tuned: Any) -> None:
    """Raise UserError unless the layers in the adapter's file are those that the base has."""
    from peft import get_peft_model_state_dict

    file = folder / ADAPTER_WEIGHTS_FILE
    saved = {name for name in read_safetensors_header(file).tensors if ".lora_" in name}
    have = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    placed = {name for name in have if ".lora_" in name}
    if saved - placed:
        why = f"it has no layer for {min(saved - placed)}"
        raise UserError(_other_base(artifact, folder, why))
    if placed - saved:
        why = f"the adapter has no weights for {min(placed - saved)}"
        raise UserError(_other_base(artifact, folder, why))


def _other_base(artifact: Artifact, folder: Path, why: str) -> str:
    adapter = json.loads((folder / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
    return wrong_base_message(artifact.name, adapter, artifact.base.path, why)


def _first_line(error: Exception) -> str:
    """The most telling line of an error of torch's or peft's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "size mismatch" in line), lines[0] if lines else "?")


# Models without weights: their layers alone, on torch's meta device.


def build_empty_model(architecture: Any, task: str, **settings: Any) -> Any:
    """Return the model of a `PretrainedConfig` on torch's meta device: shapes without weights.

    `task` is a key of `TASK_CLASSES`, `settings` are further arguments of `from_config`. Raises
    what transformers raises for an architecture that it cannot build.
    """
    import torch

    with torch.device("meta"):
        return auto_class(task).from_config(architecture, **settings)


def insert_quantized_layers(model: Any, quantization: Mapping[str, Any]) -> Any:
    """Put bitsandbytes' layers into an empty model, where loading would put them.

    `quantization` holds fields of `transformers.BitsAndBytesConfig`. Returns the quantizer of
    transformers, whose `postprocess_model` finishes the model's config.
    """
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    settings = BitsAndBytesConfig.from_dict(dict(quantization))
    quantizer: Any = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    return quantizer
