"""Held-out rows as questions with a known answer, and how many answers are right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Question:
    """What the model is asked, and the reply that the row has for it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    expected: str


def questions(conversations: Sequence[Any], limit: int) -> list[Question]:
    """The first `limit` conversations that end with a reply in words, without that reply."""
    found: list[Question] = []
    for conversation in conversations:
        if len(found) == limit:
            break
        *context, last = conversation["messages"]
        if last["role"] == "assistant" and context and isinstance(last.get("content"), str):
            found.append(Question(context, conversation.get("tools"), last["content"]))
    return found


def exact_match(replies: Sequence[str], expected: Sequence[str]) -> float:
    """The share of replies equal to what was expected, but for surrounding white space."""
    right = sum(a.strip() == b.strip() for a, b in zip(replies, expected, strict=True))
    return right / len(expected)
