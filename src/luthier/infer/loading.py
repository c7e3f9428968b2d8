"""What an `LLM` works with: model, tokenizer, prompts and stop tokens, on this machine."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from luthier.chat import ChatEncoder
from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.infer.generate import dense_head
from luthier.infer.sources import Sources
from luthier.infer.unpacked import unpacked
from luthier.model.artifact import Artefact, encoder_of
from luthier.model.device import Machine, choose
from luthier.model.load import load_tuned
from luthier.model.tokenizer import check_fits, end_token_ids, load_tokenizer


@dataclass
class Loaded:
    """A model in memory, and all that it takes to ask it."""

    model: Any
    tokenizer: Any
    machine: Machine
    prompter: ChatEncoder | Sources | None
    """What makes prompts of messages; None for a model without a chat template."""
    stop_ids: list[int]
    context: int | None
    """The most tokens of prompt and reply together; None where nothing bounds them."""
    longest: int | None
    """The most tokens of a prompt, and one more."""

    @property
    def pad_id(self) -> int:
        """What prompts of a batch are filled up with."""
        return int(self.tokenizer.pad_token_id)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Let the model answer fast within the block."""
        import torch

        with ExitStack() as stack:
            with torch.inference_mode():
                stack.enter_context(unpacked(self.model))
            stack.enter_context(dense_head(self.model))
            yield


class Opening(NamedTuple):
    """An artefact with all but its weights."""

    artefact: Artefact
    """With the config that it is loaded by."""
    machine: Machine
    tokenizer: Any

    def model(self, packing: Mapping[str, Any] | None, own: Mapping[str, Any]) -> Any:
        """Load the weights; `own` goes to `from_pretrained`. UserError where they cannot be had."""
        model = load_tuned(self.artefact, self.machine, self.tokenizer, packing, **own)
        check_fits(self.tokenizer, model)
        return model


def opening(artefact: Artefact, given: Mapping[str, Any]) -> Opening:
    """Choose the machine and load the tokenizer; `given` replaces fields of the artefact's model.

    Raises UserError where they cannot be had.
    """
    config = ModelConfig.model_validate(artefact.base.model_dump() | dict(given))
    found = replace(artefact, base=config)
    return Opening(found, choose(config), load_tokenizer(config))


def load(
    artefact: Artefact,
    given: Mapping[str, Any],
    packing: Mapping[str, Any] | None,
    own: Mapping[str, Any],
) -> Loaded:
    """Load a model that writes, and what makes its prompts; UserError where it cannot be had."""
    found = opening(artefact, given)
    artefact, machine, tokenizer = found
    prompter = _prompter(artefact, tokenizer)
    model = found.model(packing, own)
    text = model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    is_encoded = bool(model.config.is_encoder_decoder)
    return Loaded(
        model,
        tokenizer,
        machine,
        prompter,
        _stops(artefact, tokenizer, prompter),
        None if is_encoded else context,
        context + 1 if is_encoded and context is not None else context,
    )


def _prompter(artefact: Artefact, tokenizer: Any) -> ChatEncoder | Sources | None:
    if artefact.task == "SEQ_2_SEQ_LM":
        from luthier.data.encoders.tasks import Seq2SeqEncoder

        limit = None if artefact.config is None else artefact.config.chat.max_length
        on_long = "error" if artefact.config is None else artefact.config.chat.on_long
        ends = [tokenizer.eos_token_id, *end_token_ids(artefact.base)]
        stops = [end for end in dict.fromkeys(ends) if end is not None]
        return Sources(Seq2SeqEncoder(tokenizer, limit, on_long), stops)
    if artefact.chat is None and tokenizer.chat_template is None:
        return None
    return encoder_of(artefact, tokenizer)


def _stops(artefact: Artefact, tokenizer: Any, prompter: Any) -> list[int]:
    """Where a reply ends; UserError for a model of which nobody knows it."""
    if prompter is not None and prompter.stop_token_ids:
        return list(prompter.stop_token_ids)
    ends = [tokenizer.eos_token_id, *end_token_ids(artefact.base)]
    found = [end for end in dict.fromkeys(ends) if end is not None]
    if not found:
        raise UserError(
            f"{artefact.word}: neither its tokenizer nor its generation config has an end token."
        )
    return found
