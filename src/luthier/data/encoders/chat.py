"""From examples to token rows: what a training method makes of the rows of one kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from luthier.chat import IGNORED, ChatBatch, ChatError, ChatSequence
from luthier.chat.encoder import OnEmpty
from luthier.chat.images import ImageExpander, find_image_message
from luthier.config.methods import METHODS
from luthier.config.schema import SourceConfig
from luthier.data.formats import Example
from luthier.data.formats.image_parts import image_parts
from luthier.data.store import Ragged
from luthier.data.store.table import Column, to_arrow
from luthier.storage.cache import KeyFolder, cache_root

COLUMNS_SETTING = "columns"
"""The setting of an encoder that has the columns of each row kept beside its example."""

IMAGES_COLUMN = "images"
"""The column of token rows with the images of each, in the order of their tokens.

An encoder gives the SHA-256 of each, one behind the other; the store, the numbers of its table of
images.
"""

RowProblem = tuple[str, str]
"""Why a row is dropped or not whole: the reason in a few words, and the encoder's own words."""


class RowState(IntEnum):
    """What becomes of a row; the numbers are those of the store's column `state`."""

    TRAINS = 0
    LOSSY = 1
    """It trains, although not all of its text is shown."""
    DROPPED = 2
    """It makes no sequence, and the settings allow that."""
    STOPS = 3
    """Training stops at it. Encoders raise ChatError for such a row, and the store has none."""


class RowOutcome(NamedTuple):
    """What an encoder makes of one row, and what is wrong with the row."""

    sequences: int
    """How many token rows it makes."""
    state: RowState = RowState.TRAINS
    reason: str = ""
    """Why it is dropped or lossy in a few words, the same for all such rows; empty if it is not."""
    problem: str = ""
    """The same in the encoder's own words, which name the message or the field."""
    cut_turns: int | None = None
    """Trained turns that it lost to fit the length; None for a row that was not cut."""


EMPTY_TEXT: RowProblem = ("empty text", "the text is empty")


def find_empty_text(text: str, empty_replies: OnEmpty, what: str = "text") -> RowProblem | None:
    """Return what is wrong with a text that trains and says nothing; None for any other.

    `what` says which text it is. Raises ChatError where training stops at it.
    """
    if empty_replies == "train" or text.strip():
        return None
    reason, description = f"empty {what}", f"the {what} is {'blank' if text else 'empty'}"
    if empty_replies == "error":
        raise ChatError(
            f"{description}, so the model would learn to stop at once. Set "
            "chat.empty_replies=drop to leave such rows out, or =train if that is meant",
            reason=reason,
        )
    return reason, description


@dataclass
class EncodedRows:
    """What some examples make."""

    columns: dict[str, Column]
    """The token rows, one entry a sequence in each column; `trained` counts those that train."""
    outcomes: list[RowOutcome]
    """What becomes of each example."""

    @property
    def digests(self) -> Sequence[bytes] | None:
        """The SHA-256 of the images of each sequence; None where the model sees none."""
        return cast("Sequence[bytes] | None", self.columns.get(IMAGES_COLUMN))

    @property
    def has_images(self) -> bool:
        """Whether a sequence has an image."""
        return any(self.digests or ())

    @property
    def counts(self) -> list[int]:
        """How many sequences each example makes."""
        return [outcome.sequences for outcome in self.outcomes]


def row_outcome(
    sequences: int, problem: RowProblem | None = None, cut_turns: int | None = None
) -> RowOutcome:
    """Return the outcome of a row that makes so many sequences.

    `problem` is what is wrong with it: the row is lossy where it makes a sequence all the same.
    """
    if problem is None:
        return RowOutcome(sequences, cut_turns=cut_turns)
    state = RowState.LOSSY if sequences else RowState.DROPPED
    return RowOutcome(sequences, state, *problem, cut_turns)


def window_outcome(windows: Sequence[Any]) -> RowOutcome:
    """Return the outcome of a document that makes these windows; an empty one makes none."""
    return row_outcome(len(windows), None if windows else EMPTY_TEXT)


def batch_outcomes(batch: ChatBatch) -> list[RowOutcome]:
    """Return the outcome of each conversation of a batch."""
    problems = {error.row: (error.reason, error.description) for error in batch.reports}
    return [
        row_outcome(len(sequences), problems.get(number), batch.cut.get(number))
        for number, sequences in enumerate(batch.rows)
    ]


