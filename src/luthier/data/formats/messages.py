"""Messages as chat templates read them, from every spelling that datasets have.

A message has a role and a content; tools and calls of them are in OpenAI's form; content that is a
list of parts becomes text, reasoning and calls; ShareGPT's turns (`from` and `value`) become
messages. Unknown fields pass through, and what no template could show is a RowError.
"""

import difflib
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from luthier.data.formats.columns import (
    describe_value,
    list_or_empty,
    parse_json_cell,
    reply_text,
    require_list,
)
from luthier.data.formats.image_parts import (
    IMAGE_PART_TYPES,
    OTHER_MEDIA_TYPES,
    check_message_keys,
    check_text_part,
    describe_other_media,
    read_image_part,
)
from luthier.data.rows import RowError, describe_type, excerpt

ToolCall = dict[str, Any]


def read_tools(value: Any, column: str) -> list[dict[str, Any]]:
    """Return the tools of a row: a list of objects, or JSON text of one, as exports write it.

    A tool without its `function` wrapper (`functions` of OpenAI, `tools` of LLaMA-Factory) gets it.
    """
    if isinstance(value, str):
        return _parse_tools(value, column)
    if not isinstance(value, list):
        raise RowError(
            f"the tools ({column!r}) are {describe_type(value)}; expected a list of objects"
        )
    return [_read_tool(tool, column) for tool in value]


@lru_cache(maxsize=256)
def _parse_tools(text: str, column: str) -> list[dict[str, Any]]:
    """Return the tools of JSON text, which is often the same for many rows."""
    value = parse_json_cell(text, f"the tools ({column!r})", "a list of objects")
    return [] if value is None else read_tools(value, column)


def _read_tool(tool: Any, column: str) -> dict[str, Any]:
    """Return one tool, wrapped as `{"type": "function", "function": ...}` where it has only a
    name."""
    if isinstance(tool, str):
        tool = parse_json_cell(tool, f"an entry of {column!r}", "an object")
    if not isinstance(tool, dict):
        raise RowError(f"the tools ({column!r}) hold {describe_type(tool)}; expected objects")
    if "function" in tool or "name" not in tool or tool.get("type", "function") != "function":
        return tool
    function = {key: value for key, value in tool.items() if key != "type"}
    return {"type": "function", "function": function}


def read_tool_calls(value: Any) -> list[ToolCall]:
    """Return the `tool_calls` of a message, each with its function's name and arguments."""
    if isinstance(value, str):
        value = parse_json_cell(value, "tool_calls", "a list of calls")
    if not isinstance(value, list):
        raise RowError(f"tool_calls is {describe_type(value)}; expected a list")
    return [read_tool_call(call, f"tool_calls[{number}]") for number, call in enumerate(value)]


def read_tool_call(call: Any, where: str) -> ToolCall:
    """Return one call; a flat one (`{"name", "arguments"}`) gets its `function` wrapper.

    Arguments stay as they are, an object or JSON text; a call that has none gives an empty object.
    """
    if isinstance(call, str):
        call = parse_json_cell(call, where, 'an object {"name": ..., "arguments": {...}}')
    if not isinstance(call, dict):
        raise RowError(f"{where} is {describe_type(call)}; expected an object")
    fields = {key: value for key, value in call.items() if value is not None}
    if "function" in fields:
        return {**fields, "function": _check_function(fields["function"], where)}
    # A flat call has its id beside the name; OpenAI's form has it outside of `function`.
    outer = {key: fields.pop(key) for key in ("id", "index") if key in fields}
    fields.pop("type", None)
    return {**outer, "type": "function", "function": _check_function(fields, where)}


def _check_function(function: Any, where: str) -> dict[str, Any]:
    """Return the function of a call, with a name and with arguments."""
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        description = (
            f"it has: {', '.join(function)}"
            if isinstance(function, dict)
            else describe_type(function)
        )
        raise RowError(f"{where} names no function ({description}); expected name and arguments")
    arguments = function.get("arguments")
    if arguments is None:
        return {**function, "arguments": {}}
    if not isinstance(arguments, dict | str):
        raise RowError(
            f"the arguments of {where} are {describe_type(arguments)}; expected an object"
        )
    return function


