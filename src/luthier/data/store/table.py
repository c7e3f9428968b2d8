"""Token tables in Arrow files: read as views of the mapped file, joined, and written in batches."""

import os
import re
import shutil
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.errors import UserError
from luthier.storage.disk_space import is_disk_full
from luthier.storage.sizes import folder_size, format_bytes

if TYPE_CHECKING:
    import pyarrow as pa

ValueReader = Callable[[int], Any]
"""Gives the value of one column at a row of a record batch."""


class TokenTable:
    """The rows of one Arrow file.

    Opening it reads the file's footer only. It pickles as its path, so worker processes map the
    same file.
    """

    def __init__(self, path: Path | str) -> None:
        import pyarrow as pa

        self.path = Path(path)
        self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [
            self._file.get_batch(number) for number in range(self._file.num_record_batches)
        ]
        sizes = [batch.num_rows for batch in self._batches]
        self._starts: list[int] = np.cumsum([0, *sizes]).tolist()
        self._readers: list[dict[str, ValueReader] | None] = [None] * len(sizes)

    def __reduce__(self) -> tuple[type["TokenTable"], tuple[Path]]:
        return TokenTable, (self.path,)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns; a table without rows has none."""
        return tuple(self._file.schema.names)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row, shape (rows,): of its `input_ids`, or as its column `length` says."""
        if "length" in self.columns:
            return self.column("length").astype(np.int32)
        return self.lengths_of("input_ids")

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """Tokens that a model reads for each row, shape (rows,): as `tokens` says, or its length.

        A row of several sequences, such as two replies to a prompt, is as long as the longest.
        """
        return self.column("tokens").astype(np.int32) if "tokens" in self.columns else self.lengths

    def lengths_of(self, column: str) -> NDArray[np.int32]:
        """Tokens of each row of a column of token rows, shape (rows,); reads no token."""
        lengths = [np.diff(_offsets(batch.column(column))) for batch in self._batches]
        return np.concatenate([np.empty(0, np.int32), *lengths])

    def row(self, position: int) -> dict[str, Any]:
        """One row: token rows as read-only int32 views of the file, and numbers, texts, bytes.

        A negative position counts from the end; IndexError for one that is not there.
        """
        number, position_in_batch = self._find(position)
        return {name: read(position_in_batch) for name, read in self._readers_of(number).items()}

    def rows(self, positions: Iterable[int]) -> list[dict[str, Any]]:
        """Several rows, in the order of their positions."""
        return [self.row(int(position)) for position in positions]

    def column(self, name: str) -> NDArray:
        """A whole column of numbers, shape (rows,)."""
        arrays = [batch.column(name).to_numpy(zero_copy_only=False) for batch in self._batches]
        return np.concatenate(arrays) if arrays else np.empty(0, np.int64)

    def values(self, name: str, positions: Iterable[int]) -> list[Any]:
        """The values of one column at some rows, such as the texts of a few held-out rows."""
        locations = (self._find(int(position)) for position in positions)
        return [self._readers_of(number)[name](place) for number, place in locations]

    def _find(self, position: int) -> tuple[int, int]:
        """The record batch in which a row stands, and its place there."""
        if not -len(self) <= position < len(self):
            raise IndexError(f"row {position} of {len(self)} rows")
        position %= len(self)
        number = bisect_right(self._starts, position) - 1
        return number, position - self._starts[number]

    def _readers_of(self, number: int) -> dict[str, ValueReader]:
        """The readers of one record batch, made when its first row is asked for."""
        readers = self._readers[number]
        if readers is None:
            batch = self._batches[number]
            readers = {name: _reader(batch.column(name)) for name in self.columns}
            self._readers[number] = readers
        return readers


def _reader(array: Any) -> ValueReader:
    """How a value is taken from an Arrow array."""
    import pyarrow as pa

    if pa.types.is_list(array.type):
        offsets, values = _offsets(array), array.values.to_numpy()
        return lambda place: values[offsets[place] : offsets[place + 1]]
    if pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type):
        return lambda place: array[place].as_py()
    numbers = array.to_numpy(zero_copy_only=False)
    return lambda place: numbers[place]


