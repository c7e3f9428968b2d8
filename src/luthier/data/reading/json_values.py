"""JSON values that nothing was lost of: a key that stands twice, NaN and half characters fail."""

import json
from math import isinf
from typing import Any

from luthier.data.rows import BadRow, Row, RowError, excerpt, kind

LENIENT = json.JSONDecoder()
"""Reads what the strict one refuses, to find where it ends."""


def row(line: str, where: str) -> Row | BadRow:
    """The row that one line holds, or what is wrong with it."""
    try:
        value = sound(STRICT.decode(line), line)
    except json.JSONDecodeError as error:
        problem = f"this is not JSON: {error.msg} (column {error.colno})"
        return BadRow(where, problem, excerpt(line))
    except (ValueError, RecursionError, RowError) as error:
        return BadRow(where, f"this is not JSON: {error}", excerpt(line))
    return of_value(value, where)


def of_value(value: Any, where: str) -> Row | BadRow:
    """The row that a JSON value is, if it is an object."""
    if isinstance(value, dict):
        return Row(value, where)
    return BadRow(where, f"this is {kind(value)}, not a JSON object", excerpt(value))


def sound(value: Any, text: str) -> Any:
    """The value, unless an escape such as \\ud83d in its text stands for half a character."""
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RowError("a \\u escape is half of a character (a lone surrogate)") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys all differ; the last of equal keys would win without a word."""
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise RowError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return result


def _constant(name: str) -> None:
    """Refuse NaN and infinities, which Python reads and JSON does not have."""
    raise RowError(f"{name} is no JSON value")


def _float(text: str) -> float:
    """A number, unless it is so large that Python reads it as infinity."""
    number = float(text)
    if isinf(number):
        raise RowError(f"{excerpt(text)} is too large a number")
    return number


STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
"""Its hook is called for every object, which takes a fifth more time than no check at all."""
