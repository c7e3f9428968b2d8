"""Rows that are no conversations: plain text, classes, tags, and one text from another."""

import re
from math import isfinite
from typing import Any

from luthier.data.formats.columns import (
    ColumnMapping,
    check_unicode,
    describe_value,
    list_or_empty,
    reply_text,
    require_list,
    require_text,
)
from luthier.data.formats.conversations import Example
from luthier.data.rows import Row, RowError, excerpt

Label = str | int
Target = Label | float | list[Label]
"""What a text is to be classified as: a class, a number to predict, or all classes that apply."""


def from_text(row: Row, columns: ColumnMapping) -> Example:
    """Return the example of a document."""
    return {"text": _text_cell(row, columns, "text")}


def from_classification(row: Row, columns: ColumnMapping) -> Example:
    """Return the example of a text and its class, its number, or its classes."""
    label = read_target(*columns.take_cell(row, "label"), columns.number_labels)
    return {"text": _text_cell(row, columns, "text"), "label": label}


def from_classification_pair(row: Row, columns: ColumnMapping) -> Example:
    """Return the example of two texts and the class of the pair."""
    return from_classification(row, columns) | {"text_pair": _text_cell(row, columns, "text_pair")}


def from_tagging(row: Row, columns: ColumnMapping) -> Example:
    """Return the example of words, and a tag for each of them."""
    names = columns.source_name("tokens"), columns.source_name("tags")
    tokens = require_list(columns.take(row, "tokens"), names[0], "texts")
    values = require_list(columns.take(row, "tags"), names[1], "tags")
    for token in tokens:
        if not isinstance(token, str):
            raise RowError(f"{names[0]!r} holds {describe_value(token)}; expected texts")
        check_unicode(token, names[0])
    if len(tokens) != len(values) or not tokens:
        raise RowError(
            f"{names[0]!r} has {len(tokens)} entries and {names[1]!r} {len(values)}; expected a "
            "tag for each token, and one token at least"
        )
    return {"tokens": tokens, "tags": [read_label(value, names[1]) for value in values]}


def from_seq2seq(row: Row, columns: ColumnMapping) -> Example:
    """Return the example of a text and the text that is to be made of it."""
    return {
        "source": _text_cell(row, columns, "source"),
        "target": reply_text(*columns.take_cell(row, "target"), columns.json_replies),
    }


# What JSON writes for a number: `007` and `+1` are names.
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")


def parse_number(text: str) -> int | float | None:
    """Return the number that text is written as; None for any other text."""
    match = _NUMBER.fullmatch(text.strip())
    # An int of more digits than Python parses is no class.
    if match is None or len(text) > _MAX_DIGITS:
        return None
    return int(match[0]) if match[2] is match[3] is None else float(match[0])


_MAX_DIGITS = 300


def read_target(value: Any, column: str, number_labels: bool = False) -> Target:
    """Return a class, a list of classes, or a number; whether -1 is one, all rows together say.

    A text may be a list of classes, as CSV cells hold it. `number_labels`: it may be a number.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parse_label_list(value, column)
    elif number_labels and isinstance(value, str):
        number = parse_number(value)
        value = value if number is None else number
    if isinstance(value, list):
        return [read_label(item, column) for item in value]
    # Tables without whole numbers write the class 1 as 1.0, and all rows together decide later
    # whether numbers are classes.
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and isfinite(value):
        return int(value) if value == int(value) else float(value)
    return read_label(value, column)


def _parse_label_list(text: str, column: str) -> list[Any] | str:
    """Return the list that text is, or the text, a class in brackets such as `[spam]`."""
    if "".join(text.split()) == "[]":
        return []
    labels = list_or_empty(text)
    if not labels and any(mark in text for mark in ",'\""):
        raise RowError(
            f"{column!r} is {excerpt(text)!r}, which looks like a list of classes but is not one; "
            'write JSON, such as ["a", "b"]'
        )
    return labels or text


def read_label(value: Any, column: str) -> Label:
    """Return a class by its name or number; tables without whole numbers write 1 as 1.0."""
    if isinstance(value, str) and value.strip():
        return check_unicode(value, column)
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if is_whole and value >= 0:
        return int(value)
    # Hub datasets give -1 to the rows of test sets whose labels are not published.
    if is_whole:
        raise RowError(f"{column!r} is {value}, which means no label in hub datasets")
    shown_value = (
        f"{value!r}" if isinstance(value, str | float) and value == value else describe_value(value)
    )
    raise RowError(f"{column!r} is {shown_value}; expected a class, by name or whole number")


def _text_cell(row: Row, columns: ColumnMapping, ours: str) -> str:
    """Return a column that must be text."""
    return require_text(*columns.take_cell(row, ours))
