"""Checking a row and copying it so that every text in it knows its message and field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from luthier.chat.images import IMAGE_FIELD, ImageOrigin, ImagePart, is_image_part
from luthier.chat.provenance import FieldOrigin, TracedStr, trace_field
from luthier.chat.types import ChatError

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names of the reasoning field; transformers passes a message's reasoning on under two of them."""
MAX_DEPTH = 64
MAX_CHARACTERS = 50_000_000
Result = TypeVar("Result")
_LINK_KEYS = ("id", "type", "index")


@dataclass(slots=True)
class Conversation:
    """A checked row: traced messages and tools, and the origins that must reach the text."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    origins: list[FieldOrigin] = field(default_factory=list)
    """The origins of non-empty fields, which must not be lost."""
    texts: list[str] = field(default_factory=list)
    """Every text of the row, as plain strings."""
    train: list[bool | None] = field(default_factory=list)
    """Each message's own `train` flag; None where it has none."""
    numbers: list[int] = field(default_factory=list)
    """Each message's number in the row as it was given: rows may have lost turns of their front."""
    image_count: int = 0
    """How many images the row has as it was given."""

    def role(self, index: int) -> str:
        """Return the role of the message at a position."""
        return self.messages[index]["role"]


def read_conversation(
    messages: Any, tools: Any = None, image_part: Mapping[str, Any] | None = None
) -> Conversation:
    """Copy a row into traced form.

    `image_part`: what the template sees of an image part; None where rows may have no images.
    Raises ChatError for a row that is no conversation: wrong types, missing content, content parts
    that are neither text nor an image, text that is no valid Unicode, rows that are cyclic or
    enormous.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ChatError(
            "`messages` must be a list of at least one message, each a dict with `role` and "
            f"`content`; found {_describe_type(messages)}",
            reason="no messages",
        )
    conversation = Conversation([], None)
    for index, message in enumerate(messages):
        conversation.messages.append(_read_message(conversation, index, message, image_part))
    if tools is not None:
        conversation.tools = _read_tools(conversation, tools)
    if sum(map(len, conversation.texts)) > MAX_CHARACTERS:
        raise ChatError(f"the row holds over {MAX_CHARACTERS:,} characters", reason="enormous row")
    return conversation


def _describe_type(value: Any) -> str:
    is_empty = isinstance(value, list | tuple) and not value
    return "an empty list" if is_empty else type(value).__name__


def _read_message(
    conversation: Conversation, index: int, message: Any, image_part: Mapping[str, Any] | None
) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ChatError(
            f"a message must be a dict with `role` and `content`; found {type(message).__name__}",
            reason="malformed message",
            message=index,
        )
    role = message.get("role")
    if type(role) is not str or not role:
        raise ChatError(
            f"a message needs a role, such as `user` or `assistant`; found {role!r}",
            reason="malformed message",
            message=index,
            field="role",
        )
    # Nearly all messages are a role and a text: they skip what the others need.
    content = message.get("content")
    if type(content) is not str:
        _check_content(index, role, message, image_part is not None)
    elif len(message) == 2:
        conversation.numbers.append(index)
        conversation.train.append(None)
        origin = FieldOrigin(index, role, "content", content)
        return {"role": role, "content": _read_text(conversation, origin, content, True)}
    train = message.get("train")
    conversation.numbers.append(index)
    conversation.train.append(None if train is None else bool(train))
    copied: dict[str, Any] = {}
    for key, value in message.items():
        if key == "role":
            copied[key] = value
        # Arrow fills missing keys with null, and APIs send `"content": null`: neither is a value.
        elif value is None or key == "train":
            continue
        elif key == "content" and type(value) is str:
            copied[key] = _read_text(
                conversation, FieldOrigin(index, role, key, value), value, True
            )
        elif key == "content" and isinstance(value, list | tuple):
            copied[key] = [
                _read_part(conversation, index, role, part, image_part) for part in value
            ]
        else:
            copied[key] = _read_field(conversation, index, role, key, value)
    return add_reasoning_aliases(copied)


def add_reasoning_aliases(message: dict[str, Any]) -> dict[str, Any]:
    """Give the reasoning under the names that transformers gives it."""
    for name in REASONING_FIELDS:
        if name in message:
            reasoning = message[name]
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def is_empty_reply(message: dict[str, Any]) -> bool:
    """Return whether a message says nothing: no text, no call, and no reasoning."""
    if message.get("tool_calls"):
        return False
    return all(_is_blank(message.get(name)) for name in ("content", *REASONING_FIELDS))


def _is_blank(value: Any) -> bool:
    """Return whether a text, or each of its parts, is absent, empty or white space."""
    if isinstance(value, list | tuple):
        texts = (item.get("text") if isinstance(item, dict) else item for item in value)
        return all(map(_is_blank, texts))
    return value is None or (isinstance(value, str) and not value.strip())


def _check_content(index: int, role: str, message: dict, takes_images: bool) -> None:
    content = message.get("content")
    if content is None:
        has_more = message.get("tool_calls") or any(message.get(name) for name in REASONING_FIELDS)
        if role in ("system", "developer") or has_more:
            return
        raise ChatError(
            "the message has no content (write an empty string for an empty one)",
            reason="missing content",
            message=index,
            field="content",
        )
    for item in content if isinstance(content, list | tuple) else [content]:
        is_image = is_image_part(item) and content is not item
        if takes_images and is_image:
            _check_image(index, item)
            continue
        # Results of tools may be any JSON, but templates would read a part of an image as one.
        if role == "tool" and isinstance(item, dict | str) and not is_image:
            continue
        if not (isinstance(item, dict) and isinstance(item.get("text"), str)):
            raise _content_error(index, item, takes_images)


def _content_error(index: int, item: Any, takes_images: bool) -> ChatError:
    """Return what is wrong with a content, or a part of one, that is neither text nor an image."""
    type_name = item.get("type") if isinstance(item, dict) else type(item).__name__
    if is_image_part(item) and not takes_images:
        problem = (
            "the message has an image, and this model takes text only; use a vision-language "
            "model, or remove the image"
        )
    elif takes_images:
        problem = (
            "content must be a string, or a list of parts, each "
            '{"type": "text", "text": ...} or {"type": "image", "image": ...}; '
            f"found {type_name!r}"
        )
    else:
        problem = (
            "only text can be trained: content must be a string or a list of "
            f'{{"type": "text", "text": ...}} parts; found {type_name!r}'
        )
    return ChatError(problem, reason="content is not text", message=index, field="content")


def _check_image(index: int, part: dict[str, Any]) -> None:
    if part.get(IMAGE_FIELD) is None:
        raise ChatError(
            'an image part has no image: it must be {"type": "image", "image": ...}',
            reason="malformed message",
            message=index,
            field="content",
        )


def _read_part(
    conversation: Conversation,
    index: int,
    role: str,
    part: Any,
    image_part: Mapping[str, Any] | None,
) -> Any:
    """Copy one part of a content: an image, a text, or any JSON of a tool's result."""
    if image_part is not None and is_image_part(part):
        origin = ImageOrigin(index, role, conversation.image_count, part[IMAGE_FIELD])
        conversation.image_count += 1
        return ImagePart(image_part, origin)
    if isinstance(part, dict) and part.get("type") == "text":
        # Arrow gives all parts the same keys; templates ask whether `image` is one of a part's.
        part = {key: value for key, value in part.items() if value is not None}
    return _read_field(conversation, index, role, "content", part)


