"""What each trained turn's prompt and reply are, and which sequences hold them.

The prompt of turn i is the template over the messages before it with the generation prompt; its
reply is what the template, asked for the conversation up to and with turn i, writes behind that
prompt, up to and with the stop token. Where one render of the whole row proves that each turn
stands in it so, the row is one sequence (`SharedSequence`). Elsewhere each turn is rendered in its
own context, and turns that one text holds are put together (`group_turns`).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from luthier.chat.control_tokens import ControlTokens
from luthier.chat.conversation import Conversation
from luthier.chat.provenance import FieldOrigin, TracedStr, concat_traced, trace_field
from luthier.chat.reasoning import ReasoningWriter
from luthier.chat.template import ChatTemplate, TrackedRendering
from luthier.chat.types import ChatError

PrefixRenderer = Callable[[int, bool], TracedStr]
"""Renders the first messages, so many of them, with or without the generation prompt."""
ReplyWriter = Callable[[TracedStr, TracedStr, dict[str, Any]], TracedStr | None]
"""Gives the reply to a prompt that is not how the turn begins: `ReasoningWriter`'s or like it.

It takes the prompt and the turn, both without the history, and the message; None where no reply
can be written behind the prompt.
"""
_NEXT_USER_MESSAGE = {"role": "user", "content": "?"}


@dataclass(slots=True)
class TurnInContext:
    """A trained turn as a server sees it: the prompt it generates from, and the reply."""

    message: int
    prompt: TracedStr
    reply: TracedStr
    """The reply up to and with the stop token."""
    stop_token: str


@dataclass(slots=True)
class TrainedSpan:
    """The characters of a sequence's text that are a trained reply, stop token included."""

    message: int
    start: int
    stop: int
    stop_token: str


@dataclass(slots=True)
class RenderedSequence:
    """The text of one training sequence and the replies that train in it, from first to last."""

    text: TracedStr
    spans: list[TrainedSpan] = field(default_factory=list)
    plain: str = ""
    """The text as a plain string."""

    def __post_init__(self) -> None:
        self.plain = self.plain or str.__str__(self.text)


def select_trained_messages(conversation: Conversation, train_on: str | list[str]) -> list[int]:
    """Return the positions of the messages that train: those of the roles, less `train: false`.

    `train_on` is `all` or `last` for assistant turns, or a list of roles.
    """
    roles = {"assistant"} if isinstance(train_on, str) else set(train_on)
    chosen = [
        index for index in range(len(conversation.messages)) if conversation.role(index) in roles
    ]
    if train_on == "last":
        chosen = chosen[-1:]
    return [index for index in chosen if conversation.train[index] is not False]


