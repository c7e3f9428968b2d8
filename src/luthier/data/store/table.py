"""A table of encoded rows, mapped from its file: rows are views of the file, not copies."""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Reader = Callable[[int], Any]
"""Gives the value of one column at a row of a record batch."""


class Table:
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
        self._readers: list[dict[str, Reader] | None] = [None] * len(sizes)

    def __reduce__(self) -> tuple[type["Table"], tuple[Path]]:
        return Table, (self.path,)

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
        parts = [np.diff(_offsets(batch.column(column))) for batch in self._batches]
        return np.concatenate([np.empty(0, np.int32), *parts])

    def row(self, position: int) -> dict[str, Any]:
        """One row: token rows as read-only int32 views of the file, and numbers, texts, bytes.

        A negative position counts from the end; IndexError for one that is not there.
        """
        number, place = self._find(position)
        return {name: read(place) for name, read in self._readers_of(number).items()}

    def rows(self, positions: Iterable[int]) -> list[dict[str, Any]]:
        """Several rows, in the order of their positions."""
        return [self.row(int(position)) for position in positions]

    def column(self, name: str) -> NDArray:
        """A whole column of numbers, shape (rows,)."""
        parts = [batch.column(name).to_numpy(zero_copy_only=False) for batch in self._batches]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def values(self, name: str, positions: Iterable[int]) -> list[Any]:
        """The values of one column at some rows, such as the texts of a few held-out rows."""
        places = (self._find(int(position)) for position in positions)
        return [self._readers_of(number)[name](place) for number, place in places]

    def _find(self, position: int) -> tuple[int, int]:
        """The record batch in which a row stands, and its place there."""
        if not -len(self) <= position < len(self):
            raise IndexError(f"row {position} of {len(self)} rows")
        position %= len(self)
        number = bisect_right(self._starts, position) - 1
        return number, position - self._starts[number]

    def _readers_of(self, number: int) -> dict[str, Reader]:
        """The readers of one record batch, made when its first row is asked for."""
        readers = self._readers[number]
        if readers is None:
            batch = self._batches[number]
            readers = {name: _reader(batch.column(name)) for name in self.columns}
            self._readers[number] = readers
        return readers


def _reader(array: Any) -> Reader:
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
