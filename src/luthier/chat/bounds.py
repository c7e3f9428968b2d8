"""What no template may do: loop for ever, or write a text too large to hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
from jinja2 import nodes

MAX_STEPS = 10_000_000
"""Steps that all loops of one rendering may take: no template loops for ever."""
MAX_TEXT = 200_000_000
"""Characters that one text of a template may have."""
SIZED = (list, tuple, dict, str, range)
WIDENING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
WIDENING_FILTERS = frozenset({"center", "indent", "batch", "slice"})
# What is repeated as often as the text holds it: a width there multiplies.
_REPEATED = {"expandtabs": "\t", "indent": "\n"}
_WIDTHS = re.compile(r"[%:.][^a-zA-Z%{}]*?([0-9]{9,})")


def is_enormous(operator: str, left: Any, right: Any) -> bool:
    """Whether `left * right` or `left ** right` is too large to hold."""
    if operator == "**":
        return isinstance(left, int) and isinstance(right, int) and abs(right) > 4096
    size = max((len(side) for side in (left, right) if isinstance(side, SIZED)), default=0)
    count = max((side for side in (left, right) if isinstance(side, int)), default=0)
    return size * count > MAX_TEXT


def refuse_width(name: str, value: Any, widths: Iterable[Any]) -> None:
    """Raise where the method or filter `name` would make a value too wide."""
    times = 1 + value.count(_REPEATED[name]) if name in _REPEATED else 1
    numbers = (len(width) if isinstance(width, str) else width for width in widths)
    if any(isinstance(number, int) and number * times > MAX_TEXT for number in numbers):
        raise jinja2.TemplateError(f"`{name}` makes a value too large to hold")


def bounded_lipsum(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Jinja's `lipsum`, which writes as much as it is asked for, within bounds."""

    def lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> Any:
        if n * max > MAX_STEPS:
            raise jinja2.TemplateError("`lipsum` makes a value too large to hold")
        return plain(n, html, min, max)

    return lipsum


def refuse_format(template: str, values: Iterable[Any]) -> None:
    """Raise where a format string asks for a field too wide, in its own text or by a value."""
    widths = [int(found[-12:]) for found in _WIDTHS.findall(template)]
    if "*" in template or re.search(r"[:!][^{}]*\{", template):
        widths += [value for value in values if isinstance(value, int)]
    if any(width > MAX_TEXT for width in widths):
        raise jinja2.TemplateError("a format makes a value too large to hold")


def refuse_constants(tree: nodes.Template) -> None:
    """Raise for what would be too large already when the template is compiled."""
    for call in tree.find_all(nodes.Filter):
        given = [argument for argument in call.args if isinstance(argument, nodes.Const)]
        given += [k.value for k in call.kwargs if isinstance(k.value, nodes.Const)]
        if call.name in WIDENING_FILTERS:
            refuse_width(call.name, "", [argument.value for argument in given])
        if call.name == "format" and isinstance(call.node, nodes.Const):
            refuse_format(str(call.node.value), [argument.value for argument in given])
    for node in tree.find_all((nodes.Mod, nodes.Mul, nodes.Pow)):
        _constant(node)


_NONE = object()


def _constant(node: nodes.Node) -> Any:
    """The value that compiling gives an expression, or `_NONE`; raises where it is too large."""
    if isinstance(node, nodes.Const):
        return node.value
    if not isinstance(node, nodes.Mod | nodes.Mul | nodes.Pow | nodes.Add | nodes.Sub):
        return _NONE
    left, right = _constant(node.left), _constant(node.right)
    if left is _NONE or right is _NONE:
        return _NONE
    if isinstance(node, nodes.Mod) and isinstance(left, str):
        refuse_format(left, [right])
    elif isinstance(node, nodes.Mul | nodes.Pow) and is_enormous(node.operator, left, right):
        raise jinja2.TemplateError(f"`{node.operator}` makes a value too large to hold")
    try:
        return node.as_const()
    except nodes.Impossible:
        return _NONE
