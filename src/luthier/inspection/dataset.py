"""A recipe's dataset opened to be looked at, without a model; no bad row stops the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from luthier import data, model
from luthier.chat import (
    IGNORED,
    ChatEncoder,
    ChatError,
    ChatSequence,
    ImageExpander,
    Reply,
    Segment,
)
from luthier.chat.encoder import LOSSY_REASONS, ChatPromptEncoder, OnEmpty
from luthier.config import load_config
from luthier.config.methods import METHODS
from luthier.config.recipes import DATA_PATHS, check_recipe_files
from luthier.config.schema import ChatSettings, RunConfig
from luthier.data import Example
from luthier.data.batching.settings import BatchingSettings, read_batching_settings
from luthier.data.encoders.chat import (
    RowOutcome,
    RowState,
    batch_outcomes,
    check_no_images,
    find_empty_text,
    row_outcome,
    window_outcome,
)
from luthier.data.encoders.plain_text import TextWindow, WindowEncoder
from luthier.data.encoders.prompts import encode_prompt, max_prompt_tokens
from luthier.data.examples import LocatedExample, OpenedSource, eval_set_name
from luthier.data.formats.conversations import template_inputs
from luthier.environment import set_environment
from luthier.errors import UserError
from luthier.model.model_images import find_model_images
from luthier.model.positions import bounded_length, check_max_length
from luthier.model.tokenizer import (
    check_vocabulary_in_files,
    end_token_ids,
    load_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def shorten_location(text: str) -> str:
    """Return a row's place as one would type it from the working directory."""
    return text.removeprefix(f"{Path.cwd()}/")


def describe_cut(replies: int) -> str:
    """Return in words what went from a row's front, `replies` trained turns among it."""
    if not replies:
        return "its first turns were removed; every reply still trains"
    counted = "1 reply" if replies == 1 else f"{replies} replies"
    return f"its first turns were removed, {counted} among them"


@dataclass
class InspectedRow:
    """One row: where it stands, what it makes, and what becomes of it."""

    place: str
    example: Example
    sequences: list[ChatSequence]
    """What trains, cut as configured; for a row that is too long to fit, nothing."""
    outcome: RowOutcome


class RowReader(Protocol):
    """Makes rows of the examples of one kind, and goes on where training would stop."""

    def rows(self, placed: Sequence[LocatedExample]) -> list[InspectedRow]:
        """What these examples make."""
        ...


class Readers:
    """The readers under the settings of a config; sources that train alike share one."""

    def __init__(self, tokenizer: Any, config: RunConfig, end_tokens: list[int]) -> None:
        """`end_tokens`: those of the model's generation config."""
        self._tokenizer = tokenizer
        self._config = config
        self._end_tokens = end_tokens
        self._images = _find_images(config)
        self._conversations: dict[str, ConversationReader] = {}

    def of(self, opened: OpenedSource) -> RowReader:
        """Return the reader of a source."""
        config = self._config
        facts = METHODS[config.trainer.base_method]
        if opened.row_format.example_type == "conversation" and (
            facts.uses_rewards or facts.uses_teacher
        ):
            limit = max_prompt_tokens(config)
            method = config.trainer.method
            return PromptReader(self._tokenizer, config.chat, self._end_tokens, limit, method)
        if opened.row_format.example_type == "conversation":
            return self.conversations(opened)
        return DocumentReader(
            self._tokenizer,
            bounded_length(config),
            config.dataset.stride,
            config.chat.empty_replies,
        )

    def conversations(self, opened: OpenedSource) -> "ConversationReader":
        """Return the reader of conversations, with the turns that the source says train."""
        chat = self._config.chat.model_copy(update={"max_length": bounded_length(self._config)})
        train_on = chat.train_on if opened.config.train_on is None else opened.config.train_on
        if repr(train_on) not in self._conversations:
            settings = chat.model_copy(update={"train_on": train_on})
            self._conversations[repr(train_on)] = ConversationReader(
                self._tokenizer, settings, self._end_tokens, self._images
            )
        return self._conversations[repr(train_on)]


def _find_images(config: RunConfig) -> ImageExpander | None:
    """Return what the model makes of images; None where rows may have none."""
    if not METHODS[config.trainer.base_method].takes_images:
        return None
    try:
        return find_model_images(config.model)
    except UserError:
        # A folder that holds a tokenizer and nothing else is enough to look at rows of text.
        if Path(config.model.tokenizer or config.model.path).is_dir():
            return None
        raise


_OTHERS = {
    "preference": "preference pairs (a chosen and a rejected reply)",
    "unpaired": "replies labelled good or bad",
    "classification": "texts with a label",
    "tagging": "words with tags",
    "seq2seq": "sources with a target",
}


