"""The columns of a row: how a value is taken out by our name, and what it must be.

CSV files hold lists and objects as text, in JSON or as Python prints them, so text is read as one
of these where a list or an object is needed.
"""

import ast
import difflib
import io
import json
import tokenize
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from typing import Any

from luthier.data.rows import Row, RowError, describe_type, excerpt

_FLAGS = {"true": True, "1": True, "false": False, "0": False}


class MissingColumnError(RowError):
    """A row without a column that its format needs."""


class NoTextReplyError(RowError):
    """A reply that is no text, and that could train as JSON text."""


@dataclass(frozen=True)
class ColumnMapping:
    """Our names and the source's, and the system prompt for rows that have none."""

    source_names: dict[str, str]
    """Our name -> the source's; `translation.en` is the field `en` of the column `translation`."""
    late_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Optional columns that the first rows lack, and the names that later rows may give them."""
    system: str | None = None
    json_replies: bool = False
    """Whether replies that are objects, lists, or true and false train as JSON text."""
    number_labels: bool = False
    """Whether labels that are text are numbers: cells of CSV have no other type."""
    image_placeholder: str | None = None
    """What texts hold where an image stands; None where placeholders are plain text."""
    refused: tuple[str, ...] = ()
    """Columns that no row may have: those of videos and sound, and a second one of images."""

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


def parse_flag(value: Any) -> bool | None:
    """Return true or false, also of the numbers 1 and 0 and of text; None for any other value."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower() if isinstance(value, int | float | str) else ""
    # Tables without whole numbers write 1 as 1.0.
    return _FLAGS.get(text.removesuffix(".0"))


def require_text(value: Any, column: str) -> str:
    """Return the value, which must be text."""
    if isinstance(value, str):
        return check_unicode(value, column)
    raise RowError(f"{column!r} is {describe_value(value)}; expected text")


def check_unicode(text: str, column: str) -> str:
    """Return a text that can be written; RowError for one with half of a character."""
    # Nearly all texts are ASCII or whole, which Python knows at once or finds out fast.
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"{column!r}: character {error.start} is half of a surrogate pair, which is no "
                "text; read the file as UTF-8 or remove the character"
            ) from None
    return text


def reply_text(value: Any, column: str, json_replies: bool) -> str:
    """Return a reply as the text that trains: a number as JSON writes it, all else as it stands.

    NoTextReplyError is for an object, a list, true or false without `json_replies`.
    """
    if isinstance(value, str):
        return check_unicode(value, column)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Python asks an int for its float, and some are too large for one.
    if isinstance(value, float) and not isfinite(value):
        raise RowError(f"{column!r} is {describe_value(value)}; expected text")
    if not is_number and not isinstance(value, bool | list | dict):
        raise RowError(f"{column!r} is {describe_value(value)}; expected text")
    if not is_number and not json_replies:
        raise NoTextReplyError(f"{column!r} is {describe_value(value)}; expected text")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"{column!r} cannot be written as JSON: {error}") from None


def require_list(value: Any, column: str, items: str) -> list[Any]:
    """Return the value, which must be a list of `items`, or text of one, as CSV cells hold it."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str):
        raise RowError(f"{column!r} is {describe_value(value)}; expected a list of {items}")
    parsed = parse_json_cell(value, f"{column!r}", f"a list of {items}")
    if not isinstance(parsed, list):
        raise RowError(
            f"{column!r} is text of {describe_value(parsed)}; expected a list of {items}"
        )
    return parsed


def list_or_empty(value: Any) -> list[Any]:
    """Return a list, also from text of one; empty for what is none."""
    # Most texts are no lists and are spared the parser.
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = _parse_text(value)
        except ValueError:
            return []
    return value if isinstance(value, list) else []


def parse_json_cell(text: str, what: str, expected: str) -> Any:
    """Return the value of text that is JSON, or that Python printed; RowError for any other."""
    try:
        return _parse_text(text)
    except ValueError as error:
        raise RowError(
            f"{what} must be the JSON text of {expected}: {error} ({excerpt(text)})"
        ) from None


def _parse_text(text: str) -> Any:
    """Return the value of JSON text, or of what Python's `print` shows of one; else ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        # `DataFrame.to_csv` writes lists and objects with `str`.
        if not text.lstrip().startswith(("[", "{")):
            raise
        problem = error
    try:
        return _parse_python(text.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        raise problem from None


def _parse_python(text: str) -> Any:
    """Return the value of a list or an object in Python's notation, if JSON has it as well."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds = [token.type for token in tokens if token.type not in (tokenize.NL, tokenize.COMMENT)]
    # NumPy prints `['a' 'b']`, which Python reads as one text.
    if any(kind == following == tokenize.STRING for kind, following in pairwise(kinds)):
        raise ValueError("two texts stand side by side")
    with warnings.catch_warnings():
        # A backslash that escapes nothing is a warning to Python (3.12), and no `print` writes it.
        warnings.simplefilter("error")
        return _as_json(ast.literal_eval(text))


def _as_json(value: Any) -> Any:
    """Return a Python literal with lists for tuples; ValueError for what JSON has not."""
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _as_json(item) for key, item in value.items()}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"{type(value).__name__} is not a type of JSON")
