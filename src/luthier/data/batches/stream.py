"""Training rows from a stream of token rows that is too long to be known whole."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

import numpy as np

from luthier.data.batches.dataset import document
from luthier.data.batches.draws import random_bits
from luthier.data.batches.packing import pack
from luthier.data.batches.rows import Document, TrainingRow, check_fits
from luthier.errors import UserError

Open = Callable[[], Iterable[Any]]
"""Begins a pass over a source: rows with `input_ids` and `labels`."""

_DRAWS = 4096
"""Random numbers that are drawn at a time."""


def passes(open_rows: Open, buffer: int, seed: int, first: int = 0) -> Iterator[Document]:
    """Read a source again and again, each pass shuffled in another way, from pass `first` on.

    The passes follow one another without an end or a gap, so that a place in the stream is a
    number of rows, whatever pass it is in. Raises UserError for a source without rows.
    """
    for number in count(first):
        rows = 0
        for row in shuffled(open_rows(), buffer, seed, number):
            rows += 1
            yield document(row)
        if not rows:
            raise UserError("dataset: the stream holds no row to train on.")


def shuffled(rows: Iterable[Any], buffer: int, *seed: int) -> Iterator[Any]:
    """Give rows in another order, each drawn from the next `buffer` ones; nothing is lost."""
    places = _draws(*seed)
    held: list[Any] = []
    for row in rows:
        if len(held) < buffer:
            held.append(row)
            continue
        at = next(places) % buffer
        held[at], row = row, held[at]
        yield row
    while held:
        at = next(places) % len(held)
        held[at], held[-1] = held[-1], held[at]
        yield held.pop()


def packed(documents: Iterable[Document], length: int, rows: int) -> Iterator[TrainingRow]:
    """Pack as many documents at a time as fill about `rows` training rows; nothing is lost.

    Each time the emptiest training row goes back to the next documents. Raises UserError for a
    document that is longer than `length`.
    """
    held: list[Document] = []
    tokens = 0
    for row in documents:
        check_fits(len(row.input_ids), length)
        held.append(row)
        tokens += len(row.input_ids)
        if tokens >= length * rows:
            bins = _bins(held, length)
            held = list(bins.pop()) if len(bins) > 1 else []
            tokens = sum(len(kept.input_ids) for kept in held)
            yield from bins
    yield from _bins(held, length)


def _bins(documents: list[Document], length: int) -> list[TrainingRow]:
    """The documents in bins, the emptiest bin last."""
    lengths = np.array([len(row.input_ids) for row in documents], dtype=np.int64)
    bins = list(pack(lengths, length, None))
    bins.sort(key=lambda rows: -int(lengths[list(rows)].sum()))
    return [tuple(documents[row] for row in rows) for rows in bins]


def _draws(*seed: int) -> Iterator[int]:
    for part in count():
        yield from random_bits(_DRAWS, *seed, part).tolist()
