"""Rows that judge replies: a better and a worse one (preference), or one with a verdict (KTO)."""

from typing import Any

from luthier.data.formats.columns import Columns, named
from luthier.data.formats.conversations import (
    SYSTEM,
    Example,
    alpaca_prompt,
    read_dialogue,
    read_prompt,
    spoken,
    with_system,
    with_tools,
)
from luthier.data.formats.messages import Message, read_any, written_messages
from luthier.data.rows import Row, RowError

_VERDICTS = {"true": True, "1": True, "false": False, "0": False}


def from_prompted_pair(row: Row, columns: Columns) -> Example:
    """A prompt, and the two replies to it."""
    return _pair(_prompt(row, columns), row, columns)


def from_implicit_pair(row: Row, columns: Columns) -> Example:
    """Two whole conversations that begin alike: what they share is the prompt."""
    return _pair([], row, columns)


def from_messages_pair(row: Row, columns: Columns) -> Example:
    """The messages so far, and two replies to them."""
    prompt = read_any(columns.take(row, "messages"), columns.name("messages"))
    return _pair(prompt, row, columns)


def from_alpaca_pair(row: Row, columns: Columns) -> Example:
    """An instruction with its input, and two outputs."""
    return _pair(alpaca_prompt(row, columns), row, columns)


def from_judged_completion(row: Row, columns: Columns) -> Example:
    """A prompt, one reply to it, and whether it is a good one."""
    reply = _reply(columns.take(row, "completion"), columns.name("completion"))
    return _judged(_prompt(row, columns), reply, row, columns)


def from_judged_messages(row: Row, columns: Columns) -> Example:
    """A conversation whose last message is judged."""
    column = columns.name("messages")
    messages = read_any(columns.take(row, "messages"), column)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise RowError(
            f"{column!r} has {len(messages)} messages and ends with one of the role "
            f"{messages[-1]['role']}; expected a prompt and, at the end, the reply that is judged"
        )
    return _judged(messages[:-1], messages[-1:], row, columns)


def from_judged_alpaca(row: Row, columns: Columns) -> Example:
    """An instruction with its input, one output, and whether it is a good one."""
    reply = _reply(columns.take(row, "output"), columns.name("output"))
    return _judged(alpaca_prompt(row, columns), reply, row, columns)


def verdict(value: Any) -> bool | None:
    """Whether a label says good or bad; None for a label that says neither."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower() if isinstance(value, int | float | str) else ""
    return _VERDICTS.get(text.removesuffix(".0"))


def _judged(prompt: list[Message], reply: list[Message], row: Row, columns: Columns) -> Example:
    """The example of one reply and its verdict."""
    value = columns.take(row, "label")
    label = verdict(value)
    if label is None:
        shown = value if isinstance(value, str | int | float) else named(value)
        raise RowError(f"{columns.name('label')!r} is {shown!r}; expected true or false")
    example = {
        "prompt": with_system(prompt, row, columns), "completion": reply, "label": label,
    }  # fmt: skip
    return with_tools(example, row, columns)


def _prompt(row: Row, columns: Columns) -> list[Message]:
    """The prompt of a row: a text, a dialogue written as text, or messages."""
    value, column = columns.take(row, "prompt"), columns.name("prompt")
    if isinstance(value, str):
        return written_messages(value, column) or read_prompt(value)
    return spoken(value, column, "user")


def _reply(value: Any, column: str) -> list[Message]:
    """The reply alone, which begins with an assistant's message."""
    reply = spoken(value, column, "assistant")
    if reply[0]["role"] != "assistant":
        raise RowError(f"{column!r} begins with a message of the role {reply[0]['role']}")
    return reply


def _pair(prompt: list[Message], row: Row, columns: Columns) -> Example:
    """The example of a better and a worse reply, without what both begin with."""
    chosen, rejected = (_side(row, columns, ours) for ours in ("chosen", "rejected"))
    if chosen == rejected:
        raise RowError("chosen and rejected are equal, so neither is better")
    if not prompt or not (_is_reply(chosen) and _is_reply(rejected)):
        prompt, chosen, rejected = _parted(prompt, chosen, rejected)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not any(message["role"] == "assistant" for message in side):
            raise RowError(f"{columns.name(name)!r} has no reply: no message of an assistant")
    prompt = with_system(prompt, row, columns)
    example = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return with_tools(example, row, columns)


def _side(row: Row, columns: Columns, ours: str) -> list[Message]:
    """One of the two replies, or the whole conversation with it."""
    value = columns.take(row, ours)
    dialogue = read_dialogue(value) if isinstance(value, str) else None
    return dialogue or spoken(value, columns.name(ours), "assistant")


def _is_reply(side: list[Message]) -> bool:
    """Whether one side is a reply alone, and no conversation from its start."""
    return side[0]["role"] not in (*SYSTEM, "user")


def _parted(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """What two conversations begin with, and what each goes on with (as TRL's extract_prompt)."""
    most = min(len(chosen), len(rejected)) - 1
    count = 0
    while count < most and chosen[count] == rejected[count]:
        count += 1
    if not count:
        raise RowError(
            "chosen and rejected begin with different messages; expected two replies beside their "
            "prompt, or two conversations that begin alike"
        )
    said = {_said(message) for message in chosen[:count]}
    if any(_said(message) not in said for message in prompt):
        raise RowError(
            "chosen and rejected are whole conversations that do not begin with the prompt"
        )
    return chosen[:count], chosen[count:], rejected[count:]


def _said(message: Message) -> tuple[str, str]:
    """Who says what, for comparing messages."""
    return message["role"], str(message.get("content")).strip()
