"""Token rows and the training rows that are made of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from luthier.errors import UserError

IGNORE_INDEX = -100
"""The label of a token that does not train."""

Array = np.ndarray
"""Numbers in one or two dimensions; each use says its dtype and shape."""


class Document(NamedTuple):
    """One token row: what a model sees as a text of its own."""

    input_ids: Array
    """int32, shape (tokens,)."""
    labels: Array
    """int32, shape (tokens,); -100 where nothing trains."""
    columns: Mapping[str, Any] | None = None
    """The columns of the row as its source has them; None where nothing reads them."""
    images: tuple[bytes, ...] = ()
    """The images of the row as their files have them, in the order of their tokens."""


TrainingRow = tuple[Document, ...]
"""The documents that share one row of a batch; none at all in a row that only fills up a batch."""


class RowTable(Protocol):
    """Token rows on disk or in memory."""

    @property
    def lengths(self) -> Array:
        """The tokens of each row, shape (rows,)."""
        ...

    def row(self, number: int, /) -> Mapping[str, Array]:
        """Return the columns of one row, `input_ids` and `labels` among them."""
        ...


class InMemoryTable:
    """Token rows in lists, such as those that an encoder gives."""

    def __init__(self, input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> None:
        """Both have one entry a row, as long as each other."""
        self.lengths = np.array([len(ids) for ids in input_ids], dtype=np.int32)
        ends = np.cumsum(self.lengths)[:-1]
        self._columns = {
            "input_ids": np.split(_flat(input_ids), ends),
            "labels": np.split(_flat(labels), ends),
        }

    def row(self, number: int, /) -> Mapping[str, Array]:
        """Return the columns of one row."""
        return {name: column[number] for name, column in self._columns.items()}


def check_row_fits(tokens: int, length: int) -> None:
    """Raise UserError for a token row that is longer than a training row may be."""
    if tokens > length:
        raise UserError(
            f"chat.max_length={length}: a row of {tokens} tokens does not fit into a training row "
            "of that length."
        )


def _flat(column: Sequence[Sequence[int]]) -> Array:
    arrays = [np.asarray(row, dtype=np.int32) for row in column]
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)


ReadColumns = Callable[[int], Mapping[str, Any]]
"""Takes the number of a row of a table, returns its columns."""
ReadImages = Callable[[int], tuple[bytes, ...]]
"""Takes the number of a row of a table, returns the bytes of its images in the order of their
tokens."""


class TokenRows:
    """The rows of a table that take part, perhaps some of them several times."""

    def __init__(
        self,
        table: RowTable,
        index: Array | None = None,
        read_columns: ReadColumns | None = None,
        read_images: ReadImages | None = None,
    ) -> None:
        """`index` holds row numbers of the table (a mixture, or one side of a split); None: all.

        `read_columns` gives the columns of a row as its source has them; None where they are not
        kept. `read_images` gives its images; None where no row has any.
        """
        self.table = table
        self.read_columns = read_columns
        self.read_images = read_images
        self.index = index
        self.lengths: Array = table.lengths if index is None else table.lengths[index]
        """The tokens of each row that takes part."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def different(self) -> Array:
        """The numbers of the table's rows that take part, each once."""
        return np.arange(len(self)) if self.index is None else np.unique(self.index)
