"""The columns of a row: how a value is taken out by our name, and what it must be.

CSV files hold lists and objects as JSON text, so text is read as JSON where one is needed.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier.data.rows import Row, RowError, describe_type, excerpt


class MissingColumnError(RowError):
    """A row without a column that its format needs."""


@dataclass(frozen=True)
class ColumnMapping:
    """Our names and the source's, and the system prompt for rows that have none."""

    source_names: dict[str, str]
    """Our name -> the source's; `translation.en` is the field `en` of the column `translation`."""
    late_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Optional columns that the first rows lack, and the names that later rows may give them."""
    system: str | None = None

    def take(self, row: Row, name: str) -> Any:
        """Return the row's value of a needed column.

        MissingColumnError names one that is not there.
        """
        column = self.source_names[name]
        if column in row.fields:
            return row.fields[column]
        is_there, value = find_value(row.fields, column)
        if is_there:
            return value
        near = difflib.get_close_matches(column, list(row.fields), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        held = ", ".join(row.fields) or "nothing"
        raise MissingColumnError(f"there is no {column!r} (it has: {held}){hint}")

    def take_cell(self, row: Row, name: str) -> tuple[Any, str]:
        """Return the value of a needed column, and the source's name of the column."""
        return self.take(row, name), self.source_name(name)

    def get(self, row: Row, name: str) -> Any:
        """Return the row's value of an optional column; None where it has none."""
        column = self.source_names.get(name)
        if column is not None:
            value = row.fields.get(column)
            return find_value(row.fields, column)[1] if value is None and "." in column else value
        late_names = self.late_names.get(name, ())
        return next((row.fields[late] for late in late_names if late in row.fields), None)

    def source_name(self, name: str) -> str:
        """Return the source's name of a column, for messages."""
        return self.source_names.get(name, name)


def find_value(fields: Mapping[str, Any], path: str) -> tuple[bool, Any]:
    """Return whether a dotted path leads to a value, and the value."""
    # A column whose own name has a dot comes first.
    if path in fields:
        return True, fields[path]
    head, dot, rest = path.partition(".")
    inner = fields.get(head)
    return find_value(inner, rest) if dot and isinstance(inner, dict) else (False, None)


def describe_value(value: Any) -> str:
    """Return what a value is, in words; NaN, which tables write for nothing, is named."""
    return "NaN" if value != value else describe_type(value)


def is_empty_cell(value: Any) -> bool:
    """Return whether an optional cell says nothing: null, NaN, blank text or an empty list."""
    if isinstance(value, str):
        return not value.strip()
    # NaN alone differs from itself; `math.isnan` refuses what is no number.
    return value is None or value == [] or value != value


def require_text(value: Any, column: str) -> str:
    """Return the value, which must be text."""
    if isinstance(value, str):
        return value
    raise RowError(f"{column!r} is {describe_value(value)}; expected text")


def require_list(value: Any, column: str, items: str) -> list[Any]:
    """Return the value, which must be a list of `items`, or JSON text of one, as CSV cells hold
    it."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str):
        raise RowError(f"{column!r} is {describe_value(value)}; expected a list of {items}")
    parsed = parse_json_cell(value, f"{column!r}", f"a list of {items}")
    if not isinstance(parsed, list):
        raise RowError(
            f"{column!r} is JSON text of {describe_value(parsed)}; expected a list of {items}"
        )
    return parsed


def list_or_empty(value: Any) -> list[Any]:
    """Return a list, also from JSON text; empty for what is none."""
    # Most texts are no lists and are spared the parser.
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) else []


def parse_json_cell(text: str, what: str, expected: str) -> Any:
    """Return the value of JSON text.

    RowError says where it breaks, and knows Python's own notation.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        # Tables that were written with str() in place of json.dumps are the usual cause.
        written = "{'" in text or "['" in text
        advice = "; this is how Python prints it: write it with json.dumps" if written else ""
        raise RowError(
            f"{what} is text that is no JSON of {expected}: {error}{advice} ({excerpt(text)})"
        ) from None
