"""From the syntax tree of a filter expression to a function of a row.

Every kind of node has a builder here, and what has none is refused: attributes other than the
methods of `METHODS`, calls other than those of `FUNCTIONS`, powers, repeated texts, formatting,
lambdas and comprehensions. So an expression reaches nothing but the row, and its work is bounded
by its own length and the row's.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from luthier.config.words import nearest
from luthier.data.compose.operations import FUNCTIONS, METHODS, OPERATIONS, compare
from luthier.data.rows import RowError, kind

Value = Callable[[Mapping[str, Any]], Any]
"""A part of an expression: a function of the row's columns."""

DEEPEST = 100
"""Levels of an expression within an expression."""
_CONSTANTS = (str, int, float, bool, type(None))
_HINTS: dict[type[ast.AST], str] = {
    ast.BitAnd: "write `and` for `&`",
    ast.BitOr: "write `or` for `|`",
    ast.Invert: "write `not` for `~`",
    ast.Pow: "powers are left out",
    ast.Lambda: "functions cannot be defined in it",
    ast.JoinedStr: "texts are not formatted in it",
    ast.IfExp: "write `and` and `or` for `if` and `else`",
    ast.ListComp: "it has no loops",
    ast.SetComp: "it has no loops",
    ast.DictComp: "it has no loops",
    ast.GeneratorExp: "it has no loops",
    ast.NamedExpr: "nothing can be named in it",
}
_OTHER_WORDS = {"true": "True", "false": "False", "null": "None", "none": "None"}


class Unfit(Exception):
    """A part that is no filter expression, and where in the text it starts and stops."""

    def __init__(self, problem: str, start: int, stop: int) -> None:
        super().__init__(problem)
        self.start = start
        self.stop = stop


def build(tree: ast.expr, text: str) -> Value:
    """The tree of this text as a function of a row; Unfit for a part that is refused.

    The function raises RowError, with the part's own words, where it cannot be worked out.
    """
    return _Builder(text).value(tree)


