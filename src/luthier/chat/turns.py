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

from luthier.chat.control_tokens import ControlTokens
from luthier.chat.conversation import Conversation
from luthier.chat.provenance import TracedStr, concat_traced
from luthier.chat.reasoning import write_reply
from luthier.chat.template import ChatTemplate, TrackedRendering
from luthier.chat.types import ChatError


class Render(Protocol):
    """Renders the first `count` messages, with or without the generation prompt."""

    def __call__(self, count: int, generation: bool, /) -> TracedStr:
        """Ask."""
        ...


class StopFinder(Protocol):
    """Where the stop token ends in the text behind a reply's last field, and which it is."""

    def __call__(self, tail: str, /) -> tuple[int, str] | None:
        """Ask."""
        ...


@dataclass(slots=True)
class TurnInContext:
    """A turn in its own context."""

    message: int
    prompt: TracedStr
    reply: TracedStr
    """Up to and with the stop token."""
    token: str
    """The stop token."""


@dataclass(slots=True)
class TrainedSpan:
    """Where a trained reply stands in a sequence's text."""

    message: int
    start: int
    stop: int
    token: str
    """The stop token, which stands at the end of the span."""


@dataclass(slots=True)
class RenderedSequence:
    """The text of one training sequence and the replies that train in it."""

    text: TracedStr
    trained: list[TrainedSpan] = field(default_factory=list)
    plain: str = ""
    """The text as a plain string."""

    def __post_init__(self) -> None:
        self.plain = self.plain or str.__str__(self.text)


class ReplyWriter(Protocol):
    """The reply to a prompt that is not how the turn begins, both from the end of the history."""

    def __call__(
        self, prompt: TracedStr, shown: TracedStr, message: dict[str, Any], /
    ) -> TracedStr | None:
        """Ask."""
        ...


class FindFollowing(Protocol):
    """Where the stop token ends in what the template writes behind a turn once more follows."""

    def __call__(self, place: int, shown: TracedStr, /) -> tuple[TracedStr, str] | None:
        """Ask."""
        ...


def own_turn(
    render: Render,
    find_stop: StopFinder,
    find_following: FindFollowing,
    find_reply: ReplyWriter,
    conversation: Conversation,
    place: int,
) -> TurnInContext:
    """The turn of the message at `place` in its own context."""
    index = conversation.numbers[place]
    shown = render(place + 1, False)
    if place == 0 or conversation.role(place) != "assistant":
        prompt = shown[: _message_start(shown, index)]
    else:
        prompt = render(place, True)
    behind = _reply_text(prompt, shown, index)
    if behind is None:
        before, after = _without_history(prompt, index), _without_history(shown, index)
        behind = find_reply(before, after, conversation.messages[place])
        if behind is None:
            raise _unknown_reply(before, after, index)
    last = _message_end(behind, index)
    stop = find_stop(str.__str__(behind[last:]))
    if stop is not None:
        return TurnInContext(index, prompt, behind[: last + stop[0]], stop[1])
    following = find_following(place, shown)
    if following is None:
        raise ChatError(
            "the chat template writes no stop token behind this turn, so a model trained on it "
            "would never end its reply; use a template that ends its turns",
            reason="no stop token",
            message=index,
        )
    return TurnInContext(index, prompt, concat_traced((behind, following[0])), following[1])


def _message_start(text: TracedStr, index: int) -> int:
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


def _reply_text(prompt: TracedStr, shown: TracedStr, index: int) -> TracedStr | None:
    """What the template writes behind the prompt once the turn is there, if it writes the prompt.

    None where the turn begins in another way than its prompt ends.
    """
    if shown.startswith(prompt):
        return shown[len(prompt) :]
    before, after = _without_history(prompt, index), _without_history(shown, index)
    if after.startswith(before):
        return after[len(before) :]
    place = _header_end(before, after, index)
    return after[place:] if place else None


def _unknown_reply(before: TracedStr, after: TracedStr, index: int) -> ChatError:
    return ChatError(
        f"the template's generation prompt ends in {before!r}, which is not how it writes "
        f"the turn ({after[:80]!r}...), so the reply behind it is not known",
        reason="no prefix",
        message=index,
    )


def _header_end(before: TracedStr, after: TracedStr, index: int) -> int:
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


def _without_history(text: TracedStr, index: int) -> TracedStr:
    """The text behind the last character that an earlier message wrote."""
    position = end = 0
    for length, origin, _ in text._runs:
        position += length
        if origin is not None and (origin.message is None or origin.message < index):
            end = position
        elif origin is not None:
            break
    return text[end:]


def _message_end(text: TracedStr, index: int) -> int:
    """Where the last character that message `index` wrote ends."""
    position = end = 0
    for length, origin, _ in text._runs:
        position += length
        if origin is not None and origin.message == index:
            end = position
    return end


def group_turns(turns: list[TurnInContext], whole: TracedStr) -> list[RenderedSequence]:
    """The fewest sequences in which each turn stands behind its own prompt with its own reply."""
    if not turns:
        return []
    served = [turn for turn in turns if holds_turn(whole, turn)]
    if len(served) == len(turns):
        return [_make_sequence(whole, turns)]
    left = list(turns)
    sequences: list[RenderedSequence] = []
    while left:
        last = left[-1]
        text = concat_traced((last.prompt, last.reply))
        if not sequences:
            text = _with_context_behind(text, last, whole)
        group = [turn for turn in left if holds_turn(text, turn)]
        left = [turn for turn in left if turn not in group]
        sequences.append(_make_sequence(text, group))
    return sequences[::-1]


