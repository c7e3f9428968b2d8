"""Making a row shorter: whole turns go from the front, what stands above them stays."""

from __future__ import annotations

from dataclasses import replace

from luthier.chat.conversation import Conversation

_ABOVE = ("system", "developer")


def front_turns(conversation: Conversation, last: int) -> list[int]:
    """Places where a shorter row may start: users' turns behind the first, up to `last`."""
    starts = [
        place
        for place, message in enumerate(conversation.messages)
        if message["role"] == "user"
        and conversation.numbers[place] < last
        and (place == 0 or conversation.messages[place - 1]["role"] != "user")
    ]
    return [start for start in starts if start > _above(conversation)]


def without_front(conversation: Conversation, start: int) -> Conversation:
    """The row from message `start` on, behind its system messages; numbers stay the row's own."""
    kept = [*range(_above(conversation)), *range(start, len(conversation.messages))]
    return replace(
        conversation,
        messages=[conversation.messages[place] for place in kept],
        train=[conversation.train[place] for place in kept],
        numbers=[conversation.numbers[place] for place in kept],
    )


def _above(conversation: Conversation) -> int:
    """How many system messages the row begins with."""
    count = 0
    while count < len(conversation.messages) and conversation.role(count) in _ABOVE:
        count += 1
    return count
