"""ShareGPT's turns, `from` and `value`, as messages."""

import difflib
import re
from typing import Any, Literal

from luthier.data.rows import RowError, kind
from luthier.data.shapes.calls import read_call
from luthier.data.shapes.messages import Message, read_message, read_messages
from luthier.data.shapes.values import as_list, json_in, list_in, named

_SPEAKERS = {
    "user": ("human", "user", "prompter", "usr"),
    "assistant": (
        "gpt", "assistant", "bot", "chatgpt", "model", "bard", "bing", "claude", "ai", "chatbot",
        "gpt4", "gpt-4",
    ),
    "system": ("system",),
    "developer": ("developer",),
    "call": ("function_call", "function-call", "tool_call", "tool_calls"),
    "tool": (
        "observation", "tool", "function", "function_response", "function-response",
        "tool_response", "tool_result", "ipython",
    ),
}  # fmt: skip
"""Our role -> the names that FastChat, OpenAssistant, axolotl, LLaMA-Factory, Hermes and Glaive
give it; `call` is an assistant's turn that holds calls alone."""
ROLES = {name: role for role, names in _SPEAKERS.items() for name in names}
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


def read_turns(value: Any, column: str) -> list[Message]:
    """The turns of a column as messages, or RowError for what is not a list of turns."""
    turns = list_in(value, column, "turns")
    if not turns:
        raise RowError(f"{column!r} is an empty list; expected turns")
    messages = []
    for index, turn in enumerate(turns):
        try:
            messages.append(_message(turn))
        except RowError as error:
            raise RowError(f"{column}[{index}]: {error}") from None
    return messages


def read_any(value: Any, column: str) -> list[Message]:
    """Messages of either spelling: role and content, or from and value."""
    messages = list_in(value, column, "messages")
    read = read_turns if spelling(messages) == "from" else read_messages
    return read(messages, column)


def spelling(value: Any) -> Literal["role", "from"] | None:
    """How messages name their speaker; None for what is no message and no list of messages."""
    first = value if isinstance(value, dict) else next(iter(as_list(value)), None)
    if not isinstance(first, dict):
        return None
    return "role" if "role" in first else "from" if "from" in first else None


def written_messages(text: str, column: str) -> list[Message] | None:
    """The messages of JSON text, as CSV cells hold them; None for any other text."""
    is_list = text.startswith("[") and spelling(text) is not None
    return read_any(text, column) if is_list else None


def _message(turn: Any) -> Message:
    """One turn as a message; what it has besides from and value goes with it."""
    if not isinstance(turn, dict):
        raise RowError(f"this is {kind(turn)}; expected an object with from and value")
    speaker, text = turn.get("from"), turn.get("value")
    role = (ROLES.get(speaker) if type(speaker) is str else None) or _role(turn)
    if type(text) is str and role != "call" and len(turn) == 2:
        return {"role": role, "content": text}
    if text is None:
        state = "is null" if "value" in turn else "is missing"
        raise RowError(f"the value of this {speaker} turn {state}; expected text")
    rest = {key: entry for key, entry in turn.items() if key not in ("from", "value")}
    if role == "call":
        return read_message({"role": "assistant", **read_call_turn(text), **rest})
    if not isinstance(text, str | list | dict):
        raise RowError(f"the value is {named(text)}; expected text")
    return read_message({"role": role, "content": text, **rest})


def _role(turn: dict[str, Any]) -> str:
    """The role of a speaker however it is capitalised; RowError names one that is not known."""
    if "from" not in turn:
        known = "; role and content are OpenAI's names" if "role" in turn else ""
        raise RowError(f"there is no from (it has: {', '.join(turn) or 'nothing'}){known}")
    speaker = turn["from"]
    if not isinstance(speaker, str):
        raise RowError(f"from is {named(speaker)}; expected a name such as human or gpt")
    role = ROLES.get(speaker.strip().lower())
    if role is None:
        near = difflib.get_close_matches(speaker.lower(), ROLES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise RowError(f"the role {speaker!r} is not known{hint}; known are {', '.join(ROLES)}")
    return role


def read_call_turn(text: Any) -> Message:
    """The calls of a turn, and the reasoning in front of them, as LLaMA-Factory writes both.

    The text is JSON of one call (name and arguments) or of a list of them; `<think>...</think>`
    before it is reasoning.
    """
    thought = _THOUGHT.match(text) if isinstance(text, str) else None
    calls = text[thought.end() :] if thought else text
    if isinstance(calls, str):
        calls = json_in(calls, "the value of this call", '{"name": ..., "arguments": {...}}')
    calls = calls if isinstance(calls, list) else [calls]
    message: Message = {
        "tool_calls": [read_call(call, f"call {place}") for place, call in enumerate(calls)]
    }
    if thought and thought[1].strip():
        message["reasoning_content"] = thought[1].strip("\n")
    return message
