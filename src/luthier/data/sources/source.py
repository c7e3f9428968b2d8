"""A source of rows, whatever it reads: its rows can be streamed, looked into and hashed.

Hashes are those of content: they are equal where the rows are, whatever a file is called and
whenever it was written.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from itertools import islice
from typing import Any, Protocol

from luthier.data.rows import BadRow, Row, is_picture
from luthier.data.sources.streams import FileLocation, read_stored_blocks
from luthier.errors import UserError

MAX_PEEKED_BYTES = 64 * 2**20
"""Bytes and texts of the rows that `peek` keeps in memory: those with images are large."""


class SourceContent(Protocol):
    """What a source reads."""

    @property
    def advice(self) -> str:
        """What rows are to be like, for the end of an error; empty if there is nothing to say."""

    def items(self, hashed: bool = False) -> Iterator[Row | BadRow]:
        """Return the rows from the first, in an order that never changes.

        With `hashed`, what is read is hashed on its way, for `digest_as_read` and
        `check_unchanged`. Raises UserError if there are none.
        """

    def digest(self) -> str:
        """Return the SHA-256 of the content."""

    def digest_as_read(self) -> str | None:
        """Return the SHA-256 of what the last hashed `items` read, which becomes that of the
        content.

        None where it was not read to its end, or not from front to back.
        """

    def check_unchanged(self) -> None:
        """Raise UserError where the last hashed `items` read other content than `digest` hashed."""

    def settings(self) -> dict[str, Any]:
        """Return what besides the content decides the rows, as JSON has it."""

    def size(self) -> int | None:
        """Return how many rows there are, where that takes no reading of all."""


class MapContent(SourceContent, Protocol):
    """Rows that a function makes of those of another content."""

    left_out: int
    """Rows of which it made none when it was last read."""
    read_rows: int
    """Rows that it read then."""


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
        self._is_digest_of_peek = False
        self._is_peek_full = False
        self._map: MapContent | None = None

    def map_rows(self, map_content: "Callable[[SourceContent], MapContent]") -> "Source":
        """Return this source with other rows, as a content that goes around its own makes them."""
        mapped = map_content(self._content)
        source = Source(self.name, self.label, self.files, mapped)
        source._map = mapped
        return source

    @property
    def left_out(self) -> tuple[int, int]:
        """How many rows its map left out, and of how many, when it was last read; both 0 without
        one."""
        return (self._map.left_out, self._map.read_rows) if self._map else (0, 0)

    def rows(self, verify: bool = False) -> Iterator[Row | BadRow]:
        """Yield the first `max_rows` rows, good and bad; UserError where the source is broken or
        empty.

        Each call reads anew, except where `peek` has already seen all there is. With `verify`, the
        end is a UserError if these rows are not those of the content that `digest` hashed.
        """
        # What `peek` has read to its end is not read again: a function or the network may take
        # long. Its rows are those of the digest only if they were hashed on their way.
        if self._is_whole and (self._is_digest_of_peek or not verify):
            yield from self._first
            return
        yield from islice(self._content.items(hashed=verify), self._max_rows)
        if verify:
            self._content.check_unchanged()

    def peek(self, count: int = 1000) -> list[Row | BadRow]:
        """Return the first rows, or all if there are no more than `count`; read once and kept.

        Fewer of rows so large that `MAX_PEEKED_BYTES` are reached before.
        """
        if len(self._first) < count and not self._is_whole and not self._is_peek_full:
            # One more than asked for, to know whether that was all.
            rows = islice(self._content.items(hashed=True), self._max_rows)
            self._first = []
            size = 0
            for row in islice(rows, count + 1):
                self._first.append(row)
                size += measure_row(row)
                if size > MAX_PEEKED_BYTES:
                    self._is_peek_full = True
                    break
            self._is_whole = len(self._first) <= count and not self._is_peek_full
        return self._first[:count]

    def digest(self) -> str:
        """Return the SHA-256 of the content, in hex: stored bytes, or rows where nothing is stored.

        The order of files counts; their names and times do not. `settings` holds the rest of what
        decides the rows.
        """
        if self._is_whole and (digest := self._content.digest_as_read()) is not None:
            self._is_digest_of_peek = True
            return digest
        return self._content.digest()

    def settings(self) -> dict[str, Any]:
        """Return what besides `digest` decides the rows, as JSON has it: format, options,
        `max_rows`."""
        return {**self._content.settings(), "max_rows": self._max_rows}

    def check_unchanged(self) -> None:
        """Raise UserError where files are not those that `digest` has hashed.

        It looks for the cause of another error: a file that is still written has broken rows.
        """
        if self.files and not self._is_digest_of_peek:
            self._content.check_unchanged()

    @property
    def size(self) -> int | None:
        """How many rows there are, where that takes no reading of all: tables and hub datasets."""
        size = self._content.size()
        return size if size is None or self._max_rows is None else min(size, self._max_rows)

    @property
    def advice(self) -> str:
        """What rows of this source are to be like, for the end of an error about bad ones."""
        return self._content.advice


def measure_row(row: Row | BadRow) -> int:
    """Return about how many bytes the texts and bytes of a row take."""
    return _measure(row.fields) if isinstance(row, Row) else len(row.text)


def _measure(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_measure, value.values()))
    if isinstance(value, list):
        return sum(map(_measure, value))
    # A picture of Pillow.
    return 4 * value.width * value.height if is_picture(value) else 0


def hash_file(location: FileLocation) -> bytes:
    """Return the SHA-256 of a file as it is stored."""
    file_hash = sha256()
    for block in read_stored_blocks(location):
        file_hash.update(block)
    return file_hash.digest()


def join_hashes(hashes: Iterable[bytes]) -> str:
    """Return the SHA-256 of the hashes of several files, in hex; their order counts."""
    # Hashes of files are hashed, not their bytes in a row: moving bytes from the end of one file to
    # the start of the next must change the sum.
    return sha256(b"".join(hashes)).hexdigest()


def changed_file_error(label: str) -> UserError:
    """Return the error for a file that is not the one that was hashed."""
    return UserError(
        f"dataset: {label} changed while it was being read. Wait until whatever writes it has "
        "finished, and run the same command again."
    )


def _describe_value(value: Any) -> str:
    """Return what a value that JSON has not is hashed as."""
    if is_picture(value):
        # Its `repr` has its place in memory, which is another one each time.
        return f"{value.mode} {value.size} {sha256(value.tobytes()).hexdigest()}"
    return repr(value)


class RowHash:
    """The SHA-256 of rows, for what has no bytes but those it makes."""

    def __init__(self) -> None:
        self._hash = sha256()
        self.is_complete = False
        """Whether `pass_on` has seen the last row."""

    def pass_on(self, rows: Iterable[Row | BadRow], max_rows: int | None) -> Iterator[Row | BadRow]:
        """Yield the first `max_rows` rows, or all, and hash each of them."""
        for number, row in enumerate(islice(rows, max_rows), start=1):
            # Bad rows count, too: where they change, so does what is dropped.
            value = row.fields if isinstance(row, Row) else [row.problem, row.text]
            # Rows from functions and hub datasets may hold what JSON does not have, such as dates,
            # and halves of characters; hashing must not fail on either.
            text = json.dumps(value, ensure_ascii=False, default=_describe_value)
            self._hash.update(text.encode(errors="replace"))
            self._hash.update(b"\n")
            # Whoever takes so many rows does not come back for the end.
            self.is_complete = number == max_rows
            yield row
        self.is_complete = True

    def hexdigest(self) -> str:
        """Return the hash of the rows so far."""
        return self._hash.hexdigest()


class HashedRows:
    """The digests of rows that are hashed themselves: of a function, or of a stream of the hub."""

    def __init__(
        self, label: str, read: Callable[[], Iterator[Row | BadRow]], max_rows: int | None
    ) -> None:
        self._label, self._read, self._max_rows = label, read, max_rows
        self._as_read, self._digest = RowHash(), ""

    def items(self, hashed: bool) -> Iterator[Row | BadRow]:
        """Yield the rows, hashed on their way if asked."""
        if not hashed:
            return self._read()
        self._as_read = RowHash()
        return self._as_read.pass_on(self._read(), self._max_rows)

    def digest(self) -> str:
        """Return the hash of the first `max_rows` rows, or of all, which are read for it."""
        rows = RowHash()
        for _ in rows.pass_on(self._read(), self._max_rows):
            pass
        self._digest = rows.hexdigest()
        return self._digest

    def digest_as_read(self) -> str | None:
        """Return the hash of the rows of the last hashed `items`; None if not all were read."""
        if not self._as_read.is_complete:
            return None
        self._digest = self._as_read.hexdigest()
        return self._digest

    def check_unchanged(self) -> None:
        """Raise UserError where other rows came than `digest` has hashed."""
        if self._as_read.is_complete and self._as_read.hexdigest() != self._digest:
            raise UserError(
                f"dataset: {self._label} gave other rows the second time it was read. It must give "
                "the same rows, in the same order, each time; a function that draws at random "
                "needs a seed of its own."
            )
