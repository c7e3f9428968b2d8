"""What each trained turn's prompt and reply are, and which sequences hold them.

The prompt of turn i is the template over the messages before it with the generation prompt; its
reply is what the template, asked for the conversation up to and with turn i, writes behind that
prompt, up to and with the stop token.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

from luthier.chat.control_tokens import Controls
from luthier.chat.conversation import Conversation
from luthier.chat.provenance import Text, plus_all
from luthier.chat.reasoning import reply_behind
from luthier.chat.template import ChatTemplate, Rendered
from luthier.chat.types import ChatError


class Render(Protocol):
    """Renders the first `count` messages, with or without the generation prompt."""

    def __call__(self, count: int, generation: bool, /) -> Text:
        """Ask."""
        ...


class FindStop(Protocol):
    """Where the stop token ends in the text behind a reply's last field, and which it is."""

    def __call__(self, tail: str, /) -> tuple[int, str] | None:
        """Ask."""
        ...


@dataclass(slots=True)
class Turn:
    """A turn in its own context."""

    message: int
    prompt: Text
    reply: Text
    """Up to and with the stop token."""
    token: str
    """The stop token."""


@dataclass(slots=True)
class Span:
    """Where a trained reply stands in a sequence's text."""

    message: int
    start: int
    stop: int
    token: str
    """The stop token, which stands at the end of the span."""


@dataclass(slots=True)
class Sequence:
    """The text of one training sequence and the replies that train in it."""

    text: Text
    trained: list[Span] = field(default_factory=list)
    plain: str = ""
    """The text as a plain string."""

    def __post_init__(self) -> None:
        self.plain = self.plain or str.__str__(self.text)


class ReplyBehind(Protocol):
    """The reply to a prompt that is not how the turn begins, both from the end of the history."""

    def __call__(self, prompt: Text, shown: Text, message: dict[str, Any], /) -> Text | None:
        """Ask."""
        ...


class FindFollowing(Protocol):
    """Where the stop token ends in what the template writes behind a turn once more follows."""

    def __call__(self, place: int, shown: Text, /) -> tuple[Text, str] | None:
        """Ask."""
        ...


def own_turn(
    render: Render,
    find_stop: FindStop,
    find_following: FindFollowing,
    find_reply: ReplyBehind,
    conversation: Conversation,
    place: int,
) -> Turn:
    """The turn of the message at `place` in its own context."""
    index = conversation.numbers[place]
    shown = render(place + 1, False)
    if place == 0 or conversation.role(place) != "assistant":
        prompt = shown[: _first_field(shown, index)]
    else:
        prompt = render(place, True)
    behind = _behind_prompt(prompt, shown, index)
    if behind is None:
        before, after = _behind_history(prompt, index), _behind_history(shown, index)
        behind = find_reply(before, after, conversation.messages[place])
        if behind is None:
            raise _no_reply(before, after, index)
    last = _last_field_end(behind, index)
    stop = find_stop(str.__str__(behind[last:]))
    if stop is not None:
        return Turn(index, prompt, behind[: last + stop[0]], stop[1])
    following = find_following(place, shown)
    if following is None:
        raise ChatError(
            "the chat template writes no stop token behind this turn, so a model trained on it "
            "would never end its reply; use a template that ends its turns",
            reason="no stop token",
            message=index,
        )
    return Turn(index, prompt, plus_all((behind, following[0])), following[1])


def _first_field(text: Text, index: int) -> int:
    """Where the first character that message `index` wrote stands: no server writes a prompt here.

    That is so for a turn that opens the conversation and for turns of other roles.
    """
    position = 0
    for length, origin, _ in text._runs:
        if origin is not None and origin.message == index:
            return position
        position += length
    raise ChatError(
        "the template does not show where this turn begins: it has no text of its own",
        reason="no prefix",
        message=index,
    )


def _behind_prompt(prompt: Text, shown: Text, index: int) -> Text | None:
    """What the template writes behind the prompt once the turn is there, if it writes the prompt.

    None where the turn begins in another way than its prompt ends.
    """
    if shown.startswith(prompt):
        return shown[len(prompt) :]
    before, after = _behind_history(prompt, index), _behind_history(shown, index)
    if after.startswith(before):
        return after[len(before) :]
    place = _header_end(before, after, index)
    return after[place:] if place else None


def _no_reply(before: Text, after: Text, index: int) -> ChatError:
    return ChatError(
        f"the template's generation prompt ends in {before!r}, which is not how it writes "
        f"the turn ({after[:80]!r}...), so the reply behind it is not known",
        reason="no prefix",
        message=index,
    )


