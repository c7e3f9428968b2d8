"""Rows as a function of the user's own makes them of a source's rows: `dataset.map`."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from luthier.config.code_settings import CodeEntry
from luthier.data.rows import BadRow, Row, describe_type, excerpt
from luthier.data.sources.source import HashedRows, SourceContent
from luthier.errors import UserError
from luthier.python_code import describe_exception, hash_python_source, load_python_object


class MappedContent:
    """The rows of another content, each passed to a function that gives a row, several, or none.

    The function's text does not say what it reads, so the hash is that of the rows that it makes;
    its source is among the settings.
    """

    def __init__(
        self, content: SourceContent, entry: CodeEntry, name: str, label: str, max_rows: int | None
    ) -> None:
        self._content, self._entry, self._max_rows = content, entry, max_rows
        self._key = f"{name}.map"
        try:
            self._function = load_python_object(entry.path, entry.arguments, positional=("row",))
        except UserError as error:
            raise UserError(f"{self._key}: {error}") from error
        self._hashed = HashedRows(f"{label} through {entry.path}", self._rows, None)
        self.advice = content.advice
        self.read_rows = 0
        """Rows that the function got when the content was last read."""
        self.left_out = 0
        """Rows of these for which it gave none."""

    def items(self, hashed: bool = False) -> Iterator[Row | BadRow]:
        """Return the rows that the function makes; UserError where it makes none at all."""
        return self._hashed.items(hashed)

    def _rows(self) -> Iterator[Row | BadRow]:
        self.read_rows = self.left_out = made = 0
        for item in islice(self._content.items(), self._max_rows):
            self.read_rows += 1
            if isinstance(item, BadRow):
                rows: list[Row] | BadRow = item
            else:
                rows = self._call(item)
            if isinstance(rows, BadRow):
                made += 1
                yield rows
                continue
            self.left_out += not rows
            made += len(rows)
            yield from rows
        if not made:
            raise UserError(
                f"{self._key}: {self._entry.path} left out all of {self.read_rows:,} rows."
            )

    def _call(self, row: Row) -> list[Row] | BadRow:
        """Return the rows that the function makes of one; a bad row where it fails."""
        try:
            value = self._function(dict(row.fields), **self._entry.arguments)
        except (Exception, SystemExit) as error:  # a user's function fails with whatever it likes
            problem = f"{self._entry.path} failed: {describe_exception(error)}"
            return BadRow(row.where, problem, excerpt(row.fields))
        if value is None:
            return []
        if isinstance(value, Mapping):
            return [Row(dict(value), row.where)]
        if isinstance(value, list | tuple) and all(isinstance(each, Mapping) for each in value):
            return [
                Row(dict(each), f"{row.where} (map row {number})")
                for number, each in enumerate(value, start=1)
            ]
        raise UserError(
            f"{row.where}: {self._key}: {self._entry.path} returned {_describe_value(value)}. "
            "Return the row (a dict), a list of rows, or None to leave the row out."
        )

    def digest(self) -> str:
        """Return the hash of the rows that the function makes, which are read for it."""
        return self._hashed.digest()

    def digest_as_read(self) -> str | None:
        """Return the hash of the rows that were read last, if they were all."""
        return self._hashed.digest_as_read()

    def check_unchanged(self) -> None:
        """Raise UserError where the function made other rows than before."""
        self._hashed.check_unchanged()

    def settings(self) -> dict[str, Any]:
        """Return those of the content, and the hash of the function's source.

        Its arguments matter only in the rows that they make.
        """
        source = hash_python_source(self._entry.path)
        return {**self._content.settings(), "map": source, "mapped_rows": self._max_rows}

    def size(self) -> int | None:
        """Return None: the number is not known before the last row."""
        return None


def _describe_value(value: Any) -> str:
    """Return what a function returned, in words; of a list the first entry that is no row."""
    if isinstance(value, list | tuple):
        wrong = next(each for each in value if not isinstance(each, Mapping))
        return f"a list with {_describe_value(wrong)} in it"
    plain = isinstance(value, str | bool | int | float)
    return describe_type(value) if plain else f"a {type(value).__name__}"
