"""What a message must have so that a template can render it; unknown fields pass through."""

from typing import Any

from luthier.data.rows import RowError, kind

_FIELDS: dict[str, type] = {
    "reasoning_content": str, "tool_calls": list, "tool_call_id": str, "name": str, "train": bool,
}  # fmt: skip
"""The types of the fields that a message may have besides role and content."""


def read_messages(messages: Any, column: str) -> list[dict[str, Any]]:
    """The messages of a column, or RowError for what is not a list of messages.

    A null in an optional field, as exports write it, means that the field is absent.
    """
    if not isinstance(messages, list):
        raise RowError(f"{column!r} is {kind(messages)}; expected a list of messages")
    if not messages:
        raise RowError(f"{column!r} is an empty list; expected messages")
    for index, message in enumerate(messages):
        try:
            _check_message(message)
        except RowError as error:
            raise RowError(f"{column}[{index}]: {error}") from None
    return [_without_absent(message) for message in messages]


def _without_absent(message: dict[str, Any]) -> dict[str, Any]:
    """The message without optional fields that are null."""
    return {key: value for key, value in message.items() if value is not None or key not in _FIELDS}


def _check_message(message: Any) -> None:
    """Raise RowError for what is not a message."""
    if not isinstance(message, dict):
        raise RowError(f"this is {kind(message)}; expected an object with role and content")
    role = message.get("role")
    if "role" not in message:
        known = "; from and value are ShareGPT's names" if "from" in message else ""
        raise RowError(f"there is no role (it has: {', '.join(message) or 'nothing'}){known}")
    if not isinstance(role, str) or not role:
        raise RowError(f"the role is {kind(role)}; expected a name such as user or assistant")
    _check_content(message, role)
    for field, expected in _FIELDS.items():
        value = message.get(field)
        if value is not None and not isinstance(value, expected):
            raise RowError(f"{field} is {kind(value)}; expected {kind(expected())}")
    for call in message.get("tool_calls") or []:
        if not isinstance(call, dict):
            raise RowError(f"tool_calls holds {kind(call)}; expected objects")


def _check_content(message: dict[str, Any], role: str) -> None:
    """Raise RowError for content that is neither text nor parts of text, nor rightly absent."""
    content = message.get("content")
    if isinstance(content, str):
        return
    if isinstance(content, list):
        _check_parts(content)
    elif content is not None:
        raise RowError(f"the content is {kind(content)}; expected text")
    elif not _may_lack_content(message, role):
        state = "is null" if "content" in message else "is missing"
        raise RowError(f"the content of this {role} message {state}; expected text")


def _may_lack_content(message: dict[str, Any], role: str) -> bool:
    """Whether a message says something without content: a system slot, a call, or reasoning."""
    return role == "system" or bool(message.get("tool_calls") or message.get("reasoning_content"))


def _check_parts(parts: list[Any]) -> None:
    """Raise RowError for content parts other than text."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            found = part.get("type", "no type") if isinstance(part, dict) else kind(part)
            raise RowError(f"a content part is {found!r}; only parts of text are read")
