"""The rows of one source as token rows in the store: encoded once, found again by their key."""

import gc
import json
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import Any, NamedTuple
from unicodedata import unidata_version

import numpy as np
from numpy.typing import NDArray

from luthier.chat import ChatError
from luthier.data.encoders.chat import (
    COLUMNS_SETTING,
    IMAGES_COLUMN,
    EncodedRows,
    RowEncoder,
    RowState,
    hash_sequences,
)
from luthier.data.examples import BadRows, LocatedExample, OpenedSource
from luthier.data.fingerprints import (
    Fingerprints,
    encode_json,
    fingerprint,
    normalised_fingerprint,
    pack_fingerprints,
)
from luthier.data.formats.messages import find_other_keys
from luthier.data.images.image_table import ImageTableWriter, StoredImages
from luthier.data.rows import BadRow, excerpt
from luthier.data.store import EntryWriter, Store, StoredEntry, TokenTable, cache_key
from luthier.errors import UserError
from luthier.gc_pause import pause_gc
from luthier.terminal import ProgressReport, guard_output

CHUNK_ROWS = 1000
"""Rows that are encoded at once."""
CHUNKS_PER_COLLECTION = 100
"""Chunks behind which garbage is collected, should a function of the user's own make some."""
TABLE_LAYOUT = 3
"""Raise it when other tables or columns are written for the same rows."""
TABLE_NAMES = ("rows", "tokens", "hashes", "images")
"""What is written: one entry a row; one a sequence; the hash of each sequence; one an image."""


def encode_rows(
    opened: OpenedSource, encoder: RowEncoder, writer: EntryWriter, workers: int, drop: bool
) -> dict[str, Any]:
    """Read, encode and write all rows, a few in memory at a time; returns what is to be known.

    Raises UserError as `encoded` does.
    """
    for name in TABLE_NAMES:
        writer.table(name)
    bad, images = BadRows(), ImageTableWriter(writer)
    rows = opened.examples(bad, opened.source.rows(verify=True), images.keep)
    settings = encoder.settings()
    keeps_columns = bool(settings.get(COLUMNS_SETTING))
    other_keys: Counter[str] = Counter()
    bar = ProgressReport(opened.source.size, f"encoding {opened.source.label}")
    with bar, _executor(encoder, workers) as submit, pause_gc():
        encoded_chunks = _in_order(submit, _chunks(rows, bad, drop), 2 * workers)
        for number, (chunk, encoded) in enumerate(encoded_chunks, start=1):
            _write(writer, chunk, *encoded, keeps_columns, images)
            for row in chunk:
                other_keys.update(find_other_keys(row.placed.example))
            bar.update(len(chunk))
            if number % CHUNKS_PER_COLLECTION == 0:
                gc.collect(0)
    images.flush()
    if not drop:
        bad.raise_if_any(opened)
    return {
        "filtered": bad.filtered,
        "mapped": opened.source.left_out,
        "bad": [[row.where, row.problem, row.text] for row in bad.rows],
        "names": opened.names,
        "shape": opened.row_format.type,
        "unread_keys": unread_keys(other_keys, settings.get("template")),
    }


def unread_keys(keys: Mapping[str, int], template: Any) -> dict[str, int]:
    """Return those keys of messages that the chat template does not name, with their rows.

    `template`: its text, or the texts of several by name; None for rows without one.
    """
    text = "\n".join(template.values()) if isinstance(template, dict) else str(template or "")
    return {
        key: rows
        for key, rows in sorted(keys.items())
        if not re.search(rf"\b{re.escape(key)}\b", text)
    }


class _Row(NamedTuple):
    """An example with its JSON, keys in their own order, and its fingerprint."""

    placed: LocatedExample
    text: bytes
    print_: bytes


class _EncodedChunk(NamedTuple):
    """What some examples make, and the hash of each sequence."""

    rows: EncodedRows
    hashes: Fingerprints


class _RefusedExample(NamedTuple):
    """An example that the encoder neither keeps nor drops."""

    number: int
    words: str


_Submit = Callable[[list[Any]], "Future[_EncodedChunk | _RefusedExample]"]