def _header_end(before: Text, after: Text, index: int) -> int:
    """Where the turn's header ends, if it is the prompt's last lines and other text is before it.

    Some templates close a tool's message, or put a blank line before a header, in only one of both.
    """
    first = 0
    for length, origin, _ in after._runs:
        if origin is not None and origin.message == index:
            break
        first += length
    written = str.__str__(after)[:first]
    prompt = str.__str__(before)
    starts = [match.start() for match in re.finditer(r"(?<=\n)(?=\S)|(?<=>)(?=<)|^", prompt)]
    for start in starts:
        header = prompt[start:]
        place = written.find(header) if header.strip() else -1
        if place >= 0:
            return place + len(header)
    return 0


def _behind_history(text: Text, index: int) -> Text:
    """The text behind the last character that an earlier message wrote."""
    position = end = 0
    for length, origin, _ in text._runs:
        position += length
        if origin is not None and (origin.message is None or origin.message < index):
            end = position
        elif origin is not None:
            break
    return text[end:]


def _last_field_end(text: Text, index: int) -> int:
    """Where the last character that message `index` wrote ends."""
    position = end = 0
    for length, origin, _ in text._runs:
        position += length
        if origin is not None and origin.message == index:
            end = position
    return end


def grouped(turns: list[Turn], whole: Text) -> list[Sequence]:
    """The fewest sequences in which each turn stands behind its own prompt with its own reply."""
    if not turns:
        return []
    served = [turn for turn in turns if serves(whole, turn)]
    if len(served) == len(turns):
        return [_sequence(whole, turns)]
    left = list(turns)
    sequences: list[Sequence] = []
    while left:
        last = left[-1]
        text = plus_all((last.prompt, last.reply))
        if not sequences:
            text = _with_rest(text, last, whole)
        group = [turn for turn in left if serves(text, turn)]
        left = [turn for turn in left if turn not in group]
        sequences.append(_sequence(text, group))
    return sequences[::-1]


def serves(text: str, turn: Turn) -> bool:
    """Whether a turn stands in a text behind its own prompt, with its own reply."""
    return text.startswith(turn.prompt) and text.startswith(turn.reply, len(turn.prompt))


def _with_rest(text: Text, turn: Turn, whole: Text) -> Text:
    """The text and what the row holds behind its last trained turn, as context."""
    position = begin = 0
    for length, origin, _ in whole._runs:
        if origin is not None and origin.message is not None and origin.message > turn.message:
            break
        position += length
        if origin is not None:
            begin = position
    else:
        return text
    return plus_all((text, whole[begin:]))


def _sequence(text: Text, turns: list[Turn]) -> Sequence:
    trained = [
        Span(turn.message, len(turn.prompt), len(turn.prompt) + len(turn.reply), turn.token)
        for turn in turns
    ]
    return Sequence(text, trained)


def trained_messages(conversation: Conversation, train_on: str | list[str]) -> list[int]:
    """The messages that train: those of the chosen roles, less those marked `train: false`."""
    roles = {"assistant"} if isinstance(train_on, str) else set(train_on)
    chosen = [
        index for index in range(len(conversation.messages)) if conversation.role(index) in roles
    ]
    if train_on == "last":
        chosen = chosen[-1:]
    return [index for index in chosen if conversation.train[index] is not False]


# One sequence that serves all turns of a row, where the template's one render proves it does.


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


# From a conversation to the texts of its training sequences.

_ANYONE = {"role": "user", "content": "?"}


class Planner:
    """Plans the sequences of one template."""

    def __init__(
        self, template: ChatTemplate, controls: Controls, find_reply: ReplyBehind = reply_behind
    ) -> None:
        self._template = template
        self._controls = controls
        self._find_reply = find_reply

    def plan(self, conversation: Conversation, trained: list[int]) -> list[Sequence]:
        """The texts of the row's sequences and where their replies stand."""
        template, messages, tools = self._template, conversation.messages, conversation.tools
        whole = template.follow(messages, tools, False)
        asked = None if template.ends else template.follow(messages, tools, True)
        shared = Shared(whole, asked, template.ends)
        if all(conversation.role(place) == "assistant" for place in trained):
            sequence = shared.sequence(conversation, trained, self._controls.find_stop)
            if sequence is not None:
                return [sequence]
        return grouped(self._own_turns(conversation, trained), whole.text)

    def _own_turns(self, conversation: Conversation, trained: list[int]) -> list[Turn]:
        """Each trained turn in its own context, rendered for itself."""
        template, controls = self._template, self._controls
        messages, tools = conversation.messages, conversation.tools

        @lru_cache
        def render(count: int, generation: bool) -> Text:
            return template.render(messages[:count], tools, generation)

        def find_following(place: int, shown: Text) -> tuple[Text, str] | None:
            more = messages[: place + 2] if place + 1 < len(messages) else [*messages, _ANYONE]
            text = template.render(more, tools, False)
            return controls.following_stop(text[len(shown) :]) if text.startswith(shown) else None

        return [
            own_turn(
                render, controls.find_stop, find_following, self._find_reply, conversation, place
            )
            for place in trained
        ]