TEXT_PART_TYPES = ("text", "input_text", "output_text", None)
REASONING_PART_TYPES = ("reasoning", "thinking")
CALL_PART_TYPES = ("tool_call", "function_call")
# Chat templates show a message in this order, so parts in another one would train as what nobody
# wrote.
_PART_ORDER = {"reasoning": 0, "text": 1, "call": 2}


@dataclass
class MessageContent:
    """What the parts of one message say."""

    texts: list[dict[str, Any]] = field(default_factory=list)
    """The parts of text and of images, in their order."""
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)

    @property
    def content(self) -> str | list[dict[str, Any]] | None:
        """The text: a plain one where one part holds it all, which every template can show.

        Several parts stay parts: servers differ in what they put between them. So does an image.
        """
        if len(self.texts) > 1 or (self.texts and self.texts[0]["type"] == "image"):
            return self.texts
        if not self.texts:
            return None if self.reasoning or self.calls else ""
        text: str = self.texts[0]["text"]
        return text


def read_content_parts(content_parts: list[Any]) -> MessageContent:
    """Return the parts of a message's content.

    RowError names one that is neither text, an image nor known.
    """
    content, reached = MessageContent(), 0
    for content_part in content_parts:
        group = _add_part(content, content_part)
        if _PART_ORDER[group] < reached:
            raise RowError(
                f"a {group} part comes after other parts; a message has its reasoning first, "
                "then its text, then its calls, so split it into several messages"
            )
        reached = _PART_ORDER[group]
    return content


def _add_part(content: MessageContent, content_part: Any) -> str:
    """Put one part where it belongs, and say which group it is of."""
    if not isinstance(content_part, dict):
        raise RowError(
            f"a content part is {describe_type(content_part)!r}; only parts of text and images are "
            "read"
        )
    name = content_part.get("type")
    name = name if isinstance(name, str | None) else str(name)
    if name in IMAGE_PART_TYPES:
        content.texts.append(read_image_part(content_part))
        return "text"
    if name in OTHER_MEDIA_TYPES:
        raise RowError(describe_other_media(name))
    # The text of a part stands under `text`, under `value`, or under the part's type, as in
    # `thinking`.
    value = next(
        (content_part[key] for key in ("text", "value", name) if content_part.get(key) is not None),
        None,
    )
    if isinstance(value, str) and name in CALL_PART_TYPES:
        content.calls.append(read_tool_call(value, f"the {name} part"))
        return "call"
    if isinstance(value, str) and name in REASONING_PART_TYPES:
        content.reasoning.append(value)
        return "reasoning"
    if not isinstance(value, str) or name not in TEXT_PART_TYPES:
        type_name = excerpt(content_part.get("type", "no type"))
        raise RowError(f"a content part is {type_name!r}; only parts of text and images are read")
    check_text_part(content_part)
    text_part = {
        key: entry for key, entry in content_part.items() if entry is not None and key != "value"
    }
    content.texts.append({**text_part, "type": "text", "text": value})
    return "text"


def are_content_parts(content: list[Any]) -> bool:
    """Return whether a tool's result is written as parts, and is no list of its own."""
    return all(isinstance(item, dict) and isinstance(item.get("type"), str) for item in content)


Message = dict[str, Any]

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""The names under which templates and servers know a message's reasoning."""
TRAIN_KEYS = (
    "train", "training", "trainable", "loss", "weight", "loss_weight", "loss_mask",
)  # fmt: skip
"""Keys of a message that say 1 or true where it trains.

`training` is the usual `message_field_training` of axolotl (docs.axolotl.ai, dataset formats,
conversation), `loss` is ms-swift's (swift.readthedocs.io, custom dataset), `weight` OpenAI's
(fine-tuning guide), `loss_mask` verl's (github.com/verl-project/verl/pull/5472) and that of
LLaMA-Factory (github.com/hiyouga/LlamaFactory/pull/9630).
"""
MASK_KEYS = ("mask", "masked")
"""Keys of a message that say 1 or true where it does not train.

So has it torchtune's `Message.masked` (pytorch.org/torchtune, torchtune.data.Message;
github.com/meta-pytorch/torchtune/issues/2261). Where `mask` can only mean a loss mask, in which 1
trains, the row is refused.
"""
_TEXT_KEYS = (*REASONING_KEYS, "tool_call_id", "name")
_READ_KEYS = frozenset({"role", "content", "tool_calls", "train", *_TEXT_KEYS})


