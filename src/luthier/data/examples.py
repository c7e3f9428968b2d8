"""The rows of a source as examples, one after the other, and the account of those that are bad."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from luthier.config.schema import SourceConfig
from luthier.data.compose.filter import SearchTimeoutError, compile_filter
from luthier.data.parts import key_of_path, key_of_shape
from luthier.data.reading import Source, open_source
from luthier.data.rows import BadRow, Mistakes, Row, RowError, excerpt
from luthier.data.shapes import Example, Shape, find_shape
from luthier.errors import UserError

PEEKED = 1000
"""Rows that are looked at to find the shape."""


class Placed(NamedTuple):
    """An example, the place it came from, and all columns of its row."""

    example: Example
    where: str
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Opened:
    """A source whose rows can be read as examples."""

    key: str
    """The config key that describes it, such as `dataset` or `dataset.sources.code`."""
    config: SourceConfig
    source: Source
    shape: Shape

    @property
    def names(self) -> tuple[str, ...]:
        """What the places of its rows begin with."""
        return self.source.files or (self.source.label,)

    def settings(self) -> dict[str, Any]:
        """All that decides the examples besides the content, for JSON."""
        return {
            "source": self.source.settings(),
            "shape": self.shape.settings(),
            "filter": self.config.filter,
        }

    def examples(
        self, bad: "BadRows", rows: Iterable[Row | BadRow] | None = None
    ) -> Iterator[Placed]:
        """The rows that the filter lets through, of all or of some; bad ones are noted."""
        holds = _filter(self.config, self.key)
        for row in self.source.rows() if rows is None else rows:
            if isinstance(row, BadRow):
                bad.add(row.where, row.problem, row.text)
                continue
            try:
                if holds(row.fields):
                    yield Placed(self.shape.read(row), row.where, row.fields)
                else:
                    bad.filtered += 1
            except RowError as error:
                bad.add(row.where, str(error), excerpt(row.fields))
            except SearchTimeoutError as error:
                raise UserError(f"{row.where}: {error}") from None


@dataclass
class BadRows:
    """Rows that could not be read, and how many the filter left out."""

    rows: list[BadRow] = field(default_factory=list)
    filtered: int = 0

    def add(self, where: str, problem: str, text: str) -> None:
        """Note one."""
        self.rows.append(BadRow(where, problem, text))

    def raise_if_any(self, opened: Opened) -> None:
        """Raise UserError with the first of them, the count of all, and what to do."""
        mistakes = Mistakes()
        for row in self.rows:
            mistakes.add(row.where, row.problem, row.text)
        advice = opened.source.advice
        advice += f"{chr(10) if advice else ''}To leave bad rows out: dataset.on_bad_row=drop."
        mistakes.raise_if_any(opened.source.label, advice)


def open_rows(config: SourceConfig, key: str, streaming: bool = False) -> Opened:
    """Open a source and find its shape; UserError where either cannot be done."""
    source = open_source(config, key_of_path(key), streaming)
    rows = [row for row in source.peek(PEEKED) if isinstance(row, Row)]
    if not rows:
        _no_row(source)
    return Opened(key, config, source, find_shape(config, rows, source.label, key_of_shape(key)))


def _no_row(source: Source) -> None:
    """Raise UserError for a source whose first rows are all bad."""
    mistakes = Mistakes()
    for row in source.peek(PEEKED):
        if isinstance(row, BadRow):
            mistakes.add(row.where, row.problem, row.text)
    mistakes.raise_if_any(source.label, source.advice)


def _filter(config: SourceConfig, key: str) -> Callable[[Mapping[str, Any]], bool]:
    """The source's filter; without one every row is let through."""
    if config.filter is None:
        return lambda fields: True
    return compile_filter(config.filter, f"{key}.filter")
