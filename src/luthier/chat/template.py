"""A chat template, compiled once and rendered with the origin of every character."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from datetime import date as Date
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, Self

import jinja2
from jinja2 import meta, nodes

from luthier.chat.images import (
    ImageExpander,
    expand_placeholders,
    find_placeholders,
    image_count_error,
    list_image_origins,
)
from luthier.chat.jinja_env import (
    ESCAPING_FILTERS,
    TracedEnvironment,
    make_traced_environment,
    trace_function,
)
from luthier.chat.prefix_tracking import PrefixTracker, TrackedMessages
from luthier.chat.provenance import TracedStr, concat_strings, concat_traced, join_runs, with_runs
from luthier.chat.template_file import read_template
from luthier.chat.template_probe import ENDLESS, TOO_LARGE, check_template
from luthier.chat.types import ChatError

_TYPE_NAMES = (
    (re.compile(r"(?:luthier\.chat\.provenance\.)?\b(?:Safe)?TracedStr\b"), "str"),
    (re.compile(r"(?:luthier\.chat\.prefix_tracking\.)?\bTrackedMessages\b"), "list"),
)
"""Types in the errors of templates, and what their authors know them as."""
TEMPLATE_INPUTS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception"}
)
"""What every template gets, so that no variable may have these names."""
# State that is neither a variable nor an attribute of a namespace, so no tracker sees it.
_HIDDEN_STATE = frozenset({"cycler", "joiner"})
# Filters that give a lazy value: a variable that holds one changes when it is read.
_LAZY_FILTERS = frozenset(
    {"map", "select", "reject", "selectattr", "rejectattr", "unique", "batch", "slice", "items"}
)


class TrackedRendering:
    """A whole conversation as the template writes it, and what it writes for its first messages."""

    def __init__(self, tracker: PrefixTracker) -> None:
        self.plain = "".join(tracker.pieces)
        self.text = with_runs(self.plain, join_runs(tracker.pieces))
        self._tracker = tracker
        self._ends = [0, *accumulate(map(len, tracker.pieces))]

    def prefix(self, count: int) -> tuple[int, int] | None:
        """Return (stop, tail): the first `count` messages are `plain[:stop] + plain[tail:]`.

        None where the template may write it otherwise.
        """
        cuts = self._tracker.prefix(count)
        return cuts and (self._ends[cuts[0]], self._ends[cuts[1]])


class ChatTemplate:
    """One Jinja chat template with its variables and its date."""

    environment_class: type[TracedEnvironment] = TracedEnvironment

    def __init__(
        self,
        source: str,
        variables: dict[str, Any],
        date: str,
        origin: str = "",
        images: ImageExpander | None = None,
    ) -> None:
        """`origin`: where the template comes from, for errors: ` of FOLDER`, or nothing.

        `images`: what the model's processor makes of images; None for rows of text alone.
        """
        self.source = source
        self.variables = variables
        self.date = date
        self.images = images
        self._strftime_now = _make_strftime_now(date)
        self._plain = _compile_or_raise(self._compile_plain, origin)
        self._environment = make_traced_environment(self._plain.environment, self.environment_class)
        self._environment.globals["strftime_now"] = trace_function(self._strftime_now)
        self._traced = _compile_or_raise(self._compile_traced, origin)
        self._globals: dict[jinja2.Template, dict[str, Any]] = {}
        self.tree = tree = self._environment.parse(source)
        self.may_escape = any(node.name in ESCAPING_FILTERS for node in tree.find_all(nodes.Filter))
        """Whether a string may be marked as safe: it escapes what is added, which is checked."""
        self.can_track_prefixes = _can_track_prefixes(tree)
        """Whether `render_with_prefixes` can tell what the template writes for fewer messages."""
        self._ending = self._compile_ending() if self.can_track_prefixes else None
        self.fixed_endings = self._render_fixed_endings()
        """What stands behind the messages without and with the generation prompt, if fixed."""

    def with_variables(self, variables: dict[str, Any]) -> Self:
        """Return this template with other variables, compiled and tried as it is already."""
        template = copy(self)
        template.variables = variables
        template.fixed_endings = template._render_fixed_endings()
        return template

    @cached_property
    def read_names(self) -> frozenset[str]:
        """The names that the template may read from outside: all that a variable can set."""
        return frozenset(meta.find_undeclared_variables(self.tree))

    def list_variables(self) -> list[str]:
        """Return the variables that the template reads, for messages; special tokens aside.

        A name that the template sets itself is one only where it asks whether it is defined.
        """
        optional = {
            test.node.name
            for test in self.tree.find_all(nodes.Test)
            if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name)
        }
        body = self.tree.body
        own = (_variable_names(body, "store") - optional) | _variable_names(body, "param")
        names = self.read_names - own - TEMPLATE_INPUTS
        return sorted(name for name in names if not name.endswith("_token"))

    def _compile_plain(self, origin: str) -> jinja2.Template:
        """Return the template as transformers compiles it; one that does not end is refused."""
        check_template(self.source, self.variables, self.date, origin)
        return _compile_as_transformers(self.source)

    def _compile_traced(self, _: str) -> jinja2.Template:
        return self._environment.compile_traced(self.source)

    def _compile_ending(self) -> jinja2.Template | None:
        """Return what stands behind the messages; None where it depends on them."""
        behind = _nodes_behind_messages(self.tree)
        return None if behind is None else self._environment.from_string(behind)

    def _render_fixed_endings(self) -> tuple[str, str] | None:
        if self._ending is None:
            return None
        without, with_prompt = (
            "".join(self._run(self._ending, self._inputs([], None, generation), None))
            for generation in (False, True)
        )
        return without, with_prompt

    def render(self, messages: list, tools: list | None, add_generation_prompt: bool) -> TracedStr:
        """Return the rendered text, an image as the text that stands for it.

        Raises ChatError with the template's own words, and for an image that it does not show.
        """
        text = self.render_placeholders(messages, tools, add_generation_prompt)
        if self.images is None or not (origins := list_image_origins(messages)):
            return text
        expanded = expand_placeholders([text], origins, self.images)
        if expanded is None:
            raise self._image_count_error(messages, tools, add_generation_prompt, self.images)
        return concat_traced(expanded[0])

    def render_placeholders(
        self, messages: list, tools: list | None, add_generation_prompt: bool
    ) -> TracedStr:
        """Return the text as the template writes it, with its own token for each image."""
        inputs = self._inputs(messages, tools, add_generation_prompt)
        text = concat_traced(self._run(self._traced, inputs, None))
        # Escaping may happen where no trace is kept, so the plain template is asked too.
        if self.may_escape and self._written_plainly(inputs) != text:
            raise ChatError(
                "the template escapes the row's text in a way that cannot be traced",
                reason="untraceable",
            )
        return text

    def render_with_prefixes(
        self, messages: list, tools: list | None, add_generation_prompt: bool
    ) -> TrackedRendering:
        """Return the rendered text, and by the way what the template writes for fewer messages."""
        tracker = PrefixTracker(len(messages))
        if not self.may_escape and self.can_track_prefixes:
            tracked = TrackedMessages(messages, tracker)
            self._run(self._traced, self._inputs(tracked, tools, add_generation_prompt), tracker)
            if self.images is None or not (origins := list_image_origins(messages)):
                return TrackedRendering(tracker)
            # Each piece by itself, so that those of shorter prefixes stay what they are.
            expanded = expand_placeholders(tracker.pieces, origins, self.images)
            if expanded is not None:
                tracker.pieces[:] = map(concat_strings, expanded)
                return TrackedRendering(tracker)
            tracker = PrefixTracker(len(messages))
        # Nothing is known of prefixes then: as if the template had counted the messages.
        tracker.saw_count()
        tracker.pieces.append(self.render(messages, tools, add_generation_prompt))
        return TrackedRendering(tracker)

    def _image_count_error(
        self, messages: list, tools: list | None, generation: bool, expander: ImageExpander
    ) -> ChatError:
        """Return an error that names the first message whose images are not shown one by one."""
        counts = []
        for number, message in enumerate(messages, start=1):
            if not list_image_origins([message]) and number < len(messages):
                continue
            # A template may refuse the first messages by themselves.
            with suppress(ChatError):
                text = self.render_placeholders(messages[:number], tools, generation)
                written = len(find_placeholders(text, expander.placeholder))
                counts.append((list_image_origins(messages[:number]), written))
        return image_count_error(counts, expander.placeholder)

    def _inputs(self, messages: Any, tools: list | None, generation: bool) -> dict[str, Any]:
        # The names are those that transformers gives every template.
        return {
            **self.variables,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": generation,
        }

    def _written_plainly(self, inputs: dict[str, Any]) -> str:
        return "".join(self._run(self._plain, {**inputs, "strftime_now": self._strftime_now}, None))

    def _run(
        self, template: jinja2.Template, inputs: dict[str, Any], tracker: PrefixTracker | None
    ) -> list[str]:
        """Return the strings that the template writes; with a tracker, these are its pieces.

        Raises ChatError for whatever goes wrong in it: templates come from anywhere.
        """
        state = self._environment.render_state
        state.tracker = tracker
        pieces = tracker.pieces if tracker is not None else []
        try:
            # Jinja's globals are a ChainMap (3.1), slow to copy for each row; a dict is not.
            if template not in self._globals:
                self._globals[template] = dict(template.globals)
            context = template.new_context({**self._globals[template], **inputs}, shared=True)
            # One by one, for the tracker counts the pieces while the template runs.
            for piece in template.root_render_func(context):
                pieces.append(piece)
            return pieces
        except jinja2.TemplateError as error:
            problem = str(error.message or error)  # the template may raise any value
        except RecursionError:
            raise ChatError("the chat template calls itself without end", reason=ENDLESS) from None
        except MemoryError:
            raise ChatError(
                "the chat template needs more memory than there is", reason=TOO_LARGE
            ) from None
        except Exception as error:  # templates call methods of the row's values with anything
            problem = f"{type(error).__name__}: {error}"
        finally:
            state.tracker = None
        for pattern, name in _TYPE_NAMES:
            problem = pattern.sub(name, problem)
        raise ChatError(f"the chat template refuses the row: {problem}", reason="template refuses")


def _can_track_prefixes(tree: nodes.Template) -> bool:
    """Return whether all state that outlives a loop of the template can be tracked."""
    if any(name.name in _HIDDEN_STATE for name in tree.find_all(nodes.Name)):
        return False
    values = [assign.node for assign in tree.find_all(nodes.Assign)]
    return not any(isinstance(v, nodes.Filter) and v.name in _LAZY_FILTERS for v in values)


def _nodes_behind_messages(tree: nodes.Template) -> nodes.Template | None:
    """Return what stands behind the last loop, if it depends on the template's variables alone.

    Then the generation prompt, which must be mentioned only there, is one text for all rows.
    """
    loops = [index for index, node in enumerate(tree.body) if _nodes_of(node, nodes.For)]
    if not loops or not isinstance(tree.body[loops[-1]], nodes.For):
        return None
    before, behind = tree.body[: loops[-1] + 1], tree.body[loops[-1] + 1 :]
    set_before = _variable_names(before, "store")
    if "add_generation_prompt" in _variable_names(before, "load") | set_before:
        return None
    macros = {macro.name for node in before for macro in _nodes_of(node, nodes.Macro)}
    of_the_row = set_before | macros | {"messages", "tools", "documents", "loop"}
    if _variable_names(behind, "load") & of_the_row:
        return None
    return nodes.Template(behind, lineno=1)


def _nodes_of(node: nodes.Node, node_type: type[nodes.Node]) -> list:
    """Return the nodes of a type in a tree, its root included."""
    return [node] * isinstance(node, node_type) + list(node.find_all(node_type))


def _variable_names(body: list[nodes.Node], context: str) -> set[str]:
    """Return the names that a body loads or stores, as `context` says."""
    names = (name for node in body for name in _nodes_of(node, nodes.Name))
    return {name.name for name in names if name.ctx == context}


def check_template_syntax(template: str) -> None:
    """Raise ChatError for a template that cannot be read or whose Jinja is broken.

    It imports no library but Jinja, so that a config can be checked at once.
    """
    # `generation` is a tag of transformers' own, which marks what trains.
    source = re.sub(r"{%[-+]? *(end)?generation *[-+]?%}", "", read_template(template))
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        environment.parse(source)
    except (jinja2.TemplateError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        where = f" (line {line})" if line else ""
        raise ChatError(
            f"the chat template is not valid Jinja: {error}{where}", reason="bad template"
        ) from None


@lru_cache(maxsize=64)
def _compile_as_transformers(source: str) -> jinja2.Template:
    """Return the template as transformers compiles it."""
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template

    return _cached_compile_jinja_template(source)


def _compile_or_raise(
    compile_template: Callable[[str], jinja2.Template], origin: str
) -> jinja2.Template:
    try:
        return compile_template(origin)
    except ChatError:
        raise
    except jinja2.TemplateSyntaxError as error:
        problem = f"line {error.lineno}: {error.message}"
    except SyntaxError as error:
        # Jinja (3.1) writes Python, which allows 20 loops inside each other.
        problem = f"Python refuses what Jinja makes of it: {error.msg}"
    except RecursionError:
        problem = "it is nested too deeply"
    except MemoryError:
        problem = "it needs too much memory"
    except Exception as error:  # a constant such as `1 / 0` raises anything
        problem = str(error)
    raise ChatError(f"the chat template{origin} does not compile: {problem}", reason="bad template")


def _make_strftime_now(date: str) -> Callable[[str], str]:
    """`strftime_now` for a fixed date."""
    try:
        moment = datetime.combine(Date.fromisoformat(date), datetime.min.time())
    except ValueError:
        raise ChatError(
            f"the date `{date}` is not a date; write it as YYYY-MM-DD", reason="bad date"
        ) from None

    def strftime_now(format: str) -> str:
        return moment.strftime(format)

    return strftime_now