def read_messages(value: Any, column: str, json_replies: bool = False) -> list[Message]:
    """Return the messages of a column, or RowError for what is not a list of messages.

    Nulls, as exports and Arrow write them, mean that a field is absent. `function_call` and
    `function` results of OpenAI's older API become tool calls and tool results, and all that says
    whether a message trains becomes `train`. The messages are the row's own where nothing was to
    be changed. `json_replies`: replies that are objects become JSON text.
    """
    messages = value if type(value) is list else require_list(value, column, "messages")
    if not messages:
        raise RowError(f"{column!r} is an empty list; expected messages")
    for message in messages:
        # Most messages are a role and a text, and rows have many: no call for those.
        if type(message) is not dict or len(message) != 2:
            return _check_messages(messages, column, json_replies)
        role = message.get("role")
        if type(role) is not str or not role or type(message.get("content")) is not str:
            return _check_messages(messages, column, json_replies)
    return messages


def _check_messages(messages: list[Any], column: str, json_replies: bool) -> list[Message]:
    """Return every message checked; RowError says which one is wrong."""
    checked = []
    for index, message in enumerate(messages):
        try:
            checked.append(read_message(message, json_replies))
        except RowError as error:
            raise type(error)(f"{column}[{index}]: {error}") from None
    _check_masks(messages, checked, column)
    # OpenAI's older API answers a `function_call` with a message of the role `function`.
    if any(isinstance(message, dict) and message.get("function_call") for message in messages):
        return [m | {"role": "tool"} if m["role"] == "function" else m for m in checked]
    return checked


def read_message(message: Any, json_replies: bool = False) -> Message:
    """Return one message without its nulls; RowError for what is not a message."""
    if not isinstance(message, dict):
        raise RowError(
            f"this is {describe_type(message)}; expected an object with role and content"
        )
    fields = {key: value for key, value in message.items() if value is not None}
    role = fields.get("role")
    if not isinstance(role, str) or not role:
        raise RowError(_describe_missing_role(message))
    _put_content(fields, role, json_replies)
    if len(fields) > 2 or "content" not in fields:
        _put_calls(fields)
        _put_train(fields)
        _check_texts(fields)
        check_message_keys(fields)
    if "content" not in fields and not _may_lack_content(fields, role):
        state = "is null" if "content" in message else "is missing"
        raise RowError(f"the content of this {role} message {state}; expected text")
    return fields


def _describe_missing_role(message: dict[str, Any]) -> str:
    """Return the text for a message whose role is missing or is no name."""
    if "role" in message:
        role = describe_value(message["role"])
        return f"the role is {role}; expected a name such as user or assistant"
    hint = ""
    if "from" in message:
        hint = "; from and value are ShareGPT's names, and this source is read as messages"
    return f"there is no role (it has: {', '.join(message) or 'nothing'}){hint}"


def _put_content(message: Message, role: str, json_replies: bool) -> None:
    """Make the content text or parts of text; put what else its parts say into their own fields."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return
    # A tool may answer with an object or a list of objects, which templates write out as JSON.
    if role == "tool" and not (isinstance(content, list) and are_content_parts(content)):
        _check_result(content)
    elif isinstance(content, list) and (role != "assistant" or _are_parts(content, json_replies)):
        _put_parts(message, content)
    elif role == "assistant":
        message["content"] = reply_text(content, "content", json_replies)
    else:
        raise RowError(f"the content is {describe_value(content)}; expected text")


def _are_parts(content: list[Any], json_replies: bool) -> bool:
    """Return whether a reply that is a list is meant as parts, and not as a list of its own.

    With `json_replies` a list of objects that have a `type` of their own is a reply.
    """
    types = (*TEXT_PART_TYPES, *REASONING_PART_TYPES, *CALL_PART_TYPES, *IMAGE_PART_TYPES)
    return all(
        isinstance(item, dict)
        and ("text" in item or "type" in item)
        and (not json_replies or item.get("type") in types)
        for item in content
    )


def _check_result(content: Any) -> None:
    """Refuse a tool's result that no template shows: one that is no text, object or list."""
    entries = content if isinstance(content, list) else [content]
    if not all(isinstance(entry, dict | str) for entry in entries):
        raise RowError(f"the content is {describe_value(content)}; expected text")


