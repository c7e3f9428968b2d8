"""Several tables as one, laid end to end."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.store import Table


class JoinedTable:
    """The token rows of several tables under one numbering."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = list(tables)
        self._starts: list[int] = np.cumsum([0, *map(len, self.tables)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row, shape (rows,)."""
        parts = [table.lengths for table in self.tables if len(table)]
        return np.concatenate([np.empty(0, np.int32), *parts])

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Tokens that a model reads for each row, shape (rows,)."""
        parts = [table.tokens for table in self.tables if len(table)]
        return np.concatenate([np.empty(0, np.int32), *parts])

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers of all tables, shape (rows,)."""
        parts = [table.column(name) for table in self.tables if len(table)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def row(self, number: int, /) -> Mapping[str, Any]:
        """The columns of one row."""
        table = bisect_right(self._starts, number) - 1
        return self.tables[table].row(number - self._starts[table])

    def start_of(self, table: int) -> int:
        """The number of a table's first row."""
        return self._starts[table]
