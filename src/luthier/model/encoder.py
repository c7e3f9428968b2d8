"""The chat encoder of a run: its settings, the model's tokenizer and the model's end tokens."""

from typing import TYPE_CHECKING

from luthier.chat import ChatEncoder
from luthier.config.schema import RunConfig
from luthier.data.encoders.tasks import Seq2SeqEncoder
from luthier.infer.seq2seq_prompts import Sources
from luthier.model.tokenizer import end_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_encoder(config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> ChatEncoder | None:
    """Return the encoder that makes this run's training rows and prompts.

    None where there is no chat template: rows that are no chats need none.
    """
    if config.chat.template is None and tokenizer.chat_template is None:
        return None
    return ChatEncoder(
        tokenizer, **config.chat.model_dump(), eos_token_ids=end_token_ids(config.model)
    )


def make_sources(config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> Sources:
    """Return what makes the prompts of an encoder-decoder model: the sources as they train."""
    encoder = Seq2SeqEncoder(tokenizer, config.chat.max_length, config.chat.on_long)
    ends = [tokenizer.eos_token_id, *end_token_ids(config.model)]
    return Sources(encoder, [end for end in dict.fromkeys(ends) if end is not None])
