"""A chat template, compiled once and rendered with the origin of every character."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date as Date
from datetime import datetime
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes

from luthier.chat.jinja_env import (
    ESCAPING_FILTERS,
    TracedEnvironment,
    make_traced_environment,
    refuse_constants,
)
from luthier.chat.prefix_tracking import PrefixTracker, TrackedMessages
from luthier.chat.provenance import TracedStr, concat_traced, join_runs, with_runs
from luthier.chat.types import ChatError

# What can be told from a template's source alone, before it is run.

# State that is neither a variable nor an attribute of a namespace, so a watch does not see it.
_HIDDEN_STATE = frozenset({"cycler", "joiner"})
_LAZY = frozenset(
    {"map", "select", "reject", "selectattr", "rejectattr", "unique", "batch", "slice", "items"}
)


def can_track_prefixes(tree: nodes.Template) -> bool:
    """Whether all state that outlives a loop of the template can be watched."""
    if any(name.name in _HIDDEN_STATE for name in tree.find_all(nodes.Name)):
        return False
    # A variable that holds a lazy filter changes when it is read.
    kept = [assign.node for assign in tree.find_all(nodes.Assign)]
    return not any(isinstance(node, nodes.Filter) and node.name in _LAZY for node in kept)


def nodes_behind_messages(tree: nodes.Template) -> nodes.Template | None:
    """What stands behind the last loop, if it depends on nothing but the template's variables.

    Then the generation prompt, which must be mentioned only there, is one text for all rows.
    """
    last = max(
        (place for place, node in enumerate(tree.body) if _nodes_of(node, nodes.For)), default=-1
    )
    if last < 0 or not isinstance(tree.body[last], nodes.For):
        return None
    before, behind = tree.body[: last + 1], tree.body[last + 1 :]
    if "add_generation_prompt" in _variable_names(before, "load") | _variable_names(
        before, "store"
    ):
        return None
    macros = {macro.name for node in before for macro in _nodes_of(node, nodes.Macro)}
    moving = _variable_names(before, "store") | macros | {"messages", "tools", "documents", "loop"}
    if _variable_names(behind, "load") & moving:
        return None
    return nodes.Template(behind, lineno=1)


def _nodes_of(node: nodes.Node, kind: type[nodes.Node]) -> list:
    own = [node] if isinstance(node, kind) else []
    return own + list(node.find_all(kind))


def _variable_names(body: list[nodes.Node], context: str) -> set[str]:
    return {
        name.name for node in body for name in _nodes_of(node, nodes.Name) if name.ctx == context
    }


class TrackedRendering:
    """A whole conversation as the template writes it, and what it writes for its first messages."""

    def __init__(self, watch: PrefixTracker) -> None:
        self.plain = "".join(watch.pieces)
        self.text = with_runs(self.plain, join_runs(watch.pieces))
        self._watch = watch
        self._ends = [0, *accumulate(map(len, watch.pieces))]

    def prefix(self, count: int) -> tuple[int, int] | None:
        """The text of the first `count` messages: this one up to a place, and from a place on.

        None where the template may write it otherwise.
        """
        places = self._watch.prefix(count)
        return places and (self._ends[places[0]], self._ends[places[1]])


class ChatTemplate:
    """One Jinja chat template with its variables and its date."""

    environment_class: type[TracedEnvironment] = TracedEnvironment

    def __init__(self, source: str, variables: dict[str, Any], date: str) -> None:
        self.source = source
        self.variables = variables
        self.date = date
        self._clock = _make_strftime_now(date)
        self._plain = _compile_plain(source)
        self._environment = make_traced_environment(self._plain.environment, self.environment_class)
        self._environment.globals["strftime_now"] = self._clock
        self._traced = _compile_or_raise(self._environment.compile_traced, source)
        self._globals: dict[jinja2.Template, dict[str, Any]] = {}
        tree = self._environment.parse(source)
        self.may_escape = any(node.name in ESCAPING_FILTERS for node in tree.find_all(nodes.Filter))
        """Whether a string may be marked as safe: it escapes what is added, which is checked."""
        self.can_track_prefixes = can_track_prefixes(tree)
        """Whether `render_with_prefixes` can tell what the template writes for fewer messages."""
        self.fixed_endings = self._render_fixed_endings(tree) if self.can_track_prefixes else None
        """What stands behind the messages without and with the generation prompt, if fixed."""

    def _render_fixed_endings(self, tree: nodes.Template) -> tuple[str, str] | None:
        behind = nodes_behind_messages(tree)
        if behind is None:
            return None
        end = self._environment.from_string(behind)
        without, with_prompt = (
            "".join(self._run(end, self._inputs([], None, generation), None))
            for generation in (False, True)
        )
        return without, with_prompt

    def render(self, messages: list, tools: list | None, add_generation_prompt: bool) -> TracedStr:
        """The rendered text; raises ChatError with the template's own words."""
        inputs = self._inputs(messages, tools, add_generation_prompt)
        text = concat_traced(self._run(self._traced, inputs, None))
        if self.may_escape and self._written_plainly(inputs) != text:
            raise ChatError(
                "the template escapes the row's text in a way that cannot be traced",
                reason="untraceable",
            )
        return text

    def render_with_prefixes(
        self, messages: list, tools: list | None, add_generation_prompt: bool
    ) -> TrackedRendering:
        """The rendered text, and by the way what the template writes for fewer messages."""
        watch = PrefixTracker(len(messages))
        if self.may_escape or not self.can_track_prefixes:
            watch.counted()
            watch.pieces.append(self.render(messages, tools, add_generation_prompt))
            return TrackedRendering(watch)
        inputs = self._inputs(TrackedMessages(messages, watch), tools, add_generation_prompt)
        self._run(self._traced, inputs, watch)
        return TrackedRendering(watch)

    def _inputs(self, messages: Any, tools: list | None, generation: bool) -> dict[str, Any]:
        return {
            **self.variables,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": generation,
        }

    def _written_plainly(self, inputs: dict[str, Any]) -> str:
        return "".join(self._run(self._plain, {**inputs, "strftime_now": self._clock}, None))

    def _run(
        self, template: jinja2.Template, inputs: dict[str, Any], watch: PrefixTracker | None
    ) -> list[str]:
        watches = self._environment.watches
        watches.current, watches.steps = watch, 0
        pieces = watch.pieces if watch is not None else []
        try:
            if template not in self._globals:
                self._globals[template] = dict(template.globals)
            context = template.new_context({**self._globals[template], **inputs}, shared=True)
            for piece in template.root_render_func(context):
                pieces.append(piece)
            return pieces
        except jinja2.TemplateError as error:
            words = error.message or str(error)
        except RecursionError:
            words = "it calls itself without end"
        except MemoryError:
            words = "it needs more memory than there is"
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            words = f"{type(error).__name__}: {error}"
        finally:
            watches.current = None
        raise ChatError(f"the chat template refuses the row: {words}", reason="template refuses")


