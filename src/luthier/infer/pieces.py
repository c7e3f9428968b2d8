"""Text from tokens that come one by one: a piece at a time, never a part of a character."""

from typing import Any

_BROKEN = "�"
"""What a decoder writes for bytes that are no whole character."""


class Pieces:
    """Decodes a reply as it comes; the pieces together are what decoding it whole gives."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Decoders of a space before a word need what stands before it: two whole pieces are kept.
        self._before = self._said = 0

    def add(self, token: int) -> str:
        """The text that this token completes; empty where it ends within a character."""
        self._ids.append(token)
        piece = self._new()
        if not piece or piece.endswith(_BROKEN):
            return ""
        self._before, self._said = self._said, len(self._ids)
        return piece

    def rest(self) -> str:
        """What is left when the reply has ended, be it whole or not."""
        piece = self._new()
        self._before = self._said = len(self._ids)
        return piece

    def _new(self) -> str:
        """The text behind what was said."""
        known = self._text(self._ids[self._before : self._said])
        return self._text(self._ids[self._before :])[len(known) :]

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
