"""A chat template is tried on made-up conversations in a process of its own before it is used.

Templates come from anywhere, and Jinja's sandbox bounds neither their time nor their memory. So a
template that is not known yet is first rendered by a child process whose processor time and memory
the system limits, on conversations of every form and of growing size. One that passes is rendered
without any bound from then on. What that cannot find: a template that behaves for all these
conversations and not for some row.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from luthier.chat.template_file import MAX_TEMPLATE_CHARS
from luthier.chat.types import ChatError

PROBE_VERSION = 2
"""Raise it when other conversations or limits decide: what passed before is tried again."""
ENDLESS, TOO_LARGE = "template without end", "template fills the memory"
"""Reasons of errors about a template that calls itself, or fills the memory, at a row."""
MAX_WRITTEN_CHARS = 20_000_000
"""Characters that a template may write for one conversation; the longest of them has 400,000."""


class ProbeLimits(NamedTuple):
    """What the child process may use for all conversations together."""

    cpu_seconds: int = 5
    """The slowest template at hand takes 0.5."""
    wall_seconds: float = 60.0
    """Only a machine that is very busy comes near it."""
    megabytes: int = 512
    """Address space, Python's own 40 MB included."""


limits = ProbeLimits()


class PassedTemplates(Protocol):
    """The keys of templates that passed, such as a set, or one that is kept on disk."""

    def __contains__(self, key: str, /) -> bool:
        """Return whether the template of this key has passed."""

    def add(self, key: str, /) -> None:
        """Note that the template of this key has passed."""


_passed: set[str] = set()
_shared: PassedTemplates = _passed


def share_passed_templates(passed: PassedTemplates) -> None:
    """Note the templates that pass in `passed`, too, and try none that is there already."""
    global _shared
    _shared = passed


def check_template(source: str, variables: dict[str, Any], date: str, origin: str) -> None:
    """Raise ChatError for a template that does not end or fills the memory; `origin` names it."""
    if len(source) > MAX_TEMPLATE_CHARS:
        raise ChatError(
            f"the chat template{origin} has {len(source):,} characters, and may have "
            f"{MAX_TEMPLATE_CHARS:,}",
            reason="bad template",
        )
    # A variable that the template never names changes nothing, and neither does the date.
    used = {name: value for name, value in variables.items() if name in source}
    request = json.dumps(
        [source, used, date if "strftime_now" in source else "2000-01-01"], sort_keys=True,
        default=str,
    )  # fmt: skip
    version = f"{PROBE_VERSION} {sys.version_info[:2]} {jinja2.__version__} {limits}"
    key = hashlib.sha256(f"{version} {request}".encode("utf-8", "surrogatepass")).hexdigest()
    if key in _passed or key in _shared:
        return
    problem = _run_child(request)
    if problem is not None:
        raise ChatError(
            f"the chat template{origin} {problem}.\nTo use another one: chat.template=FILE",
            reason="bad template",
        )
    _passed.add(key)
    _shared.add(key)


_OUT_OF_MEMORY = 75
"""The exit code of a child that wanted more memory than it may have."""
# `-I` keeps a jinja2.py of the working directory out; the paths are those of this process.
_CHILD = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from luthier.chat.template_probe import render_probes
render_probes(sys.stdin.read(), *map(int, sys.argv[2:]))
"""


def _run_child(request: str) -> str | None:
    """Return what is wrong with a template, as a predicate; None where nothing is."""
    paths = [*filter(None, sys.path), str(Path(__file__).parents[2])]
    command = [sys.executable, "-I", "-c", _CHILD, json.dumps(paths)]
    numbers = [str(limits.cpu_seconds), str(limits.megabytes)]
    try:
        done = subprocess.run(
            [*command, *numbers], input=request, capture_output=True, text=True,
            encoding="utf-8", errors="replace", timeout=limits.wall_seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        # The standard library gives bytes here whatever was asked for (Python 3.11).
        lines = (error.stdout or b"").decode("utf-8", "replace").splitlines()
        return _refusal(f"does not end within {limits.wall_seconds:.0f} seconds", lines)
    except OSError as error:
        return f"cannot be tried, since no process can be started for it: {error}"
    lines = done.stdout.splitlines()
    if done.returncode == 0:
        return json.loads(lines[-1])
    if done.returncode == -signal.SIGXCPU:
        took = f"does not end within {limits.cpu_seconds} seconds of processor time"
        return _refusal(took, lines)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return _refusal(f"ends the process that renders it ({name})", lines)
    if done.returncode == _OUT_OF_MEMORY:
        return _refusal(f"needs more than {limits.megabytes:,} MB of memory", lines)
    last = done.stderr.strip().splitlines()[-1:] or ["no error was printed"]
    return f"cannot be tried: {last[0]}"


def _refusal(problem: str, lines: list[str]) -> str:
    """Return the predicate; the last line of the child names what it was at."""
    return f"{problem}, tried on {json.loads(lines[-1])}" if lines else problem


# What runs in the child process.


def render_probes(request: str, cpu_seconds: int, megabytes: int) -> None:
    """Render a template on all conversations, within limits.

    Each line printed is JSON: the conversation that comes next, and at the end the problem as a
    predicate, or null.
    """
    _limit_resources(cpu_seconds, megabytes)
    source, variables, date = json.loads(request)
    has_memory = True
    try:
        _print_json(_find_problem(source, variables, date))
    except MemoryError:
        has_memory = False
    # Not inside `except`, where the frames that filled the memory are still alive.
    if not has_memory:
        os._exit(_OUT_OF_MEMORY)


def _print_json(value: str | None) -> None:
    print(json.dumps(value), flush=True)


def _limit_resources(cpu_seconds: int, megabytes: int) -> None:
    """Have the system stop this process where it takes more processor time or memory."""
    try:
        import resource
    except ImportError:  # Windows: the clock of the parent is the only limit
        return
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, megabytes * 2**20),
    ):
        _, hard = resource.getrlimit(kind)
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        try:
            resource.setrlimit(kind, (soft, hard))
        except (OSError, ValueError):  # macOS has no limit of the address space
            continue


def _find_problem(source: str, variables: dict[str, Any], date: str) -> str | None:
    """Return what is wrong with a template, as a predicate; None where nothing is.

    Raises MemoryError where it takes more than the system allows.
    """
    from luthier.chat.conversation import read_conversation
    from luthier.chat.images import IMAGE_PART
    from luthier.chat.template import ChatTemplate

    class ProbedTemplate(ChatTemplate):
        """A template that neither loads transformers nor is checked once more."""

        def _compile_plain(self, origin: str) -> jinja2.Template:
            return make_plain_environment().from_string(self.source)

    try:
        template = ProbedTemplate(source, variables, date)
    except ChatError as error:
        return error.text.removeprefix("the chat template ")
    for name, messages, tools in make_probes():
        _print_json(name)
        for generation in (False, True):
            try:
                conversation = read_conversation(messages, tools, IMAGE_PART)
                traced = conversation.messages, conversation.tools, generation
                written = template.render_with_prefixes(*traced).plain
            except ChatError as error:
                # What a template refuses in its own words is a matter of the row.
                if error.reason == ENDLESS:
                    return f"calls itself without end, tried on {name}"
                if error.reason == TOO_LARGE:
                    raise MemoryError from None
                continue
            if len(written) > MAX_WRITTEN_CHARS:
                return f"writes {len(written):,} characters, tried on {name}"
    return None


class _GenerationBlock(Extension):
    """`{% generation %}` as transformers has it: a block that writes what it holds."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """Read a block up to its end."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Any) -> str:
        return str(caller())


