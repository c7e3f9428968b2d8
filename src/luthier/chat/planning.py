"""From a conversation to the texts of its training sequences."""

from __future__ import annotations

from functools import lru_cache

from luthier.chat.control import Controls
from luthier.chat.conversation import Conversation
from luthier.chat.sharing import Shared
from luthier.chat.template import ChatTemplate
from luthier.chat.text import Text
from luthier.chat.thought import reply_behind
from luthier.chat.turns import ReplyBehind, Sequence, Turn, grouped, own_turn

_ANYONE = {"role": "user", "content": "?"}


class Planner:
    """Plans the sequences of one template."""

    def __init__(
        self, template: ChatTemplate, controls: Controls, find_reply: ReplyBehind = reply_behind
    ) -> None:
        self._template = template
        self._controls = controls
        self._find_reply = find_reply

    def plan(self, conversation: Conversation, trained: list[int]) -> list[Sequence]:
        """The texts of the row's sequences and where their replies stand."""
        template, messages, tools = self._template, conversation.messages, conversation.tools
        whole = template.follow(messages, tools, False)
        asked = None if template.ends else template.follow(messages, tools, True)
        shared = Shared(whole, asked, template.ends)
        if all(conversation.role(place) == "assistant" for place in trained):
            sequence = shared.sequence(conversation, trained, self._controls.find_stop)
            if sequence is not None:
                return [sequence]
        return grouped(self._own_turns(conversation, trained), whole.text)

    def _own_turns(self, conversation: Conversation, trained: list[int]) -> list[Turn]:
        """Each trained turn in its own context, rendered for itself."""
        template, controls = self._template, self._controls
        messages, tools = conversation.messages, conversation.tools

        @lru_cache
        def render(count: int, generation: bool) -> Text:
            return template.render(messages[:count], tools, generation)

        def find_following(place: int, shown: Text) -> tuple[Text, str] | None:
            more = messages[: place + 2] if place + 1 < len(messages) else [*messages, _ANYONE]
            text = template.render(more, tools, False)
            return controls.following_stop(text[len(shown) :]) if text.startswith(shown) else None

        return [
            own_turn(
                render, controls.find_stop, find_following, self._find_reply, conversation, place
            )
            for place in trained
        ]
