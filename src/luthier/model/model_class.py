"""The class that loads a model, and the part of it that reads text.

Checkpoints of models that see or hear name a class that wraps a text decoder, and their weights
bear that class's names: so it loads them, and the text decoder within it is what trains on text.
"""

import copy
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any

from luthier.errors import UserError
from luthier.model.device import VARLEN_ATTENTION

TASK_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
"""The task of a model in peft's words -> the class of transformers that such models load by."""
_WRAPPER_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""Classes of transformers for models that write, and read more than text."""
_OTHER_INPUTS = re.compile(
    r"pixel_values|image_embeds|image_encoder_embeddings|input_features|encoder_inputs_embeds"
    r"|mm_token_type_ids"
)
"""Inputs beside text, as the errors of transformers name them."""
_ENCODES_IMAGES = (
    "its encoder reads images as well as text, and luthier trains no encoder-decoder of that kind: "
    "it would leave the encoder without an adapter and unquantized."
)
"""Why T5Gemma 2 and its like are refused: `find_text_part` finds their decoder alone."""
_OTHER_MODALITIES = {"audio", "time"}
"""Values of `input_modalities` of transformers' models that neither read nor see."""
_IMAGE_LAYERS = {
    "MllamaCrossAttentionDecoderLayer": "",
    "Ernie4_5_VLMoeMoeBlock": "vision_moe",
    "EvollaSequenceAlignerCrossAttention": "",
}
"""Layers within a text decoder that text alone does not reach: their class -> which child, if not
the whole of it."""


def resolve_model_class(architecture: Any, task: str, trust_remote_code: bool = False) -> Any:
    """Return the class that loads or builds the model of a `PretrainedConfig`.

    It is the class that the checkpoint names (`architectures[0]`) where transformers has it for
    this config and for `task`, a key of `TASK_CLASSES`; else the `Auto` class of the task, and for
    a causal language model that only an image-text class can load, that one's. With
    `trust_remote_code`, a model that brings its own code has the `Auto` class that its config
    names. Whatever loads or builds a model asks here, so that this function alone decides.
    """
    autos = _auto_classes(architecture, task)
    if trust_remote_code:
        own_code = getattr(architecture, "auto_map", None) or {}
        for auto in autos:
            if auto.__name__ in own_code:
                return auto
    classes = [named for auto in autos for named in _mapped_classes(auto, architecture)]
    for name in (architecture.architectures or ())[:1]:
        for named in classes:
            if named.__name__ == name:
                return named
    return next((auto for auto in autos if _mapped_classes(auto, architecture)), autos[0])


def has_model_class(architecture: Any, task: str) -> bool:
    """Return whether transformers has a class for this `PretrainedConfig` and task."""
    return any(_mapped_classes(auto, architecture) for auto in _auto_classes(architecture, task))


def read_folder_class(folder: str | Path, task: str, trust_remote_code: bool = False) -> Any:
    """Return the class that loads the model in a local folder; see `resolve_model_class`."""
    from transformers import AutoConfig

    architecture = AutoConfig.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True
    )
    return resolve_model_class(architecture, task, trust_remote_code)


_ATTENTION_FLAGS = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
"""An attention of transformers -> the flag of the classes that have it; all have eager."""


_VARLEN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "linear_attention"}
_VARLEN_LAYERS |= {"conv", "moe", "mlp", "hybrid", "hybrid_sliding", "mamba", "attention"}
"""Types of layers whose masks are those of documents, or that have none."""
_DENSE_MASKS = re.compile(r"allow_is_causal_skip|_attn_implementation (?:not )?in \(")
"""Code of classes that compute with masks themselves, or in their own way for some attention."""


def has_varlen_attention(architecture: Any, model_class: Any) -> bool:
    """Return whether packed rows of a model can have luthier's attention document by document.

    They can where transformers' masks and attention functions do it all. `train/packing_check.py`
    then holds it against masks, on the model itself.
    """
    text_config = architecture.get_text_config()
    named = (*_mapped_classes(model_class, architecture), model_class)[0]
    text_classes = [named, *_mapped_text_classes(text_config)]
    layer_types = set(getattr(text_config, "layer_types", None) or ())
    return (
        not architecture.is_encoder_decoder
        and layer_types <= _VARLEN_LAYERS
        and getattr(text_config, "attn_logit_softcapping", None) is None
        and not getattr(text_config, "alibi", False)
        and getattr(text_config, "is_causal", True)
        and all(map(_leaves_masks_alone, text_classes))
    )


