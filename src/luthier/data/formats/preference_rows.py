"""Rows that judge replies: a better and a worse one (preference), or one with a rating (KTO)."""

from typing import Any

from luthier.data.formats.columns import ColumnMapping, describe_value, parse_flag
from luthier.data.formats.conversations import (
    SYSTEM_ROLES,
    Example,
    add_system_prompt,
    add_template_inputs,
    read_alpaca_prompt,
    read_dialogue,
    read_prompt,
    read_reply,
    read_text_or_messages,
)
from luthier.data.formats.messages import Message, parse_message_list, read_messages_or_turns
from luthier.data.rows import Row, RowError, excerpt


def from_prompted_pair(row: Row, columns: ColumnMapping) -> Example:
    """Return the example of a prompt, and the two replies to it."""
    return _pair_example(_read_prompt(row, columns), row, columns)


def from_implicit_pair(row: Row, columns: ColumnMapping) -> Example:
    """Return the example of two conversations that begin alike; what they share is the prompt."""
    return _pair_example([], row, columns)


def from_messages_pair(row: Row, columns: ColumnMapping) -> Example:
    """Return the example of the messages so far, and two replies to them."""
    prompt = read_messages_or_turns(*columns.take_cell(row, "messages"), columns.json_replies)
    return _pair_example(prompt, row, columns)


def from_alpaca_pair(row: Row, columns: ColumnMapping) -> Example:
    """Return the example of an instruction with its input, and two outputs."""
    return _pair_example(read_alpaca_prompt(row, columns), row, columns)


def from_rated_completion(row: Row, columns: ColumnMapping) -> Example:
    """Return the example of a prompt, one reply to it, and its rating."""
    reply = _read_rated_reply(*columns.take_cell(row, "completion"), columns.json_replies)
    return _rated_example(_read_prompt(row, columns), reply, row, columns)


def from_rated_messages(row: Row, columns: ColumnMapping) -> Example:
    """Return the example of a conversation whose last message is judged."""
    column = columns.source_name("messages")
    messages = read_messages_or_turns(columns.take(row, "messages"), column, columns.json_replies)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise RowError(
            f"{column!r} has {len(messages)} messages and ends with one of the role "
            f"{messages[-1]['role']}; expected a prompt and, at the end, the reply that is judged"
        )
    return _rated_example(messages[:-1], messages[-1:], row, columns)


def from_rated_alpaca(row: Row, columns: ColumnMapping) -> Example:
    """Return the example of an instruction with its input, one output, and its rating."""
    reply = _read_rated_reply(*columns.take_cell(row, "output"), columns.json_replies)
    return _rated_example(read_alpaca_prompt(row, columns), reply, row, columns)


def _rated_example(
    prompt: list[Message], reply: list[Message], row: Row, columns: ColumnMapping
) -> Example:
    """Return the example of one reply and its rating."""
    value = columns.take(row, "label")
    label = parse_flag(value)
    if label is None:
        value_text = value if isinstance(value, int | float) else describe_value(value)
        value_text = excerpt(value) if isinstance(value, str) else value_text
        raise RowError(
            f"{columns.source_name('label')!r} is {value_text!r}; expected true or false"
        )
    example = {
        "prompt": add_system_prompt(prompt, row, columns), "completion": reply, "label": label,
    }  # fmt: skip
    return add_template_inputs(example, row, columns)


def _read_prompt(row: Row, columns: ColumnMapping) -> list[Message]:
    """Return the prompt of a row: a text, a dialogue written as text, or messages."""
    value, column = columns.take_cell(row, "prompt")
    if isinstance(value, str):
        return parse_message_list(value, column) or read_prompt(value)
    return read_text_or_messages(value, column, "user")


def _read_rated_reply(value: Any, column: str, json_replies: bool) -> list[Message]:
    """Return the reply alone, which begins with an assistant's message."""
    reply = read_reply(value, column, json_replies)
    if reply[0]["role"] != "assistant":
        raise RowError(f"{column!r} begins with a message of the role {reply[0]['role']}")
    return reply


def _pair_example(prompt: list[Message], row: Row, columns: ColumnMapping) -> Example:
    """Return the example of a better and a worse reply, without what both begin with."""
    chosen, rejected = (_read_candidate(row, columns, ours) for ours in ("chosen", "rejected"))
    if chosen == rejected:
        raise RowError("chosen and rejected are equal, so neither is better")
    # Two whole conversations hold the prompt themselves: what both begin with.
    if not prompt or not (_is_reply(chosen) and _is_reply(rejected)):
        prompt, chosen, rejected = _split_common_prompt(prompt, chosen, rejected)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not any(message["role"] == "assistant" for message in side):
            raise RowError(
                f"{columns.source_name(name)!r} has no reply: no message of an assistant"
            )
    prompt = add_system_prompt(prompt, row, columns)
    example = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return add_template_inputs(example, row, columns)


def _read_candidate(row: Row, columns: ColumnMapping, ours: str) -> list[Message]:
    """Return one of the two replies, or the whole conversation with it."""
    value = columns.take(row, ours)
    dialogue = read_dialogue(value) if isinstance(value, str) else None
    return dialogue or read_reply(value, columns.source_name(ours), columns.json_replies)


def _is_reply(side: list[Message]) -> bool:
    """Return whether one side is a reply alone, and no conversation from its start."""
    return side[0]["role"] not in (*SYSTEM_ROLES, "user")


def _split_common_prompt(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Return what two conversations begin with, and what each goes on with (as TRL's
    extract_prompt)."""
    # Each side keeps a message at least, also where one conversation is the beginning of the other.
    most = min(len(chosen), len(rejected)) - 1
    count = 0
    while count < most and chosen[count] == rejected[count]:
        count += 1
    if not count:
        raise RowError(
            "chosen and rejected begin with different messages; expected two replies beside their "
            "prompt, or two conversations that begin alike"
        )
    # The messages of a prompt column must be among what both begin with, or the columns contradict
    # each other.
    common = {_role_and_text(message) for message in chosen[:count]}
    if any(_role_and_text(message) not in common for message in prompt):
        raise RowError(
            "chosen and rejected are whole conversations that do not begin with the prompt"
        )
    return chosen[:count], chosen[count:], rejected[count:]


def _role_and_text(message: Message) -> tuple[str, str]:
    """Return the role and the stripped text of a message, by which messages are compared."""
    return message["role"], str(message.get("content")).strip()
