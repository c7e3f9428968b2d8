"""Models on this machine: loaded for training, or loaded with their adapter."""

import copy
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.library_settings import QuantizationSettings
from luthier.config.schema import ModelConfig
from luthier.environment import quiet_bitsandbytes
from luthier.errors import UserError
from luthier.model import gguf, loader, quantized, source
from luthier.model.adapter_keys import open_adapter
from luthier.model.adapter_targets import find_bypassed_layers
from luthier.model.artifact import Artifact, wrong_base_message
from luthier.model.device import VARLEN_ATTENTION, Machine, preserve_random_state
from luthier.model.embeddings import count_embedding_rows
from luthier.model.expert_adapters import load_adapter
from luthier.model.experts import find_experts
from luthier.model.model_class import (
    build_empty_model,
    choose_attention,
    expose_backbone,
    find_text_modules,
    has_varlen_attention,
    is_within,
    resolve_model_class,
)
from luthier.model.model_files import (
    ADAPTER_WEIGHTS_FILE,
    WEIGHT_INDEX_FILE,
    list_indexed_weights,
    read_adapter_config,
    read_labels,
)
from luthier.storage.sizes import read_safetensors_header

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_PACKED_EXPERT = re.compile(r"(?:^|\.)experts\.(?:.*\.)?(?:absmax|SCB)$")
"""The name of the scales of an expert that bitsandbytes has packed, in 4 or in 8 bits."""
_WRITING_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
"""Tasks whose models have no new layers: what a checkpoint lacks is missing."""


def read_model_config(config: ModelConfig) -> "PretrainedConfig":
    """Return transformers' configuration of a model, with the fields that `model.kwargs` set.

    It is read from this machine where it is there. Raises UserError where it cannot be had or read.
    """
    file = source.find_gguf_file(config.path)
    try:
        return _read_architecture(config, config.path if file is None else gguf.convert_model(file))
    except (OSError, ValueError) as error:
        raise source.explain_hub_error(error, config.path, "model.path") or UserError(
            f"model.path={config.path}: its config.json cannot be read: {error}"
        ) from error


def _read_architecture(config: ModelConfig, path: "str | Path") -> "PretrainedConfig":
    """Return the configuration of the model at `path`, which is a folder or a hub name."""
    from transformers import AutoConfig

    if config.loader is not None:
        return loader.read_architecture(config, path)
    architecture, _ = AutoConfig.from_pretrained(
        path,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        local_files_only=source.needs_hub(config.path) and source.is_hub_unreachable(),
        return_unused_kwargs=True,
        **config.kwargs,
    )
    return architecture


def resolve_attention(
    config: ModelConfig, machine: Machine, task: str, packs: bool = False
) -> Machine:
    """Return the machine with the attention that the model's text part gets on it.

    `task` is a key of `model_class.TASK_CLASSES`. Where rows are packed (`packs`), `auto` takes
    varlen attention in place of sdpa. Takes a look at config.json; nothing is loaded.
    Raises UserError where the class of the model lacks the attention that the config names.
    """
    if config.loader is not None:
        # Its class is not known before it is loaded, which has sdpa or says what it has.
        is_open = config.attention == "auto"
        return replace(machine, attention="sdpa") if is_open else machine
    architecture = read_model_config(config)
    model_class = resolve_model_class(architecture, task, config.trust_remote_code)
    attention = choose_attention(architecture, model_class, machine.attention, config.attention)
    chosen = attention if isinstance(attention, str) else attention[""]
    if packs and config.attention == "auto" and chosen == "sdpa":
        is_varlen = has_varlen_attention(architecture, model_class)
        chosen = VARLEN_ATTENTION if is_varlen else chosen
    return replace(machine, attention=chosen)