class SequencePlanner:
    """Plans the training sequences of rows, for one template."""

    def __init__(
        self,
        template: ChatTemplate,
        controls: ControlTokens,
        reply_writer: ReplyWriter | None = None,
    ) -> None:
        self._template = template
        self._controls = controls
        self._reply_writer = reply_writer or ReasoningWriter(template, controls).write_reply

    def plan(self, conversation: Conversation, trained: list[int]) -> list[RenderedSequence]:
        """Return the texts of the row's sequences and where their replies stand.

        `trained`: the positions of the messages that train. Raises ChatError for a turn whose
        reply the template does not show or does not end.
        """
        template, messages, tools = self._template, conversation.messages, conversation.tools
        rendered_row = template.render_with_prefixes(messages, tools, False)
        # Templates whose ending is the same for all rows need no second render for the prompts.
        prompted = None
        if template.fixed_endings is None:
            prompted = template.render_with_prefixes(messages, tools, True)
        if all(conversation.role(index) == "assistant" for index in trained):
            shared = SharedSequence(rendered_row, prompted, template.fixed_endings, self._controls)
            sequence = shared.sequence(conversation, trained)
            if sequence is not None:
                return [sequence]
        return group_turns(self._turns_in_context(conversation, trained), rendered_row.text)

    def _turns_in_context(
        self, conversation: Conversation, trained: list[int]
    ) -> list[TurnInContext]:
        """Return each trained turn as it stands when it is the last one, rendered for itself."""

        # The prompt of a turn and the text of the one before it are often asked for twice.
        @lru_cache
        def render(count: int, generation: bool) -> TracedStr:
            return self._template.render(
                conversation.messages[:count], conversation.tools, generation
            )

        return [self._turn_in_context(render, conversation, index) for index in trained]

    def _turn_in_context(
        self, render: PrefixRenderer, conversation: Conversation, index: int
    ) -> TurnInContext:
        number = conversation.numbers[index]
        turn_text = render(index + 1, False)
        if index == 0 or conversation.role(index) != "assistant":
            # No server writes a prompt for these, so the reply is the message's own text.
            prompt = turn_text[: _message_start(turn_text, number)]
        else:
            prompt = render(index, True)
        is_blank = not _message_end(turn_text, number)
        if is_blank and turn_text == render(index, False) != prompt:
            raise _unwritten_turn_error(number)
        reply = _reply_text(prompt, turn_text, number)
        if reply is None:
            before, after = _without_history(prompt, number), _without_history(turn_text, number)
            if self._controls.ends_closed(before):
                raise _headless_prompt_error(before, number)
            reply = self._reply_writer(before, after, conversation.messages[index])
            if reply is None:
                raise _unknown_reply_error(before, after, number)
        field_end = _message_end(reply, number)
        stop = self._controls.find_stop(str.__str__(reply[field_end:]))
        if stop is not None:
            return TurnInContext(number, prompt, reply[: field_end + stop[0]], stop[1])
        # A header that the template writes behind every render is no part of the turn.
        header = 0
        if render(index, False) == prompt:
            behind = len(turn_text) - _message_end(turn_text, number)
            header = min(_common_end(prompt, turn_text), behind)
        next_stop = self._stop_in_next_turn(conversation, index, header)
        if next_stop is None:
            raise ChatError(
                "the chat template writes no stop token after this turn, so a model trained on it "
                "would never end its reply; use a template that ends its turns",
                reason="no stop token",
                message=number,
            )
        reply = concat_traced((reply[: max(len(reply) - header, field_end)], next_stop[0]))
        return TurnInContext(number, prompt, reply, next_stop[1])

    def _stop_in_next_turn(
        self, conversation: Conversation, index: int, header: int
    ) -> tuple[TracedStr, str] | None:
        """Return the text up to the stop token with which the next message begins, and the token.

        GLM's turns end so, in the next role's token. Where no message follows, a user's does, or a
        tool's behind a call. `header`: characters that stand behind every render, not to be looked
        at. None where the next message begins with no end-of-sequence token.
        """
        messages, number = conversation.messages, conversation.numbers[index]
        following = messages[index + 1 : index + 2]
        probes = [following] if following else _next_messages(messages[index])
        # History may be written otherwise, even without the reply: what stands behind it counts.
        for message in (messages[index], _plain_reply(number)):
            for probe in probes:
                turn = [*messages[:index], message]
                alone = self._behind_message(turn, conversation.tools, number)
                followed = self._behind_message([*turn, *probe], conversation.tools, number)
                if alone is None or followed is None:
                    continue
                own = alone[: len(alone) - header]
                stop = followed.startswith(own) and self._controls.find_next_turn_stop(
                    followed[len(own) :]
                )
                if stop:
                    return stop
        return None

    def _behind_message(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, number: int
    ) -> TracedStr | None:
        """Return what is rendered behind the last character of message `number`.

        None where it has none, or where the template refuses the messages.
        """
        try:
            text = self._template.render(messages, tools, False)
        except ChatError:
            return None
        end = _message_end(text, number)
        return text[end:] if end else None


