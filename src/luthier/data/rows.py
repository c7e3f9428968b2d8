"""A row as its source holds it, with the place it came from, and the words for bad rows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
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


def bad_rows_error(rows: Sequence[BadRow], source: str, advice: str) -> UserError:
    """Return the error that names the first bad rows, the count of all, and what to do.

    `source` is what messages call the source.
    """
    head = f"{source} has {len(rows)} bad {'row' if len(rows) == 1 else 'rows'}:"
    lines = [f"  {row.where}: {row.problem}\n    {excerpt(row.text)}" for row in rows[:MAX_LISTED]]
    more = [f"  ... and {len(rows) - MAX_LISTED} more"] if len(rows) > MAX_LISTED else []
    return UserError("\n".join([head, *lines, *more, advice]))
