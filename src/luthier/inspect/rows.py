"""Every row through the encoder, none stopping the others, and what the config makes of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from luthier.chat import ChatBatch, ChatEncoder, ChatError, ChatSequence
from luthier.config.schema import ChatSettings
from luthier.data import Conversation
from luthier.data.prepare import Source

_CHUNK = 1024
Fate = Literal["trains", "lossy", "dropped", "stops"]
"""`lossy`: trains, although not all of its text is shown; `stops`: training stops at this row."""


@dataclass
class Row:
    """One row: where it stands, what it makes, and what is wrong with it."""

    number: int
    """Its number on its side, from 1."""
    place: str
    conversation: Conversation
    sequences: list[ChatSequence] = field(default_factory=list)
    """What trains, cut as configured; for a row that is too long to fit, nothing."""
    whole: list[ChatSequence] = field(default_factory=list)
    """The same before anything was cut."""
    error: ChatError | None = None
    fate: Fate = "trains"
    cut_turns: int | None = None
    """Trained turns that were cut off; None for a row that was not cut."""

    @property
    def words(self) -> str:
        """What is wrong with the row, with its message and field but without its place."""
        return words(self.error) if self.error else ""


def words(error: ChatError) -> str:
    """The error without the number of its row."""
    plain = ChatError(error.text, reason=error.reason, message=error.message, field=error.field)
    return str(plain)


class Reader:
    """Encodes rows under the settings of a config, and goes on where training would stop."""

    def __init__(self, tokenizer: Any, settings: ChatSettings, end_tokens: list[int]) -> None:
        self.settings = settings
        given = settings.model_dump() | {"eos_token_ids": end_tokens}
        unbound = given | {"max_length": None}
        self._strict = ChatEncoder(tokenizer, **unbound | {"on_lost": "drop"})
        # One day for all, also where the clock passes midnight.
        day = {"date": self._strict.date}
        self.encoder = ChatEncoder(tokenizer, **given | day)
        self._lenient = ChatEncoder(tokenizer, **unbound | day | {"on_lost": "keep"})
        on_long = "turns" if settings.on_long == "turns" else "drop"
        fitting = {"on_lost": "keep", "on_long": on_long}
        self._fitting = ChatEncoder(tokenizer, **given | day | fitting)
        other = "segments" if settings.boundaries == "served" else "served"
        self._other = ChatEncoder(
            tokenizer, **unbound | day | {"on_lost": "keep", "boundaries": other}
        )

    def read(self, source: Source) -> Iterator[list[Row]]:
        """The rows of one side, many at a time."""
        for start in range(0, len(source.places), _CHUNK):
            part = range(start, min(start + _CHUNK, len(source.places)))
            yield self.rows(source, part)

    def rows(self, source: Source, positions: range) -> list[Row]:
        """The rows at these positions."""
        part = source.pick(positions)
        rows = [
            Row(number + 1, place, conversation)
            for number, place, conversation in zip(
                positions, part.places, part.conversations, strict=True
            )
        ]
        encoded = encode_all(self._strict, part.conversations)
        for row, (sequences, error) in zip(rows, encoded, strict=True):
            row.whole, row.error = sequences, error
            self._judge(row)
        return rows

    def otherwise(self, rows: list[Row]) -> list[list[ChatSequence]]:
        """The rows with the boundaries that the config did not choose."""
        encoded = encode_all(self._other, [row.conversation for row in rows])
        return [sequences for sequences, _ in encoded]

    def _judge(self, row: Row) -> None:
        """What the config makes of the row."""
        if row.error is not None and row.error.reason == "lost" and self._keeps:
            lost = row.error
            row.whole, row.error = _first(encode_alone(self._lenient, row.conversation))
            row.error, row.fate = row.error or lost, "lossy"
        if row.error is not None and not row.whole:
            row.fate = self._fate(row.error)
            return
        row.sequences = row.whole
        limit = self.settings.max_length
        if limit is not None and max(map(len, row.whole)) > limit:
            self._cut(row)

    @property
    def _keeps(self) -> bool:
        return self.settings.on_lost == "keep"

    def _fate(self, error: ChatError) -> Fate:
        if error.reason == "nothing to train" or self.settings.on_lost == "drop":
            return "dropped"
        return "stops"

    def _cut(self, row: Row) -> None:
        batch = encode_alone(self._fitting, row.conversation)
        row.sequences = batch.rows[0]
        if row.sequences:
            row.cut_turns = batch.cut_turns
        else:
            row.error = batch.reports[0]
            row.fate = "stops" if self.settings.on_long == "error" else "dropped"


Encoded = tuple[list[ChatSequence], ChatError | None]


def encode_all(encoder: ChatEncoder, conversations: list[Any]) -> list[Encoded]:
    """The sequences of each row, or what is wrong with it."""
    try:
        batch = encoder.encode_batch(conversations)
    except ChatError:
        return [_first(encode_alone(encoder, conversation)) for conversation in conversations]
    errors = {report.row: report for report in batch.reports}
    return [(made, errors.get(number)) for number, made in enumerate(batch.rows)]


def encode_alone(encoder: ChatEncoder, conversation: Any) -> ChatBatch:
    """A batch of one row; a row that the encoder stops at is a dropped one."""
    try:
        return encoder.encode_batch([conversation])
    except ChatError as error:
        batch = ChatBatch()
        batch.drop(error)
        return batch


def _first(batch: ChatBatch) -> Encoded:
    return batch.rows[0], batch.reports[0] if batch.reports else None