def _chunks(rows: Iterator[LocatedExample], bad: BadRows, drop: bool) -> Iterator[list[_Row]]:
    """The rows, many at a time; once a bad one stops the run, the others are only looked at."""
    while chunk := list(islice(rows, CHUNK_ROWS)):
        # All bad rows are to be counted, so the reading goes on and only the encoding ends.
        if drop or not bad.rows:
            yield list(_canonical(chunk, bad))


def _canonical(chunk: list[LocatedExample], bad: BadRows) -> Iterator[_Row]:
    """The rows with their JSON; a value that JSON has not makes a bad row."""
    for row in chunk:
        try:
            # As it stands: templates write tools and arguments in the order of their keys, and what
            # is rendered again from the store must be what was trained.
            yield _Row(row, encode_json(row.example), fingerprint(row.example))
        except (TypeError, ValueError) as error:  # what a function of the user's own may yield
            bad.add(row.where, f"a value in it is not JSON: {error}", excerpt(repr(row.example)))


def _in_order(
    submit: _Submit, chunks: Iterable[list[_Row]], ahead: int
) -> Iterator[tuple[list[_Row], _EncodedChunk]]:
    """Each chunk with what it makes, in order, while some more are on their way."""
    waiting: list[tuple[list[_Row], Future[_EncodedChunk | _RefusedExample]]] = []
    for chunk in chunks:
        waiting.append((chunk, submit([row.placed.example for row in chunk])))
        if len(waiting) > ahead:
            yield _chunk_result(*waiting.pop(0))
    for chunk, future in waiting:
        yield _chunk_result(chunk, future)


def _chunk_result(
    chunk: list[_Row], future: "Future[_EncodedChunk | _RefusedExample]"
) -> tuple[list[_Row], _EncodedChunk]:
    """What the chunk makes; UserError for an example that is refused, with its place."""
    try:
        encoded = future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "dataset.workers: a process that encodes rows was killed, perhaps because "
            "the memory was full. Set fewer workers."
        ) from error
    if isinstance(encoded, _RefusedExample):
        raise UserError(f"{chunk[encoded.number].placed.where}: {encoded.words}")
    return chunk, encoded


@contextmanager
def _executor(encoder: RowEncoder, workers: int) -> Iterator[_Submit]:
    """How to have examples encoded: in a thread beside the reading, or in processes."""
    pool: Executor
    if workers == 1:
        pool = ThreadPoolExecutor(1)
        encode: Callable[[list[Any]], _EncodedChunk | _RefusedExample] = partial(
            _encode_chunk, encoder
        )
    else:
        # A fork of a process whose threads are at work may hang.
        pool = ProcessPoolExecutor(
            workers, get_context("spawn"), _start_worker, (pickle.dumps(encoder),)
        )
        encode = _encode_in_worker
    try:
        yield lambda examples: pool.submit(encode, examples)
    finally:
        pool.shutdown(cancel_futures=True)


_ENCODER: list[RowEncoder] = []
"""The encoder of a process that encodes for another one."""


def _start_worker(pickled: bytes) -> None:
    """Begin a process that encodes; one thread, for there are other processes."""
    import os

    guard_output()
    # Fast tokenizers start a thread for each core in every process.
    os.environ["RAYON_NUM_THREADS"] = "1"
    _ENCODER.append(pickle.loads(pickled))


def _encode_in_worker(examples: list[Any]) -> _EncodedChunk | _RefusedExample:
    return _encode_chunk(_ENCODER[0], examples)


def _encode_chunk(encoder: RowEncoder, examples: list[Any]) -> _EncodedChunk | _RefusedExample:
    try:
        rows = encoder.encode(examples)
    except ChatError as error:
        # Told as values: the error itself does not come back from another process.
        if error.row is None:
            raise UserError(str(error)) from None
        return _RefusedExample(error.row, error.description)
    return _EncodedChunk(rows, hash_sequences(rows.columns))


