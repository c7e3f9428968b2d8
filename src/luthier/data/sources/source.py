"""A source of rows, whatever it reads: its rows can be streamed, looked into and hashed.

Hashes are those of content: they are equal where the rows are, whatever a file is called and
whenever it was written.
"""

import json
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import islice
from typing import Any, Protocol

from luthier.data.rows import BadRow, Row
from luthier.data.sources.streams import FileLocation, read_stored_blocks


class SourceContent(Protocol):
    """What a source reads."""

    @property
    def advice(self) -> str:
        """What rows are to be like, for the end of an error; empty if there is nothing to say."""

    def items(self) -> Iterator[Row | BadRow]:
        """Return the rows from the first, in an order that never changes.

        Raises UserError if there are none.
        """

    def digest(self) -> str:
        """Return the SHA-256 of the content."""

    def settings(self) -> dict[str, Any]:
        """Return what besides the content decides the rows, as JSON has it."""

    def size(self) -> int | None:
        """Return how many rows there are, where that takes no reading of all."""


class Source:
    """Rows from one place, in the same order on every machine, a few in memory at a time."""

    def __init__(
        self,
        name: str,
        label: str,
        files: tuple[str, ...],
        content: SourceContent,
        max_rows: int | None = None,
    ) -> None:
        self.name = name
        """The config key that describes it, such as `dataset`."""
        self.label = label
        """What messages call it, such as `my.jsonl` or `data/*.jsonl (3 files)`."""
        self.files = files
        """The files as messages call them; none of a hub dataset or a function."""
        self._content, self._max_rows = content, max_rows
        self._first: list[Row | BadRow] = []
        self._is_whole = False

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield the first `max_rows` rows, good and bad; UserError where the source is broken or
        empty.

        Each call reads anew, except where `peek` has already seen all there is.
        """
        # What `peek` has read to its end is not read again: a function or the network may take
        # long.
        if self._is_whole:
            yield from self._first
        else:
            yield from islice(self._content.items(), self._max_rows)

    def peek(self, count: int = 1000) -> list[Row | BadRow]:
        """Return the first rows, or all if there are no more than `count`; read once and kept."""
        if len(self._first) < count and not self._is_whole:
            # One more than asked for, to know whether that was all.
            self._first = list(islice(self.rows(), count + 1))
            self._is_whole = len(self._first) <= count
        return self._first[:count]

    def digest(self) -> str:
        """Return the SHA-256 of the content, in hex: stored bytes, or rows where nothing is stored.

        The order of files counts; their names and times do not. `settings` holds the rest of what
        decides the rows.
        """
        return self._content.digest()

    def settings(self) -> dict[str, Any]:
        """Return what besides `digest` decides the rows, as JSON has it: format, options,
        `max_rows`."""
        return {**self._content.settings(), "max_rows": self._max_rows}

    @property
    def size(self) -> int | None:
        """How many rows there are, where that takes no reading of all: tables and hub datasets."""
        size = self._content.size()
        return size if size is None or self._max_rows is None else min(size, self._max_rows)

    @property
    def advice(self) -> str:
        """What rows of this source are to be like, for the end of an error about bad ones."""
        return self._content.advice


def hash_files(locations: Iterable[FileLocation]) -> str:
    """Return the SHA-256 of the hashes of all files as they are stored; their order counts."""
    total = sha256()
    for location in locations:
        file_hash = sha256()
        for block in read_stored_blocks(location):
            file_hash.update(block)
        # Hashes of files are hashed, not their bytes in a row: moving bytes from the end of one
        # file to the start of the next must change the sum.
        total.update(file_hash.digest())
    return total.hexdigest()


def hash_rows(rows: Iterable[Row | BadRow]) -> str:
    """Return the SHA-256 of the rows themselves, for what has no bytes but those it makes."""
    total = sha256()
    for row in rows:
        # Bad rows count, too: where they change, so does what is dropped.
        value = row.fields if isinstance(row, Row) else [row.problem, row.text]
        # Rows from functions and hub datasets may hold what JSON does not have, such as dates, and
        # halves of characters; hashing must not fail on either.
        total.update(json.dumps(value, ensure_ascii=False, default=repr).encode(errors="replace"))
        total.update(b"\n")
    return total.hexdigest()
