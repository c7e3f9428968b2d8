"""What each trained turn's prompt and reply are, and which sequences hold them.

The prompt of turn i is the template over the messages before it with the generation prompt; its
reply is what the template, asked for the conversation up to and with turn i, writes behind that
prompt, up to and with the stop token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Protocol

from luthier.chat.conversation import Conversation
from luthier.chat.errors import ChatError
from luthier.chat.text import Text, plus_all


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
