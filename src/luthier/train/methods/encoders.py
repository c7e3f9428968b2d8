"""The encoders of each training method, from the rows of a source to token rows.

They are here and not beside the trainers, so that data can be prepared without importing these.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from luthier.chat import ChatEncoder, ImageExpander, ParsedReply
from luthier.chat.encoder import IMAGES
from luthier.config.methods import METHODS, base_method, check_example_type
from luthier.config.schema import RunConfig, SourceConfig
from luthier.data.encoders.chat import (
    ColumnKeepingEncoder,
    ConversationEncoder,
    EncoderFactory,
    ImageRefusingEncoder,
    RowEncoder,
    TextEncoder,
)
from luthier.data.encoders.preference import PREFERENCE_ENCODERS
from luthier.data.encoders.prompts import PromptEncoder, max_prompt_tokens
from luthier.data.encoders.tasks import ClassificationEncoder, Seq2SeqEncoder, TaggingEncoder
from luthier.data.examples import format_key
from luthier.infer.seq2seq_prompts import Seq2SeqPrompts
from luthier.model.model_images import ModelImages, find_model_images
from luthier.model.positions import bounded_length
from luthier.model.tokenizer import end_token_ids
from luthier.train.methods.tools import load_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EncoderConstructor = Callable[[RunConfig, Any, str, SourceConfig, ImageExpander | None], RowEncoder]
"""Takes a config, its tokenizer, the format of a source's rows, the source, and what the model
makes of images, which is None where rows may have none."""


def make_row_encoders(config: RunConfig, tokenizer: Any) -> EncoderFactory:
    """Return what makes the encoder of each source of a run.

    It raises UserError for rows that the run's method does not take.
    """
    method = config.trainer.method
    images = find_images(config)
    takes_images = METHODS[base_method(method)].takes_images

    def make_encoder(row_format: str, source: SourceConfig, key: str) -> RowEncoder:
        check_example_type(method, row_format, key, format_key(key))
        make = ENCODER_FACTORIES[base_method(method)]
        encoder = make(config, tokenizer, row_format, source, images)
        if not takes_images and row_format in _CONVERSATIONS:
            encoder = ImageRefusingEncoder(encoder, method)
        return ColumnKeepingEncoder(encoder) if _reads_columns(config) else encoder

    return make_encoder


def find_images(config: RunConfig) -> ModelImages | None:
    """Return what the run's model makes of images in rows.

    None where the model or the method takes text alone.
    """
    takes_images = METHODS[config.trainer.base_method].takes_images
    return find_model_images(config.model) if takes_images else None


_CONVERSATIONS = ("conversation", "preference", "unpaired")
"""The formats whose rows have messages, which may have images."""


def _reads_columns(config: RunConfig) -> bool:
    """Whether a reward, a loss, or a metric that the user wrote, reads the columns of the rows."""
    evaluation = config.trainer.evaluation
    metrics = [*evaluation.metrics]
    for set_metrics in evaluation.sets.values():
        metrics += set_metrics
    names = (metric if isinstance(metric, str) else next(iter(metric)) for metric in metrics)
    trainer = config.trainer
    own_code = (trainer.loss, trainer.environment)
    reads = bool(trainer.rewards or trainer.tools) or any(code is not None for code in own_code)
    return reads or any(name.startswith("python:") for name in names)


def _chat_settings(config: RunConfig, source: SourceConfig) -> dict[str, Any]:
    """The settings of the chat encoder for a source."""
    chat = config.chat.model_dump() | {
        "eos_token_ids": end_token_ids(config.model),
        "max_length": bounded_length(config),
    }
    return chat if source.train_on is None else chat | {"train_on": source.train_on}


def _make_sft_encoder(
    config: RunConfig,
    tokenizer: Any,
    row_format: str,
    source: SourceConfig,
    images: ImageExpander | None,
) -> RowEncoder:
    """Conversations by the chat encoder, texts in windows."""
    if row_format == "text":
        return TextEncoder(
            tokenizer, bounded_length(config), config.dataset.stride, config.chat.empty_replies
        )
    return ConversationEncoder(tokenizer, _chat_settings(config, source), images)


def _make_preference_encoder(
    config: RunConfig,
    tokenizer: Any,
    row_format: str,
    source: SourceConfig,
    images: ImageExpander | None,
) -> RowEncoder:
    """Replies behind the ids that generation starts from, or whole conversations for a score."""
    encoder_class = PREFERENCE_ENCODERS[config.trainer.base_method, row_format]
    return encoder_class(tokenizer, _chat_settings(config, source), images)


def _make_prompt_encoder(
    config: RunConfig,
    tokenizer: Any,
    row_format: str,
    source: SourceConfig,
    images: ImageExpander | None,
) -> RowEncoder:
    """Conversations up to their last reply; UserError where completions leave them no room."""
    chat = config.chat.model_dump() | {"eos_token_ids": end_token_ids(config.model)}
    tools = load_tools(config)
    schemas = None if tools is None else tools.schemas or None
    return PromptEncoder(tokenizer, chat, max_prompt_tokens(config), schemas)


def _task_constructor(encoder_class: Callable[..., RowEncoder]) -> EncoderConstructor:
    """A constructor of an encoder that takes texts as the tokenizer encodes them."""
    return lambda config, tokenizer, row_format, source, images: encoder_class(
        tokenizer, config.chat.max_length, config.chat.on_long
    )


def _make_target_encoder(
    config: RunConfig,
    tokenizer: Any,
    row_format: str,
    source: SourceConfig,
    images: ImageExpander | None,
) -> RowEncoder:
    """Sources and targets."""
    chat = config.chat
    return Seq2SeqEncoder(tokenizer, chat.max_length, chat.on_long, chat.empty_replies)


ENCODER_FACTORIES: Mapping[str, EncoderConstructor] = {
    "sft": _make_sft_encoder,
    "pretrain": _make_sft_encoder,
    "dpo": _make_preference_encoder,
    "kto": _make_preference_encoder,
    "orpo": _make_preference_encoder,
    "cpo": _make_preference_encoder,
    "reward": _make_preference_encoder,
    "classify": _task_constructor(ClassificationEncoder),
    "tag": _task_constructor(TaggingEncoder),
    "seq2seq": _make_target_encoder,
    "grpo": _make_prompt_encoder,
    "rloo": _make_prompt_encoder,
    "distill": _make_prompt_encoder,
}
"""The constructor of the encoder of each method, by its name."""


def make_chat_encoder(
    config: RunConfig, tokenizer: "PreTrainedTokenizerBase"
) -> ChatEncoder | None:
    """Return the encoder that makes this run's training rows and prompts.

    Return None where there is no chat template: rows that are no conversations need none.
    """
    if config.chat.template is None and tokenizer.chat_template is None:
        return None
    return ChatEncoder(
        tokenizer,
        **config.chat.model_dump(),
        eos_token_ids=end_token_ids(config.model),
        images=find_images(config),
    )


def read_saved_settings(encoder: ChatEncoder) -> dict[str, Any]:
    """Return a chat encoder's settings as a run and its model keep them, for `SavedChatSettings`.

    What becomes of images is in the processor's files beside them.
    """
    settings = encoder.settings()
    settings.pop(IMAGES, None)
    return settings


def make_turn_encoder(config: RunConfig, tokenizer: Any) -> ChatEncoder:
    """Return the encoder that goes on behind the turns of a rollout: it loses and cuts nothing."""
    settings = config.chat.model_dump() | {
        "train_on": "all", "on_lost": "error", "max_length": None, "empty_replies": "train",
    }  # fmt: skip
    return ChatEncoder(tokenizer, **settings, eos_token_ids=end_token_ids(config.model))


class ToolPromptEncoder:
    """A chat encoder whose prompts show a run's tools where a row has none of its own."""

    def __init__(self, encoder: ChatEncoder, tools: list[dict[str, Any]]) -> None:
        self._encoder = encoder
        self._tools = tools

    @property
    def stop_token_ids(self) -> list[int]:
        """The encoder's."""
        return self._encoder.stop_token_ids

    def prompt(self, messages: list[dict[str, Any]], **inputs: Any) -> list[int]:
        """Return the ids that generation starts from; see `ChatEncoder.prompt`."""
        return self._encoder.prompt(messages, **self._with_tools(inputs))

    def parse(self, reply: Any, messages: list[dict[str, Any]], **inputs: Any) -> ParsedReply:
        """Return a reply as a message; see `ChatEncoder.parse`."""
        return self._encoder.parse(reply, messages, **self._with_tools(inputs))

    def _with_tools(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs | {"tools": inputs.get("tools") or self._tools}


def make_eval_prompts(
    config: RunConfig, tokenizer: Any, encoder: ChatEncoder | None
) -> ChatEncoder | ToolPromptEncoder | Seq2SeqPrompts | None:
    """Return what makes the prompts of held-out rows that are answered; None where none are.

    `encoder` is the run's own.
    """
    if METHODS[config.trainer.base_method].task == "SEQ_2_SEQ_LM":
        return make_seq2seq_prompts(config, tokenizer)
    toolbox = None if encoder is None else load_tools(config)
    if encoder is None or toolbox is None or not toolbox.schemas:
        return encoder
    return ToolPromptEncoder(encoder, toolbox.schemas)


def make_seq2seq_prompts(config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> Seq2SeqPrompts:
    """Return what makes the prompts of an encoder-decoder model: the sources, as in training."""
    encoder = Seq2SeqEncoder(tokenizer, config.chat.max_length, config.chat.on_long)
    ends = [tokenizer.eos_token_id, *end_token_ids(config.model)]
    return Seq2SeqPrompts(encoder, [end for end in dict.fromkeys(ends) if end is not None])
