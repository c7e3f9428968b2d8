"""What of a loaded model trains: an adapter, all weights, or some; and rows for new tokens."""

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
from luthier.model.tokenizer import check_vocabulary_fits, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Full fine-tuning with parts frozen, chosen by patterns over the parameters' names.

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SHOWN = 20


def freeze_parameters(model: Any, train: Sequence[str], frozen: Sequence[str]) -> None:
    """Let only weights train that a pattern of `train` finds (all if there is none), less `frozen`.

    Patterns are regular expressions, found anywhere in a name; a matrix with two names (tied
    embeddings) is found by either. Raises UserError for a pattern that finds nothing and where
    nothing is left to train.
    """
    names: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    wanted = _found("model.train", train, names) if train else set(names)
    unwanted = _found("model.freeze", frozen, names)
    kept = {id(names[name]) for name in unwanted}
    trained = {id(names[name]) for name in wanted} - kept
    if not trained:
        raise UserError(
            f"model.freeze: {', '.join(frozen)} leaves nothing to train. The parameters: "
            f"{_shown(names)}."
        )
    for parameter in names.values():
        parameter.requires_grad_(id(parameter) in trained)


def _found(key: str, patterns: Sequence[str], names: dict[str, Any]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        try:
            hits = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            text = f"{key}: {pattern!r} is not a regular expression: {error}."
            raise UserError(text) from error
        if not hits:
            raise UserError(_nothing(key, pattern, names))
        found |= hits
    return found


def _nothing(key: str, pattern: str, names: dict[str, Any]) -> str:
    parts = {part for name in names for part in name.split(".")} | {*names}
    near = difflib.get_close_matches(pattern, sorted(parts), n=3, cutoff=0.5)
    hint = f" Near it: {', '.join(near)}." if near else ""
    return f"{key}: {pattern!r} matches no parameter.{hint} The parameters: {_shown(names)}."


def _shown(names: dict[str, Any]) -> str:
    """All names with layers' numbers as N, the first of them where they are many."""
    kinds = list(dict.fromkeys(_NUMBER.sub("N", name) for name in names))
    return ", ".join(kinds[:_SHOWN]) + (", ..." if len(kinds) > _SHOWN else "")


def make_trainable(
    model: "PreTrainedModel",
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    machine: Machine,
    task_type: str = "CAUSAL_LM",
) -> Any:
    """Return the model with exactly those weights to train that `config` names.

    `model` is as `load_model` gives it, `tokenizer` has the new tokens, `task_type` is what the
    model does, as peft calls it. Raises UserError where the tokenizer does not belong to the model,
    where names match nothing, and where a new token would not train.
    """
    new = embeddings.new_token_ids(tokenizer, config.model)
    embeddings.initialize_new_rows(model, new, config.seed)
    check_vocabulary_fits(tokenizer, model)
    if config.lora.is_enabled:
        lora = embeddings.add_new_rows_to_settings(model, config.lora, new)
        original = partial(_original, config, machine, task_type)
        return add_adapter(model, lora, config.seed, task_type, tokenizer, original)
    if config.model.train or config.model.freeze:
        freeze_parameters(model, config.model.train, config.model.freeze)
        _refuse_frozen_rows(model, new)
    return model


def add_new_rows(model: "PreTrainedModel", config: RunConfig) -> None:
    """Give the new tokens their rows in a model that stands beside the one that trains."""
    if config.model.add_tokens or config.model.add_special_tokens:
        new = embeddings.new_token_ids(load_tokenizer(config.model), config.model)
        embeddings.initialize_new_rows(model, new, config.seed)


def _original(config: RunConfig, machine: Machine, task_type: str) -> Any:
    """The weights before quantization, in main memory."""
    from luthier.model.load import load_model

    place = Machine("cpu", "float32" if machine.dtype == "float32" else "bfloat16", "sdpa")
    # The layers below a head bear the same names in a language model, which has no head to draw.
    task = task_type if task_type == "SEQ_2_SEQ_LM" else "CAUSAL_LM"
    return load_model(config.model, {}, place, task=task)


def _refuse_frozen_rows(model: Any, new: list[int]) -> None:
    sides = (model.get_input_embeddings(), model.get_output_embeddings())
    if new and not all(side is None or side.weight.requires_grad for side in sides):
        raise UserError(
            "model.add_tokens: the embeddings are frozen, so the new tokens would never train. "
            "Leave the embeddings out of model.freeze, or add them to model.train."
        )