def _offsets(array: Any) -> NDArray[np.int32]:
    """Where each token row begins in the flat values, and where the last one ends."""
    offsets: NDArray[np.int32] = array.offsets.to_numpy()
    return offsets


MAX_BATCH_TOKENS = 2**31 - 1
"""Tokens of one record batch: Arrow's lists count them in 32 bits."""


@dataclass(frozen=True)
class Ragged:
    """Token rows laid end to end: row i is `values[offsets[i] : offsets[i + 1]]`."""

    values: NDArray[np.integer]
    offsets: NDArray[np.integer]

    def __len__(self) -> int:
        return len(self.offsets) - 1


Column = (
    Sequence[Sequence[int]] | Sequence[int] | Sequence[str] | Sequence[bytes] | NDArray | Ragged
)
"""Token rows, numbers, texts or bytes: one value for each row of the table."""


def to_arrow(column: Column) -> "pa.Array":
    """The column as one Arrow array; TypeError for values that no column holds, such as None.

    Token rows become lists of int32, numbers keep numpy's type (Python's become int64 or float64),
    texts and bytes become large strings and binaries.
    """
    array = _array(column)
    if array.null_count:
        raise TypeError("a column holds None")
    return array


def _array(column: Column) -> "pa.Array":
    import pyarrow as pa

    if isinstance(column, Ragged):
        return _lists(_int32(column.values), column.offsets)
    if isinstance(column, np.ndarray):
        return pa.array(column)
    if isinstance(column[0], str):
        return pa.array(column, pa.large_string())
    if isinstance(column[0], bytes):
        return pa.array(column, pa.large_binary())
    if isinstance(column[0], (list, tuple, np.ndarray)):
        return _lists(*_flat(column))
    return pa.array(np.asarray(column))


def _flat(rows: Any) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Token rows end to end, and where each begins.

    `struct` packs a list of ids in 11 ns an id; numpy and pyarrow take 18.
    """
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    if isinstance(rows[0], np.ndarray):
        return _int32(np.concatenate(rows)), offsets
    try:
        packed = b"".join([struct.pack(f"={len(row)}i", *row) for row in rows])
    except struct.error as error:
        raise TypeError(f"a token row holds what is no 32-bit number: {error}") from error
    return np.frombuffer(packed, dtype=np.int32), offsets


def _int32(values: NDArray) -> NDArray[np.int32]:
    """The ids as int32; TypeError if one does not fit."""
    narrow = values.astype(np.int32, copy=False)
    if narrow.dtype != values.dtype and not np.array_equal(narrow, values):
        raise TypeError("a token row holds what is no 32-bit number")
    return narrow


def _lists(values: NDArray[np.int32], offsets: NDArray[np.integer]) -> "pa.Array":
    """A list array over flat values, without a copy of them."""
    import pyarrow as pa

    if len(values) > MAX_BATCH_TOKENS:
        raise ValueError(f"{len(values)} tokens in one append; append fewer rows at a time")
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


class JoinedTable:
    """The token rows of several tables under one numbering."""

    def __init__(self, tables: Sequence[TokenTable]) -> None:
        self.tables = list(tables)
        self._starts: list[int] = np.cumsum([0, *map(len, self.tables)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row, shape (rows,)."""
        arrays = [table.lengths for table in self.tables if len(table)]
        return np.concatenate([np.empty(0, np.int32), *arrays])

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Tokens that a model reads for each row, shape (rows,)."""
        arrays = [table.tokens for table in self.tables if len(table)]
        return np.concatenate([np.empty(0, np.int32), *arrays])

    def lengths_of(self, column: str) -> NDArray[np.int32]:
        """Values of each row of a column of lists, shape (rows,); 0 where a table has none."""
        arrays = [
            table.lengths_of(column) if column in table.columns else np.zeros(len(table), np.int32)
            for table in self.tables
        ]
        return np.concatenate([np.empty(0, np.int32), *arrays])

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers of all tables, shape (rows,)."""
        arrays = [table.column(name) for table in self.tables if len(table)]
        return np.concatenate(arrays) if arrays else np.empty(0, np.int64)

    def row(self, number: int, /) -> Mapping[str, Any]:
        """The columns of one row."""
        table = bisect_right(self._starts, number) - 1
        return self.tables[table].row(number - self._starts[table])

    def start_of(self, table: int) -> int:
        """The number of a table's first row."""
        return self._starts[table]


