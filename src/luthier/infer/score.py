"""Held-out rows as questions with a known answer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]
Row = tuple[Mapping[str, Any], Mapping[str, Any]]
"""An example and the columns that its row has besides; none where they are not kept."""


@dataclass(frozen=True)
class Question:
    """What the model is asked, and the reply that the row has for it."""

    messages: Messages
    tools: list[dict[str, Any]] | None
    expected: str
    row: dict[str, Any] = field(default_factory=dict)
    """The example, and over it the row's own columns."""


def questions(rows: Iterable[Row], limit: int) -> list[Question]:
    """The first `limit` rows that have a reply in words, without that reply.

    Of a pair it is the chosen reply, of judged replies a good one.
    """
    found: list[Question] = []
    for example, columns in rows:
        if len(found) == limit:
            break
        messages, expected = _parted(example)
        if messages and expected is not None:
            row = {**example, **columns}
            found.append(Question(messages, example.get("tools"), expected, row))
    return found


def _parted(example: Mapping[str, Any]) -> tuple[Messages, str | None]:
    """An example's prompt and the text of its reply; None where it has none."""
    if "source" in example:
        return [{"role": "user", "content": example["source"]}], example["target"]
    if "messages" in example:
        *context, last = example["messages"]
        return context, _reply_text(last)
    if not example.get("label", True):
        return [], None
    reply = example.get("chosen", example.get("completion")) or [{}]
    return example.get("prompt", []), _reply_text(reply[0]) if len(reply) == 1 else None


def _reply_text(message: Mapping[str, Any]) -> str | None:
    """What an assistant's message says, if that is all in words."""
    content = message.get("content")
    is_reply = message.get("role") == "assistant" and not message.get("tool_calls")
    return content if is_reply and isinstance(content, str) else None