def _write(
    writer: EntryWriter,
    chunk: list[_Row],
    encoded: EncodedRows,
    hashes: Fingerprints,
    keeps_columns: bool,
    images: ImageTableWriter,
) -> None:
    """Write a chunk's rows and their token rows, which name images by their numbers."""
    outcomes = encoded.outcomes
    # -1 where nothing was cut: a cut may also cost no trained turn.
    cut_turns = [-1 if row.cut_turns is None else row.cut_turns for row in outcomes]
    writer.table("rows").append(
        {
            **_split_halves("print", pack_fingerprints(row.print_ for row in chunk)),
            "where": [row.placed.where for row in chunk],
            "example": [row.text for row in chunk],
            "sequences": np.array(encoded.counts, np.int32),
            "state": np.array([row.state for row in outcomes], np.int8),
            "reason": [row.reason for row in outcomes],
            "problem": [row.problem for row in outcomes],
            "cut": np.array(cut_turns, np.int32),
            **({"columns": _columns(chunk)} if keeps_columns else {}),
        }
    )
    columns = dict(encoded.columns)
    if encoded.digests is not None:
        columns[IMAGES_COLUMN] = images.number(encoded.digests)
    writer.table("tokens").append(columns)
    writer.table("hashes").append(_split_halves("hash", hashes))


def _columns(chunk: list[_Row]) -> list[bytes]:
    """Each row's columns as its source has them, as JSON; dates and their like become text."""
    return [json.dumps(dict(row.placed.columns), default=str).encode() for row in chunk]


def _split_halves(name: str, prints: Fingerprints) -> dict[str, NDArray[np.int64]]:
    """Prints as two columns of numbers, which need no copy when they are read."""
    halves = prints.view(np.int64).reshape(-1, 2)
    return {f"{name}_{half}": halves[:, half].copy() for half in range(2)}


def _join_halves(table: TokenTable, name: str) -> Fingerprints:
    """The prints that a table holds as two columns of numbers."""
    halves = np.empty((len(table), 2), np.int64)
    for half in range(2):
        halves[:, half] = table.column(f"{name}_{half}")
    return halves.view("S16").reshape(-1)


Array = NDArray[Any]


