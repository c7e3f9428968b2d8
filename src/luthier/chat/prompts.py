"""Conversations that end where the model is to answer: their prompts, checked as rows are."""

from __future__ import annotations

from typing import Any

from luthier.chat.conversation import Conversation, read_conversation
from luthier.chat.encoder import ChatEncoder
from luthier.chat.errors import ChatError
from luthier.chat.filled import filled_where_refused
from luthier.chat.fitting import front_turns, without_front
from luthier.chat.kit import Kit
from luthier.chat.lost import lost_fields
from luthier.chat.turns import Sequence


class Prompts:
    """Makes the prompts of conversations with an encoder's settings.

    A prompt's ids are those of `ChatEncoder.prompt`. What the template does not show, and what is
    too long, is treated as `on_lost` and `on_long` say.
    """

    def __init__(self, encoder: ChatEncoder, limit: int | None = None) -> None:
        """`limit`: the longest prompt, in tokens."""
        self._encoder = encoder
        self._limit = limit

    def of(
        self, messages: list[dict[str, Any]], tools: list | None = None
    ) -> tuple[list[int], int, ChatError | None]:
        """The prompt's ids, how many messages went from its front, and what it does not show.

        Raises ChatError for a row that makes no prompt; `stops` says whether it is to be dropped.
        """
        return filled_where_refused(lambda given: self._of(given, tools), messages)

    def stops(self, error: ChatError) -> bool:
        """Whether the settings have a row with this error stop the run, rather than drop it."""
        if error.reason == "too long":
            return self._encoder.on_long == "error"
        return self._encoder.on_lost != "drop"

    def _of(
        self, messages: list[dict[str, Any]], tools: list | None
    ) -> tuple[list[int], int, ChatError | None]:
        conversation = read_conversation(messages, tools)
        kit = self._encoder._kits.of(conversation.tools)
        text = kit.template.render(conversation.messages, conversation.tools, True)
        lost = lost_fields(conversation, [Sequence(text)], kit.template)
        if lost and self._encoder.on_lost != "keep":
            raise lost[0]
        ids = kit.labeller.prompt(text)
        gone = 0
        if self._limit is not None and len(ids) > self._limit:
            ids, gone = self._cut(kit, conversation, len(ids))
        return ids, gone, lost[0] if lost else None

    def _cut(self, kit: Kit, conversation: Conversation, length: int) -> tuple[list[int], int]:
        """The prompt without as few turns of its front as make it fit."""
        starts = front_turns(conversation, max(conversation.numbers) + 1)
        for start in starts if self._encoder.on_long == "turns" else []:
            shorter = without_front(conversation, start)
            ids = kit.labeller.prompt(kit.template.render(shorter.messages, shorter.tools, True))
            if len(ids) <= (self._limit or 0):
                return ids, len(conversation.messages) - len(shorter.messages)
        raise ChatError(
            f"the prompt has {length} tokens, and no whole turns can go to make it fit the "
            f"{self._limit} that `max_length` leaves for it beside the longest completion",
            reason="too long",
        )
