"""The rows of one source on their way to the store: read, encoded beside the reading, written."""

import gc
import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from luthier.chat import ChatError
from luthier.data.compose.prints import Prints, as_prints, canonical
from luthier.data.encoders import COLUMNS, EncodedRows, RowEncoder, hashes_of
from luthier.data.examples import BadRows, Opened, Placed
from luthier.data.rows import excerpt
from luthier.data.store import Table, Writer
from luthier.errors import UserError
from luthier.gc_pause import no_collection

CHUNK = 1000
"""Rows that are encoded at once."""
FINE, LOSSY, DROPPED = range(3)
"""What becomes of a row: it is whole, or kept although some text is lost, or makes no sequence."""
UNCOLLECTED = 100
"""Chunks behind which garbage is collected, should a function of the user's own make some."""
LAYOUT = 1
"""Raise it when other tables or columns are written for the same rows."""
TABLES = ("rows", "tokens", "hashes")
"""What is written: one entry a row; one a sequence; the hash of each sequence."""


def make_rows(
    opened: Opened, encoder: RowEncoder, writer: Writer, workers: int, drop: bool
) -> dict[str, Any]:
    """Read, encode and write all rows, a few in memory at a time; returns what is to be known.

    Raises UserError as `encoded` does.
    """
    from tqdm import tqdm

    for name in TABLES:
        writer.table(name)
    bad = BadRows()
    rows = opened.examples(bad)
    keeps_columns = bool(encoder.settings().get(COLUMNS))
    bar = tqdm(
        total=opened.source.size, unit=" rows", desc=f"encode {opened.source.label}", delay=2,
        mininterval=0.5,
    )  # fmt: skip
    with bar, _executor(encoder, workers) as submit, no_collection():
        made = _in_order(submit, _chunks(rows, bad, drop), 2 * workers)
        for number, (chunk, encoded) in enumerate(made, start=1):
            _write(writer, chunk, *encoded, keeps_columns)
            bar.update(len(chunk))
            if number % UNCOLLECTED == 0:
                gc.collect(0)
    if not drop:
        bad.raise_if_any(opened)
    return {
        "filtered": bad.filtered,
        "bad": [[row.where, row.problem, row.text] for row in bad.rows],
        "names": opened.names,
        "shape": opened.shape.name,
    }


class _Row(NamedTuple):
    """An example with its canonical JSON and the fingerprint of that."""

    placed: Placed
    text: bytes
    print_: bytes


class _Made(NamedTuple):
    """What some examples make, and the hash of each sequence."""

    rows: EncodedRows
    hashes: Prints


class _Refused(NamedTuple):
    """An example that the encoder neither keeps nor drops."""

    number: int
    words: str


_Submit = Callable[[list[Any]], "Future[_Made | _Refused]"]


def _chunks(rows: Iterator[Placed], bad: BadRows, drop: bool) -> Iterator[list[_Row]]:
    """The rows, many at a time; once a bad one stops the run, the others are only looked at."""
    while chunk := list(islice(rows, CHUNK)):
        if drop or not bad.rows:
            yield list(_canonical(chunk, bad))


def _canonical(chunk: list[Placed], bad: BadRows) -> Iterator[_Row]:
    """The rows with their canonical JSON; a value that JSON has not makes a bad row."""
    for row in chunk:
        try:
            yield _Row(row, *canonical(row.example))
        except (TypeError, ValueError) as error:  # what a function of the user's own may yield
            bad.add(row.where, f"a value in it is not JSON: {error}", excerpt(repr(row.example)))


def _in_order(
    submit: _Submit, chunks: Iterable[list[_Row]], ahead: int
) -> Iterator[tuple[list[_Row], _Made]]:
    """Each chunk with what it makes, in order, while some more are on their way."""
    waiting: list[tuple[list[_Row], Future[_Made | _Refused]]] = []
    for chunk in chunks:
        waiting.append((chunk, submit([row.placed.example for row in chunk])))
        if len(waiting) > ahead:
            yield _done(*waiting.pop(0))
    for chunk, future in waiting:
        yield _done(chunk, future)


