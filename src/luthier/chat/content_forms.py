"""The form in which a template takes the content of a message: a text, or a list of parts.

Templates of vision-language models differ. Some take both, some (Idefics3, LLaVA) loop over parts
and show nothing of a text, and most templates of text models take a text alone. Which form a
template takes, and whether it shows images, is found by rendering, once for each role.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

from luthier.chat.conversation import read_conversation
from luthier.chat.images import (
    IMAGE_FIELD,
    IMAGE_PART,
    ImageExpander,
    find_image_message,
    find_placeholders,
)
from luthier.chat.provenance import TracedStr
from luthier.chat.template import ChatTemplate
from luthier.chat.types import ChatError

_TEXT = "zqtext"
"""A content that stands in no template."""
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "id": "call00001",
            "function": {"name": "look_up", "arguments": {"word": "lute"}},
        }
    ],
}


class ContentForms(NamedTuple):
    """The forms of a content that a template shows for one role."""

    takes_text: bool
    takes_parts: bool


class ContentConverter:
    """Gives the contents of messages as one template takes them."""

    def __init__(self, template: ChatTemplate, expander: ImageExpander) -> None:
        self._template = template
        self._expander = expander
        self._forms: dict[str, ContentForms] = {}

    @cached_property
    def image_part(self) -> Mapping[str, Any] | None:
        """What the template is to see of an image part; None where it shows no images."""
        # Some templates look at a part's type, others for the key `image`.
        content = [{**IMAGE_PART, IMAGE_FIELD: _TEXT}, _text_part(_TEXT)]
        for part in (IMAGE_PART, {**IMAGE_PART, IMAGE_FIELD: ""}):
            text = self._render([{"role": "user", "content": content}], part)
            if text is not None and find_placeholders(text, self._expander.placeholder):
                return part
        return None

    def find_image_part(self, messages: Any) -> Mapping[str, Any]:
        """Return what the template is to see of an image part.

        Raises ChatError for messages with images where the template shows none.
        """
        number = find_image_message(messages)
        if number is None:
            return IMAGE_PART
        if self.image_part is None:
            raise ChatError(
                "the message has an image, and the chat template shows none: it never writes the "
                f"model's image token ({self._expander.placeholder}); use a template that takes "
                "image parts, such as the one of the model's own processor (chat.template=FILE)",
                reason="template without images",
                message=number,
                field="content",
            )
        return self.image_part

    def convert(self, messages: Any) -> Any:
        """Return the messages with each content in a form that the template shows.

        A text becomes a list of one part where the template takes parts alone, and a list of one
        text the text where it takes texts alone. What is no list of messages, and what has no
        equal in the other form, is returned as it is.
        """
        if not isinstance(messages, list | tuple):
            return messages
        return [self._convert_message(message) for message in messages]

    def _convert_message(self, message: Any) -> Any:
        if not isinstance(message, dict) or type(message.get("role")) is not str:
            return message
        content = message.get("content")
        forms = self._forms.get(message["role"]) or self._find_forms(message["role"])
        # Most templates take both, or none of what is at hand.
        if forms.takes_text == forms.takes_parts:
            return message
        text = _only_text(content)
        if text is None or isinstance(content, str) == forms.takes_text:
            return message
        return {**message, "content": text if forms.takes_text else [_text_part(text)]}

    def _find_forms(self, role: str) -> ContentForms:
        """Return the forms of a content that the template shows for a role."""
        forms = self._forms.get(role)
        if forms is None:
            forms = ContentForms(
                self._shows_text(role, _TEXT), self._shows_text(role, [_text_part(_TEXT)])
            )
            self._forms[role] = forms
        return forms

    def _shows_text(self, role: str, content: Any) -> bool:
        """Return whether a content's text is written as it stands, and not as JSON."""
        for before in _messages_before(role):
            # The messages before it are those of other roles, in the form that these take.
            messages = [*self.convert(before), {"role": role, "content": content}]
            text = self._render(messages)
            if text is not None and any(
                origin is not None and origin.text == _TEXT and (length, start) == (len(_TEXT), 0)
                for length, origin, start in text._runs
            ):
                return True
        return False

    def _render(
        self, messages: list[dict[str, Any]], image_part: Mapping[str, Any] | None = None
    ) -> TracedStr | None:
        """Return a small conversation as the template writes it; None where it refuses it."""
        try:
            row = read_conversation(messages, image_part=image_part)
            return self._template.render_placeholders(row.messages, None, False)
        except ChatError:
            return None


def _only_text(content: Any) -> str | None:
    """Return a content that is one text, or a list of one text part, as text; else None."""
    if isinstance(content, str):
        return content
    part = content[0] if isinstance(content, list | tuple) and len(content) == 1 else None
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    return text if isinstance(text, str) else None


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _messages_before(role: str) -> list[list[dict[str, Any]]]:
    """Return messages, each list for itself, behind which a message of a role may stand."""
    question = {"role": "user", "content": "What is a lute?"}
    if role == "user":
        return [[]]
    if role == "tool":
        return [[question, _CALL], [question]]
    return [[], [question]]