def _next_messages(message: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Return messages, each alone, that may follow one: behind a call first its result."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return [[_NEXT_USER_MESSAGE]]
    first = calls[0] if isinstance(calls[0], dict) else {}
    function = first.get("function", first)
    name = function.get("name") if isinstance(function, dict) else None
    result = {"role": "tool", "content": "?", "name": name, "tool_call_id": first.get("id")}
    result = {key: value for key, value in result.items() if value is not None}
    return [[result], [_NEXT_USER_MESSAGE]]


def _plain_reply(number: int) -> dict[str, Any]:
    """Return a reply of text alone, as message `number`."""
    origin = FieldOrigin(number, "assistant", "content", "?")
    return {"role": "assistant", "content": trace_field(origin, "?")}


class SharedSequence:
    """The whole row's text, looked at turn by turn: does it hold the turn's prompt and reply?"""

    def __init__(
        self,
        rendered_row: TrackedRendering,
        prompted: TrackedRendering | None,
        fixed_endings: tuple[str, str] | None,
        controls: ControlTokens,
    ) -> None:
        """`rendered_row`, `prompted`: the row without and with the generation prompt.

        `prompted` is None where `fixed_endings` are what stands behind the messages in both.
        """
        self._row = rendered_row
        self._prompted = prompted
        self._fixed_endings = fixed_endings
        self._controls = controls
        self._plain = rendered_row.plain
        self._common = (
            len(self._plain) if prompted is None else _common_length(self._plain, prompted.plain)
        )
        self._run_ends: list[tuple[int, int]] = []
        """(end, message) of each run of characters that a message wrote, in order."""
        position = 0
        for length, origin, _ in rendered_row.text._runs:
            position += length
            if origin is not None and origin.message is not None:
                self._run_ends.append((position, origin.message))

    def sequence(self, conversation: Conversation, trained: list[int]) -> RenderedSequence | None:
        """Return the one sequence of the row, or None where a turn needs a context of its own."""
        spans = []
        for index in trained:
            is_last = index + 1 == len(conversation.messages)
            span = self._span(index, conversation.numbers[index], is_last)
            if span is None:
                return None
            spans.append(span)
        return RenderedSequence(self._row.text, spans, self._plain)

    def _span(self, index: int, number: int, is_last: bool) -> TrainedSpan | None:
        """Return where the reply stands: behind its own prompt, as its own context writes it."""
        start = self._prompt_end(index)
        # The turn's own context is this text up to `stop`, and again from `tail` on.
        end = len(self._plain)
        context = (end, end) if is_last else self._row.prefix(index + 1)
        if start is None or context is None or start > context[0]:
            return None
        stop, tail = context
        field_end = self._field_end(number, start, stop)
        stop_token = self._controls.find_stop(self._plain[field_end:stop] + self._plain[tail:])
        if stop_token is None or field_end + stop_token[0] > stop:
            return None
        return TrainedSpan(number, start, field_end + stop_token[0], stop_token[1])

    def _prompt_end(self, index: int) -> int | None:
        """Return where the turn's prompt ends; None if the text does not begin with it."""
        if self._prompted is None and self._fixed_endings is not None:
            context = self._row.prefix(index)
            if context is None or context[1] != len(self._plain) - len(self._fixed_endings[0]):
                return None
            ending = self._fixed_endings[1]
        else:
            context = self._prompted.prefix(index) if self._prompted is not None else None
            if self._prompted is None or context is None or context[0] > self._common:
                return None
            ending = self._prompted.plain[context[1] :]
        is_written = self._plain.startswith(ending, context[0])
        return context[0] + len(ending) if is_written else None

    def _field_end(self, number: int, start: int, stop: int) -> int:
        """Return where the last character of message `number` from `start` to `stop` ends."""
        run = bisect_right(self._run_ends, (stop, len(self._plain)))
        while run and self._run_ends[run - 1][0] > start:
            run -= 1
            if self._run_ends[run][1] == number:
                return self._run_ends[run][0]
        return start


def _common_length(first: str, second: str) -> int:
    """Return how many characters two texts begin with together: slices compare fast."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _common_end(first: str, second: str) -> int:
    """Return how many characters two texts end with together."""
    same = 0
    while same < min(len(first), len(second)) and first[-1 - same] == second[-1 - same]:
        same += 1
    return same


def _message_start(text: TracedStr, number: int) -> int:
    """Return where the first character of message `number` stands; ChatError without one."""
    position = 0
    for length, origin, _ in text._runs:
        if origin is not None and origin.message == number:
            return position
        position += length
    raise ChatError(
        "the template does not show where this turn begins: it has no text of its own",
        reason="no prefix",
        message=number,
    )


def _reply_text(prompt: TracedStr, turn_text: TracedStr, number: int) -> TracedStr | None:
    """Return what the template writes behind the prompt once the turn is there.

    None where the turn begins in another way than its prompt ends.
    """
    if turn_text.startswith(prompt):
        return turn_text[len(prompt) :]
    # History may be written otherwise once a turn follows; what stands behind it decides.
    before, after = _without_history(prompt, number), _without_history(turn_text, number)
    if after.startswith(before):
        return after[len(before) :]
    start = _header_end(before, after, number)
    return after[start:] if start else None


def _header_end(before: TracedStr, after: TracedStr, number: int) -> int:
    """Return where the turn's header ends, which is the prompt's last lines behind other text.

    Some templates close a tool's message, or put a blank line before a header, in only one of both.
    Zero where the turn holds no such header.
    """
    first = 0
    for length, origin, _ in after._runs:
        if origin is not None and origin.message == number:
            break
        first += length
    written = str.__str__(after)[:first]
    prompt = str.__str__(before)
    # A header may begin at a line's start or at a tag behind another one; the longest counts.
    starts = [match.start() for match in re.finditer(r"(?<=\n)(?=\S)|(?<=>)(?=<)|^", prompt)]
    for start in starts:
        header = prompt[start:]
        position = written.find(header) if header.strip() else -1
        if position >= 0:
            return position + len(header)
    return 0


def _without_history(text: TracedStr, number: int) -> TracedStr:
    """Return the text behind the last character that a message before `number` wrote."""
    position = end = 0
    for length, origin, _ in text._runs:
        position += length
        if origin is not None and (origin.message is None or origin.message < number):
            end = position
        elif origin is not None:
            break
    return text[end:]


def _message_end(text: TracedStr, number: int) -> int:
    """Return where the last character of message `number` ends; zero where it wrote none."""
    position = end = 0
    for length, origin, _ in text._runs:
        position += length
        if origin is not None and origin.message == number:
            end = position
    return end


def _unwritten_turn_error(number: int) -> ChatError:
    return ChatError(
        "the chat template writes nothing for this turn, so there is no reply to train; fill it "
        "in, leave the turn out, or use another template",
        reason="no prefix",
        message=number,
    )


def _headless_prompt_error(before: TracedStr, number: int) -> ChatError:
    return ChatError(
        f"the chat template's prompt for this reply ends in {str.__str__(before)!r}, which closes "
        "the turn before it and opens no other, so a model cannot answer there; change the order "
        "of the messages before it, or use another template",
        reason="no prefix",
        message=number,
    )


def _unknown_reply_error(before: TracedStr, after: TracedStr, number: int) -> ChatError:
    return ChatError(
        f"the template's generation prompt ends in {before!r}, which is not how it writes "
        f"the turn ({after[:80]!r}...), so the reply after it is not known",
        reason="no prefix",
        message=number,
    )


def group_turns(turns: list[TurnInContext], row_text: TracedStr) -> list[RenderedSequence]:
    """Return the fewest sequences in which each turn stands with its own prompt and reply.

    `row_text`: the whole row; what it holds behind the last trained turn is kept as context.
    """
    if not turns:
        return []
    if all(_holds_turn(row_text, turn) for turn in turns):
        return [_make_sequence(row_text, turns)]
    remaining = list(turns)
    sequences: list[RenderedSequence] = []
    # From the back: the context of a late turn often holds earlier ones, never the other way.
    while remaining:
        last = remaining[-1]
        text = concat_traced((last.prompt, last.reply))
        if not sequences:
            text = _with_context_behind(text, last, row_text)
        group = [turn for turn in remaining if _holds_turn(text, turn)]
        remaining = [turn for turn in remaining if turn not in group]
        sequences.append(_make_sequence(text, group))
    return sequences[::-1]


def _holds_turn(text: str, turn: TurnInContext) -> bool:
    """Return whether a turn stands in a text behind its own prompt, with its own reply."""
    return text.startswith(turn.prompt) and text.startswith(turn.reply, len(turn.prompt))


def _with_context_behind(text: TracedStr, turn: TurnInContext, row_text: TracedStr) -> TracedStr:
    """Return the text and what the row holds behind its last trained turn, as context."""
    position = begin = 0
    for length, origin, _ in row_text._runs:
        if origin is not None and origin.message is not None and origin.message > turn.message:
            break
        position += length
        if origin is not None:
            begin = position
    else:
        return text
    return concat_traced((text, row_text[begin:]))


def _make_sequence(text: TracedStr, turns: list[TurnInContext]) -> RenderedSequence:
    spans = [
        TrainedSpan(
            turn.message, len(turn.prompt), len(turn.prompt) + len(turn.reply), turn.stop_token
        )
        for turn in turns
    ]
    return RenderedSequence(text, spans)
