"""A Jinja environment that gives what transformers' own gives, with every character traced.

transformers compiles the template first; its filters, globals, tests and extensions are taken
over as they stand, so there is nothing here to drift from it. Nothing here bounds what a template
does: `template_probe` refuses the ones that do too much, before they come here.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable
from types import BuiltinMethodType, CodeType
from typing import Any, TypeVar, cast

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, optimizeconst
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup, escape

from luthier.chat.prefix_tracking import (
    RenderState,
    TrackedMessages,
    tracked_loop_context,
    tracked_namespace,
)
from luthier.chat.provenance import (
    OriginRun,
    SafeTracedStr,
    TracedStr,
    concat_strings,
    escape_html,
    iter_traced,
    mark_safe,
    runs_of,
    with_merged_origin,
    with_runs,
)

_PLACEHOLDER = re.compile("\ue1a0([0-9]+)\ue1a1")


def retrace(function: Callable[..., Any], result: str, args: tuple, kwargs: dict) -> str:
    """Give back `result = function(*args, **kwargs)` with the runs of the texts in its arguments.

    The function runs a second time with a placeholder for each text. Where that gives the same
    string with the texts put in the places of the placeholders, the runs are exact; elsewhere the
    whole result counts as made from all of them.
    """
    texts = list(iter_traced([args, kwargs]))
    if not texts:
        return result
    # Characters of private use mark the placeholders: texts hardly hold them.
    try:
        numbers = itertools.count()
        trial = function(*_with_placeholders(args, numbers), **_with_placeholders(kwargs, numbers))
    except Exception:  # the function may refuse a placeholder for any reason of its own
        return with_merged_origin(result, texts)
    pieces = _PLACEHOLDER.split(trial) if isinstance(trial, str) else []
    if next(numbers) < len(texts):
        # A text stands where no placeholder could be put.
        return with_merged_origin(result, texts)
    retraced = concat_strings(
        texts[int(piece)] if number % 2 else piece for number, piece in enumerate(pieces)
    )
    return retraced if str.__eq__(retraced, result) is True else with_merged_origin(result, texts)


def _with_placeholders(value: Any, numbers: Iterable[int]) -> Any:
    """Return the same containers, with a numbered placeholder for each traced text."""
    if type(value) is TracedStr:
        return f"\ue1a0{next(iter(numbers))}\ue1a1"
    if isinstance(value, dict):
        return {
            _with_placeholders(key, numbers): _with_placeholders(item, numbers)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(_with_placeholders(item, numbers) for item in value)
    return value


def to_string(value: Any) -> str:
    """Return `str(value)`; a container's text was made from all texts in it."""
    if type(value) is TracedStr or type(value) is str:
        return value
    text = str(value)
    if isinstance(value, str | int | float) or value is None:
        return text
    texts = list(iter_traced(value))
    return with_merged_origin(text, texts) if texts else text


def trace_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter or a global, keeping the runs of the texts that it is given."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if (
            isinstance(result, str)
            and not isinstance(result, TracedStr)
            and any(iter_traced([args, kwargs]))
        ):
            return retrace(function, str.__str__(result), args, kwargs)
        return result

    return traced


def trace_tojson(tojson: Callable[..., str]) -> Callable[..., str]:
    """Return JSON of traced values: all of it, brackets too, was made from the fields inside."""

    @functools.wraps(tojson)
    def traced(value: Any, *args: Any, **kwargs: Any) -> str:
        # The escapes of JSON change lengths, so its characters cannot be told apart.
        value = list(value) if isinstance(value, TrackedMessages) else value
        texts = list(iter_traced(value))
        result = tojson(value, *args, **kwargs)
        return with_merged_origin(result, texts) if texts else result

    return traced


def _filter_escape(value: Any) -> Any:
    """Return the value as HTML writes it, marked as safe."""
    if not isinstance(value, str) and not hasattr(value, "__html__"):
        value = to_string(value)
    if isinstance(value, SafeTracedStr):
        return value
    if not isinstance(value, TracedStr):
        return escape(value)
    return _mark_any_safe(escape_html(value))


def _filter_join(context: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    """Join what is in an iterable, keeping the runs of every item."""
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(context.environment, attribute), value)
    # Each item behind the separator; the first separator goes.
    texts = [text for item in value for text in (to_string(d), to_string(item))]
    return concat_strings(texts[1:])


