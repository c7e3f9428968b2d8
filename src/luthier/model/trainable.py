"""The weights of a loaded model that train: an adapter, all, or those that patterns name."""

import difflib
import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from luthier.config.schema import RunConfig
from luthier.errors import UserError
from luthier.model import embeddings
from luthier.model.adapters import add_adapter
from luthier.model.device import Machine
from luthier.model.experts import find_experts, has_experts
from luthier.model.model_class import find_text_modules, is_within
from luthier.model.tokenizer import check_vocabulary_fits, load_tokenizer
from luthier.patterns import match_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_MAX_NAMES = 20
"""The number of parameters' names that an error lists."""


def make_trainable(
    model: "PreTrainedModel",
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    machine: Machine,
    task_type: str = "CAUSAL_LM",
) -> Any:
    """Return the model with exactly those weights to train that `config` names.

    `model` is as `load_model` gives it, `tokenizer` has the new tokens, `task_type` is what the
    model does in peft's words. Raises UserError where the tokenizer does not belong to the model,
    where names match nothing, and where a new token would not train.
    """
    new = embeddings.new_token_ids(tokenizer, config.model)
    embeddings.initialize_new_rows(model, new, config.seed)
    check_vocabulary_fits(tokenizer, model)
    if config.lora.is_enabled:
        lora = embeddings.add_new_rows_to_settings(model, config.lora, new)
        original = partial(_load_unquantized, config, machine, task_type)
        return add_adapter(model, lora, config.seed, task_type, tokenizer, original)
    freeze_parameters(model, config.model.train, config.model.freeze)
    if config.model.train or config.model.freeze:
        sides = (model.get_input_embeddings(), model.get_output_embeddings())
        if new and not all(side is None or side.weight.requires_grad for side in sides):
            raise UserError(
                "model.add_tokens: the embeddings are frozen, so the new tokens would never train. "
                "Leave the embeddings out of model.freeze, or add them to model.train."
            )
    return model


def add_new_rows(model: "PreTrainedModel", config: RunConfig) -> None:
    """Give the new tokens their rows in a model beside the one that trains, such as a reference."""
    if config.model.add_tokens or config.model.add_special_tokens:
        new = embeddings.new_token_ids(load_tokenizer(config.model), config.model)
        embeddings.initialize_new_rows(model, new, config.seed)


def freeze_parameters(model: Any, train: Sequence[str], frozen: Sequence[str]) -> None:
    """Let only weights train that a pattern of `train` finds, less those of `frozen`.

    Without a pattern in `train` they are those that text reaches (`find_text_modules`): a vision
    tower stays as it is. Patterns are regular expressions, found anywhere in a name; a matrix with
    two names (tied embeddings) is found by either. Raises UserError for a pattern that finds
    nothing and where nothing is left to train.
    """
    # Weights by id, because a tied matrix has two names.
    names: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    if train:
        matching = match_parameters("model.train", train, names)
    else:
        text = find_text_modules(model)
        matching = {name for name in names if names[name].requires_grad and name in text}
    frozen_ids = {id(names[name]) for name in match_parameters("model.freeze", frozen, names)}
    trained = {id(names[name]) for name in matching} - frozen_ids
    if not trained:
        raise UserError(
            f"model.freeze: {', '.join(frozen)} leaves nothing to train. The parameters: "
            f"{_list_names(names)}."
        )
    for parameter in names.values():
        parameter.requires_grad_(id(parameter) in trained)


def find_skipped_parameters(model: Any) -> list[str]:
    """Return the names of trained parameters that the loss of a step may leave without a gradient.

    They are those outside of what text reaches (an open vision tower), those of experts that are a
    module each, of which a step runs the chosen ones, and of layers that a model leaves out by
    chance. Experts in one tensor are none of them: a step reaches the whole tensor. `model` is as
    `make_trainable` returns it.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trained = [name for name, weight in base.named_parameters() if weight.requires_grad]
    settings = base.config.to_dict()
    if any(value for key, value in settings.items() if key.endswith("layerdrop")):
        return trained
    text, experts = find_text_modules(base), has_experts(settings)
    # An adapter wraps the module of its experts.
    joined = [each.name.partition(".base_layer")[0] for each in find_experts(base)]

    def is_chosen(name: str) -> bool:
        is_expert = experts and "experts" in name.split(".")
        return is_expert and not any(is_within(name, module) for module in joined)

    return [name for name in trained if name not in text or is_chosen(name)]


def _load_unquantized(config: RunConfig, machine: Machine, task_type: str) -> Any:
    """Return the model before quantization, in main memory."""
    from luthier.model.load import load_model

    cpu = Machine("cpu", "float32" if machine.dtype == "float32" else "bfloat16", "sdpa")
    # The layers below a head bear the same names in a language model, which has no head to draw.
    task = task_type if task_type == "SEQ_2_SEQ_LM" else "CAUSAL_LM"
    return load_model(config.model, {}, cpu, task=task)


def match_parameters(
    key: str, patterns: Sequence[str], names: dict[str, Any], what: str = "parameter"
) -> set[str]:
    """Return the names in which a pattern is found; raises UserError for one without any.

    `key` is the setting that holds the patterns, and `what` says what the names are.
    """
    matching: set[str] = set()
    for pattern in patterns:
        try:
            hits = set(match_names(pattern, names, "search"))
        except (ValueError, TimeoutError) as error:
            raise UserError(f"{key}: {pattern!r} {error}") from error
        if not hits:
            pieces = {piece for name in names for piece in name.split(".")} | {*names}
            near = difflib.get_close_matches(pattern, sorted(pieces), n=3, cutoff=0.5)
            hint = f" Near it: {', '.join(near)}." if near else ""
            raise UserError(
                f"{key}: {pattern!r} matches no {what}.{hint} The parameters: {_list_names(names)}."
            )
        matching |= hits
    return matching


def _list_names(names: dict[str, Any]) -> str:
    """Return names with the numbers of layers as N; the first of them where they are many."""
    patterns = list(dict.fromkeys(_LAYER_NUMBER.sub("N", name) for name in names))
    return ", ".join(patterns[:_MAX_NAMES]) + (", ..." if len(patterns) > _MAX_NAMES else "")
