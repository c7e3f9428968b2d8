"""How a template writes the calls of a reply: names, ids and arguments, and what stands between.

Replies with made-up calls are rendered, and the markers are what stands around their words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from luthier.chat.argument_forms import (
    KEYS,
    NUMBERS,
    ArgumentForm,
    EntryArguments,
    ReplySyntaxError,
    find_whole_arguments,
)
from luthier.chat.types import ChatError

RenderCalls = Callable[[list[dict[str, Any]]], str]
"""Returns the reply with these calls, without its stop token; raises ChatError."""
CallPart = Literal["id", "name", "arguments"]
NAMES = ("zqname1", "zqname2", "zqname3")
_IDS = ("zqid00001", "zqid00002", "zqid00003")
"""Mistral's templates want ids of nine letters and digits."""
_INDEX = "\1"
"""Stands for the call's number in a marker."""


def make_call(index: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a made-up call; its words are those of its number."""
    function = {"name": NAMES[index], "arguments": arguments}
    return {"id": _IDS[index], "type": "function", "function": function}


def make_calls(count: int) -> list[dict[str, Any]]:
    """Return so many made-up calls."""
    return [make_call(index, {KEYS[index]: NUMBERS[index]}) for index in range(count)]


class CallMarker(NamedTuple):
    """What the template writes in a call, which may hold the call's number."""

    text: str
    first: int = 0
    """The number of the first call."""

    def at(self, index: int) -> str:
        """Return the text in the call of an index from zero."""
        return self.text.replace(_INDEX, str(self.first + index))


class PlacedPart(NamedTuple):
    """Where a part of a call stands in a rendered reply."""

    start: int
    stop: int
    part: CallPart


class CallGrammar:
    """The form in which a template writes calls."""

    def __init__(self, render: RenderCalls) -> None:
        """Learn the form; raises ReplySyntaxError where it is not to be understood.

        Raises ChatError where the template refuses calls.
        """
        self._render = render
        self.arguments = self._learn_arguments()
        texts = [render(make_calls(1)), *self._more_calls()]
        units = [self._place_calls(text, count) for count, text in enumerate(texts, start=1)]
        calls = units[-1]
        self.parts: tuple[CallPart, ...] = tuple(part.part for part in calls[0])
        """The parts of a call, in their order."""
        if "name" not in self.parts or "arguments" not in self.parts:
            raise ReplySyntaxError("the template does not show the names or the arguments of calls")
        if any(tuple(part.part for part in call) != self.parts for call in calls):
            raise ReplySyntaxError("the template writes one call differently from another")
        text = texts[-1]
        self.inner = [
            _merge_markers([text[call[n].stop : call[n + 1].start] for call in calls])
            for n in range(len(self.parts) - 1)
        ]
        """What stands between the parts."""
        between = [text[a[-1].stop : b[0].start] for a, b in pairwise(calls)]
        self.separator = _merge_markers(between) if between else None
        """What stands between two calls; None where the template takes only one."""

    def _more_calls(self) -> list[str]:
        """Return replies with two and three calls, as far as the template takes them."""
        texts = []
        for count in (2, 3):
            try:
                text = self._render(make_calls(count))
            except ChatError:
                break
            if any(key not in text for key in KEYS[:count]):
                break
            texts.append(text)
        return texts

    def _learn_arguments(self) -> ArgumentForm:
        text = self._render(make_calls(1))
        arguments = {KEYS[0]: NUMBERS[0]}
        if KEYS[0] not in text or NAMES[0] not in text:
            raise ReplySyntaxError("the template does not show calls")
        whole = find_whole_arguments(text, arguments)
        if whole is not None:
            return whole[0]
        pair = self._render_pair()
        front = text[: self._entries_start(text, pair)]
        # What stands behind the arguments of this call stands behind those of others, too.
        behind = [_behind_number(each) for each in (text, *pair)]
        rest = behind[0][_count_common(behind) :]

        def write(arguments: dict[str, Any]) -> str:
            text = self._render([make_call(0, arguments)])
            if not (text.startswith(front) and text.endswith(rest)):
                raise ReplySyntaxError("the template writes this argument differently from others")
            return text[len(front) : len(text) - len(rest)]

        return EntryArguments(write)

    def _render_pair(self) -> list[str]:
        """Return a reply with two calls, if the template takes two."""
        try:
            text = self._render(make_calls(2))
        except ChatError:
            return []
        words = [*NAMES[:2], *KEYS[:2], *map(str, NUMBERS[:2])]
        return [text] if all(word in text for word in words) else []

    def _entries_start(self, text: str, pair: list[str]) -> int:
        """Return where the entries begin: behind the words of the call in front of them."""
        starts = [_words_end(text, 0)]
        if not pair:
            return starts[0]
        (both,) = pair
        heads = [both[_words_end(both, index) : both.index(KEYS[index])] for index in (0, 1)]
        marker = _merge_markers(heads).text
        return starts[0] + len(marker[: marker.find(_INDEX) + 1].replace(_INDEX, "1"))

    def _place_calls(self, text: str, count: int) -> list[list[PlacedPart]]:
        return [self.place(text, index) for index in range(count)]

    def place(self, text: str, index: int) -> list[PlacedPart]:
        """Return where the parts of a made-up call stand; raises ReplySyntaxError."""
        key = text.find(KEYS[index])
        start = key - len(self.arguments.lead)
        if key < 0 or text[start:key] != self.arguments.lead:
            raise ReplySyntaxError("the template writes one call differently from another")
        _, stop = self.arguments.parse(
            text, start, {"properties": {KEYS[index]: {"type": "integer"}}}
        )
        parts = [PlacedPart(start, stop, "arguments")]
        words: tuple[tuple[CallPart, str], ...] = (("name", NAMES[index]), ("id", _IDS[index]))
        for part, word in words:
            found = (match.span() for match in re.finditer(re.escape(word), text))
            parts += [PlacedPart(*span, part) for span in found]
        return sorted(parts)

    def parse(
        self, text: str, tails: Sequence[str], schemas: dict[str, dict[str, Any]], keeps_text: bool
    ) -> tuple[list[dict[str, Any]], int]:
        """Return the calls that a text begins with, and where they end.

        `tails`: what may stand behind the last one. `schemas`: the JSON schema of each tool's
        arguments. `keeps_text`: whether arguments stay the text that they are. Raises
        ReplySyntaxError.
        """
        calls: list[dict[str, Any]] = []
        position = 0
        while True:
            values, position = self._parse_call(text, position, len(calls), tails, schemas)
            calls.append(_make_parsed_call(values, keeps_text))
            separator = None if self.separator is None else self.separator.at(len(calls) - 1)
            if text[position:] in tails or separator is None:
                return calls, position
            if not text.startswith(separator, position):
                return calls, position
            position += len(separator)

    def _parse_call(
        self,
        text: str,
        position: int,
        index: int,
        tails: Sequence[str],
        schemas: dict[str, dict[str, Any]],
    ) -> tuple[dict[str, Any], int]:
        """Return the parts of a call, with the text of its arguments as `text`, and its end."""
        values: dict[str, Any] = {}
        for number, part in enumerate(self.parts):
            if part == "arguments":
                schema = schemas.get(values.get("name", ""), {})
                start = position
                values[part], position = self.arguments.parse(text, start, schema)
                values["text"] = text[start:position]
            else:
                ends = self._ends(number, index, tails)
                stop = _find_first(text, position, ends)
                word = text[position:stop]
                if not word or word != values.setdefault(part, word) or not _is_word(word):
                    raise ReplySyntaxError(f"a call has no {part}")
                position = stop
            if number + 1 < len(self.parts):
                marker = self.inner[number].at(index)
                if not text.startswith(marker, position):
                    raise ReplySyntaxError(f"the {part} of a call is followed by something else")
                position += len(marker)
        return values, position

    def _ends(self, number: int, index: int, tails: Sequence[str]) -> list[str]:
        """Return what may stand behind a name or an id: the part of a number in the call."""
        if number + 1 == len(self.parts):
            separator = [] if self.separator is None else [self.separator.at(index)]
            return [*separator, *tails]
        marker = self.inner[number].at(index)
        if marker or self.parts[number + 1] != "arguments":
            return [marker]
        empty = getattr(self.arguments, "empty", None)
        return [self.arguments.lead, *([empty] if empty else [])]


def _make_parsed_call(values: dict[str, Any], keeps_text: bool) -> dict[str, Any]:
    arguments = values["text" if keeps_text else "arguments"]
    link = {"id": values["id"]} if "id" in values else {}
    return {
        **link,
        "type": "function",
        "function": {"name": values["name"], "arguments": arguments},
    }


def _words_end(text: str, index: int) -> int:
    """Return where the last word of a made-up call in front of its first key ends."""
    key = text.index(KEYS[index])
    words = (NAMES[index], _IDS[index])
    ends = [text.rfind(word, 0, key) + len(word) for word in words if word in text[:key]]
    if not ends:
        raise ReplySyntaxError("the template writes arguments in front of a call's name")
    return max(ends)


def _behind_number(text: str) -> str:
    """Return what stands behind the value of the first made-up call."""
    _, number, behind = text.partition(str(NUMBERS[0]))
    if not number:
        raise ReplySyntaxError("the template writes arguments in an unknown form")
    return behind


def _count_common(texts: Sequence[str]) -> int:
    """Return how many characters the texts begin with together."""
    columns = enumerate(zip(*texts, strict=False))
    return next((n for n, letters in columns if len(set(letters)) > 1), min(map(len, texts)))


def _is_word(text: str) -> bool:
    return len(text) <= 256 and not any(character in text for character in "\n\r\"'{}")


def _find_first(text: str, position: int, ends: Sequence[str]) -> int:
    """Return where the first of some texts stands; the text's end where none does."""
    places = [place for end in ends if end and (place := text.find(end, position)) >= 0]
    return min(places, default=len(text))


def _merge_markers(texts: list[str]) -> CallMarker:
    """Return the marker of which the texts are, one a call; raises ReplySyntaxError."""
    if len(set(texts)) == 1:
        return CallMarker(texts[0])
    for match in re.finditer(r"\d+", texts[0]):
        marker = CallMarker(
            texts[0][: match.start()] + _INDEX + texts[0][match.end() :], int(match[0])
        )
        if [marker.at(index) for index in range(len(texts))] == texts:
            return marker
    raise ReplySyntaxError("the template writes one call differently from another")