def _put_parts(message: Message, content_parts: list[Any]) -> None:
    """Put the parts of text, reasoning and calls each into its field of the message."""
    read_content = read_content_parts(content_parts)
    if read_content.content is None:
        del message["content"]
    else:
        message["content"] = read_content.content
    if read_content.reasoning:
        message["reasoning_content"] = "\n\n".join(read_content.reasoning)
    if read_content.calls:
        message["tool_calls"] = [*message.get("tool_calls", []), *read_content.calls]


def _put_calls(message: Message) -> None:
    """Put the calls into OpenAI's form; `function_call` is what its older API had."""
    calls = read_tool_calls(message.pop("tool_calls")) if "tool_calls" in message else []
    if "function_call" in message:
        calls.append(read_tool_call(message.pop("function_call"), "function_call"))
    if calls:
        message["tool_calls"] = calls


def _put_train(message: Message) -> None:
    """Put whether the message trains under the one name `train`."""
    trains: dict[str, bool] = {}
    for name in (*TRAIN_KEYS, *MASK_KEYS):
        if name in message:
            trains[name] = _read_flag(name, message.pop(name)) is not (name in MASK_KEYS)
    if not trains:
        return
    if len({*trains.values()}) > 1:
        says = {value: name for name, value in trains.items()}
        raise RowError(
            f"{says[True]} says that this message trains, and {says[False]} says that it does "
            "not; keep one of them"
        )
    message["train"] = next(iter(trains.values()))


