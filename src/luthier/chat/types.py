"""What the encoder gives: sequences of token ids with labels, errors, and the counts of a batch."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from luthier.errors import UserError


class ChatError(UserError):
    """A conversation that cannot become tokens, or a template that cannot be used.

    `reason` is one word for counting, `row` the row's number in a batch, `message` the message's
    number in the row, `field` the field of that message; each is None where it does not apply.
    """

    def __init__(
        self,
        text: str,
        *,
        reason: str,
        row: int | None = None,
        message: int | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(text)
        self.text = text
        self.reason = reason
        self.row = row
        self.message = message
        self.field = field

    def __str__(self) -> str:
        where = [f"row {self.row}"] if self.row is not None else []
        if self.message is not None:
            where.append(f"message {self.message}")
        if self.field is not None:
            where.append(f"field `{self.field}`")
        return f"{', '.join(where)}: {self.text}" if where else self.text

    @property
    def description(self) -> str:
        """The error's text without the row, for a caller that says itself which row it is."""
        return str(self.in_row(None))

    def in_row(self, row: int | None) -> ChatError:
        """Return the same error with the row's number."""
        return ChatError(
            self.text, reason=self.reason, row=row, message=self.message, field=self.field
        )


# Ids are held as bytes: a quarter of the memory of a list, and joined without looking at each.
BYTES_PER_ID = 4
"""Bytes of one id: an int32 in the order of this machine."""


def pack_ids(ids: Sequence[int]) -> bytes:
    """Return the ids as bytes."""
    return array("i", ids).tobytes()


def unpack_ids(ids: bytes) -> list[int]:
    """Return the ids of bytes."""
    return memoryview(ids).cast("i").tolist()


IGNORED = -100
"""The label of a token that does not train."""


class Reply(NamedTuple):
    """A trained reply: tokens `start` up to `stop` answer as message `message`."""

    message: int
    start: int
    stop: int


class ImageSpan(NamedTuple):
    """Tokens `start` up to `stop` stand for image `number` of the row, counted from 0."""

    number: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start` up to `stop` of a sequence that have one origin.

    `message` and `field` are None where the template itself wrote the text; `role` is None there
    and for the row's tools. A token that spans two origins counts to the first.
    """

    start: int
    end: int
    role: str | None
    message: int | None
    field: str | None
    trained: bool


class ChatSequence:
    """One training sequence: `input_ids` and `labels` of one length.

    `labels[t]` is `input_ids[t]` where the token trains and -100 elsewhere. `segments` says where
    each token came from; it is worked out when it is first asked for.
    """

    __slots__ = (
        "_find_segments",
        "_input_ids",
        "_labels",
        "_packed",
        "_segments",
        "images",
        "replies",
    )

    def __init__(
        self,
        input_ids: list[int] | bytes,
        replies: list[Reply],
        find_segments: Callable[[], list[Segment]],
        images: list[ImageSpan] | None = None,
    ) -> None:
        """`input_ids`: a list, or as `packed` gives them."""
        self._input_ids: list[int] | None = None
        self._packed: bytes | None = None
        if isinstance(input_ids, bytes):
            self._packed = input_ids
        else:
            self._input_ids = input_ids
        self._labels: list[int] | None = None
        self.replies = replies
        """The replies that train in this sequence, from first to last.

        A reply that holds images is one entry for each stretch between them: images never train.
        """
        self.images = images or []
        """The images of this sequence, in the order of their tokens."""
        self._find_segments: Callable[[], list[Segment]] | None = find_segments
        self._segments: list[Segment] = []

    @property
    def input_ids(self) -> list[int]:
        """The ids of all tokens."""
        if self._input_ids is None:
            self._input_ids = unpack_ids(self.packed)
        return self._input_ids

    @property
    def packed(self) -> bytes:
        """The ids as int32 in the order of this machine, one behind the other."""
        if self._packed is None:
            self._packed = pack_ids(self.input_ids)
        return self._packed

    @property
    def labels(self) -> list[int]:
        """The ids of the replies where they stand, and -100 elsewhere."""
        if self._labels is None:
            self._labels = [IGNORED] * len(self.input_ids)
            for _, start, stop in self.replies:
                self._labels[start:stop] = self.input_ids[start:stop]
        return self._labels

    @property
    def trained_tokens(self) -> int:
        """How many tokens train."""
        return sum(stop - start for _, start, stop in self.replies)

    @property
    def messages(self) -> list[int]:
        """The messages that train in this sequence."""
        return list(dict.fromkeys(reply.message for reply in self.replies))

    @property
    def segments(self) -> list[Segment]:
        """The sequence as runs of tokens of one origin, from first to last."""
        if self._find_segments is not None:
            self._segments = self._find_segments()
            self._find_segments = None
        return self._segments

    def __len__(self) -> int:
        return len(self.packed) // BYTES_PER_ID if self._input_ids is None else len(self._input_ids)

    def __repr__(self) -> str:
        trained = self.trained_tokens
        return f"ChatSequence({len(self)} tokens, {trained} trained, messages {self.messages})"


@dataclass(slots=True)
class ChatBatch:
    """What became of a batch of rows."""

    rows: list[list[ChatSequence]] = field(default_factory=list)
    """The sequences of each row, in the order given; empty for a dropped row."""
    dropped: Counter[str] = field(default_factory=Counter)
    """How many rows were dropped, by reason."""
    cut: dict[int, int] = field(default_factory=dict)
    """Rows from whose front turns were removed to fit the length, by number: how many of those that
    went train."""
    lossy_rows: int = 0
    """Rows kept although the template does not show all of their text (`on_lost="keep"`)."""
    reports: list[ChatError] = field(default_factory=list)
    """What is wrong with each dropped or lossy row."""

    def drop(self, error: ChatError) -> None:
        """Account for a row that makes no sequence."""
        self.dropped[error.reason] += 1
        self.reports.append(error)
        self.rows.append([])

    @property
    def sequences(self) -> list[ChatSequence]:
        """All sequences, row after row."""
        return [sequence for row in self.rows for sequence in row]

    @property
    def counts(self) -> dict[str, int | dict[str, int]]:
        """Rows, sequences and tokens, and what was dropped or cut and why."""
        sequences = self.sequences
        trained = sum(sequence.trained_tokens for sequence in sequences)
        return {
            "rows": len(self.rows),
            "sequences": len(sequences),
            "tokens": sum(map(len, sequences)),
            "trained_tokens": trained,
            "dropped_rows": sum(self.dropped.values()),
            "dropped": dict(self.dropped),
            "cut_rows": len(self.cut),
            "cut_turns": sum(self.cut.values()),
            "lossy_rows": self.lossy_rows,
        }
