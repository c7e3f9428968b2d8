"""What a filter expression may do to values: its functions, methods, arithmetic and comparisons.

None can make a value much larger than what it is given, and none reaches beyond its arguments.
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

Operation = Callable[..., Any]


def _text_method(name: str) -> Operation:
    """A method of `str` that takes nothing but texts, so that null is a mistake and not ''."""
    return getattr(str, name)


def _of_numbers(operation: Operation) -> Operation:
    """Arithmetic on two numbers: no text is repeated by `*` or formatted by `%`."""

    def work(left: Any, right: Any) -> Any:
        if not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
            raise TypeError
        return operation(left, right)

    return work


def _get(item: Any, key: Any, default: Any = None) -> Any:
    """`get` of an object."""
    return dict.get(item, key, default)


FUNCTIONS: dict[str, tuple[Operation, int, int]] = {
    "abs": (abs, 1, 1),
    "float": (float, 1, 1),
    "int": (int, 1, 1),
    "len": (len, 1, 1),
    "lower": (str.lower, 1, 1),
    "max": (max, 1, 9),
    "min": (min, 1, 9),
    "str": (str, 1, 1),
    "upper": (str.upper, 1, 1),
}
"""Name -> the function, and the fewest and the most arguments that it takes."""

METHODS: dict[str, tuple[Operation, int, int]] = {
    **{
        name: (_text_method(name), 0, 0)
        for name in ("casefold", "isalpha", "isascii", "isdigit", "islower", "isupper", "lower")
    },
    **{name: (_text_method(name), 0, 0) for name in ("splitlines", "upper")},
    **{name: (_text_method(name), 0, 1) for name in ("lstrip", "rstrip", "split", "strip")},
    **{name: (_text_method(name), 1, 1) for name in ("count", "endswith", "find", "startswith")},
    "get": (_get, 1, 2),
}
"""Name -> the method of a text (`get`: of an object), and how many arguments it takes."""

OPERATIONS: dict[type[ast.operator], Operation] = {
    ast.Add: operator.add,
    ast.Sub: _of_numbers(operator.sub),
    ast.Mult: _of_numbers(operator.mul),
    ast.Div: _of_numbers(operator.truediv),
    ast.FloorDiv: _of_numbers(operator.floordiv),
    ast.Mod: _of_numbers(operator.mod),
}

_SIGNS: dict[type[ast.cmpop], Operation] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, whole: item in whole,
    ast.NotIn: lambda item, whole: item not in whole,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


def compare(sign: ast.cmpop) -> Operation:
    """What a comparison does with the values at its two sides."""
    return _SIGNS[type(sign)]
