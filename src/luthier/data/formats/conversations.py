"""Rows that are conversations: messages, ShareGPT, Alpaca, a prompt and its completion."""

import re
from collections.abc import Mapping
from typing import Any

from luthier.data.formats.columns import (
    ColumnMapping,
    NoTextReplyError,
    describe_value,
    is_empty_cell,
    parse_flag,
    parse_json_cell,
    reply_text,
    require_list,
    require_text,
)
from luthier.data.formats.image_parts import fill_image_parts
from luthier.data.formats.messages import (
    Message,
    parse_message_list,
    read_messages,
    read_messages_or_turns,
    read_tools,
    read_turns,
    speaker_key,
)
from luthier.data.rows import Row, RowError, describe_type

Example = dict[str, Any]
SYSTEM_ROLES = ("system", "developer")
TEMPLATE_KWARGS = "chat_template_kwargs"
"""The column in which TRL and others have a row's own variables for the chat template."""
TEMPLATE_SWITCHES = frozenset({"enable_thinking", "preserve_thinking", "reasoning_effort"})
"""Variables of many templates, which rows may have as columns of their own."""


def from_messages(row: Row, columns: ColumnMapping) -> Example:
    """Return the example of a row that has messages."""
    messages = read_messages(*columns.take_cell(row, "messages"), columns.json_replies)
    return _conversation(messages, row, columns)


def from_sharegpt(row: Row, columns: ColumnMapping) -> Example:
    """Return the example of a row of ShareGPT's turns."""
    messages = read_turns(*columns.take_cell(row, "conversations"), columns.json_replies)
    return _conversation(messages, row, columns)


def from_alpaca(row: Row, columns: ColumnMapping) -> Example:
    """Return the example of an instruction, perhaps an input and earlier turns, and the output."""
    output = reply_text(*columns.take_cell(row, "output"), columns.json_replies)
    reply = {"role": "assistant", "content": output}
    return _conversation([*read_alpaca_prompt(row, columns), reply], row, columns)


def from_prompt_completion(row: Row, columns: ColumnMapping) -> Example:
    """Return the example of a prompt and its completion, each a text or messages.

    Assistant messages within the prompt are context and do not train, as in TRL.
    """
    prompt = read_text_or_messages(*columns.take_cell(row, "prompt"), "user")
    reply = read_reply(*columns.take_cell(row, "completion"), columns.json_replies)
    # An assistant's message of the prompt does not train unless it says so itself.
    context = [{"train": False, **m} if m["role"] == "assistant" else m for m in prompt]
    return _conversation([*context, *reply], row, columns)


def from_prompt(row: Row, columns: ColumnMapping) -> Example:
    """Return the example of a prompt alone, for a model that learns from its own answers."""
    prompt = read_text_or_messages(*columns.take_cell(row, "prompt"), "user")
    return _conversation(prompt, row, columns)


def _conversation(messages: list[Message], row: Row, columns: ColumnMapping) -> Example:
    """Return the example of these messages with the row's system prompt and tools."""
    example = {"messages": add_system_prompt(messages, row, columns)}
    return add_template_inputs(example, row, columns)


def read_alpaca_prompt(row: Row, columns: ColumnMapping) -> list[Message]:
    """Return the earlier turns, and the instruction with its input below it.

    A blank line stands between the two, as between the sections of Stanford Alpaca's own prompt
    (github.com/tatsu-lab/stanford_alpaca): inputs are often whole passages, and one line break
    would make the instruction a part of them.
    """
    instruction = require_text(*columns.take_cell(row, "instruction"))
    input_text = columns.get(row, "input")
    if not is_empty_cell(input_text):
        input_text = require_text(input_text, columns.source_name("input"))
        instruction = f"{instruction}\n\n{input_text}" if instruction.strip() else input_text
    return [*_read_history(row, columns), {"role": "user", "content": instruction}]


def _read_history(row: Row, columns: ColumnMapping) -> list[Message]:
    """Return the earlier turns, each a question and its answer.

    The answers train, as in LLaMA-Factory.
    """
    value, column = columns.get(row, "history"), columns.source_name("history")
    if is_empty_cell(value):
        return []
    messages: list[Message] = []
    for number, pair in enumerate(require_list(value, column, "pairs")):
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise RowError(
                f"{column}[{number}] is {describe_type(pair)}; expected a question and its answer"
            )
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    return messages


def read_text_or_messages(
    value: Any, column: str, role: str, json_replies: bool = False
) -> list[Message]:
    """Return what one side says: text of this role, one message, or a list of messages."""
    if isinstance(value, str):
        messages = parse_message_list(value, column, json_replies)
        return messages or [{"role": role, "content": value}]
    if isinstance(value, list):
        return read_messages_or_turns(value, column, json_replies)
    if isinstance(value, dict):
        return read_messages_or_turns([value], column, json_replies)
    raise RowError(f"{column!r} is {describe_value(value)}; expected text or a list of messages")


