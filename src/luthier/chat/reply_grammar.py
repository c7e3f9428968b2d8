"""How a template writes a reply: which fields, in which order, and what stands around each.

A few made-up replies are rendered, with a word of its own in each field; where the words stand in
what the model would have to write gives the grammar. Nothing is known of any family of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

from luthier.chat.argument_forms import ReplySyntaxError
from luthier.chat.call_grammar import CallGrammar, make_calls
from luthier.chat.types import ChatError

TextField = Literal["reasoning", "content"]
ReplyNode = Literal["start", "reasoning", "content", "calls", "end"]
_WORDS: dict[TextField, str] = {"reasoning": "Zqreasonz", "content": "Zqcontentz"}
_FIELD_SETS: tuple[tuple[TextField, ...], ...] = (
    ("reasoning", "content"), ("reasoning",), ("content",), (),
)  # fmt: skip
"""The fields of made-up replies. gpt-oss writes content beside a call as it writes reasoning; the
first that is learnt counts."""
_CALL_BASES: tuple[tuple[TextField, ...], ...] = ((), ("content",))
"""The fields beside made-up calls: some templates want a content."""
_KEYS: dict[TextField, str] = {"reasoning": "reasoning_content", "content": "content"}


class RenderReply(Protocol):
    """Renders what a model writes for a message behind one prompt, without the stop token.

    Raises ChatError where the template does not write such a turn.
    """

    def __call__(self, message: dict[str, Any], /) -> str:
        """Return the text."""


class FieldMarkers:
    """What the template writes behind one field of a reply, or at its start."""

    def __init__(self) -> None:
        self.targets: dict[str, ReplyNode] = {}
        """Where each marker leads, the end of the reply aside."""
        self.endings: list[str] = []
        """What may stand behind the field at the end of the reply, the longest first."""
        self.pattern = re.compile("(?!)")
        """Finds a marker; the longest of those that stand at a position."""
        self.heads: frozenset[str] = frozenset()
        """Beginnings of markers, and endings: text that may yet become a marker, or the end."""
        self._longest = 0

    def add(self, marker: str, target: ReplyNode) -> None:
        """Note a marker, unless the same one is known to lead elsewhere."""
        if target != "end":
            self.targets.setdefault(marker, target)
        elif marker not in self.endings:
            self.endings = sorted([*self.endings, marker], key=len, reverse=True)

    def compile(self) -> None:
        """Prepare for the search."""
        markers = sorted(filter(None, self.targets), key=len, reverse=True)
        if markers:
            self.pattern = re.compile("|".join(map(re.escape, markers)))
        beginnings = {m[:size] for m in (*markers, *self.endings) for size in range(1, len(m))}
        self.heads = frozenset(beginnings | set(filter(None, self.endings)))
        self._longest = max(map(len, self.heads), default=0)

    def count_held(self, text: str) -> int:
        """Return how many characters at the end of a text may be the beginning of a marker."""
        for size in range(min(self._longest, len(text)), 0, -1):
            if text[-size:] in self.heads:
                return size
        return 0


class ReplyGrammar:
    """What a template writes around the fields of a reply, behind one form of prompt."""

    def __init__(self, render: RenderReply) -> None:
        self._render = render
        self.nodes: dict[ReplyNode, FieldMarkers] = {
            "start": FieldMarkers(), "reasoning": FieldMarkers(), "content": FieldMarkers(),
        }  # fmt: skip
        self.call_markers = FieldMarkers()
        """What may stand behind the calls."""
        self.calls: CallGrammar | None = None
        """The form of calls; None where the template writes none that are understood."""
        self.calls_problem: str | None = None
        """Why calls are not understood."""
        for fields in _FIELD_SETS:
            self._add_texts(fields)
        self._learn_calls()
        for markers in (*self.nodes.values(), self.call_markers):
            markers.compile()

    @property
    def is_known(self) -> bool:
        """Whether the template has shown any reply."""
        return bool(self.nodes["start"].targets)

    def _add_texts(self, fields: Sequence[TextField]) -> None:
        """Learn from a reply with these fields."""
        try:
            text = self._render(_make_message(fields))
        except ChatError:
            return
        self._add_path(text, fields)

    def _learn_calls(self) -> None:
        """Learn the form of calls, and what stands around them with and without other fields."""
        for base in _CALL_BASES:
            try:
                self.calls = CallGrammar(partial(self._render_calls, base))
                break
            except (ReplySyntaxError, ChatError) as error:
                self.calls_problem = str(error)
        if self.calls is None:
            return
        self.calls_problem = None
        for fields in _FIELD_SETS:
            try:
                text = self._render(_make_message(fields, make_calls(1)))
                parts = self.calls.place(text, 0)
            except (ReplySyntaxError, ChatError):
                continue
            self._add_path(text, fields, (parts[0].start, parts[-1].stop))

    def _render_calls(self, fields: Sequence[TextField], calls: list[dict[str, Any]]) -> str:
        return self._render(_make_message(fields, calls))

    def _add_path(
        self, text: str, fields: Sequence[TextField], calls: tuple[int, int] | None = None
    ) -> None:
        """Learn the markers of a text in which each field is one word; `calls`: their span."""
        # A field that the template leaves out, or writes twice, tells nothing.
        if any(text.count(_WORDS[name]) != 1 for name in fields):
            return
        spans: list[tuple[int, int, ReplyNode]] = [
            (start := text.index(_WORDS[name]), start + len(_WORDS[name]), name) for name in fields
        ]
        if calls is not None:
            spans.append((*calls, "calls"))
        node: ReplyNode = "start"
        position = 0
        for start, stop, name in sorted(spans):
            self._markers(node).add(text[position:start], name)
            node, position = name, stop
        self._markers(node).add(text[position:], "end")

    def _markers(self, node: ReplyNode) -> FieldMarkers:
        return self.call_markers if node == "calls" else self.nodes[node]

    def parse_calls(
        self, text: str, schemas: dict[str, dict[str, Any]], keeps_text: bool = False
    ) -> tuple[list[dict[str, Any]], str]:
        """Return the calls of a text that begins with them, and the content behind them.

        `keeps_text`: whether the calls' arguments stay the text that they are. Raises
        ReplySyntaxError.
        """
        assert self.calls is not None
        markers = self.call_markers
        calls, position = self.calls.parse(text, markers.endings, schemas, keeps_text)
        rest = text[position:]
        if rest in markers.endings:
            return calls, ""
        for marker, target in markers.targets.items():
            if target == "content" and rest.startswith(marker):
                endings = self.nodes["content"].endings
                ending = next((each for each in endings if rest.endswith(each)), None)
                if ending is not None:
                    return calls, rest[len(marker) : len(rest) - len(ending)]
        raise ReplySyntaxError("a call is followed by something that the template does not write")


def _make_message(
    fields: Sequence[TextField], calls: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Return a made-up reply with a word in each of these fields."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    message |= {_KEYS[name]: _WORDS[name] for name in fields}
    return message if calls is None else message | {"tool_calls": calls}


class ScannedText(NamedTuple):
    """A piece of a reply and the field that it belongs to."""

    field: TextField
    text: str


class ReplyScanner:
    """Goes through a reply as it comes and says which field each piece belongs to.

    Text that may yet be part of a marker is held back until that is decided, and so are calls.
    """

    def __init__(self, grammar: ReplyGrammar) -> None:
        self.grammar = grammar
        self.node: ReplyNode = "start"
        self.held = ""
        """The text behind what was given out; at the end the calls, or a marker that was cut."""
        self.problem: str | None = None
        """Why the reply is not a turn of the template, once that is known."""

    def add(self, text: str) -> Iterator[ScannedText]:
        """Yield what a piece of text settles."""
        self.held += text
        if self.node == "start" and self.problem is None:
            self._begin(is_end=False)
        while self.problem is None and self.node in ("reasoning", "content"):
            markers = self.grammar.nodes[self.node]
            match = markers.pattern.search(self.held)
            free = len(self.held) - markers.count_held(self.held)
            # A longer marker may be under way where a shorter one stands.
            is_settled = match is not None and match.start() < free
            yield from self._take(match.start() if match is not None and is_settled else free)
            if match is None or not is_settled:
                return
            self._pass(markers, match[0])

    def finish(self, is_cut: bool) -> Iterator[ScannedText]:
        """Yield what is left at the end of the reply. `is_cut`: it may end anywhere."""
        if self.node == "start" and self.problem is None:
            self._begin(is_end=True)
        yield from self.add("")
        while self.problem is None and self.node in ("reasoning", "content"):
            markers = self.grammar.nodes[self.node]
            ending = next((each for each in markers.endings if self.held.endswith(each)), None)
            match = markers.pattern.search(self.held)
            if match is not None and match.start() < len(self.held) - len(ending or ""):
                yield from self._take(match.start())
                self._pass(markers, match[0])
            elif ending is not None:
                yield from self._take(len(self.held) - len(ending))
                self.held, self.node = "", "end"
            elif is_cut:
                yield from self._take(len(self.held) - markers.count_held(self.held))
                return
            else:
                self.problem = f"it ends within its {self.node}"

    def _take(self, stop: int) -> Iterator[ScannedText]:
        if stop:
            yield ScannedText("reasoning" if self.node == "reasoning" else "content",
                              self.held[:stop])  # fmt: skip
        self.held = self.held[stop:]

    def _pass(self, markers: FieldMarkers, marker: str) -> None:
        """Go on behind a marker with which the held text begins."""
        self.node = markers.targets[marker]
        self.held = self.held[len(marker) :]

    def _begin(self, is_end: bool) -> None:
        """Go into the first field, unless more text decides which it is."""
        markers = self.grammar.nodes["start"]
        text = self.held
        if not is_end and (not text or text in markers.heads):
            return
        if is_end and text in markers.endings:
            self.held, self.node = "", "end"
            return
        begun = [each for each in markers.targets if text.startswith(each)]
        if begun:
            self._pass(markers, max(begun, key=len))
        else:
            self.problem = "it does not begin as the template begins a reply"
