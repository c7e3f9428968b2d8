"""How a template writes a reply: which fields, in which order, and what stands around each.

A few made-up replies are rendered, with a word of its own in each field; where the words stand in
what the model would have to write gives the grammar. Nothing is known of any family of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from luthier.chat.types import ChatError

TextField = Literal["reasoning", "content"]
ReplyNode = Literal["start", "reasoning", "content", "calls", "end"]
_WORDS: dict[TextField, str] = {"reasoning": "Zqreasonz", "content": "Zqcontentz"}
_KEYS: dict[TextField, str] = {"reasoning": "reasoning_content", "content": "content"}


class RenderReply(Protocol):
    """Renders what a model writes for a message behind one prompt, without the stop token.

    Raises ChatError where the template does not write such a turn.
    """

    def __call__(self, message: dict[str, Any], /) -> str:
        """Return the text."""


class Transition(NamedTuple):
    """What the template writes between two fields, or at an edge of the reply."""

    marker: str
    target: ReplyNode


@dataclass(slots=True)
class FieldMarkers:
    """What may follow in one field of a reply, or at its start."""

    transitions: list[Transition] = field(default_factory=list)
    pattern: re.Pattern[str] = re.compile("(?!)")
    """Finds a marker that leads to another field; the longest that stands at a position."""
    endings: list[str] = field(default_factory=list)
    """What may stand behind the field at the end of the reply, the longest first."""
    heads: frozenset[str] = frozenset()
    """All proper beginnings of markers, and whole endings: text that may yet become one."""
    longest: int = 0

    def add(self, marker: str, target: ReplyNode) -> None:
        """Note a marker, unless the same one is known to lead elsewhere."""
        known = any(each.marker == marker for each in self.transitions)
        # Between two fields nothing can be found; an end with nothing in front of it is the text's.
        if not known:
            self.transitions.append(Transition(marker, target))

    def compile(self) -> None:
        """Prepare for the search."""
        leading = sorted(
            (t.marker for t in self.transitions if t.target != "end" and t.marker),
            key=len,
            reverse=True,
        )
        self.pattern = re.compile("|".join(map(re.escape, leading)) or "(?!)")
        ends = [each.marker for each in self.transitions if each.target == "end"]
        self.endings = sorted(ends, key=len, reverse=True)
        heads = {m[:size] for m in (*leading, *ends) for size in range(1, len(m))}
        self.heads = frozenset(heads | set(filter(None, ends)))
        self.longest = max(map(len, self.heads), default=0)

    def target(self, marker: str) -> ReplyNode | None:
        """Return where a marker leads; None for text that is none."""
        return next((t.target for t in self.transitions if t.marker == marker), None)

    def held(self, text: str) -> int:
        """Return how many characters at the end of a text may be the beginning of a marker."""
        for size in range(min(self.longest, len(text)), 0, -1):
            if text[-size:] in self.heads:
                return size
        return 0


class ReplyGrammar:
    """What a template writes around the fields of a reply, behind one form of prompt."""

    def __init__(self, render: RenderReply) -> None:
        self.nodes: dict[ReplyNode, FieldMarkers] = {
            "start": FieldMarkers(), "reasoning": FieldMarkers(), "content": FieldMarkers(),
        }  # fmt: skip
        for fields in (("reasoning", "content"), ("reasoning",), ("content",), ()):
            self._add_texts(render, fields)
        for markers in self.nodes.values():
            markers.compile()

    @property
    def is_known(self) -> bool:
        """Whether the template has shown any reply."""
        return bool(self.nodes["start"].transitions)

    def _add_texts(self, render: RenderReply, fields: Sequence[TextField]) -> None:
        """Learn from a reply with these fields."""
        message = {"role": "assistant", "content": ""}
        message |= {_KEYS[name]: _WORDS[name] for name in fields}
        try:
            text = render(message)
        except ChatError:
            return
        if any(text.count(_WORDS[name]) != 1 for name in fields):
            return
        self._add_path(text, [(name, _WORDS[name]) for name in fields])

    def _add_path(self, text: str, fields: Sequence[tuple[ReplyNode, str]]) -> None:
        """Learn the markers of a text in which each field is one word."""
        node: ReplyNode = "start"
        position = 0
        for start, name, size in sorted(
            (text.index(word), name, len(word)) for name, word in fields
        ):
            self.nodes[node].add(text[position:start], name)
            node, position = name, start + size
        self.nodes[node].add(text[position:], "end")


class ScannedText(NamedTuple):
    """A piece of a reply and the field that it belongs to."""

    field: TextField
    text: str


class ReplyScanner:
    """Goes through a reply as it comes and says which field each piece belongs to.

    Text that may yet be part of a marker is held back until that is decided. A reply that does not
    begin as the template begins one, or that goes on where the template would not, is `problem`.
    """

    def __init__(self, grammar: ReplyGrammar) -> None:
        self._grammar = grammar
        self.node: ReplyNode = "start"
        self.held = ""
        """The text behind what was given out."""
        self.problem: str | None = None

    def add(self, text: str) -> Iterator[ScannedText]:
        """Yield what a piece of text settles."""
        self.held += text
        while self.problem is None and self.node in self._grammar.nodes:
            markers = self._grammar.nodes[self.node]
            if self.node == "start":
                if not self._begin(markers, is_end=False):
                    return
                continue
            match = markers.pattern.search(self.held)
            free = len(self.held) - markers.held(self.held)
            # A longer marker may be under way where a shorter one stands.
            is_settled = match is not None and match.start() < free
            stop = match.start() if match is not None and is_settled else free
            if stop:
                yield ScannedText(self._field(), self.held[:stop])
            self.held = self.held[stop:]
            if match is None or not is_settled:
                return
            self._go(markers, match[0])

    def finish(self, is_cut: bool) -> Iterator[ScannedText]:
        """Yield what is left at the end of the reply. `is_cut`: it may end anywhere."""
        if self.problem is None and self.node == "start":
            self._begin(self._grammar.nodes["start"], is_end=True)
            yield from self.add("")
        while self.problem is None and self.node in ("reasoning", "content"):
            markers = self._grammar.nodes[self.node]
            ending = next((e for e in markers.endings if self.held.endswith(e)), None)
            match = markers.pattern.search(self.held)
            if ending is None and match is not None:
                yield from self._piece(match.start())
                self._go(markers, match[0])
                continue
            if ending is None and not is_cut:
                self.problem = f"it ends within its {self.node}"
                return
            yield from self._piece(len(self.held) - len(ending or ""))
            self.held, self.node = "", "end"

    def _piece(self, stop: int) -> Iterator[ScannedText]:
        if stop:
            yield ScannedText(self._field(), self.held[:stop])
        self.held = self.held[stop:]

    def _field(self) -> TextField:
        return "reasoning" if self.node == "reasoning" else "content"

    def _go(self, markers: FieldMarkers, marker: str) -> None:
        """Go on behind a marker with which the held text begins."""
        target = markers.target(marker)
        assert target is not None
        self.node = target
        self.held = self.held[len(marker) :]

    def _begin(self, markers: FieldMarkers, is_end: bool) -> bool:
        """Go into the first field; False where more text decides which it is."""
        text = self.held
        if not is_end and (not text or text in markers.heads):
            return False
        if is_end and text in markers.endings:
            self.held, self.node = "", "end"
            return True
        begun = [
            each.marker
            for each in markers.transitions
            if each.target != "end" and text.startswith(each.marker)
        ]
        if not begun:
            self.problem = "it does not begin as the template begins a reply"
            return False
        self._go(markers, max(begun, key=len))
        return True