def read_reply(value: Any, column: str, json_replies: bool) -> list[Message]:
    """Return the reply of one side: text, messages, a number, or what trains as JSON text.

    A value without any sign of a message is JSON; an empty list is no reply.
    """
    is_other = not isinstance(value, str) and value != [] and speaker_key(value) is None
    if value is None or not is_other or (isinstance(value, dict) and "content" in value):
        return read_text_or_messages(value, column, "assistant", json_replies)
    try:
        return [{"role": "assistant", "content": reply_text(value, column, json_replies)}]
    except NoTextReplyError as error:
        raise NoTextReplyError(f"{error} or a list of messages") from None


def add_system_prompt(messages: list[Message], row: Row, columns: ColumnMapping) -> list[Message]:
    """Return the messages behind their system prompt: their own, the row's, or the config's."""
    cell = columns.get(row, "system")
    system = None if is_empty_cell(cell) else require_text(cell, columns.source_name("system"))
    # The config's system prompt is for rows without one; it never stands beside a row's own.
    if messages[0]["role"] in SYSTEM_ROLES:
        if system is not None and messages[0].get("content") != system:
            raise RowError(
                f"the row has a system message and another system prompt in "
                f"{columns.source_name('system')!r}; keep one of them"
            )
        return messages
    system = columns.system if system is None else system
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def add_template_inputs(example: Example, row: Row, columns: ColumnMapping) -> Example:
    """Return the example with what its row has for the chat template beside the messages, if any.

    That is `tools`, `chat_template_kwargs` (the row's own variables), and images.
    """
    value = columns.get(row, "tools")
    tools = None if is_empty_cell(value) else read_tools(value, columns.source_name("tools"))
    inputs = {"tools": tools, TEMPLATE_KWARGS: _read_template_kwargs(row, columns)}
    example = {**example, **{name: value for name, value in inputs.items() if value}}
    return fill_image_parts(example, row, columns)


def template_inputs(example: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an example has for the template beside its messages, by the encoder's names."""
    return {name: example[name] for name in ("tools", TEMPLATE_KWARGS) if example.get(name)}


def _read_template_kwargs(row: Row, columns: ColumnMapping) -> dict[str, Any]:
    """Return the row's own variables of the template: its mapping of them, and its switches.

    Null is no value: tables that hold a mapping fill the keys that a row lacks with it.
    """
    column, cell = columns.source_name(TEMPLATE_KWARGS), columns.get(row, TEMPLATE_KWARGS)
    kwargs: dict[str, Any] = {}
    if not is_empty_cell(cell):
        expected = "an object of variables for the chat template"
        value = parse_json_cell(cell, repr(column), expected) if isinstance(cell, str) else cell
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise RowError(f"{column!r} is {describe_value(value)}; expected {expected}")
        kwargs = {name: item for name, item in value.items() if item is not None}
        for name in TEMPLATE_SWITCHES & kwargs.keys():
            kwargs[name] = _read_switch(name, kwargs[name], f"{column}.{name}")
    for name in sorted(TEMPLATE_SWITCHES):
        cell = columns.get(row, name)
        if is_empty_cell(cell):
            continue
        switch = columns.source_name(name)
        value = _read_switch(name, cell, switch)
        if kwargs.setdefault(name, value) != value:
            raise RowError(
                f"{switch!r} is {value!r}, and {column!r} says {kwargs[name]!r}; keep one of them"
            )
    return kwargs


def _read_switch(name: str, value: Any, column: str) -> Any:
    """Return the value of a switch that is known; cells of CSV are text, which is always true."""
    if name == "reasoning_effort":
        if isinstance(value, str) and value.strip():
            return value.strip()
        raise RowError(f"{column!r} is {describe_value(value)}; expected text such as 'low'")
    flag = parse_flag(value)
    if flag is None:
        raise RowError(f"{column!r} is {describe_value(value)}; expected true or false")
    return flag


# Below: conversations that are written as one text, as in Anthropic's hh-rlhf.
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def read_dialogue(text: str) -> list[Message] | None:
    r"""Return the messages of a text like `\n\nHuman: Hi\n\nAssistant: Yes`; None for any other."""
    before, *pieces = _TURN.split(text)
    if before or not pieces:
        return None
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": _ROLES[speaker], "content": content} for speaker, content in turns]


def read_prompt(text: str) -> list[Message]:
    r"""Return a prompt as messages: a whole dialogue up to `\n\nAssistant:`, or what one user
    says."""
    messages = read_dialogue(text)
    if messages is None:
        return [{"role": "user", "content": text}]
    # A prompt ends with an open `Assistant:`, which the chat template writes itself.
    is_open = messages[-1] == {"role": "assistant", "content": ""}
    return messages[:-1] if is_open else messages