def make_plain_environment() -> ImmutableSandboxedEnvironment:
    """Return an environment like transformers' own, which takes half a second to import."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
        sort_keys: bool = False,
    ) -> str:  # fmt: skip
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def raise_exception(message: Any) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = None  # every template puts its own there
    return environment


_TEXTS = (
    "Hi",
    "",
    " \n",
    '<think>\nWhy?\n</think>\n\nSo: <b>"é"</b> & 琵琶',
    '{"a": [1, {"b": null}]}',
)
_CALL = {"type": "function", "id": "call00001"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds a word.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string"}, "n": {"type": "integer", "enum": [1, 2]}},
            "required": ["word"],
        },
        "return": {"type": "object", "properties": {"found": {"type": "boolean"}}},
    },
}


def make_probes() -> Iterator[tuple[str, list[dict[str, Any]], list[Any] | None]]:
    """Yield conversations as (name, messages, tools): of every form, then of growing size."""
    for text in _TEXTS:
        yield "a plain conversation", _turns(2, text), None
        yield "a prompt alone", _turns(1, text), None
        yield "a conversation with tools", _tool_turns(text), [_TOOL]
        yield "a conversation with calls but no tools", _tool_turns(text), None
        for role in ("system", "developer", "tool", "assistant", "user"):
            first = {"role": role, "content": text}
            yield f"a conversation that begins with {role}", [first, *_turns(4, text)], None
        parts = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        yield "content in parts", [*parts, *_turns(4, text)[1:]], [_TOOL]
        image = {"type": "image", "image": ""}
        for content in ([image], [image, {"type": "text", "text": text}] * 2):
            pictured = {"role": "user", "content": content}
            yield "content with images", [pictured, *_turns(4, text)[1:]], None
        for field in ("reasoning_content", "thinking", "reasoning"):
            yield (
                "a conversation with reasoning",
                [
                    message if message["role"] == "user" else {**message, field: text}
                    for message in _turns(4, "Hi")
                ],
                None,
            )
    # A template that counts messages is seen at any small number.
    for count in (*range(3, 41), 64, 128):
        yield f"{count} messages", _turns(count, "Hi."), None
    for count in (8, 32):
        yield f"{count} calls of tools", _tool_turns("Hi.", count), [_TOOL]
        yield f"{count} tools", _turns(2, "Hi"), [_TOOL] * count
    for length in (300, 3_000, 20_000):
        yield f"texts of {length:,} characters", _turns(4, "So it is. " * (length // 10)), None


def _turns(count: int, text: str) -> list[dict[str, Any]]:
    """Return so many messages, of a user and an assistant by turns."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n in range(count)]


def _tool_turns(text: str, count: int = 2) -> list[dict[str, Any]]:
    """Return a question, so many rounds of a call and its result, and the reply."""
    arguments = {"word": text, "n": 1, "more": [{"deep": None}]}
    calls = [{**_CALL, "function": {"name": "find", "arguments": arguments}}]
    result = {"role": "tool", "name": "find", "tool_call_id": "call00001", "content": text}
    rounds: list[dict[str, Any]] = [
        {"role": "assistant", "content": text, "tool_calls": calls}, result,
    ]  # fmt: skip
    return [*_turns(1, text), *rounds * count, {"role": "assistant", "content": text}]
