"""What makes token rows of a source's rows, for each method: known without its trainer."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from luthier.chat import ChatEncoder
from luthier.config.methods import check_example_type
from luthier.config.schema import RunConfig, SourceConfig
from luthier.data.encoders.chat import (
    ColumnKeepingEncoder,
    ConversationEncoder,
    EncoderFactory,
    RowEncoder,
    TextEncoder,
)
from luthier.data.encoders.preference import (
    PairSplittingEncoder,
    PreferenceEncoder,
    RewardEncoder,
    UnpairedEncoder,
)
from luthier.data.encoders.prompts import PromptEncoder, max_prompt_tokens
from luthier.data.encoders.tasks import ClassificationEncoder, Seq2SeqEncoder, TaggingEncoder
from luthier.data.examples import format_key
from luthier.infer.seq2seq_prompts import Seq2SeqPrompts
from luthier.model.tokenizer import end_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EncoderConstructor = Callable[[RunConfig, Any, str, SourceConfig], RowEncoder]
"""From a config, its tokenizer, and the kind of a source's rows, which is one of the method's."""


def make_row_encoders(config: RunConfig, tokenizer: Any) -> EncoderFactory:
    """The encoder for each source of a run; UserError for rows that its method does not take."""
    name = config.trainer.method

    def encoder(kind: str, source: SourceConfig, key: str) -> RowEncoder:
        check_example_type(name, kind, key, format_key(key))
        made = ENCODER_FACTORIES[name](config, tokenizer, kind, source)
        return ColumnKeepingEncoder(made) if _reads_columns(config) else made

    return encoder


def _reads_columns(config: RunConfig) -> bool:
    """Whether a reward or a metric of the user's own reads the columns of the rows."""
    evaluation = config.trainer.evaluation
    metrics = [*evaluation.metrics, *(one for own in evaluation.sets.values() for one in own)]
    names = (metric if isinstance(metric, str) else next(iter(metric)) for metric in metrics)
    return bool(config.trainer.rewards) or any(name.startswith("python:") for name in names)


def _chat_settings(config: RunConfig, source: SourceConfig) -> dict[str, Any]:
    """The settings of the chat encoder for a source."""
    chat = config.chat.model_dump() | {"eos_token_ids": end_token_ids(config.model)}
    return chat if source.train_on is None else chat | {"train_on": source.train_on}


def make_sft_encoder(
    config: RunConfig, tokenizer: Any, kind: str, source: SourceConfig
) -> RowEncoder:
    """Conversations by the chat encoder, texts in windows."""
    if kind == "text":
        return TextEncoder(tokenizer, config.chat.max_length, config.dataset.stride)
    return ConversationEncoder(tokenizer, _chat_settings(config, source))


def make_pair_encoder(
    config: RunConfig, tokenizer: Any, kind: str, source: SourceConfig
) -> RowEncoder:
    """Both replies behind the ids that generation starts from."""
    return PreferenceEncoder(tokenizer, _chat_settings(config, source))


def make_kto_encoder(
    config: RunConfig, tokenizer: Any, kind: str, source: SourceConfig
) -> RowEncoder:
    """Replies behind the ids that generation starts from; of a pair, each by itself."""
    make = UnpairedEncoder if kind == "unpaired" else PairSplittingEncoder
    return make(tokenizer, _chat_settings(config, source))


def make_reward_encoder(
    config: RunConfig, tokenizer: Any, kind: str, source: SourceConfig
) -> RowEncoder:
    """Both conversations as the template writes them."""
    return RewardEncoder(tokenizer, _chat_settings(config, source))


def make_classification_encoder(
    config: RunConfig, tokenizer: Any, kind: str, source: SourceConfig
) -> RowEncoder:
    """Texts as the tokenizer gives them, and their labels."""
    return ClassificationEncoder(tokenizer, config.chat.max_length, config.chat.on_long)


def make_tagging_encoder(
    config: RunConfig, tokenizer: Any, kind: str, source: SourceConfig
) -> RowEncoder:
    """Words with one space between them, and their tags."""
    return TaggingEncoder(tokenizer, config.chat.max_length, config.chat.on_long)


def make_seq2seq_encoder(
    config: RunConfig, tokenizer: Any, kind: str, source: SourceConfig
) -> RowEncoder:
    """Sources and targets as the tokenizer gives them."""
    return Seq2SeqEncoder(tokenizer, config.chat.max_length, config.chat.on_long)


def make_prompt_encoder(
    config: RunConfig, tokenizer: Any, kind: str, source: SourceConfig
) -> RowEncoder:
    """Conversations up to their last reply; UserError where completions leave them no room."""
    chat = config.chat.model_dump() | {"eos_token_ids": end_token_ids(config.model)}
    return PromptEncoder(tokenizer, chat, max_prompt_tokens(config))


ENCODER_FACTORIES: Mapping[str, EncoderConstructor] = {
    "sft": make_sft_encoder,
    "pretrain": make_sft_encoder,
    "dpo": make_pair_encoder,
    "kto": make_kto_encoder,
    "orpo": make_pair_encoder,
    "cpo": make_pair_encoder,
    "reward": make_reward_encoder,
    "classify": make_classification_encoder,
    "tag": make_tagging_encoder,
    "seq2seq": make_seq2seq_encoder,
    "grpo": make_prompt_encoder,
    "rloo": make_prompt_encoder,
    "distill": make_prompt_encoder,
}
"""By the name of the method."""


# The chat encoder of a run: its settings, the model's tokenizer and the model's end tokens.


def make_chat_encoder(
    config: RunConfig, tokenizer: "PreTrainedTokenizerBase"
) -> ChatEncoder | None:
    """Return the encoder that makes this run's training rows and prompts.

    None where there is no chat template: rows that are no chats need none.
    """
    if config.chat.template is None and tokenizer.chat_template is None:
        return None
    return ChatEncoder(
        tokenizer, **config.chat.model_dump(), eos_token_ids=end_token_ids(config.model)
    )


def make_seq2seq_prompts(config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> Seq2SeqPrompts:
    """Return what makes the prompts of an encoder-decoder model: the sources as they train."""
    encoder = Seq2SeqEncoder(tokenizer, config.chat.max_length, config.chat.on_long)
    ends = [tokenizer.eos_token_id, *end_token_ids(config.model)]
    return Seq2SeqPrompts(encoder, [end for end in dict.fromkeys(ends) if end is not None])
