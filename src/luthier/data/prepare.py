"""From a dataset's config to token rows: read, shape, hold out, encode, count, hash."""

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from luthier.chat.errors import ChatError
from luthier.chat.sequences import IGNORED, ChatBatch
from luthier.config.schema import DatasetConfig
from luthier.data.files import forget
from luthier.data.formats import Conversation, find_shape, to_conversations
from luthier.data.rows import Row
from luthier.data.sources import check_sources, read_heldout, read_rows
from luthier.data.splits import Split, apart, draw
from luthier.errors import UserError

Columns = dict[str, list[list[int]]]
"""`input_ids` and `labels`, one list of token ids a sequence, for `datasets.Dataset.from_dict`."""


class Encoder(Protocol):
    """What turns conversations into token rows, such as `luthier.chat.ChatEncoder`."""

    def encode_batch(self, conversations: Any) -> ChatBatch:
        """Encode dicts of messages and tools; ChatError for a row that cannot be encoded."""
        ...


@dataclass(frozen=True)
class Counts:
    """What became of the rows of one side, in rows, sequences and tokens."""

    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    """Tokens of the longest sequence."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows that give no sequence, by reason; `equal to a held-out row` are not in `rows`."""
    cut_rows: int = 0
    """Rows that lost turns from their front to fit `chat.max_length`."""
    cut_turns: int = 0
    """Trained turns that went with them."""
    lossy_rows: int = 0
    """Rows kept although the template does not show all of their text."""


@dataclass(frozen=True)
class Prepared:
    """A dataset as token rows, ready for a trainer, and its held-out conversations."""

    train: Columns
    eval: Columns
    heldout: list[Conversation]
    """The held-out rows that were encoded, in order, for generation."""
    train_counts: Counts
    eval_counts: Counts
    content_hash: str
    """SHA-256 of all token rows and their labels, training first."""
    reports: list[str]
    """What is wrong with each dropped or lossy row, beginning with its place."""


@dataclass(frozen=True)
class Source:
    """Conversations and, for each, the place it came from."""

    conversations: list[Conversation]
    places: list[str]

    def pick(self, positions: Iterable[int]) -> "Source":
        """The conversations at these positions."""
        chosen = list(positions)
        return Source([self.conversations[i] for i in chosen], [self.places[i] for i in chosen])


def prepare(config: DatasetConfig, encoder: Encoder, seed: int) -> Prepared:
    """Read the dataset, hold rows out, and encode both sides.

    Raises UserError, with file and line, for rows that cannot be read, and where nothing is left
    to train or to hold out. The same files, encoder and seed give the same rows in any process.
    """
    rows, heldout, equal = read_conversations(config, seed)
    forget()
    train, evaluation = _encode(encoder, rows, "train", equal), _encode(encoder, heldout, "eval", 0)
    return Prepared(
        train=train.columns,
        eval=evaluation.columns,
        heldout=evaluation.kept,
        train_counts=train.counts,
        eval_counts=evaluation.counts,
        content_hash=_hash(train.columns, evaluation.columns),
        reports=[*train.reports, *evaluation.reports],
    )


def read_conversations(config: DatasetConfig, seed: int) -> tuple[Source, Source, int]:
    """The conversations to train on, those held out, and how many were equal to one held out."""
    check_sources(config)
    source = _source(config, read_rows(config), config.path)
    separate = read_heldout(config)
    if separate:
        name = "eval.path" if config.eval.path else "eval.split"
        held = _source(config, separate, config.eval.path or f"{config.path}[{config.eval.split}]")
        split = apart(source.conversations, held.conversations, name)
        return source.pick(split.train), held, split.equal
    if config.eval.share is None and config.eval.count is None:
        split = Split(list(range(len(source.places))), [], 0)
    else:
        split = draw(source.conversations, config.eval, seed)
    return source.pick(split.train), source.pick(split.heldout), split.equal


def _source(config: DatasetConfig, rows: Sequence[Row], name: str) -> Source:
    """The rows as conversations."""
    shape = find_shape(config, rows, name)
    return Source(to_conversations(rows, shape, name), [row.where for row in rows])


@dataclass(frozen=True)
class _Side:
    """One side, encoded."""

    columns: Columns
    kept: list[Conversation]
    counts: Counts
    reports: list[str]


def _encode(encoder: Encoder, source: Source, name: str, equal: int) -> _Side:
    """The token rows of one side, the conversations that gave them, and the account of both."""
    batch = _batch(encoder, source)
    if source.places and not batch.sequences:
        raise UserError(
            f"dataset: none of the {len(source.places)} {name} rows gives anything to train on "
            f"({_words(batch.dropped)}). The first one is {source.places[0]}."
        )
    columns = {
        "input_ids": [sequence.input_ids for sequence in batch.sequences],
        "labels": [sequence.labels for sequence in batch.sequences],
    }
    kept = [row for row, made in zip(source.conversations, batch.rows, strict=True) if made]
    reports = [_placed(report, source) for report in batch.reports]
    return _Side(columns, kept, _count(batch, columns, equal), reports)


def _batch(encoder: Encoder, source: Source) -> ChatBatch:
    """The encoded conversations; an error names the row by its place, not by its number."""
    try:
        return encoder.encode_batch(source.conversations)
    except ChatError as error:
        raise UserError(_placed(error, source)) from error


def _placed(error: ChatError, source: Source) -> str:
    """The encoder's words with the row's place before them; a template's own error has none."""
    if error.row is None:
        return str(error)
    words = ChatError(error.text, reason=error.reason, message=error.message, field=error.field)
    return f"{source.places[error.row]}: {words}"


def _count(batch: ChatBatch, columns: Columns, equal: int) -> Counts:
    """The counts of one side."""
    lengths = [len(ids) for ids in columns["input_ids"]]
    return Counts(
        rows=len(batch.rows),
        sequences=len(lengths),
        tokens=sum(lengths),
        trained_tokens=sum(len(row) - row.count(IGNORED) for row in columns["labels"]),
        longest=max(lengths, default=0),
        dropped=dict(batch.dropped) | ({"equal to a held-out row": equal} if equal else {}),
        cut_rows=batch.cut_rows,
        cut_turns=batch.cut_turns,
        lossy_rows=batch.kept_lost,
    )


def _words(dropped: Mapping[str, int]) -> str:
    """Counts by reason, as words."""
    return ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "no reason given"


def _hash(*sides: Columns) -> str:
    """A SHA-256 of token rows, the same on any machine: lengths and ids as little-endian int32."""
    digest = hashlib.sha256()
    for columns in sides:
        digest.update(struct.pack("<q", len(columns["labels"])))
        for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True):
            digest.update(struct.pack(f"<i{2 * len(ids)}i", len(ids), *ids, *labels))
    return digest.hexdigest()