_DICT_ATTRIBUTES = frozenset(dir(dict))
_LOOP_ATTRIBUTES = frozenset({"first", "last", "index", "index0"})
# Filters whose result is not a string, or that pass their strings on as they are.
_TRACE_KEEPING_FILTERS = frozenset(
    {"length", "count", "list", "items", "default", "d", "first", "last", "map", "select"}
    | {"selectattr", "reject", "rejectattr", "reverse", "sort", "dictsort", "attr"}
)
# Filters that make `Markup`, a string that escapes whatever is added to it.
ESCAPING_FILTERS = frozenset({"e", "escape", "forceescape", "safe", "urlize", "xmlattr"})


class TracedCodeGenerator(CodeGenerator):
    """Compiles `+` and `~` to calls that keep the runs, one call for a whole chain."""

    @optimizeconst
    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        """Write `environment.plus(a, b, ...)` for `a + b + ...`."""
        self._call("plus", _operands(node), frame)

    @optimizeconst
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Write `environment.tilde(a, b, ...)` for `a ~ b ~ ...`."""
        # With autoescape operands may be Markup, for which Jinja compiles another call.
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_Concat(node, frame)
        else:
            self._call("tilde", node.nodes, frame)

    def _call(self, name: str, operands: Iterable[nodes.Expr], frame: Frame) -> None:
        self.write(f"environment.{name}(")
        for operand in operands:
            self.visit(operand, frame)
            self.write(", ")
        self.write(")")


def _operands(node: nodes.Expr) -> list[nodes.Expr]:
    """Return the operands of a chain of additions, from left to right."""
    if isinstance(node, nodes.Add):
        return [*_operands(node.left), node.right]
    return [node]


# Blocks that collect what is written in them, so that it is not written when it is rendered.
_BUFFERING_BLOCKS = (
    nodes.Macro,
    nodes.CallBlock,
    nodes.FilterBlock,
    nodes.AssignBlock,
    nodes.Block,
)


def _route_loops(node: nodes.Node, at_top: bool) -> None:
    """Route what every `for` loops over through the environment."""
    for child in node.iter_child_nodes():
        if isinstance(child, nodes.For):
            # Inside a macro or a block set, what the loop writes is not written where it stands.
            plain = at_top and not child.recursive and not child.else_
            follow = nodes.EnvironmentAttribute("loop_over")
            call = nodes.Call(follow, [child.iter, nodes.Const(plain)], [], None, None)
            child.iter = call.set_lineno(child.lineno)
        _route_loops(child, at_top and not isinstance(child, _BUFFERING_BLOCKS))


_MAX_CACHED_CODES = 64
"""Templates whose compiled code is cached."""
_compiled_codes: dict[tuple[type, str], CodeType] = {}
"""By the class of the environment and the source."""


class TracedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' sandbox, in which no operation that a template can reach loses the runs."""

    code_generator_class = TracedCodeGenerator
    # The sandbox sends these operators to `call_binop`.
    intercepted_binops = frozenset({"%"})
    # Jinja (3.1) joins by this what macros, `set` blocks and `call` blocks have written.
    concat = staticmethod(concat_strings)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.render_state = RenderState()

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _route_loops(tree, True)
        return tree

    def compile_traced(self, source: str) -> jinja2.Template:
        """Compile a template whose `loop` tells the tracker when it looks ahead.

        The code is kept: it names filters and globals, and takes them from the environment that it
        runs in.
        """
        code = _compiled_codes.get((type(self), source))
        if code is None:
            code = self.compile(source)
            while len(_compiled_codes) >= _MAX_CACHED_CODES:
                del _compiled_codes[next(iter(_compiled_codes))]
            _compiled_codes[type(self), source] = code
        template = self.template_class.from_code(self, code, self.make_globals(None))
        # Compiled code takes `LoopContext` from its globals, not from the environment (Jinja 3.1).
        names = template.root_render_func.__globals__
        names["LoopContext"] = tracked_loop_context(self.render_state)
        # What is written goes through `str`, to which a dict of traced texts is no traced text.
        names["str"] = to_string
        return template

    def loop_over(self, iterable: Any, at_top: bool) -> Any:
        """Return what a `for` of the template loops over."""
        if isinstance(iterable, TrackedMessages):
            return iterable.loop() if at_top else iterable
        return iterable

    def plus(self, *operands: Any) -> Any:
        """Return the sum of the operands, from left to right."""
        runs: list[OriginRun] = []
        for operand in operands:
            # A method call per operand would be felt: templates add for every message.
            if type(operand) is str:
                if operand:
                    runs.append((len(operand), None, 0))
            elif type(operand) is TracedStr:
                runs += operand._runs
            else:
                return functools.reduce(_add, operands)
        return with_runs("".join(operands), tuple(runs))

    def tilde(self, *operands: Any) -> str:
        """Return the operands as strings, one behind the other."""
        return concat_strings(map(to_string, operands))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute or item as the sandbox gives it, but faster for a dict."""
        # The sandbox checks each attribute; a plain key of a dict needs no check.
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            try:
                return obj[attribute]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)
        if isinstance(obj, LoopContext) and attribute in _LOOP_ATTRIBUTES:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`left % right`, keeping the runs of what is formatted in."""
        result = super().call_binop(context, operator, left, right)
        if isinstance(left, str) and type(result) is str:
            return retrace(lambda first, second: first % second, result, (left, right), {})
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what the template calls; methods of plain strings keep the runs of arguments."""
        is_method = isinstance(__obj, BuiltinMethodType)
        if is_method and __obj.__name__ == "encode" and isinstance(__obj.__self__, TracedStr):
            raise jinja2.TemplateError("`encode` makes bytes, in which texts cannot be traced")
        plain_method = is_method and type(__obj.__self__) is str
        if plain_method and any(True for _ in iter_traced(args)):
            traced = with_runs(__obj.__self__, runs_of(__obj.__self__))
            return getattr(traced, __obj.__name__)(*args)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` inside the sandbox, keeping the runs of what is formatted in."""
        # The sandbox formats in a formatter of its own, which hides unsafe attributes.
        bare = super().wrap_str_format(value)
        if bare is None:
            return None
        template = str.__str__(value.__self__)
        own = list(iter_traced(value.__self__))
        plain = cast(Callable[..., str], super().wrap_str_format(getattr(template, value.__name__)))

        def traced(*args: Any, **kwargs: Any) -> str:
            result = plain(*args, **kwargs)
            if own:
                return with_merged_origin(result, [*own, *iter_traced([args, kwargs])])
            return retrace(plain, result, args, kwargs)

        return functools.update_wrapper(traced, bare)


