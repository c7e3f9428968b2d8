"""A row as its source holds it, with the place it came from, and the words for bad rows."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from luthier.errors import UserError

MAX_LISTED = 5
"""Bad rows that an error shows; the others are counted."""
EXCERPT_CHARS = 120
"""Characters of a row that an error shows."""


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a source: its fields and where it stands, such as `data.jsonl:7`."""

    fields: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class BadRow:
    """A place in a source that is no row: where, why, and the start of what stands there."""

    where: str
    problem: str
    text: str


class RowError(Exception):
    """A row that cannot be used; the text says why, without saying which row."""


def excerpt(value: Any) -> str:
    """The start of a value as one short line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    text = text if len(text) <= EXCERPT_CHARS else text[: EXCERPT_CHARS - 3] + "..."
    # Half of a surrogate pair cannot be printed.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def describe_type(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")


@dataclass
class BadRowReport:
    """The bad rows found so far: all counted, the first few kept in words."""

    count: int = 0
    lines: list[str] = field(default_factory=list)

    def add(self, where: str, problem: str, row: Any) -> None:
        """Note one bad row."""
        self.count += 1
        if self.count <= MAX_LISTED:
            self.lines.append(f"  {where}: {problem}\n    {excerpt(row)}")

    @contextmanager
    def of(self, row: Row) -> Iterator[None]:
        """Note the row if the block finds it bad."""
        try:
            yield
        except RowError as error:
            self.add(row.where, str(error), row.fields)

    def raise_if_any(self, source: str, advice: str) -> None:
        """Stop with the first bad rows, the count of all, and the advice."""
        if not self.count:
            return
        head = f"{source} has {self.count} bad {'row' if self.count == 1 else 'rows'}"
        more = [f"  ... and {self.count - MAX_LISTED} more"] if self.count > MAX_LISTED else []
        raise UserError("\n".join([head + ":", *self.lines, *more, advice]))