def _read_field(conversation: Conversation, index: int, role: str, key: str, value: Any) -> Any:
    """Copy one field; every text in it gets an origin of its own."""
    is_required = key in ("content", "tool_calls") or key in REASONING_FIELDS
    # The name on a tool's result only links it to its call; elsewhere it says who speaks.
    is_required |= key == "name" and role not in ("tool", "function", "ipython")

    def trace(text: str, path: tuple) -> TracedStr:
        # These only link or type a call, or type a piece of content.
        is_link = key == "tool_calls" and len(path) == 2 and path[1] in _LINK_KEYS
        is_type = key == "content" and path and path[-1] == "type"
        origin = FieldOrigin(index, role, key, text)
        origin.is_json = bool(path) and path[-1] == "arguments"
        return _read_text(conversation, origin, text, is_required and not (is_link or is_type))

    return _copy_value(value, trace, (), index, key)


def _copy_value(
    value: Any, trace: Callable[[str, tuple], TracedStr], path: tuple, index: int | None, key: str
) -> Any:
    """Return a deep copy in plain types, with `trace(text, path)` instead of every text.

    `path`: the keys and indices that lead to the value. `index`, `key`: message and field, for
    errors.
    """
    if isinstance(value, str):
        return trace(str.__str__(value), path)
    if value is None or type(value) in (bool, int, float):
        return value
    if len(path) > MAX_DEPTH:
        raise ChatError(
            f"the value is nested over {MAX_DEPTH} levels deep, or holds itself",
            reason="cyclic row",
            message=index,
            field=key,
        )
    if isinstance(value, dict):
        # Keys of a call's arguments are text of the row too; keys above them are the format's own.
        traces_keys = "arguments" in path or "parameters" in path
        copied = {}
        for name, item in value.items():
            item_path = (*path, name)
            is_text = traces_keys and isinstance(name, str)
            copied_name = trace(name, item_path) if is_text else name
            copied[copied_name] = _copy_value(item, trace, item_path, index, key)
        return copied
    if isinstance(value, list | tuple):
        return [
            _copy_value(item, trace, (*path, number), index, key)
            for number, item in enumerate(value)
        ]
    # Other objects become plain types, as transformers shows them to templates.
    from transformers.utils.chat_template_utils import _plain_template_data

    return _copy_value(_plain_template_data(value), trace, (*path, None), index, key)