class _Builder:
    """Builds the parts of one expression."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._depth = 0

    def value(self, node: ast.expr) -> Value:
        """The function of one part."""
        builder = _BUILDERS.get(type(node))
        if builder is None:
            self._refuse(node, _HINTS.get(type(node), "this is not part of the language"))
        self._depth += 1
        if self._depth > DEEPEST:
            self._refuse(node, f"it is nested deeper than {DEEPEST} levels")
        built: Value = builder(self, node)
        self._depth -= 1
        return built

    def constant(self, node: ast.Constant) -> Value:
        """A text, a number, True, False or None."""
        constant = node.value
        if not isinstance(constant, _CONSTANTS):
            self._refuse(node, "this is neither a text nor a number")
        return lambda row: constant

    def name(self, node: ast.Name) -> Value:
        """A column, or `row` for all of them."""
        name = node.id
        if name in _OTHER_WORDS:
            self._refuse(node, f"write `{_OTHER_WORDS[name]}`")
        return (lambda row: row) if name == "row" else _column(name)

    def several(self, node: ast.List | ast.Tuple | ast.Set) -> Value:
        """A list written out; one of constants alone is made once."""
        made: type = tuple if isinstance(node, ast.Tuple) else list
        values = [self.value(item) for item in node.elts]
        if all(isinstance(item, ast.Constant) for item in node.elts):
            constants = made(value({}) for value in values)
            return lambda row: constants
        return lambda row: made(value(row) for value in values)

    def either(self, node: ast.BoolOp) -> Value:
        """`and` and `or`: the value of the first part that decides, as in Python."""
        values = [self.value(part) for part in node.values]
        stops_at = isinstance(node.op, ast.Or)

        def decide(row: Mapping[str, Any]) -> Any:
            found = None
            for value in values:
                found = value(row)
                if bool(found) is stops_at:
                    break
            return found

        return decide

    def unary(self, node: ast.UnaryOp) -> Value:
        """`not`, and the sign of a number."""
        value = self.value(node.operand)
        if isinstance(node.op, ast.Not):
            return lambda row: not value(row)
        if isinstance(node.op, ast.Invert):
            self._refuse(node, _HINTS[ast.Invert])
        sign = operator.neg if isinstance(node.op, ast.USub) else operator.pos
        return self._applied(node, sign, [value])

    def binary(self, node: ast.BinOp) -> Value:
        """Arithmetic on numbers, and `+` on texts."""
        operation = OPERATIONS.get(type(node.op))
        if operation is None:
            self._refuse(node, _HINTS.get(type(node.op), "this operation is left out"))
        return self._applied(node, operation, [self.value(node.left), self.value(node.right)])

    def comparison(self, node: ast.Compare) -> Value:
        """One comparison, or a chain such as `1 < len(text) < 9`."""
        values = [self.value(part) for part in (node.left, *node.comparators)]
        steps = [
            self._applied(node, compare(sign), [left, right])
            for sign, left, right in zip(node.ops, values, values[1:], strict=False)
        ]
        return steps[0] if len(steps) == 1 else lambda row: all(step(row) for step in steps)

    def item(self, node: ast.Subscript) -> Value:
        """`row["odd name"]`, an item of a list or of an object, or a part of a text or list."""
        value = self.value(node.value)
        if isinstance(node.slice, ast.Slice):
            return self._part(node, value, node.slice)
        if isinstance(node.value, ast.Name) and node.value.id == "row":
            if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
                return _column(node.slice.value)
            self._refuse(node.slice, "a column's name is a text")
        return self._applied(node, operator.getitem, [value, self.value(node.slice)])

    def call(self, node: ast.Call) -> Value:
        """A function of `FUNCTIONS`, a method of `METHODS`, or `matches`."""
        if node.keywords or any(isinstance(argument, ast.Starred) for argument in node.args):
            self._refuse(node, "arguments are given one by one, without names")
        if isinstance(node.func, ast.Attribute):
            return self._method(node, node.func)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name == "matches":
            return self._matches(node)
        if name not in FUNCTIONS:
            self._refuse(node.func, _unknown(name, [*FUNCTIONS, "matches"], "functions"))
        function, least, most = FUNCTIONS[name]
        self._count(node, least, most)
        return self._applied(node, function, [self.value(part) for part in node.args])

    def attribute(self, node: ast.Attribute) -> NoReturn:
        """An attribute that is not called."""
        self._refuse(node, f'write `["{node.attr}"]` for an item of an object')

    def _method(self, node: ast.Call, function: ast.Attribute) -> Value:
        if function.attr not in METHODS:
            self._refuse(function, _unknown(function.attr, METHODS, "methods"))
        method, least, most = METHODS[function.attr]
        self._count(node, least, most)
        return self._applied(
            node, method, [self.value(part) for part in (function.value, *node.args)]
        )

    def _matches(self, node: ast.Call) -> Value:
        """`matches(text, pattern)`: the pattern is compiled once, so it is written out."""
        self._count(node, 2, 2)
        pattern = node.args[1]
        if not (isinstance(pattern, ast.Constant) and isinstance(pattern.value, str)):
            self._refuse(pattern, "the pattern is a text in quotes")
        try:
            search = re.compile(pattern.value).search
        except (re.error, RecursionError, OverflowError) as error:
            self._refuse(pattern, f"this is no regular expression: {error}")
        return self._applied(
            node, lambda text: search(text) is not None, [self.value(node.args[0])]
        )

    def _part(self, node: ast.Subscript, value: Value, bounds: ast.Slice) -> Value:
        """`text[:10]`."""
        ends = [
            (lambda row: None) if end is None else self.value(end)
            for end in (bounds.lower, bounds.upper, bounds.step)
        ]
        return self._applied(node, lambda whole, *ends: whole[slice(*ends)], [value, *ends])

    def _applied(self, node: ast.expr, function: Callable[..., Any], values: list[Value]) -> Value:
        """A function of the values of other parts; RowError, in words, where it does not work."""
        words = f"the filter's `{ast.get_source_segment(self._text, node)}`"

        def apply(row: Mapping[str, Any]) -> Any:
            arguments = [value(row) for value in values]
            try:
                return function(*arguments)
            except ZeroDivisionError:
                raise RowError(f"{words} divides by zero") from None
            except (TypeError, ValueError, ArithmeticError):
                kinds = " and ".join(kind(argument) for argument in arguments)
                raise RowError(f"{words} does not work on {kinds}") from None
            except LookupError:
                raise RowError(f"{words} is not there") from None

        return apply

    def _count(self, node: ast.Call, least: int, most: int) -> None:
        if not least <= len(node.args) <= most:
            wanted = f"{least}" if least == most else f"{least} to {most}"
            name = ast.get_source_segment(self._text, node.func)
            self._refuse(node, f"`{name}` takes {wanted} arguments, not {len(node.args)}")

    def _refuse(self, node: ast.expr, problem: str) -> NoReturn:
        """Stop at a part; Python counts columns in bytes, the text in characters."""
        line = self._text.encode()
        start, stop = (len(line[:end].decode()) for end in (node.col_offset, node.end_col_offset))
        raise Unfit(problem, start, stop)


def _column(name: str) -> Value:
    """The value of a column; RowError names those that are there if it is not."""

    def column(row: Mapping[str, Any]) -> Any:
        try:
            return row[name]
        except KeyError:
            near = nearest(name, row)
            hint = f"; did you mean {near!r}?" if near else ""
            raise RowError(
                f"there is no {name!r}, which the filter names (it has: {', '.join(row)}){hint}"
            ) from None

    return column


def _unknown(name: str, known: Any, what: str) -> str:
    near = nearest(name, known) if name else None
    guess = f" (did you mean `{near}`?)" if near else ""
    return f"`{name}` is none of its {what}{guess}, which are {', '.join(sorted(known))}"


_BUILDERS: dict[type[ast.expr], Callable[[_Builder, Any], Value]] = {
    ast.Constant: _Builder.constant,
    ast.Name: _Builder.name,
    ast.List: _Builder.several,
    ast.Tuple: _Builder.several,
    ast.Set: _Builder.several,
    ast.BoolOp: _Builder.either,
    ast.UnaryOp: _Builder.unary,
    ast.BinOp: _Builder.binary,
    ast.Compare: _Builder.comparison,
    ast.Subscript: _Builder.item,
    ast.Call: _Builder.call,
    ast.Attribute: _Builder.attribute,
}