class RowEncoder(Protocol):
    """Encodes the examples of one kind; it pickles, for processes that encode side by side."""

    def settings(self) -> dict[str, Any]:
        """All that decides the token rows besides the tokenizer, for JSON."""
        ...

    def encode(self, examples: Sequence[Example]) -> EncodedRows:
        """Encode some examples.

        Raises ChatError, with the example's number, for one that is neither dropped nor kept.
        """
        ...


EncoderFactory = Callable[[str, SourceConfig, str], RowEncoder]
"""Returns the encoder for the examples of a kind from a source; the last argument is the source's
config key. Raises UserError for a kind that the training method does not take."""


def hash_sequences(columns: Mapping[str, Column]) -> NDArray[np.bytes_]:
    """The BLAKE2b of each sequence, over all its columns: shape (sequences,), `S16`."""
    if not any(map(len, columns.values())):
        return np.empty(0, "S16")
    columns_of_bytes = [_bytes_of_rows(columns[name]) for name in sorted(columns)]
    # The sizes tell where one column ends and the next begins.
    sizes = np.array([[len(row) for row in part] for part in columns_of_bytes], "<i4").T
    rows = zip(map(bytes, sizes), *columns_of_bytes, strict=True)
    hashes = [blake2b(b"".join(row), digest_size=16).digest() for row in rows]
    return np.frombuffer(b"".join(hashes), "S16")


def _bytes_of_rows(column: Column) -> list[memoryview]:
    """A column's numbers or texts, row by row, as bytes that are the same on every machine."""
    from pyarrow import types

    array: Any = to_arrow(column)
    if types.is_large_string(array.type):
        return [memoryview(text.encode()) for text in array.to_pylist()]
    if types.is_large_binary(array.type):
        return [memoryview(data) for data in array.to_pylist()]
    is_ragged = types.is_list(array.type)
    numbers = (array.values if is_ragged else array).to_numpy()
    offsets = array.offsets.to_numpy() if is_ragged else np.arange(len(numbers) + 1)
    flat = memoryview(numbers.astype(numbers.dtype.newbyteorder("<"), copy=False)).cast("B")
    byte_offsets = (offsets * numbers.itemsize).tolist()
    return [flat[start:stop] for start, stop in pairwise(byte_offsets)]


def _token_rows(sequences: Sequence[ChatSequence]) -> dict[str, Column]:
    """The sequences as arrays."""
    offsets = np.cumsum([0, *map(len, sequences)])
    ids = np.frombuffer(b"".join([sequence.packed for sequence in sequences]), np.int32)
    # The labels of all sequences at once: a loop over tokens is slow.
    trains = _inside(len(ids), [
        (start + reply.start, start + reply.stop)
        for start, sequence in zip(offsets.tolist(), sequences, strict=False)
        for reply in sequence.replies
    ])  # fmt: skip
    trained = np.concatenate([[0], np.cumsum(trains, dtype=np.int32)])[offsets]
    return {
        "input_ids": Ragged(ids, offsets),
        "labels": Ragged(np.where(trains, ids, np.int32(IGNORED)), offsets),
        "trained": np.diff(trained).astype(np.int32),
    }


def image_digests(example: Mapping[str, Any], sequence: ChatSequence) -> bytes:
    """Return the SHA-256 of each image of a sequence of an example, one behind the other.

    They are in the order of their tokens. Images that went with turns to fit the length are none.
    """
    if not sequence.images:
        return b""
    digests = [bytes.fromhex(part["image"]["sha256"]) for part in image_parts(example)]
    return b"".join(digests[image.number] for image in sequence.images)


