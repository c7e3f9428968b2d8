"""Replies as messages in the form of OpenAI's API: reasoning, content and tool calls with ids."""

import hashlib
import secrets
from collections.abc import Iterator
from typing import Any

from luthier.chat import ParsedReply, ReplyDelta
from luthier.chat.reply_parser import format_arguments

_ID_LENGTH = 9
"""Mistral's templates refuse ids of calls that are not nine letters and digits."""


def make_call_id() -> str:
    """Return a new id for a tool call."""
    return secrets.token_hex(_ID_LENGTH)[:_ID_LENGTH]


def split_message(parsed: ParsedReply) -> Iterator[ReplyDelta]:
    """Yield the fields of a message, each in one piece: reasoning, content and calls."""
    message = parsed.message
    if message.get("reasoning_content"):
        yield ReplyDelta("reasoning", message["reasoning_content"])
    if message.get("content"):
        yield ReplyDelta("content", message["content"])
    yield from map(ReplyDelta.of_call, message.get("tool_calls", ()))


def format_message(parsed: ParsedReply, turn: int) -> dict[str, Any]:
    """Return the message with an id for each call, and the arguments as JSON text.

    `turn`: the number of messages in front of it. Where the template writes no ids, they are made
    from it and from the call, so that the same reply always has the same.
    """
    message = dict(parsed.message)
    if "tool_calls" in message:
        message["tool_calls"] = [
            _format_call(call, f"{turn} {number}")
            for number, call in enumerate(message["tool_calls"])
        ]
    return message


def _format_call(call: dict[str, Any], place: str) -> dict[str, Any]:
    function = call["function"]
    name, arguments = function["name"], format_arguments(function["arguments"])
    digest = hashlib.sha256(f"{place} {name} {arguments}".encode("utf-8", "backslashreplace"))
    return {
        "id": call.get("id") or digest.hexdigest()[:_ID_LENGTH],
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
