"""The filter of a dataset: an expression over a row's own columns that says whether it is used.

An expression goes through three steps. Python's parser reads it (`_parse`). `_Checker` refuses,
with its position, everything that docs/mixtures.md does not list, before any row is read. The
library simpleeval computes the checked tree for each row (`_RowEvaluator`); it is never run as
Python. It reaches nothing but the row, and its work is bounded by its length and the row's:
powers, repeated texts and formatting are left out, and a search has a time limit.
"""

import ast
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import simpleeval

from luthier import patterns
from luthier.data.rows import RowError, describe_type
from luthier.errors import UserError, nearest_option

MAX_LENGTH = 10_000
"""Characters of an expression."""
MAX_DEPTH = 100
"""Levels of an expression within an expression."""

_EXAMPLE = "A filter compares columns, such as: len(text) > 20 and lang in ['en', 'de']"
_PYTHON_SIGNS = {"&&": "and", "||": "or", "!": "not", "=": "==", "AND": "and", "OR": "or"}
_PYTHON_CONSTANTS = {"true": "True", "false": "False", "null": "None", "none": "None"}
_HINTS: dict[type[ast.AST], str] = {
    ast.BitAnd: "write `and` for `&`",
    ast.BitOr: "write `or` for `|`",
    ast.Invert: "write `not` for `~`",
    ast.Pow: "powers are left out",
    ast.Lambda: "functions cannot be defined in it",
    ast.JoinedStr: "texts are not formatted in it",
    ast.IfExp: "write `and` and `or` for `if` and `else`",
    ast.NamedExpr: "nothing can be named in it",
    **dict.fromkeys((ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp), "it has no loops"),
}


class FilterError(Exception):
    """What is wrong with an expression, and from which to which character of its text."""

    def __init__(self, problem: str, start: int, stop: int) -> None:
        super().__init__(problem)
        self.start = start
        self.stop = stop


class OperandError(Exception):
    """An operation cannot be done with its operands; the text is a predicate such as `divides by
    zero`, and `_RowEvaluator` puts the operation's source before it."""


class SearchTimeoutError(UserError):
    """A search of `matches` took longer than `luthier.patterns.SEARCH_SECONDS`.

    It ends the reading of a source and is not counted as a bad row: which rows are too slow
    depends on the machine, and the rows of a dataset may not.
    """


def compile_filter(
    expression: str, key: str = "dataset.filter"
) -> Callable[[Mapping[str, Any]], bool]:
    """Return the function that says, from a row's columns, whether the row is used.

    `key` is the config key of the expression, for messages. Raises UserError for what is not a
    filter expression, pointing at the position. The function raises RowError for a row that lacks
    a column or has values that an operation does not work on, and SearchTimeoutError.
    """
    # A YAML block has lines; positions are counted in one.
    text = expression.translate({ord("\n"): " ", ord("\r"): " "}).strip()
    try:
        tree = _Checker(text).visit(_parse(text))
    except FilterError as error:
        raise UserError(_point_at(key, text, error)) from None
    return _RowEvaluator(text, tree, key).holds


