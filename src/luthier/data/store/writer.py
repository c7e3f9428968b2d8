"""Writes the tables of an entry to disk while they are made, in memory that does not grow."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from luthier.data.store.columns import Column, to_arrow
from luthier.data.store.disk import writing_to

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
        return writing_to(self._path.parent.parent, self._path.parent)


class Writer:
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