def _read_flag(name: str, value: Any) -> bool:
    """Return a flag that is true, false, 1 or 0."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, int | float) and 0 < value < 1:
        raise RowError(
            f"{name} is {value}, and a message trains whole (1) or not at all (0). To see some "
            "rows less often, make them a source of their own with a smaller `weight` or `repeats`"
        )
    shown = excerpt(value) if isinstance(value, str) else value
    shown = shown if isinstance(value, int | float | str) else describe_value(value)
    raise RowError(f"{name} is {shown!r}; expected true or 1, or false or 0")


def _check_masks(messages: list[Any], checked: list[Message], column: str) -> None:
    """Refuse a `mask` that can only be a loss mask, in which 1 means that a message trains."""
    masks = [
        (message["role"], bool(raw["mask"]))
        for raw, message in zip(messages, checked, strict=True)
        if raw.get("mask") is not None
    ]
    replies = [is_masked for role, is_masked in masks if role == "assistant"]
    others = [is_masked for role, is_masked in masks if role != "assistant"]
    if replies and all(replies) and others and not any(others):
        raise RowError(
            f"{column}: mask is 1 for every reply and 0 for the others, as in a loss mask. Here "
            "mask=1 means that a message does not train, so nothing would. Rename it to loss_mask"
        )


def find_other_keys(example: dict[str, Any]) -> set[str]:
    """Return the keys of an example's messages that are none of a message's own."""
    found: set[str] = set()
    for name in ("messages", "prompt", "chosen", "rejected", "completion"):
        for message in example.get(name) or ():
            # Most messages are a role and a text.
            if len(message) > 2:
                found |= message.keys() - _READ_KEYS
    return found


def _check_texts(message: Message) -> None:
    """Refuse other values where a text is expected."""
    for name in _TEXT_KEYS:
        if not isinstance(message.get(name, ""), str):
            raise RowError(f"{name} is {describe_value(message[name])}; expected text")


def _may_lack_content(message: Message, role: str) -> bool:
    """Return whether a message says something without content: a system slot, a call, or
    reasoning."""
    if role in ("system", "developer"):
        return True
    return bool(message.get("tool_calls") or any(message.get(name) for name in REASONING_KEYS))


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
ROLE_OF_SPEAKER = {name: role for role, names in _SPEAKERS.items() for name in names}
_THINK_BLOCK = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


def read_turns(value: Any, column: str, json_replies: bool = False) -> list[Message]:
    """Return the turns of a column as messages, or RowError for what is not a list of turns."""
    turns = require_list(value, column, "turns")
    if not turns:
        raise RowError(f"{column!r} is an empty list; expected turns")
    messages = []
    for index, turn in enumerate(turns):
        try:
            messages.append(_message_of_turn(turn, json_replies))
        except RowError as error:
            raise type(error)(f"{column}[{index}]: {error}") from None
    if any("mask" in turn for turn in turns):
        _check_masks(turns, messages, column)
    return messages


def read_messages_or_turns(value: Any, column: str, json_replies: bool = False) -> list[Message]:
    """Return messages in either spelling: role and content, or from and value."""
    messages = require_list(value, column, "messages")
    read = read_turns if speaker_key(messages) == "from" else read_messages
    return read(messages, column, json_replies)


def speaker_key(value: Any) -> Literal["role", "from"] | None:
    """Return how messages name their speaker.

    None for what is no message and no list of messages.
    """
    first = value if isinstance(value, dict) else next(iter(list_or_empty(value)), None)
    if not isinstance(first, dict):
        return None
    return "role" if "role" in first else "from" if "from" in first else None


def parse_message_list(text: str, column: str, json_replies: bool = False) -> list[Message] | None:
    """Return the messages of text, as CSV cells hold them; None for any other text."""
    is_list = text.startswith("[") and speaker_key(text) is not None
    return read_messages_or_turns(text, column, json_replies) if is_list else None


def _message_of_turn(turn: Any, json_replies: bool) -> Message:
    """Return one turn as a message; what it has besides from and value goes with it."""
    if not isinstance(turn, dict):
        raise RowError(f"this is {describe_type(turn)}; expected an object with from and value")
    speaker, text = turn.get("from"), turn.get("value")
    role = (ROLE_OF_SPEAKER.get(speaker) if type(speaker) is str else None) or _role_of_turn(turn)
    # Most turns are a speaker and a text: no further call for those.
    if type(text) is str and role != "call" and len(turn) == 2:
        return {"role": role, "content": text}
    if text is None:
        state = "is null" if "value" in turn else "is missing"
        raise RowError(f"the value of this {speaker} turn {state}; expected text")
    rest = {key: entry for key, entry in turn.items() if key not in ("from", "value")}
    if role == "call":
        return read_message({"role": "assistant", **read_call_turn(text), **rest})
    if role != "assistant" and not isinstance(text, str | list | dict):
        raise RowError(f"the value is {describe_value(text)}; expected text")
    return read_message({"role": role, "content": text, **rest}, json_replies)


def _role_of_turn(turn: dict[str, Any]) -> str:
    """Return the role of a speaker however it is capitalised.

    RowError names one that is not known.
    """
    if "from" not in turn:
        advice = "; role and content are OpenAI's names" if "role" in turn else ""
        raise RowError(f"there is no from (it has: {', '.join(turn) or 'nothing'}){advice}")
    speaker = turn["from"]
    if not isinstance(speaker, str):
        raise RowError(f"from is {describe_value(speaker)}; expected a name such as human or gpt")
    role = ROLE_OF_SPEAKER.get(speaker.strip().lower())
    if role is None:
        near = difflib.get_close_matches(speaker.lower(), ROLE_OF_SPEAKER, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise RowError(
            f"the role {excerpt(speaker)!r} is not known{hint}; known are "
            f"{', '.join(ROLE_OF_SPEAKER)}"
        )
    return role


def read_call_turn(text: Any) -> Message:
    """Return the calls of a turn, and the reasoning in front of them, as LLaMA-Factory writes both.

    The text is JSON of one call (name and arguments) or of a list of them; `<think>...</think>`
    before it is reasoning.
    """
    thought = _THINK_BLOCK.match(text) if isinstance(text, str) else None
    calls = text[thought.end() :] if thought else text
    if isinstance(calls, str):
        calls = parse_json_cell(
            calls, "the value of this call", '{"name": ..., "arguments": {...}}'
        )
    calls = calls if isinstance(calls, list) else [calls]
    message: Message = {
        "tool_calls": [read_tool_call(call, f"call {number}") for number, call in enumerate(calls)]
    }
    if thought and thought[1].strip():
        message["reasoning_content"] = thought[1].strip("\n")
    return message
