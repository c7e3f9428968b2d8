"""Conversations up to their last reply, for methods whose model answers them itself."""

from collections.abc import Sequence
from typing import Any

from luthier.chat import ChatEncoder, ChatError, ChatSequence, Segment
from luthier.chat.encoder import Prompts
from luthier.config.schema import ChatSettings
from luthier.data.encoders.prompts import NO_PROMPT, parted
from luthier.data.examples import Placed
from luthier.inspect.rows import Row, place


class PromptReader:
    """Encodes prompts as a training does, and goes on where it would stop."""

    def __init__(
        self, tokenizer: Any, settings: ChatSettings, end_tokens: list[int], limit: int | None
    ) -> None:
        """`limit`: the longest prompt, in tokens."""
        encoder = ChatEncoder(tokenizer, **settings.model_dump(), eos_token_ids=end_tokens)
        self._prompts = Prompts(encoder, limit)

    def rows(self, placed: Sequence[Placed]) -> list[Row]:
        """What these conversations make."""
        return [self._row(row) for row in placed]

    def _row(self, placed: Placed) -> Row:
        row = Row(place(placed.where), placed.example)
        context = parted(placed.example)[0]
        if not context:
            row.error, row.fate = ChatError(NO_PROMPT[1], reason=NO_PROMPT[0]), "dropped"
            return row
        try:
            ids, gone, row.error = self._prompts.of(context, placed.example.get("tools"))
        except ChatError as error:
            row.error, row.fate = error, "stops" if self._prompts.stops(error) else "dropped"
            return row
        row.fate = "trains" if row.error is None else "lossy"
        row.sequences = [_prompt_sequence(ids)]
        row.cut_turns = 0 if gone else None
        return row


def _prompt_sequence(ids: list[int]) -> ChatSequence:
    """The prompt as a sequence in which nothing trains."""
    part = Segment(0, len(ids), None, None, "prompt", False)
    return ChatSequence(list(ids), [], lambda: [part])
