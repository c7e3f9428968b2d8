"""What the tools look at: the recipe's sources and tokenizer, and no model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from luthier import data, model
from luthier.chat import IGNORED, ChatBatch, ChatEncoder, ChatError, ChatSequence, Reply, Segment
from luthier.chat.encoder import ChatPromptEncoder
from luthier.config import load_config
from luthier.config.methods import METHODS
from luthier.config.schema import ChatSettings, DatasetConfig, RunConfig
from luthier.data import Example
from luthier.data.batching.settings import BatchingSettings, read_batching_settings
from luthier.data.encoders.plain_text import TextWindow, WindowEncoder
from luthier.data.encoders.prompts import NO_PROMPT, split_prompt_and_reply
from luthier.data.examples import (
    LocatedExample,
    OpenedSource,
    eval_set_name,
    eval_sources,
    open_examples,
    train_sources,
)
from luthier.data.mixture import source_key
from luthier.environment import set_environment
from luthier.errors import UserError
from luthier.model.tokenizer import end_token_ids, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# A row with what the encoder makes of it, and what the config makes of that.

Outcome = Literal["trains", "lossy", "dropped", "stops"]
"""`lossy`: trains, although not all of its text is shown; `stops`: training stops at this row."""
OUTCOMES: tuple[Outcome, ...] = ("trains", "lossy", "dropped", "stops")


def shorten_location(text: str) -> str:
    """A row's place as one would type it from here."""
    return text.removeprefix(f"{Path.cwd()}/")


def describe_cut(replies: int) -> str:
    """What went from a row's front, in words."""
    if not replies:
        return "turns went from its front, every reply still trains"
    return (
        f"turns went from its front, {replies} {'reply' if replies == 1 else 'replies'} with them"
    )


@dataclass
class InspectedRow:
    """One row: where it stands, what it makes, and what is wrong with it."""

    place: str
    example: Example
    sequences: list[ChatSequence] = field(default_factory=list)
    """What trains, cut as configured; for a row that is too long to fit, nothing."""
    error: ChatError | None = None
    fate: Outcome = "trains"
    cut_turns: int | None = None
    """Trained turns that were cut off; None for a row that was not cut."""

    @property
    def words(self) -> str:
        """What is wrong with the row, with its message and field but without its place."""
        return self.error.description if self.error else ""


class RowReader(Protocol):
    """Makes rows of the examples of one kind, and goes on where training would stop."""

    def rows(self, placed: Sequence[LocatedExample]) -> list[InspectedRow]:
        """What these examples make."""
        ...


# The reader of each source: what makes sequences of its rows.


class Readers:
    """The readers under the settings of a config; sources that train alike share one."""

    def __init__(self, tokenizer: Any, config: RunConfig, end_tokens: list[int]) -> None:
        """`end_tokens`: those of the model's generation config."""
        self._tokenizer = tokenizer
        self._config = config
        self._end_tokens = end_tokens
        self._conversations: dict[str, ConversationReader] = {}

    def of(self, opened: OpenedSource) -> RowReader:
        """The reader of a source."""
        facts = METHODS[self._config.trainer.method]
        if opened.row_format.example_type == "conversation" and (facts.rewards or facts.teacher):
            return self._prompts()
        if opened.row_format.example_type == "conversation":
            return self.conversations(opened)

        config = self._config
        return DocumentReader(self._tokenizer, config.chat.max_length, config.dataset.stride)

    def _prompts(self) -> RowReader:
        from luthier.data.encoders.prompts import max_prompt_tokens

        config = self._config
        return PromptReader(
            self._tokenizer, config.chat, self._end_tokens, max_prompt_tokens(config)
        )

    def conversations(self, opened: OpenedSource) -> "ConversationReader":
        """The reader of a source of conversations, with the turns that the source says train."""

        chat, own = self._config.chat, opened.config.train_on
        train_on = chat.train_on if own is None else own
        if repr(train_on) not in self._conversations:
            settings = chat.model_copy(update={"train_on": train_on})
            self._conversations[repr(train_on)] = ConversationReader(
                self._tokenizer, settings, self._end_tokens
            )
        return self._conversations[repr(train_on)]


