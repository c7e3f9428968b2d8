"""The chat encoder of a run: its settings, the model's tokenizer and the model's end tokens."""

from typing import TYPE_CHECKING

from luthier.chat import ChatEncoder
from luthier.config.schema import RunConfig
from luthier.model.tokenizer import end_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_encoder(config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> ChatEncoder:
    """Return the encoder that makes this run's training rows and prompts."""
    return ChatEncoder(
        tokenizer, **config.chat.model_dump(), eos_token_ids=end_token_ids(config.model)
    )