def _mapped_text_classes(text_config: Any) -> tuple[Any, ...]:
    import transformers

    return _mapped_classes(transformers.AutoModel, text_config)


def _leaves_masks_alone(model_class: Any) -> bool:
    """Return whether a class has sdpa, by functions of transformers for attention and masks."""
    can_set = getattr(model_class, "_can_set_attn_implementation", None)
    if can_set is None or not getattr(model_class, "_supports_sdpa", False) or not can_set():
        return False
    return _DENSE_MASKS.search(inspect.getsource(sys.modules[model_class.__module__])) is None


def choose_attention(
    architecture: Any, model_class: Any, attention: str, typed: str = "auto"
) -> str | dict[str, str]:
    """Return `attention`, or the fastest that a class of models has where it lacks that one.

    Where a tower of the model lacks what its text part has, it is a dict by the names of
    transformers' sub-configs, with the text part's under the empty name. `architecture` is the
    `PretrainedConfig`, `typed` the value of `model.attention`. Raises UserError where the class
    lacks what was typed.
    """
    import transformers

    # An `Auto` class has no flags: it makes a model of the first class that it has.
    named = (*_mapped_classes(model_class, architecture), model_class)[0]
    is_varlen = attention == VARLEN_ATTENTION and has_varlen_attention(architecture, model_class)
    chosen = attention if is_varlen else _supported_attention(named, attention)
    if chosen != attention and attention == typed:
        flash = ["flash_attention_2"] if getattr(named, "_supports_flash_attn", False) else []
        has = [name for name, flag in _ATTENTION_FLAGS.items() if getattr(named, flag, False)]
        raise UserError(
            f"model.attention={typed}: {named.__name__} does not have it. It has "
            f"{', '.join(['eager', *has, *flash])}; auto takes the fastest of them."
        )
    text_config = architecture.get_text_config()
    parts = {}
    for name in architecture.sub_configs:
        part = getattr(architecture, name, None)
        if is_varlen and part is text_config:
            continue
        for tower_class in _mapped_classes(transformers.AutoModel, part)[:1]:
            # Only text comes in packed rows: towers then have sdpa where they can.
            parts[name] = _supported_attention(tower_class, chosen)
    if all(each == chosen for each in parts.values()):
        return chosen
    return {"": chosen, **dict.fromkeys(architecture.sub_configs, chosen), **parts}


_IMAGE_BLOCKS = re.compile(r"blockwise_overlay|block_sequence_ids|or_mask_function=")
"""Code of classes in which the tokens of an image see each other."""


