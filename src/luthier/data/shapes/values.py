"""Values of a row in words, and cells that hold JSON text."""

import json
from typing import Any

from luthier.data.rows import RowError, excerpt, kind


def named(value: Any) -> str:
    """What a value is, in words; NaN, which tables write where nothing stands, by its name."""
    return "NaN" if value != value else kind(value)


def is_absent(value: Any) -> bool:
    """Whether an optional cell says nothing: null, NaN, blank text or an empty list."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or value != value


def text_in(value: Any, column: str) -> str:
    """The value, which must be text."""
    if isinstance(value, str):
        return value
    raise RowError(f"{column!r} is {named(value)}; expected text")


def list_in(value: Any, column: str, items: str) -> list[Any]:
    """The value, which must be a list of `items`, or JSON text of one, as CSV cells hold it."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str):
        raise RowError(f"{column!r} is {named(value)}; expected a list of {items}")
    parsed = json_in(value, f"{column!r}", f"a list of {items}")
    if not isinstance(parsed, list):
        raise RowError(f"{column!r} is JSON text of {named(parsed)}; expected a list of {items}")
    return parsed


def as_list(value: Any) -> list[Any]:
    """A list, also from JSON text; empty for what is none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) else []


def json_in(text: str, what: str, expected: str) -> Any:
    """The value of JSON text; RowError says where it breaks, and knows Python's own notation."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        written = "{'" in text or "['" in text
        advice = "; this is how Python prints it: write it with json.dumps" if written else ""
        raise RowError(
            f"{what} is text that is no JSON of {expected}: {error}{advice} ({excerpt(text)})"
        ) from None