_OTHERS = {
    "preference": "pairs of a chosen and a rejected reply",
    "unpaired": "replies with a verdict",
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


def load_dataset(overrides: list[str], command: str, bad_rows: bool = False) -> LoadedDataset:
    """Open what a run with these overrides would read, less the weights.

    `bad_rows`: do not stop at rows that cannot be read. Raises UserError for mistakes in the
    configuration or the files, before anything large is imported where it can be known, and for
    rows that are neither conversations nor plain text.
    """
    config = load_config(overrides).config
    data.check_sources(_lenient(config.dataset) if bad_rows else config.dataset)
    batching = read_batching_settings(config)
    # A folder that holds a tokenizer and nothing else is enough here.
    if not Path(config.model.tokenizer or config.model.path).is_dir():
        model.check_model_path(config.model)
    set_environment(config)
    trained, evaluated = _opened(config.dataset, command)
    tokenizer = _quiet_tokenizer(config)
    readers = Readers(tokenizer, config, end_token_ids(config.model))
    return LoadedDataset(config, tokenizer, trained, evaluated, readers, batching)


def split_name(key: str) -> str:
    """What an evaluation set is called, by its config key: its name, or `held out`."""
    return eval_set_name(key) or "held out"


def _lenient(config: DatasetConfig) -> DatasetConfig:
    return config.model_copy(update={"on_bad_row": "drop"})


def _opened(
    config: DatasetConfig, command: str
) -> tuple[dict[str, OpenedSource], dict[str, OpenedSource]]:
    sources = train_sources(config)
    trained = {
        name: open_examples(source, source_key(name, sources), config.streaming)
        for name, source in sources.items()
    }
    evaluated = {
        key: open_examples(source, key, config.streaming)
        for key, source in eval_sources(config).items()
    }
    for opened in (*trained.values(), *evaluated.values()):
        _check_kind(opened, command)
    return trained, evaluated


def _check_kind(opened: OpenedSource, command: str) -> None:
    row_format = opened.row_format
    if row_format.example_type in _OTHERS:
        raise UserError(
            f"{opened.key}: its rows are {_OTHERS[row_format.example_type]} (type "
            f"{row_format.type}), and luthier {command} looks at conversations and plain texts "
            f"for now. If they are conversations all the same, say so: {opened.key}.type=messages."
        )


def _quiet_tokenizer(config: RunConfig) -> Any:
    """The tokenizer, without the library's remarks on long texts: here they are the point."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    return load_tokenizer(config.model)


# Conversations through the encoder, none stopping the others.


class EncodedConversation(NamedTuple):
    """The sequences of a row, what is wrong with it, and trained turns that were cut off."""

    sequences: list[ChatSequence]
    error: ChatError | None
    cut_turns: int | None


class ConversationReader:
    """Encodes rows under the settings of a config, and goes on where training would stop."""

    def __init__(self, tokenizer: Any, settings: ChatSettings, end_tokens: list[int]) -> None:
        self.settings = settings
        given = settings.model_dump() | {"eos_token_ids": end_tokens}
        self.encoder = ChatEncoder(tokenizer, **given)
        """The encoder of a training."""
        # One day for all, also where the clock passes midnight.
        given |= {"date": self.encoder.date, "on_lost": "drop"}
        if settings.on_long == "error":
            given["on_long"] = "drop"
        self._encoder = ChatEncoder(tokenizer, **given)
        self._lenient = ChatEncoder(tokenizer, **given | {"on_lost": "keep"})
        unbound = given | {"on_lost": "keep", "max_length": None}
        self._unbound = ChatEncoder(tokenizer, **unbound)
        other = "segments" if settings.boundaries == "served" else "served"
        self._other = ChatEncoder(tokenizer, **unbound | {"boundaries": other})

    def rows(self, placed: Sequence[LocatedExample]) -> list[InspectedRow]:
        """What these conversations make."""
        made = encode_each(self._encoder, [row.example for row in placed])
        rows = [
            InspectedRow(
                shorten_location(row.where),
                row.example,
                one.sequences,
                one.error,
                "trains",
                one.cut_turns,
            )
            for row, one in zip(placed, made, strict=True)
        ]
        if self.settings.on_lost == "keep":
            self._keep([row for row in rows if row.error and row.error.reason == "lost"])
        for row in rows:
            if not row.sequences and row.error is not None:
                row.fate = self._fate(row.error)
        return rows

    def whole(self, row: InspectedRow) -> list[ChatSequence]:
        """The sequences of a row before anything is cut."""
        if row.sequences and row.cut_turns is None:
            return row.sequences
        return _sequences(self._unbound, row)

    def otherwise(self, row: InspectedRow) -> list[ChatSequence]:
        """The same with the boundaries that the config did not choose."""
        return _sequences(self._other, row)

    def _keep(self, rows: list[InspectedRow]) -> None:
        """Encode rows that lose text and train all the same."""
        made = encode_each(self._lenient, [row.example for row in rows])
        for row, (sequences, error, cut_turns) in zip(rows, made, strict=True):
            row.error, row.sequences, row.cut_turns = error, sequences, cut_turns
            row.fate = "lossy"

    def _fate(self, error: ChatError) -> Outcome:
        """What becomes of a row that makes no sequence."""
        if error.reason == "too long":
            return "stops" if self.settings.on_long == "error" else "dropped"
        if error.reason == "nothing to train" or self.settings.on_lost == "drop":
            return "dropped"
        return "stops"


def encode_each(encoder: ChatEncoder, conversations: list[Any]) -> list[EncodedConversation]:
    """What each row makes; a row that the encoder stops at is a dropped one."""
    try:
        return _made(encoder.encode_batch(conversations))
    except ChatError:
        return [_alone(encoder, conversation) for conversation in conversations]


def _alone(encoder: ChatEncoder, conversation: Any) -> EncodedConversation:
    try:
        return _made(encoder.encode_batch([conversation]))[0]
    except ChatError as error:
        return EncodedConversation([], error, None)


def _sequences(encoder: ChatEncoder, row: InspectedRow) -> list[ChatSequence]:
    """What a row makes; nothing where the encoder stops at it."""
    try:
        return encoder.encode(row.example["messages"], row.example.get("tools"))
    except ChatError:
        return []


def _made(batch: ChatBatch) -> list[EncodedConversation]:
    errors = {report.row: report for report in batch.reports}
    return [
        EncodedConversation(sequences, errors.get(number), batch.cut.get(number))
        for number, sequences in enumerate(batch.rows)
    ]


# Plain texts as windows, none stopping the others.


class DocumentReader:
    """Cuts documents into windows as a config says, and goes on where training would stop."""

    def __init__(self, tokenizer: Any, max_length: int | None, stride: int) -> None:
        self._encoder = WindowEncoder(tokenizer, max_length, stride)

    def rows(self, placed: Sequence[LocatedExample]) -> list[InspectedRow]:
        """What these documents make."""
        try:
            made = self._encoder.encode_batch(row.example["text"] for row in placed)
        except ChatError:
            return [self._alone(row) for row in placed]
        return [_row(*pair) for pair in zip(placed, made, strict=True)]

    def _alone(self, placed: LocatedExample) -> InspectedRow:
        try:
            (windows,) = self._encoder.encode_batch([placed.example["text"]])
        except ChatError as error:
            return InspectedRow(
                shorten_location(placed.where),
                placed.example,
                error=error.in_row(None),
                fate="stops",
            )
        return _row(placed, windows)


def _row(placed: LocatedExample, windows: list[TextWindow]) -> InspectedRow:
    if windows:
        return InspectedRow(
            shorten_location(placed.where),
            placed.example,
            [_document_sequence(window) for window in windows],
        )
    error = ChatError("the text is empty", reason="empty text")
    return InspectedRow(shorten_location(placed.where), placed.example, error=error, fate="dropped")


def _document_sequence(window: TextWindow) -> ChatSequence:
    """The window as a sequence whose reply is all that trains."""
    size, context = len(window.input_ids), window.labels.count(IGNORED)
    parts = [Segment(0, context, None, None, "text", False)] if context else []
    parts.append(Segment(context, size, None, None, "text", True))
    return ChatSequence(window.input_ids, [Reply(0, context, size)], lambda: parts)


# Conversations up to their last reply, for methods whose model answers them itself.


class PromptReader:
    """Encodes prompts as a training does, and goes on where it would stop."""

    def __init__(
        self, tokenizer: Any, settings: ChatSettings, end_tokens: list[int], limit: int | None
    ) -> None:
        """`limit`: the longest prompt, in tokens."""
        encoder = ChatEncoder(tokenizer, **settings.model_dump(), eos_token_ids=end_tokens)
        self._prompts = ChatPromptEncoder(encoder, limit)

    def rows(self, placed: Sequence[LocatedExample]) -> list[InspectedRow]:
        """What these conversations make."""
        return [self._row(row) for row in placed]

    def _row(self, placed: LocatedExample) -> InspectedRow:
        row = InspectedRow(shorten_location(placed.where), placed.example)
        context = split_prompt_and_reply(placed.example)[0]
        if not context:
            row.error, row.fate = ChatError(NO_PROMPT[1], reason=NO_PROMPT[0]), "dropped"
            return row
        try:
            ids, gone, row.error = self._prompts.encode(context, placed.example.get("tools"))
        except ChatError as error:
            row.error, row.fate = error, "stops" if self._prompts.is_fatal(error) else "dropped"
            return row
        row.fate = "trains" if row.error is None else "lossy"
        row.sequences = [_prompt_sequence(ids)]
        row.cut_turns = 0 if gone else None
        return row


def _prompt_sequence(ids: list[int]) -> ChatSequence:
    """The prompt as a sequence in which nothing trains."""
    part = Segment(0, len(ids), None, None, "prompt", False)
    return ChatSequence(list(ids), [], lambda: [part])