@dataclass(frozen=True)
class LoadedDataset:
    """A valid configuration with its tokenizer and the opened sources of its dataset."""

    config: RunConfig
    tokenizer: "PreTrainedTokenizerBase"
    trained: dict[str, OpenedSource]
    """The training sources by name; the only one that has none is `dataset`."""
    evaluated: dict[str, OpenedSource]
    """The evaluation sets that have rows of their own, by config key."""
    readers: Readers
    """What makes sequences of their rows."""
    batching: BatchingSettings

    @property
    def name(self) -> str:
        """What the configuration is called: the recipe, or the model."""
        return self.config.recipe or self.config.model.path


def load_dataset(
    overrides: list[str], command: str, bad_rows: bool = False, is_trusted: bool = False
) -> LoadedDataset:
    """Open what a run with these overrides would read, less the weights.

    `bad_rows`: do not stop at rows that cannot be read. `is_trusted`: recipes may name code that
    is not the user's own. Raises UserError for mistakes in the
    configuration or the files, before anything large is imported where it can be known, and for
    rows that are neither conversations nor plain text.
    """
    return open_dataset(load_config(overrides, is_trusted).config, command, bad_rows)


def open_dataset(config: RunConfig, command: str, bad_rows: bool = False) -> LoadedDataset:
    """Open what a run with this config would read, as `load_dataset` does."""
    # A folder that holds a tokenizer and nothing else is enough here.
    needs_model = not Path(config.model.tokenizer or config.model.path).is_dir()
    check_recipe_files(config, [*(["model.path"] if needs_model else []), *DATA_PATHS])
    lenient = {"on_bad_row": "drop"} if bad_rows else {}
    sources = data.check_sources(config.dataset.model_copy(update=lenient))
    batching = read_batching_settings(config)
    if needs_model:
        model.check_model_path(config.model)
    check_max_length(config)
    set_environment(config)
    trained, evaluated = sources.open_train(), sources.open_eval()
    for opened in (*trained.values(), *evaluated.values()):
        _check_kind(opened, command)
    tokenizer = _quiet_tokenizer(config)
    check_vocabulary_in_files(tokenizer, config.model)
    readers = Readers(tokenizer, config, end_token_ids(config.model))
    return LoadedDataset(config, tokenizer, trained, evaluated, readers, batching)


def split_name(key: str) -> str:
    """What an evaluation set is called, by its config key: its name, or `held out`."""
    return eval_set_name(key) or "held out"


def _check_kind(opened: OpenedSource, command: str) -> None:
    row_format = opened.row_format
    if row_format.example_type in _OTHERS:
        raise UserError(
            f"{opened.key}: these rows are {_OTHERS[row_format.example_type]} (type "
            f"{row_format.type}), and luthier {command} shows conversations and plain texts only. "
            f"If they are conversations after all, set {opened.key}.type=messages"
        )


