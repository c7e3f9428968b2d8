"""Models that a function of the user's own loads (`model.loader`), where no Auto class does.

The function gets the model's path, and of what luthier gives `from_pretrained` whatever it has an
argument for. What it returns is checked: it has to be a model of transformers that a training, a
generation and a merge can use as they use those of transformers' own classes.
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from luthier.config.code_settings import LOADER_ARGUMENTS, CodeEntry, read_code_entries
from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model import source
from luthier.model.device import preserve_random_state
from luthier.model.model_class import expose_backbone, find_missing_text_layer
from luthier.python_code import describe_exception, load_python_object, select_arguments

_KEY = "model.loader"


def read_architecture(config: ModelConfig, path: str | Path) -> Any:
    """Return transformers' configuration of a model that `model.loader` loads.

    A type that neither transformers nor the function's module (`AutoConfig.register`) knows gives a
    plain `PretrainedConfig` with the fields of its config.json.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    # Its module may register classes, and is imported for that.
    _load_function(config)
    where: dict[str, Any] = {
        "revision": config.revision,
        "local_files_only": source.needs_hub(config.path) and source.is_hub_unreachable(),
    }
    fields, _ = PretrainedConfig.get_config_dict(path, **where)
    if fields.get("model_type") in CONFIG_MAPPING:
        return AutoConfig.from_pretrained(path, **where)
    return PretrainedConfig.from_dict(fields)


def load_by_function(
    config: ModelConfig, path: str | Path, settings: Mapping[str, Any], is_full: bool
) -> Any:
    """Return the model that the function of `model.loader` gives for `path`, on its device.

    `settings` are those arguments of `from_pretrained` that the function may take; with `is_full`
    every weight has to be float32. Raises UserError for a function that fails, and for a model that
    cannot be used as it is.
    """
    import torch

    name, arguments = _entry(config)
    function = _load_function(config)
    if isinstance(function, type):
        function = getattr(function, "from_pretrained", function)
    available = {key: settings.get(key) for key in LOADER_ARGUMENTS}
    dtype = getattr(torch, settings["dtype"])
    available |= {"dtype": dtype, **arguments}
    taken = select_arguments(partial(function, str(path)), available, f"{_KEY}: {name}")
    if config.revision is not None and "revision" not in taken:
        raise UserError(
            f"model.revision={config.revision}: {name} has no argument revision, so it would load "
            "another one. Add the argument, or remove the setting."
        )
    try:
        model = function(str(path), **taken)
    except UserError:
        raise
    except Exception as error:  # the user's function may raise anything
        raise UserError(f"{_KEY}: {name} failed: {describe_exception(error)}") from error
    _check_interface(model, name)
    _check_weights(model, name, dtype, is_full)
    attention = model.config.get_text_config()._attn_implementation
    if config.attention not in ("auto", attention):
        raise UserError(
            f"model.attention={config.attention}: the model of {name} has {attention}. Pass the "
            "function's argument attn_implementation on, or set model.attention=auto."
        )
    device_map = settings.get("device_map")
    return model.eval() if device_map is None else model.to(device_map[""]).eval()


def _entry(config: ModelConfig) -> CodeEntry:
    (entry,) = read_code_entries(config.loader)
    return entry


def _load_function(config: ModelConfig) -> Any:
    return load_python_object(_entry(config).path)


def _check_interface(model: Any, name: str) -> None:
    """Raise UserError for what is no model of transformers that writes."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{_KEY}: {name} returned a {type(model).__name__}, and a transformers.PreTrainedModel "
            "is needed: adapters, losses, checkpoints and save_pretrained work by its methods."
        )
    kind = type(model).__name__
    if not model.can_generate():
        raise UserError(
            f"{_KEY}: {kind} cannot generate. Write class {kind}(PreTrainedModel, GenerationMixin) "
            "with prepare_inputs_for_generation, if its own is not enough."
        )
    if missing := find_missing_text_layer(model):
        raise UserError(
            f"{_KEY}: {kind} has no {missing}: get_input_embeddings and get_output_embeddings have "
            "to return them."
        )
    expose_backbone(model)
    if model.base_model is model:
        raise UserError(
            f"{_KEY}: {kind}.base_model_prefix is {model.base_model_prefix!r}, which names "
            "no module of it. It has to name the layers below the output layer, whose "
            "last_hidden_state losses are computed from."
        )


def _check_weights(model: Any, name: str, dtype: Any, is_full: bool) -> None:
    """Raise UserError for weights without values, or in another number format than is needed."""
    sizes: Counter[Any] = Counter()
    for key, weight in model.named_parameters():
        if weight.is_meta:
            raise UserError(f"{_KEY}: {name} returned a model whose {key} has no values (meta).")
        if weight.is_floating_point():
            sizes[weight.dtype] += weight.numel()
    loaded = {each for each, _ in sizes.most_common(None if is_full else 1)}
    if loaded != {dtype}:
        other = next(str(each) for each in loaded if each != dtype).removeprefix("torch.")
        reason = ", as all weights train" if is_full else ""
        raise UserError(
            f"{_KEY}: {name} returned weights in {other}, and the run has them in "
            f"{str(dtype).removeprefix('torch.')}{reason}. Load them in the function's argument "
            "dtype."
        )


def check_log_probs(model: Any) -> None:
    """Raise UserError where a model's logits are not those that its losses would be computed from.

    TRL's fused head takes `base_model`'s last hidden states to the output layer, past what the
    model's own forward does between them.
    """
    import torch
    from trl.trainer.utils import add_fused_lm_head

    vocabulary = model.get_output_embeddings().weight.shape[0]
    ids = torch.arange(8, device=model.device)[None] * 7 % vocabulary
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), preserve_random_state():
        logits = model(**inputs).logits[:, :-1].float()
        forward = vars(model).get("forward")
        add_fused_lm_head(model)
        try:
            fused = model(**inputs, labels=ids, fused_lm_head=True).log_probs.float()
        finally:
            del model.forward
            if forward is not None:
                model.forward = forward
    plain = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    difference = float((plain - fused).abs().max())
    # What rounding makes of the largest logit, with a margin.
    rounding = 1e-3 if model.dtype == torch.float32 else 0.03
    if not difference <= rounding * float(logits.abs().max()):
        raise UserError(
            f"{_KEY}: the logits of {type(model).__name__} are not its output layer's of "
            f"base_model's last_hidden_state: log-probabilities differ by {difference:.3g}. Losses "
            "are computed from those. Whatever its forward does between the two belongs into "
            "base_model, or is logit_scale or final_logit_softcapping of its config."
        )