def read_template(template: str) -> str:
    """A template given as text or as the path of a file, as text."""
    if "{" in template or "\n" in template:
        return template
    path = Path(template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatError(
            f"the chat template `{template}` is neither Jinja text nor a file that can be read "
            f"({error})",
            reason="no template",
        ) from None


@lru_cache(maxsize=64)
def _compile_plain(source: str) -> jinja2.Template:
    """The template as transformers compiles it."""
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template

    def compile_(text: str) -> jinja2.Template:
        refuse_constants(_cached_compile_jinja_template("").environment.parse(text))
        return _cached_compile_jinja_template(text)

    return _compile_or_raise(compile_, source)


def _compile_or_raise(compile_: Callable[[str], jinja2.Template], source: str) -> jinja2.Template:
    try:
        return compile_(source)
    except jinja2.TemplateSyntaxError as error:
        raise ChatError(
            f"the chat template does not compile: line {error.lineno}: {error.message}",
            reason="bad template",
        ) from None
    except (
        ArithmeticError, MemoryError, RecursionError, ValueError, jinja2.TemplateError
    ) as error:  # fmt: skip
        raise ChatError(
            f"the chat template does not compile: {error}", reason="bad template"
        ) from None


def _make_strftime_now(date: str) -> Callable[[str], str]:
    """`strftime_now` for a fixed date."""
    try:
        moment = datetime.combine(Date.fromisoformat(date), datetime.min.time())
    except ValueError:
        raise ChatError(
            f"the date `{date}` is no date; write it as YYYY-MM-DD", reason="bad date"
        ) from None

    def strftime_now(format: str) -> str:
        return moment.strftime(format)

    return strftime_now