def load_model(
    config: ModelConfig,
    quantization: Mapping[str, Any],
    machine: Machine,
    full: bool = False,
    task: str = "CAUSAL_LM",
    **kwargs: Any,
) -> "PreTrainedModel":
    """Return the model on `machine`, in evaluation mode, ready to get an adapter or to train.

    `quantization` holds fields of `transformers.BitsAndBytesConfig`, or `dequantize` for a model
    that comes quantized (`check_quantized_model` says which can be); empty for none. With `full`
    (every weight trains) the weights are float32 whatever the machine computes in: in bfloat16
    small updates round to nothing. `task` is a key of `model_class.TASK_CLASSES`, and `kwargs` are
    further arguments of `from_pretrained`. The model's `new_layers` are the names of those that the
    checkpoint has no weights for. Raises UserError where the model cannot be had.
    """
    quantization = QuantizationSettings(quantization)
    # A conversion builds a model, which draws: a run must not differ by what is in the cache.
    file = source.find_gguf_file(config.path)
    with preserve_random_state():
        path = config.path if file is None else gguf.convert_model(file)
    quiet_bitsandbytes()
    try:
        if config.loader is not None:
            model = _load_by_function(config, path, quantization, machine, full, kwargs)
            return _prepare_model(model)
        architecture = _read_architecture(config, path)
        model_class = resolve_model_class(architecture, task, config.trust_remote_code)
        _refuse_packed_experts(config, path, architecture, task)
        attention = choose_attention(architecture, model_class, machine.attention, config.attention)
        if machine.attention == VARLEN_ATTENTION:
            from luthier.model.varlen_attention import register_varlen_attention

            register_varlen_attention()
        settings = {
            **_load_settings(config, quantization, machine, full),
            "attn_implementation": attention,
            **config.kwargs,
            **kwargs,
        }
        _leave_modules_unpacked(settings, config, architecture, task)
        with _pack_experts(quantization):
            model, loaded = model_class.from_pretrained(path, **settings, output_loading_info=True)
    except Exception as error:
        raise _as_user_error(error, config, machine) from error
    if quantization.dequantize:
        model = quantized.finish_dequantizing(model, settings["dtype"])
    # Layers that the checkpoint has no weights for, such as the head of a new task.
    new = {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}
    if new and task in _WRITING_TASKS:
        raise UserError(
            f"model.path={config.path}: its weight files lack {min(new)}"
            + (f" and {len(new) - 1} more" if len(new) > 1 else "")
            + ", which would be random.\nFetch or copy the model again, weights and config.json."
        )
    return _prepare_model(model, sorted({name.rpartition(".")[0] for name in new}))


def _prepare_model(model: Any, new_layers: Sequence[str] = ()) -> Any:
    """Return a loaded model, set up to get an adapter or to train."""
    # Training has no use for keys and values of earlier tokens, and warns of them.
    model.config.use_cache = False
    # A checkpoint may ask for its routers' loss, which TRL would compute: the trainer's settings
    # say whether it is (docs/methods.md).
    text_config = model.config.get_text_config()
    if getattr(text_config, "output_router_logits", False):
        text_config.output_router_logits = False
    model.new_layers = list(new_layers)
    keep_backward_kernels(model)
    expose_backbone(model)
    return model


def _load_by_function(
    config: ModelConfig,
    path: "str | Path",
    quantization: QuantizationSettings,
    machine: Machine,
    full: bool,
    kwargs: Mapping[str, Any],
) -> Any:
    """Return the model that `model.loader` gives; see `load_model` for the arguments."""
    if quantization.is_enabled or kwargs:
        what = ", ".join(kwargs) or "quantization"
        raise UserError(f"model.loader: {what} cannot be set where a function loads the model.")
    attention = None if config.attention == "auto" else config.attention
    settings = _load_settings(config, quantization, machine, full)
    settings |= {"attn_implementation": attention}
    return loader.load_by_function(config, path, settings, full)


