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
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, default=_describe_other)
    text = value
    text = " ".join(text.split())
    text = text if len(text) <= EXCERPT_CHARS else text[: EXCERPT_CHARS - 3] + "..."
    # Half of a surrogate pair cannot be printed.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _describe_other(value: Any) -> str:
    """What JSON does not have, in short: of bytes their number, of a picture its size."""
    if is_picture(value):
        return f"a picture of {value.width} x {value.height}"
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


def is_picture(value: Any) -> bool:
    """Whether a value is a picture of Pillow, which is not imported for the answer."""
    return any(cls.__module__.startswith("PIL.") for cls in type(value).__mro__)


_LONGEST_DATA_ADDRESS = 200


def shorten_bytes(value: Any) -> Any:
    """The value with texts such as `1234 bytes` in place of bytes and of images as base64."""
    if isinstance(value, dict):
        return {key: shorten_bytes(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shorten_bytes(item) for item in value]
    if isinstance(value, str) and len(value) > _LONGEST_DATA_ADDRESS and value.startswith("data:"):
        head = value[:_LONGEST_DATA_ADDRESS].partition(",")[0]
        return f"{head},... {len(value)} characters"
    if isinstance(value, str | int | float | None):
        return value
    return _describe_other(value)


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
