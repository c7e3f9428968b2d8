"""The rows of files, one file behind another."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from luthier.data.reading.csv_files import csv_rows
from luthier.data.reading.digests import of_places
from luthier.data.reading.formats import TABLES
from luthier.data.reading.json_files import json_rows, jsonl_rows
from luthier.data.reading.options import Options
from luthier.data.reading.places import File
from luthier.data.reading.tables import arrow_rows, parquet_rows, table_size
from luthier.data.reading.text_files import text_rows
from luthier.data.rows import BadRow, Row
from luthier.errors import UserError

_READERS: dict[str, Callable[[File, Any], Iterator[Row | BadRow]]] = {
    "jsonl": jsonl_rows,
    "json": json_rows,
    "csv": csv_rows,
    "tsv": csv_rows,
    "text": text_rows,
    "parquet": lambda file, options: parquet_rows(file),
    "arrow": lambda file, options: arrow_rows(file),
}
_OBJECTS = (
    "Each row is to be one JSON object, such as\n"
    '  {"messages": [{"role": "user", "content": "Hi"}, '
    '{"role": "assistant", "content": "Hello!"}]}\n'
    '  {"prompt": "Hi", "completion": "Hello!"}\n'
    "one per line (JSONL), or all of them in one array (JSON)."
)
_RECORDS = (
    "Each record is to have one cell for each column of the header; a cell that holds the "
    "delimiter, a quote or a line break stands in quotes, and quotes inside it are doubled. "
    "Where quotes are plain characters, set options.quotechar=null."
)
_ADVICE = {"jsonl": _OBJECTS, "json": _OBJECTS, "csv": _RECORDS, "tsv": _RECORDS}


class FileContent:
    """The rows of files, each of a format and its options."""

    def __init__(self, files: Sequence[File], options: Mapping[str, Options]) -> None:
        self._files, self._options = files, options
        self.advice = _ADVICE.get(files[0].format, "")

    def items(self) -> Iterator[Row | BadRow]:
        """The rows of all files; one without rows is a bad row, or an error if it is alone."""
        for file in self._files:
            item = None
            for item in _READERS[file.format](file, self._options[file.format]):
                yield item
            if item is None:
                yield self._empty(file)

    def _empty(self, file: File) -> BadRow:
        """What stands for a file without rows."""
        if len(self._files) > 1:
            return BadRow(file.label, "the file is empty: it has no rows", "")
        raise UserError(f"dataset: {file.label} is empty: it has no rows. {self.advice}".rstrip())

    def digest(self) -> str:
        """The hash of the files as they are stored."""
        # An archive is one place, however many of its files are read.
        places = {file.place.key: file.place for file in self._files}
        return of_places(places.values())

    def settings(self) -> dict[str, Any]:
        """The formats, in the order of the files where they differ, and their options."""
        formats = [file.format for file in self._files]
        kinds = sorted(set(formats))
        options = {kind: self._options[kind].model_dump() for kind in kinds}
        return {"format": kinds[0] if len(kinds) == 1 else formats, "options": options}

    def size(self) -> int | None:
        """How many rows there are, where the files themselves say it."""
        if any(file.format not in TABLES or file.place.is_remote for file in self._files):
            return None
        return sum(map(table_size, self._files))