def check_image_attention(model: Any) -> None:
    """Raise UserError where a model's attention cannot show it an image as its class does.

    In Gemma's classes the tokens of an image see those behind them, too. Flash attention takes no
    mask for that, and transformers 5.23 leaves it out without a word.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    attention = str(base.config.get_text_config()._attn_implementation)
    code = inspect.getsource(sys.modules[type(base).__module__])
    if "flash" in attention and _IMAGE_BLOCKS.search(code) is not None:
        raise UserError(
            f"model.attention={attention}: in {type(base).__name__} the tokens of an image see "
            "each other, which flash attention cannot compute, and rows have images. Set "
            "model.attention=varlen with packed rows, else model.attention=sdpa."
        )


def _supported_attention(model_class: Any, attention: str) -> str:
    """Return `attention` where a class has it, else the fastest that needs no other library."""
    flag = "_supports_flash_attn" if "flash" in attention else _ATTENTION_FLAGS.get(attention)
    can_have = flag is None or getattr(model_class, flag, True)
    if can_have and attention != VARLEN_ATTENTION:
        return attention
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"


def build_empty_model(
    architecture: Any, task: str, trust_remote_code: bool = False, **settings: Any
) -> Any:
    """Return the model of a `PretrainedConfig` on torch's meta device: shapes without weights.

    `task` is a key of `TASK_CLASSES`, `settings` are further arguments of `from_config`. Raises
    what transformers raises for an architecture that it cannot build.
    """
    import torch

    model_class = resolve_model_class(architecture, task, trust_remote_code)
    if "attn_implementation" in settings:
        attention = choose_attention(architecture, model_class, settings["attn_implementation"])
        settings["attn_implementation"] = attention
    with torch.device("meta"):
        # A class of one model builds by another name, and knows nothing of code to trust.
        if hasattr(model_class, "_from_config"):
            model = model_class._from_config(architecture, **settings)
        else:
            model = model_class.from_config(
                architecture, trust_remote_code=trust_remote_code, **settings
            )
    expose_backbone(model)
    return model


def check_trains_on_text(
    architecture: Any, trust_remote_code: bool = False, task: str = "CAUSAL_LM"
) -> None:
    """Raise UserError for a model that no class here trains to write, or not on text alone.

    `task` is a key of `TASK_CLASSES`; models with a head are not judged. An empty model that reads
    more than text is given a row of it; nothing is loaded. A model that cannot be built or tried
    without its weights is not judged.
    """
    import torch

    if task == "SEQ_2_SEQ_LM" and _has_vision(architecture):
        name = type(architecture).__name__.removesuffix("Config")
        raise UserError(f"model.path: {name} cannot be trained: {_ENCODES_IMAGES}")
    if task != "CAUSAL_LM":
        return
    if not trust_remote_code and not has_model_class(architecture, "CAUSAL_LM"):
        raise UserError(_no_class_message(architecture))
    _refuse_class_without_forward(architecture, trust_remote_code)
    if not architecture.sub_configs or architecture.is_encoder_decoder:
        return
    # Some models cannot be built from their config alone, which says nothing of their inputs.
    try:
        model = build_empty_model(copy.deepcopy(architecture), "CAUSAL_LM", trust_remote_code)
    except Exception:
        return
    name = type(architecture).__name__.removesuffix("Config")
    refusal = f"model.path: {name} cannot be trained on text alone"
    if missing := find_missing_text_layer(model):
        raise UserError(f"{refusal}: {type(model).__name__} has no {missing}.")
    row = torch.zeros(1, 4, dtype=torch.long, device="meta")
    try:
        model.train()(input_ids=row, attention_mask=torch.ones_like(row))
    except (ValueError, TypeError) as error:
        if _OTHER_INPUTS.search(str(error)):
            raise UserError(f"{refusal}: {error}") from error
    # Without values some forwards cannot go on.
    except Exception:
        return


def _refuse_class_without_forward(architecture: Any, trust_remote_code: bool) -> None:
    """Raise UserError for a class that only generates, such as the whole of Qwen3-Omni.

    It has no forward, and its thinker, the part that reads and writes text, is a model of its own.
    """
    import torch

    auto = resolve_model_class(architecture, "CAUSAL_LM", trust_remote_code)
    named = (*_mapped_classes(auto, architecture), auto)[0]
    if getattr(named, "forward", None) is not torch.nn.Module.forward:
        return
    message = f"model.path: {named.__name__} only generates, and has no forward to train it by."
    parts = [getattr(architecture, name, None) for name in architecture.sub_configs]
    part_classes = [
        part_class
        for part in parts
        if part is not None
        for auto in _auto_classes(part, "CAUSAL_LM")
        for part_class in _mapped_classes(auto, part)
    ]
    if part_classes:
        message += (
            f"\nIts part that writes text trains. Save it with transformers' "
            f"{part_classes[0].__name__}.from_pretrained(MODEL).save_pretrained(FOLDER), put the "
            "model's tokenizer beside it, and set model.path=FOLDER."
        )
    raise UserError(message)


def find_missing_text_layer(model: Any) -> str | None:
    """Return which layer a model lacks that training on tokens of text needs; None if it has all.

    Models that embed sound with each token (Kyutai's speech to text) or give actions instead of
    words (PI0) have no such layers.
    """
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        embeddings = None
    if not hasattr(embeddings, "weight"):
        return "table of embeddings with one row for each token of text"
    if model.get_output_embeddings() is None:
        return "output layer that scores the next token of text"
    return None


def _no_class_message(architecture: Any) -> str:
    """Return why a model that transformers loads by no class for text cannot be trained."""
    message = (
        f"model.path: this is a {architecture.model_type} model, and transformers has no class "
        "that loads it as a language model."
    )
    if architecture.is_encoder_decoder and _has_vision(architecture):
        return f"{message} It is an encoder-decoder: {_ENCODES_IMAGES}"
    if has_model_class(architecture, "SEQ_2_SEQ_LM"):
        return f"{message} It is an encoder-decoder: trainer=seq2seq is for those."
    return f"{message} luthier does not train it to write."


def _has_vision(architecture: Any) -> bool:
    """Return whether a `PretrainedConfig` or one within it describes a vision tower."""
    parts = [getattr(architecture, name, None) for name in architecture.sub_configs]
    return any(name.startswith("vision") for name in architecture.sub_configs) or any(
        _has_vision(part) for part in parts if part is not None
    )


def expose_backbone(model: Any) -> None:
    """Have `model.base_model` be the layers below the output layer, whose output losses take.

    transformers 5.23 gives the model itself for Llama 4, Mllama and a dozen more classes, and TRL
    1.16 then finds no `last_hidden_state`. The property is of the class, so all its models have it.
    So are the methods of the output layer, which find none in Nemotron 3 Omni.
    """
    from transformers import PreTrainedModel

    if model.base_model is not model:
        return
    modules = dict(model.named_modules())
    for name in ("language_model.model", "text_model.model", "model"):
        if isinstance(modules.get(name), PreTrainedModel):
            type(model).base_model = property(methodcaller("get_submodule", name))
            head = f"{name.rpartition('.')[0]}.lm_head".strip(".")
            if model.get_output_embeddings() is None and head in modules:
                _expose_output_layer(type(model), head)
            return


def _expose_output_layer(model_class: Any, name: str) -> None:
    """Have the models of a class give and take the output layer of this name."""
    model_class.get_output_embeddings = lambda self: self.get_submodule(name)
    model_class.set_output_embeddings = lambda self, layer: self.set_submodule(name, layer)


def _auto_classes(architecture: Any, task: str) -> list[Any]:
    """Return the `Auto` classes that may load a model for a task, the first choice first."""
    import transformers

    if task not in TASK_CLASSES:
        raise UserError(f"task_type {task!r}: there are {', '.join(TASK_CLASSES)}.")
    names = [TASK_CLASSES[task]]
    # An encoder that reads images before a decoder writes is no causal language model.
    if task == "CAUSAL_LM" and not architecture.is_encoder_decoder:
        names += _WRAPPER_CLASSES
    return [getattr(transformers, name) for name in names]


def _mapped_classes(auto: Any, architecture: Any) -> tuple[Any, ...]:
    """Return the classes that an `Auto` class has for this type of config."""
    mapping: Any = getattr(auto, "_model_mapping", {})
    config_class = type(architecture)
    if config_class not in mapping:
        return ()
    try:
        classes = mapping[config_class]
    # transformers 5.23 names some classes that it does not have, as Voxtral Realtime's text model.
    except ValueError:
        return ()
    return classes if isinstance(classes, tuple) else (classes,)


@dataclass(frozen=True)
class TextPart:
    """The modules and weights of a model that its rows reach, by name: `name in text_part`."""

    prefix: str
    """The name of the text decoder within the model; empty where the model has no other part."""
    heads: tuple[str, ...]
    """The names of the output layers, such as `lm_head`, or `score` of a model that classifies."""
    others: tuple[str, ...]
    """The outermost modules that the rows do not reach: towers, projectors, layers for images."""
    vision: tuple[str, ...] = ()
    """The modules that images reach and text does not; empty for rows of text alone."""

    def __contains__(self, name: str) -> bool:
        """Return whether the rows reach the module or weight of this name."""
        if any(is_within(name, other) for other in self.others):
            return False
        return any(is_within(name, part) for part in (self.prefix, *self.heads, *self.vision))


def is_within(name: str, prefix: str) -> bool:
    """Return whether a module or weight is the one named `prefix` or lies within it."""
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def find_text_part(model: Any) -> str:
    """Return the name of the text decoder within a model, such as `model.language_model`.

    It is empty where the model has no other part. The model is one of transformers, without an
    adapter; it may be on the meta device.
    """
    from transformers import PreTrainedModel

    text_config = model.config.get_text_config()
    if text_config is model.config:
        return ""
    # transformers 5.23: `get_decoder` of Llama 4 and of wrapped encoder-decoders goes deeper.
    return next(
        (
            name
            for name, module in model.named_modules()
            if name
            and isinstance(module, PreTrainedModel)
            and type(module.config) is type(text_config)
        ),
        "",
    )


def find_text_modules(model: Any, with_vision: bool = False) -> TextPart:
    """Return which modules of a model text reaches; see `find_text_part` for the model.

    `with_vision`: which modules rows of text and images reach.
    """
    modules = dict(model.named_modules())
    prefix = find_text_part(model)
    heads = _find_heads(model, modules)
    others: list[str] = []
    if prefix:
        others += _modules_beside(model, [prefix, *heads])
    elif model.config.sub_configs:
        others += _find_towers(model, modules)
    for name, module in modules.items():
        if (child := _IMAGE_LAYERS.get(type(module).__name__)) is not None:
            others.append(f"{name}.{child}" if child else name)
    if not with_vision:
        return TextPart(prefix, heads, tuple(others))
    split = [_split_vision(name, modules[name]) for name in others]
    vision = [name for images, _ in split for name in images]
    rest = [name for _, others in split for name in others]
    return TextPart(prefix, heads, tuple(rest), tuple(vision))


def find_vision_modules(model: Any) -> tuple[str, ...]:
    """Return the towers and projectors for images, by the names of their outermost modules.

    It is empty for a model that reads text alone, or text and sound.
    """
    return find_text_modules(model, with_vision=True).vision


def _split_vision(name: str, module: Any) -> tuple[list[str], list[str]]:
    """Return the parts of a module beside the text decoder: those for images, and the others."""
    from transformers import PreTrainedModel

    towers = [each for each in module.modules() if isinstance(each, PreTrainedModel)]
    declared = [tower.input_modalities for tower in towers]
    modalities = [{each} if isinstance(each, str) else {*each} for each in declared]
    hears = [names <= _OTHER_MODALITIES for names in modalities]
    if "audio" in name.rpartition(".")[2] or (towers and all(hears)):
        return [], [name]
    if not any(hears):
        return [name], []
    # Phi-4-multimodal keeps a tower for sound and one for images in one module.
    parts = [_split_vision(f"{name}.{n}", child) for n, child in module.named_children()]
    return [n for images, _ in parts for n in images], [n for _, rest in parts for n in rest]


def _find_heads(model: Any, modules: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the output layers: of a model that writes, or of one that classifies."""
    output = model.get_output_embeddings()
    if output is not None:
        return tuple(name for name, module in modules.items() if module is output)
    # peft 0.21 leaves its configuration at the base, too.
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    start = next(name for name, module in modules.items() if module is base)
    inner = base.base_model
    if inner is base:
        return ()
    return tuple(
        f"{start}.{child}".strip(".")
        for child, layer in base.named_children()
        if layer is not inner
    )


def _modules_beside(model: Any, text_names: list[str], parent: str = "") -> Iterator[str]:
    """Yield the outermost modules that neither hold one of these modules nor lie within one."""
    for child, module in model.named_children():
        name = f"{parent}.{child}" if parent else child
        if any(is_within(name, text) for text in text_names):
            continue
        if any(is_within(text, name) for text in text_names):
            yield from _modules_beside(module, text_names, name)
        else:
            yield name


def _find_towers(model: Any, modules: dict[str, Any]) -> Iterator[str]:
    """Yield the towers of a model whose text decoder has no config of its own.

    What holds a tower and no embeddings of tokens belongs to it, such as Phi-4-multimodal's
    `model.embed_tokens_extend`.
    """
    from transformers import PreTrainedModel

    embeddings = model.get_input_embeddings()
    for name, module in modules.items():
        if not isinstance(module, PreTrainedModel) or "text" in module.input_modalities:
            continue
        parent = name.rpartition(".")[0]
        while parent and not any(layer is embeddings for layer in modules[parent].modules()):
            name, parent = parent, parent.rpartition(".")[0]
        yield name