def holds_turn(text: str, turn: TurnInContext) -> bool:
    """Whether a turn stands in a text behind its own prompt, with its own reply."""
    return text.startswith(turn.prompt) and text.startswith(turn.reply, len(turn.prompt))


def _with_context_behind(text: TracedStr, turn: TurnInContext, whole: TracedStr) -> TracedStr:
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
    return concat_traced((text, whole[begin:]))


def _make_sequence(text: TracedStr, turns: list[TurnInContext]) -> RenderedSequence:
    trained = [
        TrainedSpan(turn.message, len(turn.prompt), len(turn.prompt) + len(turn.reply), turn.token)
        for turn in turns
    ]
    return RenderedSequence(text, trained)


def select_trained_messages(conversation: Conversation, train_on: str | list[str]) -> list[int]:
    """The messages that train: those of the chosen roles, less those marked `train: false`."""
    roles = {"assistant"} if isinstance(train_on, str) else set(train_on)
    chosen = [
        index for index in range(len(conversation.messages)) if conversation.role(index) in roles
    ]
    if train_on == "last":
        chosen = chosen[-1:]
    return [index for index in chosen if conversation.train[index] is not False]


# One sequence that serves all turns of a row, where the template's one render proves it does.


class SharedSequence:
    """The whole row's text, asked turn by turn whether it holds prompt and reply."""

    def __init__(
        self, whole: TrackedRendering, asked: TrackedRendering | None, ends: tuple[str, str] | None
    ) -> None:
        self._whole = whole
        self._asked = asked
        self._ends = ends
        self._plain = whole.plain
        self._same = len(self._plain) if asked is None else _common_length(self._plain, asked.plain)
        self._written: list[tuple[int, int]] = []
        position = 0
        for length, origin, _ in whole.text._runs:
            position += length
            if origin is not None and origin.message is not None:
                self._written.append((position, origin.message))

    def sequence(
        self, conversation: Conversation, trained: list[int], find_stop: StopFinder
    ) -> RenderedSequence | None:
        """The one sequence, or None where some turn needs a context of its own."""
        spans = []
        for place in trained:
            last = place + 1 == len(conversation.messages)
            span = self._span(place, conversation.numbers[place], last, find_stop)
            if span is None:
                return None
            spans.append(span)
        return RenderedSequence(self._whole.text, spans, self._plain)

    def _span(
        self, place: int, number: int, last: bool, find_stop: StopFinder
    ) -> TrainedSpan | None:
        """Where the reply stands: behind its own prompt, as its own context writes it."""
        start = self._prompt_end(place)
        own = (len(self._plain), len(self._plain)) if last else self._whole.prefix(place + 1)
        if start is None or own is None or start > own[0]:
            return None
        field = self._field_end(number, start, own[0])
        stop = find_stop(self._plain[field : own[0]] + self._plain[own[1] :])
        if stop is None or field + stop[0] > own[0]:
            return None
        return TrainedSpan(number, start, field + stop[0], stop[1])

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


def _common_length(first: str, plain: str) -> int:
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

_NEXT_USER_MESSAGE = {"role": "user", "content": "?"}


class SequencePlanner:
    """Plans the sequences of one template."""

    def __init__(
        self, template: ChatTemplate, controls: ControlTokens, find_reply: ReplyWriter = write_reply
    ) -> None:
        self._template = template
        self._controls = controls
        self._find_reply = find_reply

    def plan(self, conversation: Conversation, trained: list[int]) -> list[RenderedSequence]:
        """The texts of the row's sequences and where their replies stand."""
        template, messages, tools = self._template, conversation.messages, conversation.tools
        whole = template.follow(messages, tools, False)
        asked = None if template.ends else template.follow(messages, tools, True)
        shared = SharedSequence(whole, asked, template.ends)
        if all(conversation.role(place) == "assistant" for place in trained):
            sequence = shared.sequence(conversation, trained, self._controls.find_stop)
            if sequence is not None:
                return [sequence]
        return group_turns(self._own_turns(conversation, trained), whole.text)

    def _own_turns(self, conversation: Conversation, trained: list[int]) -> list[TurnInContext]:
        """Each trained turn in its own context, rendered for itself."""
        template, controls = self._template, self._controls
        messages, tools = conversation.messages, conversation.tools

        @lru_cache
        def render(count: int, generation: bool) -> TracedStr:
            return template.render(messages[:count], tools, generation)

        def find_following(place: int, shown: TracedStr) -> tuple[TracedStr, str] | None:
            more = (
                messages[: place + 2]
                if place + 1 < len(messages)
                else [*messages, _NEXT_USER_MESSAGE]
            )
            text = template.render(more, tools, False)
            return controls.following_stop(text[len(shown) :]) if text.startswith(shown) else None

        return [
            own_turn(
                render, controls.find_stop, find_following, self._find_reply, conversation, place
            )
            for place in trained
        ]
