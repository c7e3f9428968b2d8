"""One sequence that serves all turns of a row, where the template's one render proves it does."""

from __future__ import annotations

from bisect import bisect_right

from luthier.chat.conversation import Conversation
from luthier.chat.template import Rendered
from luthier.chat.turns import FindStop, Sequence, Span


class Shared:
    """The whole row's text, asked turn by turn whether it holds prompt and reply."""

    def __init__(
        self, whole: Rendered, asked: Rendered | None, ends: tuple[str, str] | None
    ) -> None:
        self._whole = whole
        self._asked = asked
        self._ends = ends
        self._plain = whole.plain
        self._same = len(self._plain) if asked is None else _common(self._plain, asked.plain)
        self._written: list[tuple[int, int]] = []
        position = 0
        for length, origin, _ in whole.text._runs:
            position += length
            if origin is not None and origin.message is not None:
                self._written.append((position, origin.message))

    def sequence(
        self, conversation: Conversation, trained: list[int], find_stop: FindStop
    ) -> Sequence | None:
        """The one sequence, or None where some turn needs a context of its own."""
        spans = []
        for place in trained:
            last = place + 1 == len(conversation.messages)
            span = self._span(place, conversation.numbers[place], last, find_stop)
            if span is None:
                return None
            spans.append(span)
        return Sequence(self._whole.text, spans, self._plain)

    def _span(self, place: int, number: int, last: bool, find_stop: FindStop) -> Span | None:
        """Where the reply stands: behind its own prompt, as its own context writes it."""
        start = self._prompt_end(place)
        own = (len(self._plain), len(self._plain)) if last else self._whole.prefix(place + 1)
        if start is None or own is None or start > own[0]:
            return None
        field = self._field_end(number, start, own[0])
        stop = find_stop(self._plain[field : own[0]] + self._plain[own[1] :])
        if stop is None or field + stop[0] > own[0]:
            return None
        return Span(number, start, field + stop[0], stop[1])

    def _prompt_end(self, place: int) -> int | None:
        """Where the turn's prompt ends in the text, if it is how the text begins."""
        if self._asked is None and self._ends is not None:
            parts = self._whole.prefix(place)
            if parts is None or parts[1] != len(self._plain) - len(self._ends[0]):
                return None
            end = self._ends[1]
        else:
            parts = self._asked.prefix(place) if self._asked is not None else None
            if self._asked is None or parts is None or parts[0] > self._same:
                return None
            end = self._asked.plain[parts[1] :]
        return parts[0] + len(end) if self._plain.startswith(end, parts[0]) else None

    def _field_end(self, number: int, start: int, stop: int) -> int:
        """Where the last character that the message wrote between two places ends."""
        place = bisect_right(self._written, (stop, len(self._plain)))
        while place and self._written[place - 1][0] > start:
            place -= 1
            if self._written[place][1] == number:
                return self._written[place][0]
        return start


def _common(first: str, plain: str) -> int:
    """How many characters two texts begin with together."""
    low, high = 0, min(len(first), len(plain))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == plain[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
