"""Plain texts as windows, none stopping the others."""

from collections.abc import Sequence
from typing import Any

from luthier.chat import IGNORED, ChatError, ChatSequence, Reply, Segment
from luthier.data.encoders.plain_text import PlainEncoder, Window
from luthier.data.examples import Placed
from luthier.inspect.rows import Row, place


class DocumentReader:
    """Cuts documents into windows as a config says, and goes on where training would stop."""

    def __init__(self, tokenizer: Any, max_length: int | None, stride: int) -> None:
        self._encoder = PlainEncoder(tokenizer, max_length, stride)

    def rows(self, placed: Sequence[Placed]) -> list[Row]:
        """What these documents make."""
        try:
            made = self._encoder.encode_batch(row.example["text"] for row in placed)
        except ChatError:
            return [self._alone(row) for row in placed]
        return [_row(*pair) for pair in zip(placed, made, strict=True)]

    def _alone(self, placed: Placed) -> Row:
        try:
            (windows,) = self._encoder.encode_batch([placed.example["text"]])
        except ChatError as error:
            return Row(place(placed.where), placed.example, error=error.in_row(None), fate="stops")
        return _row(placed, windows)


def _row(placed: Placed, windows: list[Window]) -> Row:
    if windows:
        return Row(
            place(placed.where), placed.example, [_document_sequence(window) for window in windows]
        )
    error = ChatError("the text is empty", reason="empty text")
    return Row(place(placed.where), placed.example, error=error, fate="dropped")


def _document_sequence(window: Window) -> ChatSequence:
    """The window as a sequence whose reply is all that trains."""
    size, context = len(window.input_ids), window.labels.count(IGNORED)
    parts = [Segment(0, context, None, None, "text", False)] if context else []
    parts.append(Segment(context, size, None, None, "text", True))
    return ChatSequence(window.input_ids, [Reply(0, context, size)], lambda: parts)
