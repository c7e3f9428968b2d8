"""Tool calls that come without content, for templates that ask for it."""

from collections.abc import Callable
from typing import Any, TypeVar

from luthier.chat.errors import ChatError

Result = TypeVar("Result")


def filled_where_refused(use: Callable[[Any], Result], messages: Any) -> Result:
    """Use the messages as they are; where the template refuses them, with empty content.

    APIs send a tool call with `"content": null`, transformers drops the key, and some templates
    (Qwen3's first one) raise without it. Such a row means an empty content.
    """
    try:
        return use(messages)
    except ChatError as error:
        if error.reason != "template refuses":
            raise
        filled = with_content(messages)
        if filled == messages:
            raise
        return use(filled)


def with_content(messages: Any) -> Any:
    """Return the messages with an empty content where a tool call has none."""
    return [
        {**message, "content": ""}
        if message.get("tool_calls") and message.get("content") is None
        else message
        for message in messages
    ]
