"""The arguments of tool calls in the form that a template takes: an object or JSON text.

OpenAI's API has them as JSON text. Some templates loop over them (Qwen3.5), some encode text once
more (Qwen2.5, gpt-oss), some add them to a string and raise for an object (DeepSeek-V3). Which
form a template takes is found by rendering a call in both. Where it takes objects, a row gives
objects, as servers do: vLLM parses the text before it renders (`_postprocess_messages` in
vllm/entrypoints/chat_utils.py). So both forms of a row give the same ids.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any, Literal

from luthier.chat.conversation import read_conversation
from luthier.chat.template import ChatTemplate
from luthier.chat.types import ChatError

_ARGUMENTS = {"zone": "UTC"}
_TEXT = json.dumps(_ARGUMENTS)
_TOOL = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Tells the time.",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string", "description": "A time zone."}},
            "required": ["zone"],
        },
    },
}
# Templates differ in what they take beside a call: some need a content, some refuse it, and
# Mistral's want an id of nine characters.
_CONTENTS: tuple[dict[str, str], ...] = ({"content": ""}, {}, {"content": "One moment."})
_CALL_ID = "call00001"

ArgumentForm = Literal["object", "text"]


class ArgumentConverter:
    """Gives the arguments of calls as one template takes them."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    @cached_property
    def form(self) -> ArgumentForm | None:
        """The form that the template takes; None where it shows no arguments in either."""
        shown = self._render(_ARGUMENTS)
        if shown is not None and "UTC" in shown and str(_ARGUMENTS) not in shown:
            return "object"
        text = self._render(_TEXT)
        return "text" if text is not None and _TEXT in text else None

    def convert(self, messages: Any) -> Any:
        """Return the messages with the arguments of all calls in the template's form.

        Arguments that have no equal in that form stay as they are. What is no list of messages is
        returned as it is.
        """
        if not isinstance(messages, list | tuple) or not any(map(_has_calls, messages)):
            return messages
        form = self.form
        if form is None:
            return messages
        return [
            {**message, "tool_calls": [_convert_call(call, form) for call in message["tool_calls"]]}
            if _has_calls(message)
            else message
            for message in messages
        ]

    def _render(self, arguments: dict[str, str] | str) -> str | None:
        """Return a call with these arguments as rendered; None where the template refuses it."""
        function = {"name": "clock", "arguments": arguments}
        call = {"type": "function", "id": _CALL_ID, "function": function}
        result = {"role": "tool", "name": "clock", "tool_call_id": _CALL_ID, "content": "noon"}
        for content in _CONTENTS:
            turn = {"role": "assistant", **content, "tool_calls": [call]}
            messages = [{"role": "user", "content": "Hi"}, turn, result]
            conversation = read_conversation(messages, [_TOOL])
            try:
                text = self._template.render(conversation.messages, conversation.tools, False)
            except ChatError:
                continue
            return str.__str__(text)
        return None


def _has_calls(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("tool_calls"), list)


def _convert_call(call: Any, form: ArgumentForm) -> Any:
    """Return one call with its arguments in this form, or as it is where it has none."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    arguments = function["arguments"]
    if form == "object" and isinstance(arguments, str):
        arguments = _parse_object(arguments)
    elif form == "text" and isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _parse_object(text: str) -> dict[str, Any] | str:
    """Return the object that JSON text means; the text itself where it means none, or more."""
    # OpenAI's API writes an empty text for a call without arguments.
    if not text.strip():
        return {}
    try:
        value = json.loads(
            text, object_pairs_hook=_object_of_pairs, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object whose keys differ: of equal ones all but the last would be lost."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key appears twice")
    return value


def _refuse_constant(name: str) -> Any:
    """Refuse NaN and Infinity, which JSON has not and templates would write."""
    raise ValueError(name)