def _read_text(
    conversation: Conversation, origin: FieldOrigin, value: str, is_required: bool
) -> TracedStr:
    if not value.isascii():
        _check_unicode(value, origin)
    conversation.texts.append(value)
    if is_required and value and not value.isspace():
        conversation.origins.append(origin)
    return trace_field(origin, value)


def _check_unicode(value: str, origin: FieldOrigin) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ChatError(
            f"character {error.start} is half of a surrogate pair, which is not text; "
            "read the file as UTF-8 or remove the character",
            reason="invalid unicode",
            message=origin.message,
            field=origin.field,
        ) from None


def _read_tools(conversation: Conversation, tools: Any) -> list[Any]:
    if not isinstance(tools, list | tuple):
        raise ChatError(
            f"`tools` must be a list of JSON schemas; found {type(tools).__name__}",
            reason="malformed tools",
            field="tools",
        )
    # Templates rewrite tools in many ways: it is enough that some of their text arrives.
    shared = FieldOrigin(None, None, "tools")

    def trace(text: str, path: tuple) -> TracedStr:
        return _read_text(conversation, shared, text, False)

    copied = [_copy_value(to_schema(tool), trace, (), None, "tools") for tool in tools]
    if copied:
        conversation.origins.append(shared)
    return copied


def to_schema(tool: Any) -> Any:
    """Return a tool as a JSON schema; functions are described as transformers does it."""
    if isinstance(tool, dict):
        return tool
    if callable(tool):
        from transformers.utils import get_json_schema

        return get_json_schema(tool)
    raise ChatError(
        f"a tool must be a JSON schema (a dict); found {type(tool).__name__}",
        reason="malformed tools",
        field="tools",
    )


def retry_with_empty_content(use: Callable[[Any], Result], messages: Any) -> Result:
    """Use the messages as they are; where the template refuses them, with empty content.

    APIs send a tool call with `"content": null`, transformers drops the key, and some templates
    (Qwen3's first one) raise without it. Such a row means an empty content.
    """
    try:
        return use(messages)
    except ChatError as error:
        if error.reason != "template refuses":
            raise
        filled = fill_empty_content(messages)
        if filled == messages:
            raise
        return use(filled)


def fill_empty_content(messages: Any) -> Any:
    """Return the messages with an empty content where a tool call has none."""
    return [
        {**message, "content": ""}
        if message.get("tool_calls") and message.get("content") is None
        else message
        for message in messages
    ]
