"""What a column of a table may hold, and how lists of Python become Arrow arrays."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

MOST_TOKENS = 2**31 - 1
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

    if len(values) > MOST_TOKENS:
        raise ValueError(f"{len(values)} tokens in one append; append fewer rows at a time")
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))