def keep_backward_kernels(model: Any) -> None:
    """Keep 4-bit layers on the kernels that have a backward; do it before the first forward.

    On a CPU with AVX512-BF16, bitsandbytes repacks a 4-bit layer's weights at the first forward in
    evaluation mode without gradients, for a kernel without a backward. Training after that gets
    wrong gradients without an error (docs/model.md has the measurements).
    """
    from bitsandbytes.nn.modules import Linear4bit

    # bitsandbytes 0.50 asks this attribute before it repacks.
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def load_trained(
    artifact: Artifact,
    machine: Machine,
    tokenizer: Any,
    quantization: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Return the model with its adapter, in evaluation mode, none of it training.

    `quantization`: fields of `BitsAndBytesConfig`; None for those that it was trained with.
    `kwargs`: further arguments of `from_pretrained`. Raises UserError where the adapter does not
    go on its base.
    """
    if artifact.adapter is not None and not (artifact.adapter / ADAPTER_WEIGHTS_FILE).is_file():
        raise UserError(f"{artifact.name}: {artifact.adapter} has no {ADAPTER_WEIGHTS_FILE}.")
    settings = artifact.quantization if quantization is None else quantization
    kwargs = {**label_settings(artifact), **kwargs}
    # Only training packs rows, and transformers generates in other ways under a name it knows.
    if machine.attention == VARLEN_ATTENTION:
        machine = replace(machine, attention="sdpa")
    model: Any = load_model(artifact.base, settings, machine, task=artifact.task, **kwargs)
    if artifact.adapter is not None:
        # Make room for tokens that the training added; their rows come with the adapter.
        highest = max(tokenizer.get_vocab().values())
        if highest >= count_embedding_rows(model):
            model.resize_token_embeddings(highest + 1, mean_resizing=False)
        model = attach_adapter(model, artifact)
    model.requires_grad_(False)
    return model.eval()


_LABEL_SETTINGS = ("num_labels", "id2label", "label2id", "problem_type")
"""Entries of a labels.json that make a head."""


def label_settings(artifact: Artifact) -> dict[str, Any]:
    """Return the labels that the base of an adapter gets, as arguments of `from_pretrained`."""
    labels = None if artifact.adapter is None else read_labels(artifact.adapter)
    if labels is None:
        return {"num_labels": 1} if artifact.is_reward else {}
    # These and no others: any argument of from_pretrained could stand in the file.
    labels = {key: labels[key] for key in _LABEL_SETTINGS if key in labels}
    # Keys in JSON are texts, and from_pretrained takes arguments as they are.
    return labels | {"id2label": {int(key): name for key, name in labels["id2label"].items()}}


def attach_adapter(model: Any, artifact: Artifact) -> Any:
    """Return the base with the artifact's adapter on it, its weights as they were saved.

    Raises UserError where the adapter does not go on this base.
    """
    from peft import get_peft_model_state_dict

    folder = artifact.adapter
    assert folder is not None

    def wrong_base(reason: str) -> UserError:
        adapter = read_adapter_config(folder) or {}
        return UserError(wrong_base_message(artifact.name, adapter, artifact.base.path, reason))

    try:
        with warnings.catch_warnings():
            # Missing weights are looked for below, and are an error.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            # peft 0.21 reads an attribute by its older name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            with open_adapter(folder, model) as named_folder:
                adapted = load_adapter(model, named_folder)
                # peft 0.21 passes over layers that the base lacks, and over weights that the file
                # lacks.
                tensors = read_safetensors_header(named_folder / ADAPTER_WEIGHTS_FILE).tensors
    except (RuntimeError, ValueError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        mismatches = [line for line in lines if "size mismatch" in line]
        raise wrong_base([*mismatches, *lines, "?"][0]) from error
    saved = {name for name in tensors if ".lora_" in name}
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    expected = {name for name in state if ".lora_" in name}
    if saved - expected:
        raise wrong_base(f"it has no layer for {min(saved - expected)}")
    if expected - saved:
        raise wrong_base(f"the adapter has no weights for {min(expected - saved)}")
    return adapted


def insert_quantized_layers(model: Any, quantization: Mapping[str, Any]) -> Any:
    """Put bitsandbytes' layers into an empty model, where loading would put them.

    `quantization` holds fields of `transformers.BitsAndBytesConfig`; in 4 bits experts are packed
    like linear layers. Returns the quantizer of transformers, whose `postprocess_model` finishes
    the model's config.
    """
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    settings: Any = BitsAndBytesConfig.from_dict(dict(quantization))
    # What comes quantized says itself what is packed.
    if "quant_method" not in quantization:
        skipped = find_unpacked_modules(model, settings.llm_int8_skip_modules)
        settings.llm_int8_skip_modules = skipped
    with _pack_experts(QuantizationSettings(quantization)):
        quantizer: Any = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    return quantizer


def find_unpacked_modules(model: Any, skipped: Sequence[str] | None = None) -> list[str]:
    """Return the names of the modules of a model whose weights are not to be packed.

    `model` may be empty, `skipped` is `llm_int8_skip_modules` as the config has it. They are the
    parts that text does not reach, such as a vision tower; heads of classifiers, which may be new;
    layers whose weight Mamba's kernels read; and `skipped`, or, where it is None, those that
    transformers leaves out, which it forgets as soon as a list is set.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    text = find_text_modules(model)
    names = {*(get_keys_to_not_convert(model) if skipped is None else skipped), *text.others}
    if model.get_output_embeddings() is None:
        # What checkpoints of a language model may lack: loading draws it, and packs nothing.
        poolers = (name for name, _ in model.named_modules() if name.endswith(".pooler"))
        names.update(text.heads, poolers)
    return sorted({*names, *find_bypassed_layers(model)})


def describe_packing(model: Any) -> str | None:
    """Return which share of a model's layers bitsandbytes packs, and what it leaves as it was.

    It reads `nf4 packs 100% of the layers' weights; in bfloat16 stay: model.visual, lm_head (0.30
    GB)`. The share is that of linear layers and experts in the text part, without its output
    layers; the frozen parts and layers that stay are named, experts and embeddings are not.
    `model` may be empty, or have an adapter. None where nothing is packed.
    """
    from bitsandbytes.nn import Int8Params, Params4bit
    from torch.nn import Embedding, Linear
    from transformers.pytorch_utils import Conv1D

    text, is_adapted = find_text_modules(model), hasattr(model, "peft_config")
    tables = {id(layer.weight) for layer in model.modules() if isinstance(layer, Embedding)}
    packed: Counter[str] = Counter()
    whole: dict[str, Counter[str]] = defaultdict(Counter)
    unpacked = 0
    for group in find_experts(model):
        own = dict(model.get_submodule(group.name).named_parameters(recurse=False))
        for name, shape in group.shapes.items():
            # Weights that bitsandbytes packs have the attribute even before they are loaded.
            if hasattr(own[name], "quant_state"):
                packed[own[name].quant_type] += prod(shape)
            else:
                unpacked += prod(shape)
    for name, layer in model.named_modules():
        weight = layer.weight if isinstance(layer, Linear | Conv1D) else None
        if weight is None or id(weight) in tables or (is_adapted and weight.requires_grad):
            continue
        beside = (*text.others, *text.heads)
        part = next((each for each in beside if is_within(name, each)), None)
        if isinstance(weight, Int8Params | Params4bit):
            state = getattr(weight, "quant_state", None)
            form = weight.quant_type if isinstance(weight, Params4bit) else "int8"
            packed[form] += weight.numel() if state is None else prod(state.shape)
            continue
        if part is None:
            unpacked += weight.numel()
        label = part or ".".join(name.replace(".base_layer", "").split(".")[-2:])
        dtype = str(weight.dtype).removeprefix("torch.")
        whole[dtype][label.removeprefix("base_model.model.")] += weight.numel() * weight.itemsize
    if not packed:
        return None
    share = packed.total() / (packed.total() + unpacked)
    stays = [
        f"; in {dtype} stay: {', '.join(sizes)} ({sizes.total() / 1e9:,.2f} GB)"
        for dtype, sizes in whole.items()
    ]
    return f"{' and '.join(packed)} packs {share:.0%} of the layers' weights{''.join(stays)}"


def _leave_modules_unpacked(
    settings: dict[str, Any], config: ModelConfig, architecture: Any, task: str
) -> None:
    """Set in the arguments of `from_pretrained` which modules bitsandbytes does not pack.

    Raises UserError where it would pack none.
    """
    from bitsandbytes.nn import Int8Params, Params4bit
    from transformers import BitsAndBytesConfig

    packing: Any = settings.get("quantization_config")
    is_quantized = getattr(architecture, "quantization_config", None) is not None
    if not isinstance(packing, BitsAndBytesConfig) or is_quantized:
        return
    named = " beside those in llm_int8_skip_modules" if packing.llm_int8_skip_modules else ""
    # Building draws random numbers, and a run must not differ by what it asks before.
    with preserve_random_state():
        empty = build_empty_model(
            copy.deepcopy(architecture), task, config.trust_remote_code, dtype=settings["dtype"]
        )
    fields = packing.to_dict()
    # With its mark, the settings would be those of a checkpoint that comes quantized.
    del fields["quant_method"]
    quantizer = insert_quantized_layers(empty, fields)
    packing.llm_int8_skip_modules = quantizer.quantization_config.llm_int8_skip_modules
    if not any(isinstance(weight, Int8Params | Params4bit) for weight in empty.parameters()):
        raise UserError(
            f"quantization: it would pack none of the weights of {type(empty).__name__}:\n"
            f"bitsandbytes packs linear layers of torch's own class, and there are none{named}. "
            "Use quantization=none."
        )


def _pack_experts(quantization: QuantizationSettings) -> AbstractContextManager[None]:
    """Return what has transformers pack experts, too, where it packs a model in 4 bits."""
    if quantization.bits != 4:
        return nullcontext()
    from luthier.model.quantized_experts import pack_experts

    return pack_experts()


def _refuse_packed_experts(
    config: ModelConfig, path: "str | Path", architecture: Any, task: str
) -> None:
    """Raise UserError for a checkpoint whose experts bitsandbytes has packed one by one.

    transformers 4 wrote such. transformers 5.23 puts the packed bytes of a layer's experts
    together without their scales, and stops because sizes differ, or goes on where they do not.
    """
    if getattr(architecture, "quantization_config", None) is None:
        return
    scales = next(filter(_PACKED_EXPERT.search, _weight_names(config, path)), None)
    if scales is None:
        return
    plain = copy.deepcopy(architecture)
    del plain.quantization_config
    # In some classes experts are linear layers still, which are read as they were written.
    if find_experts(build_empty_model(plain, task, config.trust_remote_code)):
        raise UserError(
            f"model.path={config.path} comes with experts that are packed one by one ({scales}), "
            "and transformers 5 holds all experts of a layer in one weight.\nName the model that "
            "it was made from, with quantization=nf4, which packs experts while loading."
        )


def _weight_names(config: ModelConfig, path: "str | Path") -> list[str]:
    """Return the names in a checkpoint's files, of which no more than an index is fetched."""
    from transformers.utils import cached_file

    single = Path(path) / "model.safetensors"
    if single.is_file():
        return list(read_safetensors_header(single).tensors)
    index = cached_file(
        str(path),
        WEIGHT_INDEX_FILE,
        revision=config.revision,
        local_files_only=source.needs_hub(config.path) and source.is_hub_unreachable(),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return [] if index is None else list_indexed_weights(Path(index).parent)


def _load_settings(
    config: ModelConfig, quantization: QuantizationSettings, machine: Machine, full: bool
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that follow from the config and the machine."""
    local = source.needs_hub(config.path) and source.is_hub_unreachable()
    # An unreachable hub is asked again and again for most of a minute, for files that are there.
    settings: dict[str, Any] = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "local_files_only": local,
        # transformers looks for an adapter beside the model, with settings of its own.
        "adapter_kwargs": {"local_files_only": local},
        "dtype": "float32" if full else machine.dtype,
    }
    # FSDP and DeepSpeed place the weights themselves: then nobody else may.
    variables = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    if not any(os.environ.get(name, "false").lower() == "true" for name in variables):
        settings["device_map"] = {"": machine.device}
    if quantization.dequantize:
        settings["quantization_config"] = quantized.dequantize_config(config)
    elif quantization.is_enabled:
        from transformers import BitsAndBytesConfig

        make_config: Any = BitsAndBytesConfig
        # 4-bit layers multiply in the machine's number format if the config names none.
        fields = {"bnb_4bit_compute_dtype": machine.dtype} | quantization
        settings["quantization_config"] = make_config(**fields)
    return settings


def _as_user_error(error: Exception, config: ModelConfig, machine: Machine) -> Exception:
    """Return the error in the user's words, or as it was if it is none of the user's."""
    problem = source.explain_hub_error(error, config.path, "model.path")
    if problem is not None:
        return problem
    # torch has no class of its own for this error on every device.
    text = str(error)
    if "out of memory" in text.lower():
        return UserError(
            f"model.path={config.path} does not fit into the memory of {machine.device}.\n"
            "Use quantization=nf4 (about a third of the memory of bfloat16), or a smaller model."
        )
    damaged = is_weights_damage(error)
    if damaged:
        reason = text.strip().partition("\n")[0]
        return UserError(
            f"model.path={config.path}: its weights cannot be read, or are not those of its "
            f"config.json: {reason}\nFetch or copy the model again."
        )
    # Other errors are not the user's mistakes, and keep their traceback.
    if not isinstance(error, OSError | ValueError | TypeError | ImportError):
        return error
    if "trust_remote_code" in text:
        text = source.OWN_CODE
    return UserError(f"model.path={config.path}: the model cannot be loaded: {text}")


def is_weights_damage(error: Exception) -> bool:
    """Return whether reading weight files failed by what is in them: cut, no weights, other sizes.

    safetensors and pickle have classes of their own for it; torch raises RuntimeError.
    """
    import pickle

    from safetensors import SafetensorError

    if isinstance(error, SafetensorError | pickle.UnpicklingError | EOFError):
        return True
    texts = ("size mismatch", "ignore_mismatched_sizes", "PytorchStreamReader", "unexpected EOF")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
