"""Replies in the forms of OpenAI's API: as one JSON object, or as the events of a stream.

Each form takes the deltas of a reply as they come; `start`, `add` and `end` return the events, and
`body` the whole. Source: https://platform.openai.com/docs/api-reference.
"""

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from luthier.chat import ReplyDelta
from luthier.infer.api_objects import ApiError
from luthier.infer.openai_requests import (
    ChatCompletionRequest,
    CompletionRequest,
    ReplyRequest,
    ResponseRequest,
)
from luthier.infer.reply_messages import make_call_id

STREAM_END = "data: [DONE]\n\n"
"""The last event of each stream."""


FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class ReplyEnd:
    """How a reply ended, and what it cost."""

    finish: FinishReason
    prompt_tokens: int
    completion_tokens: int
    """All that the model wrote, stop token and all."""
    parse_error: str | None = None
    """Why the reply's content is all that the model wrote, and no message."""

    @property
    def extra_fields(self) -> dict[str, str]:
        """What the reply has besides the fields of the API."""
        return {} if self.parse_error is None else {"parse_error": self.parse_error}


class ReplyForm(Protocol):
    """What the server needs of a form."""

    def start(self) -> list[str]:
        """Return the events before a reply."""

    def add(self, delta: ReplyDelta) -> list[str]:
        """Take a piece of the reply, and return its events."""

    def end(self, end: ReplyEnd) -> list[str]:
        """Return the events behind a reply."""

    def body(self, end: ReplyEnd) -> dict[str, Any]:
        """Return the reply whole, as it was taken."""

    def error(self, error: ApiError) -> list[str]:
        """Return the event for a reply that breaks off."""


def format_event(data: dict[str, Any], name: str | None = None) -> str:
    """Return a server-sent event with JSON."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data)}\n\n"


def make_id(prefix: str) -> str:
    """Return a new id that begins as OpenAI's do."""
    return f"{prefix}-{uuid.uuid4().hex}"


def count_usage(end: ReplyEnd) -> dict[str, int]:
    """Return the counts of tokens of a completion."""
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    }


