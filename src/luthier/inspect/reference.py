"""Prompts as transformers writes them, to hold the encoder's own against."""

import re
from collections.abc import Iterable
from datetime import date
from typing import Any

from jinja2 import TemplateError

from luthier.chat import ChatEncoder
from luthier.chat.conversation import with_content
from luthier.data import Example


class Reference:
    """`apply_chat_template` under the settings of an encoder."""

    def __init__(self, tokenizer: Any, encoder: ChatEncoder, template: str | None) -> None:
        self._tokenizer = tokenizer
        # None leaves the choice between a tokenizer's templates to transformers.
        self._template = None if template is None else encoder.settings()["template"]
        self._variables = encoder.variables
        self._encoder = encoder
        # transformers writes the day it is; a pinned day is compared by way of it.
        self._today = _of_today(tokenizer, encoder)
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, added)) or "(?!)")

    def agrees(self, row: Example, message: int, ids: list[int]) -> list[int] | None:
        """The prompt before a message as transformers writes it where it is not `ids`.

        None where it agrees, and where transformers has no prompt to compare with: none before the
        first message, and none for control tokens in a user's text beside tags in a reply's, of
        which it can take only both or neither as text.
        """
        before = [_plain(each) for each in row["messages"][:message]]
        if not before:
            return None
        tools = row.get("tools")
        if self._today is not None:
            pinned = self._encoder.prompt(before, tools)
            if pinned != ids:
                return pinned
            ids = self._today.prompt(before, tools)
        said = self._holds_controls(m for m in before if m["role"] == "assistant")
        asked = self._holds_controls([*(m for m in before if m["role"] != "assistant"), tools])
        ways = [asked] if not said else [True] if asked else [False, True]
        found = [self._prompt(before, tools, sanitize) for sanitize in ways]
        if ids in found or (said and asked):
            return None
        return found[0]

    def _prompt(self, messages: list[dict[str, Any]], tools: Any, sanitize: bool) -> list[int]:
        try:
            return self._applied(messages, tools, sanitize)
        except TemplateError:
            return self._applied(with_content(messages), tools, sanitize)

    def _applied(self, messages: list[dict[str, Any]], tools: Any, sanitize: bool) -> list[int]:
        ids: list[int] = self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self._template,
            add_generation_prompt=True,
            return_dict=False,
            sanitize_control_tokens=sanitize,
            **self._variables,
        )
        return ids

    def _holds_controls(self, values: Iterable[Any]) -> bool:
        """Whether text somewhere in the values holds an added token."""
        return any(self._controls.search(text) for value in values for text in _texts(value))


def _of_today(tokenizer: Any, encoder: ChatEncoder) -> ChatEncoder | None:
    """The encoder of this day, where that is not the encoder's and a template asks for it."""
    settings, today = encoder.settings(), date.today().isoformat()
    template = settings["template"]
    texts = [template] if isinstance(template, str) else template.values()
    if encoder.date == today or not any("strftime_now" in text for text in texts):
        return None
    return ChatEncoder.from_settings(tokenizer, settings | {"date": today})


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """The message without luthier's own field, and without fields that say nothing."""
    return {key: value for key, value in message.items() if value is not None and key != "train"}


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