class EncodedSource:
    """A source's rows, encoded: what each makes, and its token rows."""

    def __init__(self, opened: OpenedSource, stored: StoredEntry) -> None:
        self.opened = opened
        self.stored = stored
        self.rows: TokenTable = stored.table("rows")
        """One a row: `print_0`, `print_1`, `where`, `example`, `sequences`, `state`, `problem`,
        `reason`, `cut`; and where the encoder keeps them, `columns`."""
        self.tokens: TokenTable = stored.table("tokens")
        """One a sequence: `input_ids`, `labels`, `trained`, and where a model sees images,
        `images`."""
        self.images = StoredImages(stored.table("images"), opened.names)
        """The images of the rows; their numbers stand in the column `images` of `tokens`."""
        self._hashes: TokenTable = stored.table("hashes")
        self._names = dict(zip(stored.manifest["names"], opened.names, strict=True))
        self.filtered: int = stored.manifest["filtered"]
        """Rows that the filter left out."""
        self.left_out_by_map: tuple[int, int] = tuple(stored.manifest.get("mapped", (0, 0)))
        """Rows that the map left out, and of how many."""
        self.unread_keys: dict[str, int] = stored.manifest.get("unread_keys", {})
        """Keys of messages that neither luthier nor the template reads, each with its rows."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bad_rows(self) -> list[BadRow]:
        """The rows that could not be read."""
        rows = (BadRow(*row) for row in self.stored.manifest["bad"])
        return [replace(row, where=self._place(row.where)) for row in rows]

    @property
    def fingerprints(self) -> Fingerprints:
        """The fingerprint of each row, `S16`."""
        return _join_halves(self.rows, "print")

    @property
    def normalised_fingerprints(self) -> Fingerprints:
        """The fingerprint of each row's normalised text, `S16`: made once, kept in the store."""
        # The folder's name is the key of the rows, so it tells of all that decides them; case
        # folding and NFKC depend on the Unicode version of Python besides.
        rows = self.stored.folder
        key = cache_key({"normalised": rows.name, "unicode": unidata_version})
        stored = Store(rows.parent).open_or_make(key, self._normalise)
        return _join_halves(stored.table("prints"), "print")

    def _normalise(self, writer: EntryWriter) -> dict[str, Any]:
        table = writer.table("prints")
        for start in range(0, len(self), CHUNK_ROWS):
            examples = self.examples(range(start, min(start + CHUNK_ROWS, len(self))))
            table.append(
                _split_halves("print", pack_fingerprints(map(normalised_fingerprint, examples)))
            )
        return {}

    @property
    def hashes(self) -> Fingerprints:
        """The hash of each sequence's token ids and labels, `S16`."""
        return _join_halves(self._hashes, "hash")

    @property
    def sequences(self) -> Array:
        """How many sequences each row makes."""
        return self.rows.column("sequences")

    @property
    def states(self) -> Array:
        """What becomes of each row: the numbers of `RowState`."""
        return self.rows.column("state")

    @property
    def cut_turns(self) -> Array:
        """Trained turns that each row lost to fit the length, -1 where it was not cut."""
        return self.rows.column("cut")

    def drop_reasons(self, rows: Array | None = None) -> dict[str, int]:
        """How many of these rows are dropped for each reason; None for all rows."""
        states = self.states
        rows = np.arange(len(self)) if rows is None else rows
        dropped = rows[states[rows] == RowState.DROPPED]
        return dict(Counter(self.rows.values("reason", dropped)))

    def sequences_of(self, rows: Array) -> Array:
        """The numbers of the sequences that these rows make, in the order of the rows."""
        counts = self.sequences.astype(np.int64)
        return expand_ranges((np.cumsum(counts) - counts)[rows], counts[rows])

    def examples(self, rows: Iterable[int]) -> list[Any]:
        """The examples of these rows."""
        return [json.loads(text) for text in self.rows.values("example", rows)]

    def columns(self, rows: Iterable[int]) -> list[dict[str, Any]]:
        """The columns of these rows as their source has them; none where they are not kept."""
        if "columns" not in self.rows.columns:
            return [{} for _ in rows]
        return [json.loads(text) for text in self.rows.values("columns", rows)]

    def locations(self, rows: Iterable[int]) -> list[str]:
        """Where these rows stand, such as `data.jsonl:7`."""
        return [self._place(where) for where in self.rows.values("where", rows)]

    @property
    def first_location(self) -> str:
        """Where the first row stands."""
        return self.locations([0])[0]

    def _place(self, where: str) -> str:
        """A place in a file that may have had another name when its rows were encoded."""
        before = max(filter(where.startswith, self._names), key=len)
        return self._names[before] + where.removeprefix(before)


def expand_ranges(starts: Array, counts: Array) -> Array:
    """Return the numbers `start`, `start + 1`, ... of each pair, one pair behind the other."""
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts, counts) + offsets


def encode_source(
    opened: OpenedSource,
    encoder: RowEncoder,
    store: Store,
    tokenizer: str,
    workers: int,
    drop: bool,
) -> EncodedSource:
    """The source's encoded rows, from the store or made now.

    `tokenizer`: its digest. `drop`: leave bad rows out; else they raise UserError, as do rows that
    the encoder neither keeps nor drops.
    """
    key = source_cache_key(opened, encoder, tokenizer)

    def make(writer: EntryWriter) -> dict[str, Any]:
        try:
            return encode_rows(opened, encoder, writer, workers, drop)
        except UserError:
            opened.source.check_unchanged()
            raise

    source = EncodedSource(opened, store.open_or_make(key, make))
    if changes := source.images.find_changes():
        # The files of images are no part of the key, which is known before any row is read.
        changed_key = cache_key({"rows": key, "images": changes})
        source = EncodedSource(opened, store.open_or_make(changed_key, make))
    if not drop:
        bad = BadRows(source.bad_rows)
        bad.raise_if_any(opened)
    return source


def source_cache_key(opened: OpenedSource, encoder: RowEncoder, tokenizer: str) -> str:
    """The key of a source's token rows: of all that decides them, and nothing else."""
    return cache_key(
        {
            "content": opened.source.digest(),
            **opened.settings(),
            "encoder": encoder.settings(),
            "tokenizer": tokenizer,
            "layout": TABLE_LAYOUT,
        }
    )