def _add(left: Any, right: Any) -> Any:
    """`left + right`, where either may be marked as safe and so escape the other."""
    marked = isinstance(left, Markup | SafeTracedStr) or isinstance(right, Markup | SafeTracedStr)
    if not (marked and isinstance(left, str) and isinstance(right, str)):
        return left + right
    return _mark_any_safe(concat_strings((escape_html(left), escape_html(right))))


def _mark_any_safe(text: Any) -> Any:
    """Return the text, or any value as text, marked as safe, so that nothing escapes it."""
    if not isinstance(text, str):
        text = to_string(text)
    return mark_safe(text) if isinstance(text, TracedStr) else Markup(text)


def _take_strings(replace: Callable[..., str]) -> Callable[..., str]:
    """Return the filter `replace`, which makes strings of all that it is given."""

    @functools.wraps(replace)
    def replace_strings(context: Any, *values: Any, **more: Any) -> str:
        strings = (v if isinstance(v, str | int) else to_string(v) for v in values)
        return replace(context, *strings, **more)

    return replace_strings


EnvironmentType = TypeVar("EnvironmentType", bound=TracedEnvironment)


def make_traced_environment(
    base: jinja2.Environment, environment_type: type[EnvironmentType]
) -> EnvironmentType:
    """Return an environment with the settings, filters, globals and tests of transformers' own."""
    environment = environment_type(
        trim_blocks=base.trim_blocks,
        lstrip_blocks=base.lstrip_blocks,
        extensions=[type(extension) for extension in base.extensions.values()],
    )
    # All that transformers adds (tojson, raise_exception, generation blocks) comes with `base`.
    environment.globals.update(base.globals)
    namespace = cast(type, base.globals["namespace"])
    environment.globals["namespace"] = tracked_namespace(namespace, environment.render_state)
    environment.tests.update(base.tests)
    for name, filter_ in base.filters.items():
        wrapped = filter_ if name in _TRACE_KEEPING_FILTERS else trace_function(filter_)
        environment.filters[name] = trace_tojson(filter_) if name == "tojson" else wrapped
    environment.filters["replace"] = _take_strings(environment.filters["replace"])
    environment.filters["safe"] = _mark_any_safe
    environment.filters["escape"] = environment.filters["e"] = _filter_escape
    environment.filters["join"] = jinja2.pass_context(_filter_join)
    return environment
