"""What of a loaded model trains: an adapter, all weights, or some; and rows for new tokens."""

from functools import partial
from typing import TYPE_CHECKING, Any

from luthier.config.schema import RunConfig
from luthier.errors import UserError
from luthier.model import new_tokens, token_rows
from luthier.model.adapters import add_adapter
from luthier.model.freezing import freeze
from luthier.model.machine import Machine
from luthier.model.tokenizer import check_fits, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_KINDS = {"SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
"""Classes of transformers that load the weights before quantization, by task."""


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
    new = new_tokens.new_ids(tokenizer, config.model)
    new_tokens.make_rows(model, new, config.seed)
    check_fits(tokenizer, model)
    if config.lora:
        lora = token_rows.with_new_rows(model, config.lora, new)
        original = partial(_original, config, machine, task_type)
        return add_adapter(model, lora, config.seed, task_type, tokenizer, original)
    if config.model.train or config.model.freeze:
        freeze(model, config.model.train, config.model.freeze)
        _refuse_frozen_rows(model, new)
    return model


def give_new_rows(model: "PreTrainedModel", config: RunConfig) -> None:
    """Give the new tokens their rows in a model that stands beside the one that trains."""
    if config.model.add_tokens or config.model.add_special_tokens:
        new = new_tokens.new_ids(load_tokenizer(config.model), config.model)
        new_tokens.make_rows(model, new, config.seed)


def _original(config: RunConfig, machine: Machine, task_type: str) -> Any:
    """The weights before quantization, in main memory."""
    from luthier.model.weights import load_model

    place = Machine("cpu", "float32" if machine.dtype == "float32" else "bfloat16", "sdpa")
    kind = _KINDS.get(task_type, "AutoModelForCausalLM")
    return load_model(config.model, {}, place, kind=kind)


def _refuse_frozen_rows(model: Any, new: list[int]) -> None:
    sides = (model.get_input_embeddings(), model.get_output_embeddings())
    if new and not all(side is None or side.weight.requires_grad for side in sides):
        raise UserError(
            "model.add_tokens: the embeddings are frozen, so the new tokens would never train. "
            "Leave the embeddings out of model.freeze, or add them to model.train."
        )
