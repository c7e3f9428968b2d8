"""Rows that are conversations: messages, ShareGPT, Alpaca, a prompt and its completion."""

import re
from typing import Any

from luthier.data.formats.columns import Columns, is_absent, list_in, named, text_in
from luthier.data.formats.messages import (
    Message,
    read_any,
    read_messages,
    read_tools,
    read_turns,
    written_messages,
)
from luthier.data.rows import Row, RowError, describe_type

Example = dict[str, Any]
SYSTEM = ("system", "developer")


def from_messages(row: Row, columns: Columns) -> Example:
    """A row that has its messages."""
    messages = read_messages(columns.take(row, "messages"), columns.name("messages"))
    return with_tools({"messages": with_system(messages, row, columns)}, row, columns)


def from_sharegpt(row: Row, columns: Columns) -> Example:
    """A row of ShareGPT's turns."""
    messages = read_turns(columns.take(row, "conversations"), columns.name("conversations"))
    return with_tools({"messages": with_system(messages, row, columns)}, row, columns)


def from_alpaca(row: Row, columns: Columns) -> Example:
    """An instruction, perhaps an input and earlier turns, and the output."""
    messages = [*alpaca_prompt(row, columns), _output(row, columns)]
    return with_tools({"messages": with_system(messages, row, columns)}, row, columns)


def from_prompt_completion(row: Row, columns: Columns) -> Example:
    """A prompt and its completion, each a text or messages.

    Assistant messages within the prompt are context and do not train, as in TRL.
    """
    prompt = spoken(columns.take(row, "prompt"), columns.name("prompt"), "user")
    reply = spoken(columns.take(row, "completion"), columns.name("completion"), "assistant")
    messages = [*map(_as_context, prompt), *reply]
    return with_tools({"messages": with_system(messages, row, columns)}, row, columns)


def from_prompt(row: Row, columns: Columns) -> Example:
    """A prompt alone, a text or messages, for a model that learns from its own answers."""
    prompt = spoken(columns.take(row, "prompt"), columns.name("prompt"), "user")
    return with_tools({"messages": with_system(prompt, row, columns)}, row, columns)


def alpaca_prompt(row: Row, columns: Columns) -> list[Message]:
    """The earlier turns, and the instruction with its input below it.

    A blank line stands between the two, as between the sections of Stanford Alpaca's own prompt
    (github.com/tatsu-lab/stanford_alpaca): inputs are often whole passages, and one line break
    would make the instruction a part of them.
    """
    instruction = text_in(columns.take(row, "instruction"), columns.name("instruction"))
    given = columns.get(row, "input")
    if not is_absent(given):
        given = text_in(given, columns.name("input"))
        instruction = f"{instruction}\n\n{given}" if instruction.strip() else given
    return [*_history(row, columns), {"role": "user", "content": instruction}]


def _history(row: Row, columns: Columns) -> list[Message]:
    """The earlier turns, each a question and its answer; the answers train, as in LLaMA-Factory."""
    value, column = columns.get(row, "history"), columns.name("history")
    if is_absent(value):
        return []
    messages: list[Message] = []
    for place, pair in enumerate(list_in(value, column, "pairs")):
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise RowError(
                f"{column}[{place}] is {describe_type(pair)}; expected a question and its answer"
            )
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    return messages


def _output(row: Row, columns: Columns) -> Message:
    """The reply of an Alpaca row."""
    text = text_in(columns.take(row, "output"), columns.name("output"))
    return {"role": "assistant", "content": text}


def spoken(value: Any, column: str, role: str) -> list[Message]:
    """What one side says: text of this role, one message, or a list of messages."""
    if isinstance(value, str):
        return written_messages(value, column) or [{"role": role, "content": value}]
    if isinstance(value, list):
        return read_any(value, column)
    if isinstance(value, dict):
        return read_any([value], column)
    raise RowError(f"{column!r} is {named(value)}; expected text or a list of messages")


def _as_context(message: Message) -> Message:
    """A message of a prompt: an assistant's does not train unless it says so itself."""
    return {"train": False, **message} if message["role"] == "assistant" else message


def with_system(messages: list[Message], row: Row, columns: Columns) -> list[Message]:
    """The messages behind their system prompt: their own, the row's, or the config's."""
    own = columns.get(row, "system")
    given = None if is_absent(own) else text_in(own, columns.name("system"))
    if messages[0]["role"] in SYSTEM:
        if given is not None and messages[0].get("content") != given:
            raise RowError(
                f"the row has a system message and another system prompt in "
                f"{columns.name('system')!r}; keep one of them"
            )
        return messages
    given = columns.system if given is None else given
    return messages if given is None else [{"role": "system", "content": given}, *messages]


def with_tools(example: Example, row: Row, columns: Columns) -> Example:
    """The example with the tools that its row offers, if any."""
    value = columns.get(row, "tools")
    if value is None or is_absent(value):
        return example
    tools = read_tools(value, columns.name("tools"))
    return {**example, "tools": tools} if tools else example


# Conversations written as one text, as in Anthropic's hh-rlhf.

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def read_dialogue(text: str) -> list[Message] | None:
    r"""The messages of a text such as `\n\nHuman: Hi\n\nAssistant: Hello`; None for any other."""
    before, *pieces = _TURN.split(text)
    if before or not pieces:
        return None
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": _ROLES[speaker], "content": said} for speaker, said in turns]


def read_prompt(text: str) -> list[Message]:
    r"""A prompt as messages: a whole dialogue up to `\n\nAssistant:`, or what one user says."""
    messages = read_dialogue(text)
    if messages is None:
        return [{"role": "user", "content": text}]
    is_open = messages[-1] == {"role": "assistant", "content": ""}
    return messages[:-1] if is_open else messages