def _inside(size: int, stretches: list[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which of so many tokens are inside one of the stretches, which share no token."""
    starts, stops = np.array(stretches, np.int64).reshape(-1, 2).T
    steps = np.zeros(size + 1, np.int8)
    np.add.at(steps, starts, 1)
    np.subtract.at(steps, stops, 1)
    return np.cumsum(steps[:size], dtype=np.int8).astype(bool)


def share_templates_that_passed() -> None:
    """Have each chat template tried once on this machine, and not in each process."""
    from luthier.chat.template_probe import share_passed_templates

    share_passed_templates(KeyFolder(cache_root() / "templates"))


class ConversationEncoder:
    """Conversations as `input_ids` and `labels`, and `images` for a model that sees them."""

    def __init__(
        self, tokenizer: Any, settings: dict[str, Any], images: ImageExpander | None = None
    ) -> None:
        """`settings`: those of `luthier.chat.ChatEncoder`; `images`: what the model's processor
        makes of images, None for a model of text alone."""
        self._tokenizer = tokenizer
        self._settings = settings
        self.images = images

    @cached_property
    def chat(self) -> Any:
        """The chat encoder."""
        from luthier.chat import ChatEncoder

        share_templates_that_passed()
        encoder = ChatEncoder.from_settings(self._tokenizer, self._settings, self.images)
        encoder.check_variables()
        return encoder

    def settings(self) -> dict[str, Any]:
        """The chat encoder's, with the template's text; less what the template does not ask for.

        So a run without a date finds tomorrow what it encoded today.
        """
        settings = {"kind": "conversation", **self.chat.settings()}
        text = str(settings["template"])
        # Settings that the template never reads would change the cache key for nothing.
        if "strftime_now" not in text:
            del settings["date"]
        return settings

    def encode(self, examples: Sequence[Example]) -> EncodedRows:
        """Encode dicts of messages and tools."""
        batch = self.chat.encode_batch(examples)
        columns = _token_rows(batch.sequences)
        if self.images is not None:
            columns[IMAGES_COLUMN] = [
                image_digests(example, sequence)
                for example, sequences in zip(examples, batch.rows, strict=True)
                for sequence in sequences
            ]
        return EncodedRows(columns, batch_outcomes(batch))

    def __getstate__(self) -> dict[str, Any]:
        # Without the chat encoder, which is made where it is needed.
        return {name: getattr(self, name) for name in ("_tokenizer", "_settings", "images")}


class ColumnKeepingEncoder:
    """An encoder whose rows' own columns are kept, for rewards and metrics that read them."""

    def __init__(self, encoder: RowEncoder) -> None:
        self._encoder = encoder

    def settings(self) -> dict[str, Any]:
        """The encoder's, and that columns are kept."""
        return self._encoder.settings() | {COLUMNS_SETTING: True}

    def encode(self, examples: Sequence[Example]) -> EncodedRows:
        """Encode as the encoder does."""
        return self._encoder.encode(examples)


class ImageRefusingEncoder:
    """An encoder for rows of text alone, which says so of a row that has an image."""

    def __init__(self, encoder: RowEncoder, method: str) -> None:
        """`method`: the training method that takes no images."""
        self._encoder = encoder
        self._method = method

    def settings(self) -> dict[str, Any]:
        """The encoder's: rows of text are the same tokens with it."""
        return self._encoder.settings()

    def encode(self, examples: Sequence[Example]) -> EncodedRows:
        """Encode as the encoder does; ChatError, with the example's number, for an image."""
        for number, example in enumerate(examples):
            check_no_images(example, self._method, number)
        return self._encoder.encode(examples)


def check_no_images(example: Example, method: str, row: int | None = None) -> None:
    """Raise ChatError, with the row's number, for an example with an image.

    `method` is a training method that trains on text alone.
    """
    for messages in example.values():
        message = find_image_message(messages)
        if message is None:
            continue
        able = [f"trainer={name}" for name, facts in METHODS.items() if facts.takes_images]
        raise ChatError(
            f"the message has an image, and trainer.method={method} trains on text only. Use "
            f"{' or '.join(able)}, or remove the row",
            reason="an image",
            row=row,
            message=message,
            field="image",
        )


class TextEncoder:
    """Plain documents as `input_ids` and `labels`, cut into windows."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int | None,
        stride: int,
        empty_replies: OnEmpty = "error",
    ) -> None:
        """`empty_replies`: what to do with a text that is empty or blank."""
        self._arguments = (tokenizer, max_length, stride)
        self._empty_replies: OnEmpty = empty_replies

    @cached_property
    def _windows(self) -> Any:
        from luthier.data.encoders.plain_text import WindowEncoder

        return WindowEncoder(*self._arguments)

    def settings(self) -> dict[str, Any]:
        """The plain encoder's, and what becomes of empty texts."""
        windows = self._windows.settings()
        return {"kind": "text", **windows, "empty_replies": self._empty_replies}

    def encode(self, examples: Sequence[Example]) -> EncodedRows:
        """Encode dicts of a text.

        Raises ChatError, with the example's number, for an empty text that is not dropped.
        """
        texts: list[str] = []
        for number, example in enumerate(examples):
            try:
                problem = find_empty_text(example["text"], self._empty_replies)
            except ChatError as error:
                raise error.in_row(number) from None
            texts.append("" if problem else example["text"])
        rows = self._windows.encode_batch(texts)
        windows = [window for row in rows for window in row]
        return EncodedRows(
            {
                "input_ids": [window.input_ids for window in windows],
                "labels": [window.labels for window in windows],
                "trained": [len(w.labels) - w.labels.count(IGNORED) for w in windows],
            },
            [*map(window_outcome, rows)],
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_arguments": self._arguments, "_empty_replies": self._empty_replies}