def _parse(text: str) -> ast.expr:
    """Return the syntax tree; raise FilterError with the position where Python's parser stops."""
    if len(text) > MAX_LENGTH:
        raise FilterError(f"it has {len(text)} characters, more than {MAX_LENGTH}", 0, 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about "\d" in a pattern that is not r"..."
            tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        # CPython 3.11 gives offset 0 where the text ends too early, as in `len(text) >`.
        start = error.offset - 1 if error.offset else len(text)
        raise FilterError(_describe_syntax(error.msg, text, start), start, start + 1) from None
    except (RecursionError, MemoryError):
        raise FilterError("it is nested too deep", 0, 0) from None
    except ValueError as error:  # a null byte in the text
        raise FilterError(str(error), 0, 0) from None
    if isinstance(tree, ast.Tuple):
        raise FilterError("several values; write `and` or `or` between them", 0, len(text))
    return tree


def _describe_syntax(problem: str, text: str, position: int) -> str:
    """Return the parser's words, or what to write in place of a sign of other languages."""
    word = re.split(r"\W", text[position:], maxsplit=1)[0]
    # The parser stops at the second character of `&&`.
    signs = (word, text[position : position + 1], text[max(position - 1, 0) : position + 1])
    for sign, spelling in _PYTHON_SIGNS.items():
        if sign in signs:
            return f"write `{spelling}` for `{sign}`"
    if not text:
        return "it is empty"
    return problem if position < len(text) else "something is missing at its end"


def _point_at(key: str, text: str, error: FilterError) -> str:
    """Return the message for an expression that is wrong, with marks under the position."""
    # A long expression is printed around the position; the marks move with what is cut off.
    cut = max(0, error.start - 40) if len(text) > 100 else 0
    excerpt = text[cut : cut + 100]
    marks = max(1, min(error.stop, cut + len(excerpt)) - error.start)
    lines = f"  {excerpt}\n  {' ' * (error.start - cut)}{'^' * marks}\n" if excerpt else ""
    return f"{key} is not a valid filter: {error}\n{lines}{_EXAMPLE}"


# What an expression may do to values. No operation makes a value much larger than its operands.

Operation = Callable[..., Any]


def _name_operands(operation: Operation) -> Operation:
    """Return the operation as one that raises OperandError in place of Python's errors."""

    def apply(*operands: Any) -> Any:
        try:
            return operation(*operands)
        except ZeroDivisionError:
            raise OperandError("divides by zero") from None
        except LookupError:
            raise OperandError("is not there") from None
        except (TypeError, ValueError, ArithmeticError):
            type_names = " and ".join(describe_type(value) for value in _written_values(operands))
            raise OperandError(f"does not work on {type_names}") from None

    return apply


def _written_values(operands: Iterable[Any]) -> Iterator[Any]:
    """Yield the operands, and in place of a slice such as `[:10]` the bounds that it has."""
    for operand in operands:
        if isinstance(operand, slice):
            bounds = (operand.start, operand.stop, operand.step)
            yield from (bound for bound in bounds if bound is not None)
        else:
            yield operand


def _on_numbers(operation: Operation) -> Operation:
    """Return the operation for numbers alone: `*` repeats no text and `%` formats none."""

    def apply(left: Any, right: Any) -> Any:
        if not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
            raise TypeError
        return operation(left, right)

    return _name_operands(apply)


def _text_method(name: str) -> Operation:
    """Return a method of `str` that takes nothing but texts, so that null is an error."""
    return _name_operands(getattr(str, name))


def _search(text: Any, pattern: Any) -> bool:
    """Return whether the compiled pattern is in the text; raise TimeoutError past the limit."""
    if not isinstance(text, str):
        raise OperandError(f"does not work on {describe_type(text)}")
    return patterns.search(pattern, text) is not None


FUNCTIONS: dict[str, tuple[Operation, int, int]] = {
    "abs": (_name_operands(abs), 1, 1),
    "float": (_name_operands(float), 1, 1),
    "int": (_name_operands(int), 1, 1),
    "len": (_name_operands(len), 1, 1),
    "lower": (_text_method("lower"), 1, 1),
    "matches": (_search, 2, 2),
    "max": (_name_operands(max), 1, 9),
    "min": (_name_operands(min), 1, 9),
    "str": (_name_operands(str), 1, 1),
    "upper": (_text_method("upper"), 1, 1),
}
"""Name -> the function, and the fewest and the most arguments that it takes."""

METHODS: dict[str, tuple[Operation, int, int]] = {
    name: (_text_method(name), fewest, most)
    for names, fewest, most in (
        ("casefold isalpha isascii isdigit islower isupper lower splitlines upper", 0, 0),
        ("lstrip rstrip split strip", 0, 1),
        ("count endswith find startswith", 1, 1),
    )
    for name in names.split()
} | {"get": (_name_operands(dict.get), 1, 2)}
"""Name -> the method of a text (`get`: of an object), and how many arguments it takes."""

OPERATORS: dict[type[ast.AST], Operation] = {
    ast.Add: _name_operands(operator.add),
    ast.Sub: _on_numbers(operator.sub),
    ast.Mult: _on_numbers(operator.mul),
    ast.Div: _on_numbers(operator.truediv),
    ast.FloorDiv: _on_numbers(operator.floordiv),
    ast.Mod: _on_numbers(operator.mod),
    ast.UAdd: _name_operands(operator.pos),
    ast.USub: _name_operands(operator.neg),
    # These and `is` work on any values, so they are not wrapped.
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: _name_operands(operator.lt),
    ast.LtE: _name_operands(operator.le),
    ast.Gt: _name_operands(operator.gt),
    ast.GtE: _name_operands(operator.ge),
    ast.In: _name_operands(lambda item, container: item in container),
    ast.NotIn: _name_operands(lambda item, container: item not in container),
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_get_item = _name_operands(operator.getitem)


class _Checker(ast.NodeTransformer):
    """Refuses what the language does not have, and prepares the rest for the evaluator.

    The language is what has a `visit_` method here. Methods become functions of their object (so
    that no attribute is ever looked up), and lists of constants and patterns become constants.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._depth = 0

    def visit(self, node: ast.AST) -> Any:
        """Return the node for the evaluator; raise FilterError with its position."""
        if not isinstance(node, ast.expr):  # `+` of `a + b`, which its expression has checked
            return node
        if not hasattr(self, f"visit_{type(node).__name__}"):
            self._refuse(node, _HINTS.get(type(node), "this is not part of the language"))
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._refuse(node, f"it is nested deeper than {MAX_DEPTH} levels")
        checked = super().visit(node)
        self._depth -= 1
        return checked

    visit_BoolOp = visit_Compare = ast.NodeTransformer.generic_visit

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """Keep a text, a number, True, False or None; refuse b"x", 1j and `...`."""
        if not isinstance(node.value, (str, int, float, bool, type(None))):
            self._refuse(node, "this is neither a text nor a number")
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Keep the name of a column, or `row`."""
        if node.id in _PYTHON_CONSTANTS:
            self._refuse(node, f"write `{_PYTHON_CONSTANTS[node.id]}`")
        return node

    def visit_List(self, node: ast.List | ast.Tuple | ast.Set) -> ast.AST:
        """Keep a list that is written out; one of constants is made once, not for each row."""
        self.generic_visit(node)
        values = [item.value for item in node.elts if isinstance(item, ast.Constant)]
        if len(values) < len(node.elts):
            return node
        constant: Any = tuple(values) if isinstance(node, ast.Tuple) else values
        return ast.copy_location(ast.Constant(constant), node)

    visit_Tuple = visit_Set = visit_List

    def visit_BinOp(self, node: ast.BinOp | ast.UnaryOp) -> ast.AST:
        """Keep arithmetic on numbers, `+` on texts, and `not`."""
        if type(node.op) not in OPERATORS:
            self._refuse(node, _HINTS.get(type(node.op), "this operation is left out"))
        return self.generic_visit(node)

    visit_UnaryOp = visit_BinOp

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """Keep `row["odd name"]`, an item of a list or an object, and a slice such as `[:10]`."""
        if isinstance(node.value, ast.Name) and node.value.id == "row":
            if _text_constant(node.slice) is None:
                self._refuse(node.slice, "a column's name is a text")
        elif isinstance(node.slice, ast.Slice):
            node.value = self.visit(node.value)
            self.generic_visit(node.slice)  # A slice elsewhere, as in `x[1:2, 3]`, is refused.
            return node
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> NoReturn:
        """Refuse an attribute that is not called."""
        self._refuse(node, f'write `["{node.attr}"]` for an item of an object')

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Keep a function of `FUNCTIONS` and a method of `METHODS`."""
        if node.keywords or any(isinstance(argument, ast.Starred) for argument in node.args):
            self._refuse(node, "arguments are given one by one, without names")
        if isinstance(node.func, ast.Attribute):
            self._check_call(node, node.func.attr, METHODS, "methods")
            # The dot keeps methods apart from functions of the same name, such as `lower`.
            function, arguments = f".{node.func.attr}", [node.func.value, *node.args]
        elif isinstance(node.func, ast.Name):
            self._check_call(node, node.func.id, FUNCTIONS, "functions")
            function, arguments = node.func.id, node.args
        else:
            self._refuse(node.func, "only functions and methods can be called")
        arguments = [self.visit(argument) for argument in arguments]
        if function == "matches":
            arguments[1] = self._compiled(arguments[1])
        name = ast.Name(function, ast.Load())
        return ast.copy_location(ast.Call(name, arguments, []), node)

    def _check_call(
        self, node: ast.Call, name: str, table: Mapping[str, tuple[Operation, int, int]], what: str
    ) -> None:
        """Refuse a name that the table does not have, and a wrong number of arguments."""
        if name not in table:
            near = nearest_option(name, table)
            guess = f" (did you mean `{near}`?)" if near else ""
            names = ", ".join(sorted(table))
            self._refuse(node.func, f"`{name}` is not one of its {what}{guess}, which are {names}")
        _, fewest, most = table[name]
        if not fewest <= len(node.args) <= most:
            count = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            noun = "argument" if count == "1" else "arguments"
            source = ast.get_source_segment(self._text, node.func)
            self._refuse(node, f"`{source}` takes {count} {noun}, not {len(node.args)}")

    def _compiled(self, node: ast.expr) -> ast.expr:
        """Return the constant of a compiled pattern; it is written out so that it is made once."""
        pattern = _text_constant(node)
        if pattern is None:
            self._refuse(node, "the pattern is a text in quotes")
        try:
            return ast.copy_location(ast.Constant(patterns.compile_pattern(pattern)), node)
        except ValueError as error:
            self._refuse(node, f"this pattern {error}")

    def _refuse(self, node: ast.expr, problem: str) -> NoReturn:
        """Raise FilterError at a node; Python counts positions in bytes, and the text is str."""
        line = self._text.encode()
        start, stop = (len(line[:end].decode()) for end in (node.col_offset, node.end_col_offset))
        # The parser counts in UTF-8, where a letter may take several bytes; marks are set by
        # letters.
        raise FilterError(problem, start, stop)


class _RowEvaluator(simpleeval.EvalWithCompoundTypes):
    """Computes a checked expression for one row after the other."""

    def __init__(self, text: str, tree: ast.expr, key: str) -> None:
        super().__init__(operators=OPERATORS, functions={})
        self._text = text
        self._tree = tree
        self._key = key
        # simpleeval has more than the language: comprehensions, attributes, formatting, random
        # numbers. The checker refuses them all; here they do not exist either.
        self.nodes = {
            ast.Constant: self._eval_constant,
            ast.Name: self._eval_name,
            ast.List: self._eval_list,
            ast.Set: self._eval_list,  # A list compares with a list, and holds lists.
            ast.Tuple: self._eval_tuple,
            ast.BoolOp: self._eval_boolop,
            ast.UnaryOp: self._eval_unaryop,
            ast.BinOp: self._eval_binop,
            ast.Compare: self._eval_compare,
            ast.Subscript: self._eval_subscript,
            ast.Slice: self._eval_slice,
            ast.Call: self._eval_call,
        }
        self.functions = {name: function for name, (function, _, _) in FUNCTIONS.items()}
        self.functions |= {f".{name}": method for name, (method, _, _) in METHODS.items()}

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Return whether the expression holds for a row's columns."""
        self.names = row
        return bool(self.eval(self._text, previously_parsed=self._tree))

    def _eval(self, node: ast.AST) -> Any:
        try:
            return super()._eval(node)
        except OperandError as error:
            # The innermost node whose operation failed: the outer ones see a RowError.
            raise RowError(f"the filter's {self._source(node)} {error}") from None
        except TimeoutError:
            raise SearchTimeoutError(
                f"{self._key}: {self._source(node)} takes more than "
                f"{patterns.SEARCH_SECONDS:g} seconds for this row. {patterns.SLOW_ADVICE}"
            ) from None

    def _check_disallowed_items(self, item: Any) -> None:
        """Skip simpleeval's search of every value for forbidden functions.

        It reads a whole row for each step. Rows are data, and no value of one can be called.
        """

    def _eval_name(self, node: ast.Name) -> Any:
        return self.names if node.id == "row" else self._column(node.id)

    def _eval_subscript(self, node: ast.Subscript) -> Any:
        if isinstance(node.value, ast.Name) and node.value.id == "row":
            return self._column(self._eval(node.slice))
        return _get_item(self._eval(node.value), self._eval(node.slice))

    def _column(self, name: str) -> Any:
        """Return the value of a column; raise RowError with the row's columns if it has none."""
        try:
            return self.names[name]
        except KeyError:
            near = nearest_option(name, self.names)
            hint = f"; did you mean {near!r}?" if near else ""
            columns = ", ".join(self.names)
            raise RowError(
                f"there is no {name!r}, which the filter names (it has: {columns}){hint}"
            ) from None

    def _source(self, node: ast.AST) -> str:
        return f"`{ast.get_source_segment(self._text, node)}`"


def _text_constant(node: ast.expr) -> str | None:
    """Return the text that a node is in quotes; None for any other node."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
