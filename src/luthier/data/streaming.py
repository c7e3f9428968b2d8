"""Rows that are read and encoded while they train, for sets larger than the disk."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from luthier.chat import ChatError
from luthier.config.schema import DatasetConfig
from luthier.data.encode_source import unread_keys
from luthier.data.encoders.chat import (
    EncodedRows,
    EncoderFactory,
    RowEncoder,
    RowState,
)
from luthier.data.examples import (
    PEEKED_ROWS,
    BadRows,
    DatasetSources,
    LocatedExample,
    OpenedSource,
)
from luthier.data.formats.image_parts import image_parts
from luthier.data.formats.messages import find_other_keys
from luthier.errors import UserError

CHUNK_ROWS = 256
"""Rows that are encoded at once."""

TokenRow = dict[str, Any]


@dataclass
class TokenRowStream:
    """The training rows of a dataset, read from the first anew at each pass."""

    opened: dict[str, OpenedSource]
    encoders: dict[str, RowEncoder]
    config: DatasetConfig
    on_problem: Callable[[dict[str, str]], None] = lambda row: None
    """Told of each row that is left out or not whole: `where`, `state`, `problem`."""
    _told: set[str] = field(default_factory=set)

    def __call__(self) -> Iterator[TokenRow]:
        """One pass: token rows with `input_ids` and `labels`.

        Raises UserError for a row that cannot be read, where the config does not drop such rows.
        """
        sources = {key: self._rows(key) for key in self.opened}
        if self.config.mix == "concatenate":
            for key, rows in sources.items():
                yield from _repeated(rows, self.opened[key], self._rows)
        else:
            weights = {key: opened.config.weight or 1.0 for key, opened in self.opened.items()}
            yield from _interleaved(sources, weights)

    def unread_keys(self, key: str) -> dict[str, int]:
        """Return the keys of messages that nothing reads, among the first rows of a source."""
        opened, found = self.opened[key], Counter[str]()
        for row in opened.examples(BadRows(), opened.source.peek(PEEKED_ROWS), fetch=False):
            found.update(find_other_keys(row.example))
        return unread_keys(found, self.encoders[key].settings().get("template"))

    def _rows(self, key: str) -> Iterator[TokenRow]:
        """The token rows of one source; the next rows are encoded while these train."""
        opened, encoder, bad = self.opened[key], self.encoders[key], BadRows()
        examples = opened.examples(bad)
        # One chunk is encoded while the one before it trains.
        with ThreadPoolExecutor(1) as worker:
            waiting: tuple[list[LocatedExample], Future[EncodedRows]] | None = None
            while True:
                chunk = list(islice(examples, CHUNK_ROWS))
                self._tell_bad(opened, bad)
                previous = waiting
                waiting = None
                if chunk:
                    waiting = chunk, worker.submit(encoder.encode, [row.example for row in chunk])
                if previous is not None:
                    yield from self._token_rows(*previous)
                if waiting is None:
                    self._tell_left_out(opened)
                    return

    def _tell_left_out(self, opened: OpenedSource) -> None:
        """Say how many rows the map left out, at the end of the first pass."""
        left_out, read_rows = opened.source.left_out
        key = f"{opened.key}.map"
        if left_out and key not in self._told and os.environ.get("RANK", "0") == "0":
            self._told.add(key)
            print(f"{key} left out {left_out:,} of {read_rows:,} rows", file=sys.stderr)

    def _tell_bad(self, opened: OpenedSource, bad: BadRows) -> None:
        if self.config.on_bad_row == "error":
            bad.raise_if_any(opened)
        for row in bad.rows:
            self._tell(row.where, "could not be read", row.problem)
        bad.rows.clear()

    def _tell(self, where: str, state: str, problem: str) -> None:
        # Each pass finds the same ones.
        if where not in self._told:
            self._told.add(where)
            self.on_problem({"where": where, "state": state, "problem": problem})

    def _token_rows(
        self, chunk: list[LocatedExample], future: "Future[EncodedRows]"
    ) -> Iterator[TokenRow]:
        try:
            encoded = future.result()
        except ChatError as error:
            if error.row is None:
                raise
            raise UserError(f"{chunk[error.row].where}: {error.description}") from error
        if encoded.has_images:
            raise _images_error(next(row for row in chunk if any(image_parts(row.example))))
        for row, outcome in zip(chunk, encoded.outcomes, strict=True):
            if outcome.state != RowState.TRAINS:
                self._tell(row.where, outcome.state.name.lower(), outcome.problem)
        for ids, labels in zip(
            *(_split(encoded.columns[n]) for n in ("input_ids", "labels")), strict=True
        ):
            yield {"input_ids": ids, "labels": labels}


def open_stream(
    sources: DatasetSources,
    encoders: EncoderFactory,
    on_problem: Callable[[dict[str, str]], None] = lambda row: None,
) -> TokenRowStream:
    """Open the training sources as a stream.

    Raises UserError for settings that need all rows to be known (duplicates, a share or a count)
    and for rows with images.
    """
    _check_streamable(sources.config)
    opened = {source.key: source for source in sources.open_train().values()}
    for source in opened.values():
        for row in source.examples(BadRows(), source.source.peek(PEEKED_ROWS), fetch=False):
            if any(image_parts(row.example)):
                raise _images_error(row)
    row_encoders = {
        key: encoders(source.row_format.example_type, source.config, key)
        for key, source in opened.items()
    }
    return TokenRowStream(opened, row_encoders, sources.config, on_problem)


def _check_streamable(config: DatasetConfig) -> None:
    """Refuse what can only be done with all rows at hand."""
    needs_all_rows = {
        "dataset.deduplicate": config.deduplicate != "none",
        "dataset.eval.share": config.eval.share is not None,
        "dataset.eval.count": config.eval.count is not None,
    }
    for key, is_set in needs_all_rows.items():
        if is_set:
            raise UserError(
                f"{key} needs all rows to be known, and dataset.streaming=true reads them as they "
                "come. Remove it; rows to evaluate on can come from dataset.eval.path, "
                "dataset.eval.split or dataset.eval.sets."
            )
    for name, source in config.sources.items():
        if source.repeats != int(source.repeats):
            raise UserError(
                f"dataset.sources.{name}.repeats={source.repeats:g}: a stream is read a whole "
                "number of times. Give a whole number, or weights with dataset.mix=interleave."
            )


def _images_error(row: LocatedExample) -> UserError:
    """The error for a row with images, whose bytes are read when it trains."""
    return UserError(
        f"{row.where}: dataset.streaming=true stores nothing of the rows, but the images of this "
        "one must be found again when it trains. Set dataset.streaming=false; only tokens and "
        "references to the images are then kept on disk, and images that no file of their own "
        "holds."
    )


def _repeated(
    rows: Iterator[TokenRow], opened: OpenedSource, again: Callable[[str], Iterator[TokenRow]]
) -> Iterator[TokenRow]:
    """A source as many times as it is to be seen."""
    yield from rows
    for _ in range(int(opened.config.repeats) - 1):
        yield from again(opened.key)


def _interleaved(
    sources: Mapping[str, Iterator[TokenRow]], weights: Mapping[str, float]
) -> Iterator[TokenRow]:
    """Rows by weight, evenly spread, until a source has no more: the next is the most behind."""
    taken = dict.fromkeys(sources, 0)
    while True:
        key = min(taken, key=lambda name: (taken[name] + 0.5) / weights[name])
        row = next(sources[key], None)
        if row is None:
            return
        taken[key] += 1
        yield row


def _split(column: Any) -> list[Any]:
    """The token rows of a column, one by one."""
    if isinstance(column, list):
        return [np.asarray(row, np.int32) for row in column]
    return np.split(column.values, column.offsets[1:-1])
