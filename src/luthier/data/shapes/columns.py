"""Which column of a row holds what, and how it is taken out."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier.data.rows import Row, RowError


class MissingColumn(RowError):
    """A row without a column that its shape needs."""


@dataclass(frozen=True)
class Columns:
    """Our names and the source's, and the system prompt for rows that have none."""

    names: dict[str, str]
    """Our name -> the source's; `translation.en` is the field `en` of the column `translation`."""
    later: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Optional columns that the first rows lack, and the names that later rows may give them."""
    system: str | None = None

    def take(self, row: Row, ours: str) -> Any:
        """The row's value of a needed column; MissingColumn names one that is not there."""
        column = self.names[ours]
        if column in row.fields:
            return row.fields[column]
        found, value = inside(row.fields, column)
        if found:
            return value
        near = difflib.get_close_matches(column, list(row.fields), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        held = ", ".join(row.fields) or "nothing"
        raise MissingColumn(f"there is no {column!r} (it has: {held}){hint}")

    def get(self, row: Row, ours: str) -> Any:
        """The row's value of an optional column; None where it has none."""
        column = self.names.get(ours)
        if column is not None:
            value = row.fields.get(column)
            return inside(row.fields, column)[1] if value is None and "." in column else value
        for name in self.later.get(ours, ()):
            if name in row.fields:
                return row.fields[name]
        return None

    def name(self, ours: str) -> str:
        """The source's name of a column, for messages."""
        return self.names.get(ours, ours)


def inside(fields: Mapping[str, Any], path: str) -> tuple[bool, Any]:
    """Whether a dotted path leads to a value, and the value."""
    if path in fields:
        return True, fields[path]
    head, dot, rest = path.partition(".")
    inner = fields.get(head)
    return inside(inner, rest) if dot and isinstance(inner, dict) else (False, None)