def _quiet_tokenizer(config: RunConfig) -> Any:
    """The tokenizer, without the library's remarks on long texts: here they are the point."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    return load_tokenizer(config.model)


class ConversationReader:
    """Encodes conversations as a config says, and goes on where training would stop."""

    def __init__(
        self,
        tokenizer: Any,
        settings: ChatSettings,
        end_tokens: list[int],
        images: ImageExpander | None,
    ) -> None:
        """`images`: what the model makes of images; None where rows may have none."""
        self.settings = settings
        chat = settings.model_dump() | {"eos_token_ids": end_tokens}
        self.encoder = ChatEncoder(tokenizer, **chat, images=images)
        """The encoder of a training."""
        self.encoder.check_variables()
        # One day for all, also where the clock passes midnight.
        chat |= {"date": self.encoder.date, "on_lost": "drop"}
        chat |= {name: "drop" for name in ("on_long", "empty_replies") if chat[name] == "error"}
        self._dropping = ChatEncoder(tokenizer, **chat, images=images)
        self._lenient = ChatEncoder(tokenizer, **chat | {"on_lost": "keep"}, images=images)
        uncut = chat | {"on_lost": "keep", "max_length": None}
        self._uncut = ChatEncoder(tokenizer, **uncut, images=images)
        other = "segments" if settings.boundaries == "served" else "served"
        self._other_boundaries = ChatEncoder(
            tokenizer, **uncut | {"boundaries": other}, images=images
        )

    def rows(self, placed: Sequence[LocatedExample]) -> list[InspectedRow]:
        """Return what these conversations make."""
        rows = self._encode(self._dropping, placed)
        if self.settings.on_lost == "keep":
            lossy = [n for n, row in enumerate(rows) if row.outcome.reason in LOSSY_REASONS]
            lossy_rows = self._encode(self._lenient, [placed[number] for number in lossy])
            for number, row in zip(lossy, lossy_rows, strict=True):
                rows[number] = row
        for row in rows:
            if not row.sequences and self._stops_at(row.outcome):
                row.outcome = row.outcome._replace(state=RowState.STOPS)
        return rows

    def uncut_sequences(self, row: InspectedRow) -> list[ChatSequence]:
        """Return the sequences of a row before anything is cut."""
        if row.sequences and row.outcome.cut_turns is None:
            return row.sequences
        return _encode_or_nothing(self._uncut, row)

    def other_sequences(self, row: InspectedRow) -> list[ChatSequence]:
        """Return the same with the boundaries that the config did not choose."""
        return _encode_or_nothing(self._other_boundaries, row)

    def _encode(self, encoder: ChatEncoder, placed: Sequence[LocatedExample]) -> list[InspectedRow]:
        """Return what an encoder makes of rows; those that it stops at are dropped."""
        try:
            batch = encoder.encode_batch([row.example for row in placed])
        except ChatError as error:
            if len(placed) > 1:
                # One row stops the batch: each by itself tells which one.
                return [row for each in placed for row in self._encode(encoder, [each])]
            outcome = row_outcome(0, (error.reason, error.description))
            return [_inspected(placed[0], [], outcome)]
        columns = placed, batch.rows, batch_outcomes(batch)
        return [_inspected(*row) for row in zip(*columns, strict=True)]

    def _stops_at(self, outcome: RowOutcome) -> bool:
        """Return whether training stops at a row that makes no sequence."""
        if outcome.reason == "too long":
            return self.settings.on_long == "error"
        if outcome.reason == "empty reply":
            return self.settings.empty_replies == "error"
        return outcome.reason != "nothing to train" and self.settings.on_lost != "drop"


class DocumentReader:
    """Cuts plain texts into windows as a config says, and goes on where training would stop."""

    def __init__(
        self, tokenizer: Any, max_length: int | None, stride: int, empty_replies: OnEmpty
    ) -> None:
        self._encoder = WindowEncoder(tokenizer, max_length, stride)
        self._empty_replies: OnEmpty = empty_replies

    def rows(self, placed: Sequence[LocatedExample]) -> list[InspectedRow]:
        """Return what these documents make."""
        try:
            texts = [
                "" if find_empty_text(row.example["text"], self._empty_replies) else text
                for row in placed
                for text in [row.example["text"]]
            ]
            windows = self._encoder.encode_batch(texts)
        except ChatError as error:
            if len(placed) > 1:
                return [row for each in placed for row in self.rows([each])]
            return [_inspected(placed[0], [], _stopping(error))]
        return [
            _inspected(row, [*map(_window_sequence, own)], window_outcome(own))
            for row, own in zip(placed, windows, strict=True)
        ]


class PromptReader:
    """Encodes conversations up to their last reply, for methods whose model answers them itself.

    It goes on where a training would stop.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: ChatSettings,
        end_tokens: list[int],
        limit: int | None,
        method: str,
    ) -> None:
        """`limit`: the longest prompt, in tokens; `method`: the training method, for messages."""
        self._method = method
        encoder = ChatEncoder(tokenizer, **settings.model_dump(), eos_token_ids=end_tokens)
        encoder.check_variables()
        self._prompts = ChatPromptEncoder(encoder, limit)

    def rows(self, placed: Sequence[LocatedExample]) -> list[InspectedRow]:
        """Return what these conversations make."""
        return [self._row(row) for row in placed]

    def _row(self, placed: LocatedExample) -> InspectedRow:
        try:
            check_no_images(placed.example, self._method)
            ids, outcome = encode_prompt(self._prompts, placed.example)
        except ChatError as error:
            return _inspected(placed, [], _stopping(error))
        return _inspected(placed, [_prompt_sequence(ids)] * outcome.sequences, outcome)


def _inspected(
    placed: LocatedExample, sequences: list[ChatSequence], outcome: RowOutcome
) -> InspectedRow:
    return InspectedRow(shorten_location(placed.where), placed.example, sequences, outcome)


def _stopping(error: ChatError) -> RowOutcome:
    """Return the outcome of a row at which training stops with this error."""
    return RowOutcome(0, RowState.STOPS, error.reason, error.description)


def _encode_or_nothing(encoder: ChatEncoder, row: InspectedRow) -> list[ChatSequence]:
    """Return what a row makes; nothing where the encoder stops at it."""
    try:
        return encoder.encode(row.example["messages"], **template_inputs(row.example))
    except ChatError:
        return []


def _window_sequence(window: TextWindow) -> ChatSequence:
    """Return the window as a sequence whose reply is all that trains."""
    size, context = len(window.input_ids), window.labels.count(IGNORED)
    segments = [Segment(0, context, None, None, "text", False)] if context else []
    segments.append(Segment(context, size, None, None, "text", True))
    return ChatSequence(window.input_ids, [Reply(0, context, size)], lambda: segments)


def _prompt_sequence(ids: list[int]) -> ChatSequence:
    """Return the prompt as a sequence in which nothing trains."""
    segment = Segment(0, len(ids), None, None, "prompt", False)
    return ChatSequence(ids, [], lambda: [segment])
