"""Conversations through the encoder, none stopping the others."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from luthier.chat import ChatBatch, ChatEncoder, ChatError, ChatSequence
from luthier.config.schema import ChatSettings
from luthier.data.examples import Placed
from luthier.inspect.rows import Fate, Row, place


class Made(NamedTuple):
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

    def rows(self, placed: Sequence[Placed]) -> list[Row]:
        """What these conversations make."""
        made = encode_all(self._encoder, [row.example for row in placed])
        rows = [
            Row(place(row.where), row.example, one.sequences, one.error, "trains", one.cut_turns)
            for row, one in zip(placed, made, strict=True)
        ]
        if self.settings.on_lost == "keep":
            self._keep([row for row in rows if row.error and row.error.reason == "lost"])
        for row in rows:
            if not row.sequences and row.error is not None:
                row.fate = self._fate(row.error)
        return rows

    def whole(self, row: Row) -> list[ChatSequence]:
        """The sequences of a row before anything is cut."""
        if row.sequences and row.cut_turns is None:
            return row.sequences
        return _sequences(self._unbound, row)

    def otherwise(self, row: Row) -> list[ChatSequence]:
        """The same with the boundaries that the config did not choose."""
        return _sequences(self._other, row)

    def _keep(self, rows: list[Row]) -> None:
        """Encode rows that lose text and train all the same."""
        made = encode_all(self._lenient, [row.example for row in rows])
        for row, (sequences, error, cut_turns) in zip(rows, made, strict=True):
            row.error, row.sequences, row.cut_turns = error, sequences, cut_turns
            row.fate = "lossy"

    def _fate(self, error: ChatError) -> Fate:
        """What becomes of a row that makes no sequence."""
        if error.reason == "too long":
            return "stops" if self.settings.on_long == "error" else "dropped"
        if error.reason == "nothing to train" or self.settings.on_lost == "drop":
            return "dropped"
        return "stops"


def encode_all(encoder: ChatEncoder, conversations: list[Any]) -> list[Made]:
    """What each row makes; a row that the encoder stops at is a dropped one."""
    try:
        return _made(encoder.encode_batch(conversations))
    except ChatError:
        return [_alone(encoder, conversation) for conversation in conversations]


def _alone(encoder: ChatEncoder, conversation: Any) -> Made:
    try:
        return _made(encoder.encode_batch([conversation]))[0]
    except ChatError as error:
        return Made([], error, None)


def _sequences(encoder: ChatEncoder, row: Row) -> list[ChatSequence]:
    """What a row makes; nothing where the encoder stops at it."""
    try:
        return encoder.encode(row.example["messages"], row.example.get("tools"))
    except ChatError:
        return []


def _made(batch: ChatBatch) -> list[Made]:
    errors = {report.row: report for report in batch.reports}
    return [
        Made(sequences, errors.get(number), batch.cut.get(number))
        for number, sequences in enumerate(batch.rows)
    ]
