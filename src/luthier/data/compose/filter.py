"""The filter expression: a small language over a row's own columns, from which nothing else leads.

The expression is parsed by Python's parser and rebuilt as functions of a row from the few kinds of
nodes that `expression` knows; it is never run as Python.
"""

import ast
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from luthier.data.compose.expression import Unfit, build
from luthier.errors import UserError

LONGEST = 10_000
"""Characters of an expression."""
_EXAMPLE = "A filter compares columns, such as: len(text) > 20 and lang in ['en', 'de']"
_SIGNS = {"&&": "and", "||": "or", "!": "not", "=": "=="}


def compile_filter(
    expression: str, key: str = "dataset.filter"
) -> Callable[[Mapping[str, Any]], bool]:
    """The expression as a function that says whether to keep a row, given its columns.

    Raises UserError for what is no filter expression, pointing at the place; `key` is the config's
    key of it. The function raises RowError for a row that lacks a column that is asked for, or
    whose values do not go with what is done to them. docs/mixtures.md has the language.
    """
    text = " ".join(expression.split("\n")).strip()
    try:
        value = build(_parse(text), text)
    except Unfit as error:
        raise UserError(_pointing(key, text, error)) from None
    return lambda row: bool(value(row))


def _parse(text: str) -> ast.expr:
    """The syntax tree; Unfit with the place where Python's parser stops."""
    if len(text) > LONGEST:
        raise Unfit(f"it has {len(text)} characters, more than {LONGEST}", 0, 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "\d" in a pattern that is not r"..."
            tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        start = max((error.offset or 1) - 1, 0)
        raise Unfit(_syntax(error.msg, text, start), start, start + 1) from None
    except (RecursionError, MemoryError):
        raise Unfit("it is nested too deep", 0, 0) from None
    except ValueError as error:  # a null byte in the text
        raise Unfit(str(error), 0, 0) from None
    if isinstance(tree, ast.Tuple):
        raise Unfit("several values; write `and` or `or` between them", 0, len(text))
    return tree


def _syntax(problem: str, text: str, place: int) -> str:
    """The parser's words, with those of this language for the signs of another."""
    for sign, word in _SIGNS.items():
        # The parser stops at the second character of `&&`.
        if sign in (text[place - 1 : place + 1], text[place : place + 1]):
            return f"write `{word}` for `{sign}`"
    return problem if text else "it is empty"


def _pointing(key: str, text: str, error: Unfit) -> str:
    """The words for an expression that is none, with marks under the place."""
    # A long expression is shown around the place; the marks move with what is cut off.
    cut = max(0, error.start - 40) if len(text) > 100 else 0
    shown = text[cut : cut + 100]
    marks = max(1, min(error.stop, cut + len(shown)) - error.start)
    line = f"  {shown}\n  {' ' * (error.start - cut)}{'^' * marks}\n" if shown else ""
    return f"{key} is no filter expression: {error}\n{line}{_EXAMPLE}"
