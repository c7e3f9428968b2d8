"""What a message must have so that a template can render it; unknown fields pass through."""

from typing import Any

from luthier.data.rows import RowError, kind
from luthier.data.shapes.calls import read_call, read_calls
from luthier.data.shapes.parts import are_parts, read_parts
from luthier.data.shapes.values import list_in, named

Message = dict[str, Any]

REASONING = ("reasoning_content", "reasoning", "thinking")
"""The names under which templates and servers know a message's reasoning."""
WEIGHTS = ("weight", "loss_weight")
"""OpenAI's and LLaMA-Factory's way to say whether a message trains: 0 or 1."""
_TEXTS = (*REASONING, "tool_call_id", "name")


def read_messages(value: Any, column: str) -> list[Message]:
    """The messages of a column, or RowError for what is not a list of messages.

    Nulls, as exports and Arrow write them, mean that a field is absent. `function_call` and
    `function` results of OpenAI's older API become tool calls and tool results, `weight` becomes
    `train`. The messages are the row's own where nothing was to be changed.
    """
    messages = value if type(value) is list else list_in(value, column, "messages")
    if not messages:
        raise RowError(f"{column!r} is an empty list; expected messages")
    for message in messages:
        # Most messages are a role and a text, and rows have many: no call for those.
        if type(message) is not dict or len(message) != 2:
            return _each(messages, column)
        role = message.get("role")
        if type(role) is not str or not role or type(message.get("content")) is not str:
            return _each(messages, column)
    return messages


def _each(messages: list[Any], column: str) -> list[Message]:
    """Every message checked; RowError says which one is wrong."""
    found = []
    for index, message in enumerate(messages):
        try:
            found.append(read_message(message))
        except RowError as error:
            raise RowError(f"{column}[{index}]: {error}") from None
    if any(isinstance(message, dict) and message.get("function_call") for message in messages):
        return [m | {"role": "tool"} if m["role"] == "function" else m for m in found]
    return found


def read_message(message: Any) -> Message:
    """One message without its nulls; RowError for what is not a message."""
    if not isinstance(message, dict):
        raise RowError(f"this is {kind(message)}; expected an object with role and content")
    kept = {key: value for key, value in message.items() if value is not None}
    role = kept.get("role")
    if not isinstance(role, str) or not role:
        raise RowError(_no_role(message))
    _put_content(kept, role)
    if len(kept) > 2 or "content" not in kept:
        _put_calls(kept)
        _put_train(kept)
        _check_texts(kept)
    if "content" not in kept and not _may_lack_content(kept, role):
        state = "is null" if "content" in message else "is missing"
        raise RowError(f"the content of this {role} message {state}; expected text")
    return kept


def _no_role(message: dict[str, Any]) -> str:
    """The words for a message whose role is missing or is no name."""
    if "role" in message:
        return f"the role is {named(message['role'])}; expected a name such as user or assistant"
    known = ""
    if "from" in message:
        known = "; from and value are ShareGPT's names, and this source is read as messages"
    return f"there is no role (it has: {', '.join(message) or 'nothing'}){known}"


def _put_content(message: Message, role: str) -> None:
    """Content as text or parts of text; what else its parts say goes into fields of its own."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return
    if role == "tool" and (isinstance(content, dict) or not _is_list_of_parts(content)):
        _check_result(content)
    elif isinstance(content, list):
        _put_parts(message, content)
    else:
        raise RowError(f"the content is {named(content)}; expected text")


def _is_list_of_parts(content: Any) -> bool:
    return isinstance(content, list) and are_parts(content)


def _check_result(content: Any) -> None:
    """Refuse a tool's result that no template shows: one that is no text, object or list."""
    entries = content if isinstance(content, list) else [content]
    if not all(isinstance(entry, dict | str) for entry in entries):
        raise RowError(f"the content is {named(content)}; expected text")


def _put_parts(message: Message, parts: list[Any]) -> None:
    """Parts of text, reasoning and calls, each in its field."""
    found = read_parts(parts)
    if found.content is None:
        del message["content"]
    else:
        message["content"] = found.content
    if found.reasoning:
        message["reasoning_content"] = "\n\n".join(found.reasoning)
    if found.calls:
        message["tool_calls"] = [*message.get("tool_calls", []), *found.calls]


def _put_calls(message: Message) -> None:
    """Calls in OpenAI's form; `function_call` is what its older API had."""
    calls = read_calls(message.pop("tool_calls")) if "tool_calls" in message else []
    if "function_call" in message:
        calls.append(read_call(message.pop("function_call"), "function_call"))
    if calls:
        message["tool_calls"] = calls


def _put_train(message: Message) -> None:
    """Whether the message trains, under one name."""
    for name in WEIGHTS:
        weight = message.pop(name, None)
        if weight is None:
            continue
        if weight not in (0, 1) or isinstance(weight, str):
            raise RowError(f"{name} is {weight!r}; a message trains (1) or does not (0)")
        message.setdefault("train", bool(weight))
    if not isinstance(message.get("train", True), bool):
        raise RowError(f"train is {named(message['train'])}; expected true or false")


def _check_texts(message: Message) -> None:
    """Refuse other values where a text is expected."""
    for name in _TEXTS:
        if not isinstance(message.get(name, ""), str):
            raise RowError(f"{name} is {named(message[name])}; expected text")


def _may_lack_content(message: Message, role: str) -> bool:
    """Whether a message says something without content: a system slot, a call, or reasoning."""
    if role in ("system", "developer"):
        return True
    return bool(message.get("tool_calls") or any(message.get(name) for name in REASONING))