def _done(chunk: list[_Row], future: "Future[_Made | _Refused]") -> tuple[list[_Row], _Made]:
    """What the chunk makes; UserError for an example that is refused, with its place."""
    try:
        made = future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "dataset.workers: a process that encodes rows was ended from outside, perhaps because "
            "the memory was full. Set fewer workers."
        ) from error
    if isinstance(made, _Refused):
        raise UserError(f"{chunk[made.number].placed.where}: {made.words}")
    return chunk, made


@contextmanager
def _executor(encoder: RowEncoder, workers: int) -> Iterator[_Submit]:
    """How to have examples encoded: in a thread beside the reading, or in processes."""
    pool: Executor
    if workers == 1:
        pool = ThreadPoolExecutor(1)
        encode: Callable[[list[Any]], _Made | _Refused] = partial(_made, encoder)
    else:
        # A fork of a process whose threads are at work may hang.
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (pickle.dumps(encoder),))
        encode = _made_there
    try:
        yield lambda examples: pool.submit(encode, examples)
    finally:
        pool.shutdown(cancel_futures=True)


_ENCODER: list[RowEncoder] = []
"""The encoder of a process that encodes for another one."""


def _start(pickled: bytes) -> None:
    """Begin a process that encodes; one thread, for there are other processes."""
    import os

    os.environ["RAYON_NUM_THREADS"] = "1"
    _ENCODER.append(pickle.loads(pickled))


def _made_there(examples: list[Any]) -> _Made | _Refused:
    return _made(_ENCODER[0], examples)


def _made(encoder: RowEncoder, examples: list[Any]) -> _Made | _Refused:
    try:
        made = encoder.encode(examples)
    except ChatError as error:
        # Told as values: the error itself does not come back from another process.
        if error.row is None:
            raise UserError(str(error)) from None
        return _Refused(error.row, error.words)
    return _Made(made, hashes_of(made.columns))


def _write(
    writer: Writer, chunk: list[_Row], made: EncodedRows, hashes: Prints, keeps_columns: bool
) -> None:
    """Write a chunk's rows and their token rows."""
    states = [
        FINE if number not in made.problems else LOSSY if count else DROPPED
        for number, count in enumerate(made.counts)
    ]
    nothing = ("", "")
    writer.table("rows").append(
        {
            **halves("print", as_prints(row.print_ for row in chunk)),
            "where": [row.placed.where for row in chunk],
            "example": [row.text for row in chunk],
            "sequences": np.array(made.counts, np.int32),
            "state": np.array(states, np.int8),
            "reason": [made.problems.get(number, nothing)[0] for number in range(len(chunk))],
            "problem": [made.problems.get(number, nothing)[1] for number in range(len(chunk))],
            # -1 where nothing was cut: a cut may also cost no trained turn.
            "cut": np.array([made.cut.get(number, -1) for number in range(len(chunk))], np.int32),
            **({"columns": _columns(chunk)} if keeps_columns else {}),
        }
    )
    writer.table("tokens").append(made.columns)
    writer.table("hashes").append(halves("hash", hashes))


def _columns(chunk: list[_Row]) -> list[bytes]:
    """Each row's columns as its source has them, as JSON; dates and their like become text."""
    return [json.dumps(dict(row.placed.columns), default=str).encode() for row in chunk]


def halves(name: str, prints: Prints) -> dict[str, NDArray[np.int64]]:
    """Prints as two columns of numbers, which need no copy when they are read."""
    words = prints.view(np.int64).reshape(-1, 2)
    return {f"{name}_{half}": words[:, half].copy() for half in range(2)}


def prints_of(table: Table, name: str) -> Prints:
    """The prints that a table holds as two columns of numbers."""
    words = np.empty((len(table), 2), np.int64)
    for half in range(2):
        words[:, half] = table.column(f"{name}_{half}")
    return words.view("S16").reshape(-1)