class _CompletionForm:
    """What chat completions and completions have in common."""

    prefix: str
    stream_object: str

    def __init__(self, request: ReplyRequest, model: str) -> None:
        options = request.stream_options
        self._shows_usage = bool(options and options.include_usage)
        self._facts = {"id": make_id(self.prefix), "created": int(time.time()), "model": model}

    def error(self, error: ApiError) -> list[str]:
        """Return the event for a reply that breaks off."""
        return [format_event(error.body())]

    def _chunk(self, choice: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, **choice, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self._shows_usage else {}
        object_type = {"object": self.stream_object}
        return format_event({**self._facts, **object_type, "choices": [choice], **usage})

    def _usage_events(self, end: ReplyEnd) -> list[str]:
        if not self._shows_usage:
            return []
        facts = {**self._facts, "object": self.stream_object}
        return [format_event({**facts, "choices": [], "usage": count_usage(end)})]


class ChatCompletionForm(_CompletionForm):
    """Replies of /v1/chat/completions."""

    prefix, stream_object = "chatcmpl", "chat.completion.chunk"

    def __init__(self, request: ChatCompletionRequest, model: str) -> None:
        super().__init__(request, model)
        self._texts = {"content": "", "reasoning": ""}
        self._calls: list[dict[str, Any]] = []

    def start(self) -> list[str]:
        """Return the event with the role."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})]

    def add(self, delta: ReplyDelta) -> list[str]:
        """Take a piece of the reply, and return its event."""
        if delta.field == "tool_call":
            function = {"name": delta.name, "arguments": delta.text}
            call = {"id": delta.id or make_call_id(), "type": "function", "function": function}
            self._calls.append(call)
            index = {"index": len(self._calls) - 1}
            # As the API has it: first the call without its arguments, then these.
            head = index | call | {"function": function | {"arguments": ""}}
            rest = index | {"function": {"arguments": delta.text}}
            return [self._chunk({"delta": {"tool_calls": [piece]}}) for piece in (head, rest)]
        self._texts[delta.field] += delta.text
        name = "content" if delta.field == "content" else "reasoning_content"
        return [self._chunk({"delta": {name: delta.text}})]

    def end(self, end: ReplyEnd) -> list[str]:
        """Return the events with the reason of the end and the counts of tokens."""
        choice = {"delta": {}, **end.extra_fields}
        return [self._chunk(choice, end.finish), *self._usage_events(end)]

    def body(self, end: ReplyEnd) -> dict[str, Any]:
        """Return a `chat.completion`."""
        # Beside calls an empty text is none, as the API has it.
        content = self._texts["content"] or (None if self._calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._texts["reasoning"]:
            message["reasoning_content"] = self._texts["reasoning"]
        if self._calls:
            message["tool_calls"] = self._calls
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": end.finish}
        choice |= end.extra_fields
        facts = {**self._facts, "object": "chat.completion"}
        return {**facts, "choices": [choice], "usage": count_usage(end)}


class CompletionForm(_CompletionForm):
    """Replies of /v1/completions."""

    prefix, stream_object = "cmpl", "text_completion"

    def __init__(self, request: CompletionRequest, model: str) -> None:
        super().__init__(request, model)
        self._text = ""

    def start(self) -> list[str]:
        """Return no event: a completion begins with its text."""
        return []

    def add(self, delta: ReplyDelta) -> list[str]:
        """Take a piece of the text, and return its event."""
        self._text += delta.text
        return [self._chunk({"text": delta.text})]

    def end(self, end: ReplyEnd) -> list[str]:
        """Return the events with the reason of the end and the counts of tokens."""
        return [self._chunk({"text": ""}, end.finish), *self._usage_events(end)]

    def body(self, end: ReplyEnd) -> dict[str, Any]:
        """Return a `text_completion`."""
        choice = {"index": 0, "text": self._text, "logprobs": None, "finish_reason": end.finish}
        facts = {**self._facts, "object": "text_completion"}
        return {**facts, "choices": [choice], "usage": count_usage(end)}


class ResponseForm:
    """Replies of /v1/responses: items of reasoning, text and calls, in the order they came."""

    def __init__(self, request: ResponseRequest, model: str) -> None:
        self._items: list[dict[str, Any]] = []
        self._sequence = 0
        self._response = {
            "id": make_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": {},
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": [tool.model_dump() | {"strict": False} for tool in request.tools or ()],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def start(self) -> list[str]:
        """Return the events before a reply."""
        names = ("response.created", "response.in_progress")
        return [self._event(name, response=self._response) for name in names]

    def add(self, delta: ReplyDelta) -> list[str]:
        """Take a piece of the reply, and return its events."""
        if delta.field == "tool_call":
            return [*self._close_item(), *self._add_call(delta)]
        item_type = "message" if delta.field == "content" else "reasoning"
        events = []
        if not self._is_open(item_type):
            events += [*self._close_item(), *self._open_item(item_type)]
        item = self._items[-1]
        item["content"][0]["text"] += delta.text
        return [*events, self._text_event(item, "delta", delta=delta.text)]

    def end(self, end: ReplyEnd) -> list[str]:
        """Return the events behind a reply."""
        events = []
        if not self._items:
            events += self._open_item("message")
        events += self._close_item()
        name = "response.incomplete" if end.finish == "length" else "response.completed"
        return [*events, self._event(name, response=self.body(end))]

    def body(self, end: ReplyEnd) -> dict[str, Any]:
        """Return a `response`."""
        if not self._items:
            self._open_item("message")
        self._close_item()
        is_cut = end.finish == "length"
        usage = {
            "input_tokens": end.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": end.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": end.prompt_tokens + end.completion_tokens,
        }
        return self._response | {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self._items,
            "usage": usage,
            **end.extra_fields,
        }

    def error(self, error: ApiError) -> list[str]:
        """Return the event for a reply that breaks off."""
        fields = {**error.body()["error"], "code": error.code or "server_error"}
        fields.pop("type")
        return [self._event("error", **fields)]

    def _event(self, event_type: str, **fields: Any) -> str:
        data = {"type": event_type, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return format_event(data, event_type)

    def _item_event(self, event_type: str, item: dict[str, Any], **fields: Any) -> str:
        place = {"item_id": item["id"], "output_index": len(self._items) - 1}
        return self._event(f"response.{event_type}", **place, **fields)

    def _text_event(self, item: dict[str, Any], ending: str, **fields: Any) -> str:
        is_message = item["type"] == "message"
        logprobs: dict[str, Any] = {"logprobs": []} if is_message else {}
        name = f"{'output' if is_message else 'reasoning'}_text.{ending}"
        return self._item_event(name, item, content_index=0, **fields, **logprobs)

    def _is_open(self, item_type: str) -> bool:
        item = self._items[-1] if self._items else {}
        return item.get("type") == item_type and item.get("status") == "in_progress"

    def _open_item(self, item_type: str) -> list[str]:
        """Begin an item of text."""
        item: dict[str, Any] = {"id": make_id("item"), "type": item_type, "status": "in_progress"}
        if item_type == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item |= {"role": "assistant", "content": []}
        else:
            part = {"type": "reasoning_text", "text": ""}
            item |= {"summary": [], "content": []}
        self._items.append(item)
        index = len(self._items) - 1
        events = [self._event("response.output_item.added", output_index=index, item=item)]
        item["content"] = [part]
        return [*events, self._item_event("content_part.added", item, content_index=0, part=part)]

    def _close_item(self) -> list[str]:
        """End the item of text that is open, if one is."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return []
        item = self._items[-1]
        item["status"] = "completed"
        (part,) = item["content"]
        return [
            self._text_event(item, "done", text=part["text"]),
            self._item_event("content_part.done", item, content_index=0, part=part),
            self._event(
                "response.output_item.done", output_index=len(self._items) - 1, item=item
            ),
        ]  # fmt: skip

    def _add_call(self, delta: ReplyDelta) -> list[str]:
        """Add a call, which comes whole."""
        item = {
            "id": make_id("item"),
            "type": "function_call",
            "call_id": delta.id or make_call_id(),
            "name": delta.name,
            "arguments": "",
            "status": "in_progress",
        }
        self._items.append(item)
        index = len(self._items) - 1
        events = [self._event("response.output_item.added", output_index=index, item=item)]
        item |= {"arguments": delta.text, "status": "completed"}
        self._items[-1] = item
        name = "function_call_arguments"
        return [
            *events,
            self._item_event(f"{name}.delta", item, delta=delta.text),
            self._item_event(f"{name}.done", item, arguments=delta.text, name=delta.name),
            self._event("response.output_item.done", output_index=index, item=item),
        ]