@contextmanager
def cache_write_errors(cache: Path, entry: Path | None = None) -> Iterator[None]:
    """Turn an OSError of writing to the cache folder into a UserError that says what to do.

    `entry` is the folder of what was being written, whose size is told when the disk is full.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if is_disk_full(error, cache):
            raise UserError(_full(cache, entry, reason)) from error
        raise UserError(
            f"dataset: the cache folder {cache} cannot be written to: {reason}.\n"
            "Name another folder: dataset.cache=FOLDER, or the environment variable LUTHIER_CACHE."
        ) from error


def _full(cache: Path, entry: Path | None, reason: str) -> str:
    written = format_bytes(folder_size(entry)) if entry is not None and entry.is_dir() else "none"
    return (
        f"dataset: the cache folder {cache} is full ({reason}): {written} of this dataset's "
        f"encoded rows were written and {format_bytes(shutil.disk_usage(cache).free)} are free.\n"
        "What was written is removed. Free some space there, or name another folder: "
        "dataset.cache=FOLDER, or the environment variable LUTHIER_CACHE."
    )


BATCH_BYTES = 8 * 2**20
"""Bytes that a table holds back before it writes a record batch."""


class TableWriter:
    """Takes the rows of one table; a few hundred at a time is fast."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows = 0
        """Rows so far."""
        self._schema: Any = None
        self._waiting: list[Any] = []
        self._waiting_bytes = 0
        self._sink: Any = None
        self._file: Any = None

    def append(self, columns: Mapping[str, Column]) -> None:
        """Add rows: one value a row in each column, and the same columns each time.

        Raises ValueError for columns of different lengths, TypeError for values that do not go
        with those before, and UserError where the disk is full.
        """
        import pyarrow as pa

        lengths = {len(column) for column in columns.values()}
        if len(lengths) != 1:
            raise ValueError(f"columns of {sorted(lengths)} rows in one append")
        if lengths == {0}:
            return
        arrays = [to_arrow(column) for column in columns.values()]
        batch = pa.RecordBatch.from_arrays(arrays, names=list(columns))
        self._schema = self._schema or batch.schema
        if batch.schema != self._schema:
            raise TypeError(f"columns ({batch.schema}) behind columns ({self._schema})")
        self._hold(batch)

    def close(self) -> None:
        """Write what is held back and the file's end; a table without rows has no columns."""
        import pyarrow as pa

        self._schema = self._schema or pa.schema([])
        self._write()
        with self._writing():
            self._file.close()
            self._sink.close()

    def abandon(self) -> None:
        """Let go of the file, which is to be removed."""
        if self._sink is not None:
            with suppress(OSError):
                self._sink.close()

    def _hold(self, batch: Any) -> None:
        self._waiting.append(batch)
        self._waiting_bytes += batch.nbytes
        self.rows += batch.num_rows
        if self._waiting_bytes >= BATCH_BYTES:
            self._write()

    def _write(self) -> None:
        """Write what is held back as one record batch, and begin the file with the first."""
        import pyarrow as pa

        with self._writing():
            if self._file is None:
                self._sink = pa.OSFile(str(self._path), "wb")
                self._file = pa.ipc.new_file(self._sink, self._schema)
            if self._waiting:
                self._file.write_batch(pa.concat_batches(self._waiting))
        self._waiting, self._waiting_bytes = [], 0

    def _writing(self) -> Any:
        return cache_write_errors(self._path.parent.parent, self._path.parent)


class EntryWriter:
    """Takes the tables of one entry; each becomes a file in its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tables: dict[str, TableWriter] = {}

    def table(self, name: str) -> TableWriter:
        """The table of this name, begun if it is new; ValueError for what names no file."""
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{name!r} cannot be a file's name")
        if name not in self._tables:
            self._tables[name] = TableWriter(self._folder / f"{name}.arrow")
        return self._tables[name]

    def close(self) -> None:
        """Finish all tables."""
        for table in self._tables.values():
            table.close()

    def abandon(self) -> None:
        """Let go of all files."""
        for table in self._tables.values():
            table.abandon()
