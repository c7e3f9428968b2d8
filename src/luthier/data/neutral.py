"""Texts as token ids, in which no text becomes a control token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from luthier.chat import ChatError
from luthier.chat.tokens import Kind, Piece, TokenEncoder, control_tokens, token_pattern

_CHUNK = 2_000_000
"""Characters that go through the tokenizer at once: it needs about 100 bytes for each token."""


class NeutralText:
    """Encodes texts as a tokenizer does, without what it puts around them.

    tokenizer: a fast tokenizer of transformers. Text never becomes a control token, as in chats:
    `</s>` in a text is encoded as plain text. Control tokens are the special ones and those that
    the tokenizer's chat template writes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokens = TokenEncoder(tokenizer)
        self.controls = control_tokens(tokenizer, _template_text(tokenizer))
        """The tokens that text must not become."""
        self._pattern = token_pattern(self.controls)

    def encode(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """The ids of each text.

        Raises ChatError, with the text's number, where a control token in it cannot be encoded as
        text.
        """
        number = 0
        for chunk in _chunks(texts):
            yield from self._encoded(chunk, number)
            number += len(chunk)

    def encode_words(self, rows: Sequence[Sequence[str]]) -> Iterator[list[list[int]]]:
        """The ids of each word of each row, as they are in a text with one space between words.

        Raises ChatError as `encode` does.
        """
        pieces = [[self._word(word, place) for place, word in enumerate(row)] for row in rows]
        try:
            ids = iter(self._tokens.encode(chain.from_iterable(chain.from_iterable(pieces))))
        except ChatError:
            # Again, row by row, to know which one it is.
            for number, row in enumerate(pieces):
                self._pieces(list(chain.from_iterable(row)), number)
            raise
        for row in pieces:
            yield [list(chain.from_iterable(next(ids) for _ in word)) for word in row]

    def _word(self, word: str, place: int) -> list[Piece]:
        if not word:
            return []
        return _pieces(f" {word}" if place else word, self._pattern, at_start=not place)

    def _encoded(self, texts: list[str], first: int) -> Iterator[list[int]]:
        """The ids of texts, those without control tokens in one go."""
        suspect = [self._pattern.search(text) is not None for text in texts]
        clean = iter(
            self._plain([t for t, is_suspect in zip(texts, suspect, strict=True) if not is_suspect])
        )
        for place, text in enumerate(texts):
            yield self._neutral(text, first + place) if suspect[place] else next(clean)

    def _plain(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts, without what the tokenizer puts around them."""
        backend = self._tokens.backend
        # The backend is the tokenizer's own and others may have left their settings on it.
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        backend.encode_special_tokens = False
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _neutral(self, text: str, number: int) -> list[int]:
        """The ids of a text in which control tokens stand, these as plain text."""
        pieces = _pieces(text, self._pattern)
        return list(chain.from_iterable(self._pieces(pieces, number)))

    def _pieces(self, pieces: list[Piece], number: int) -> list[list[int]]:
        try:
            return self._tokens.encode(pieces)
        except ChatError as error:
            raise error.in_row(number) from None


def _pieces(text: str, pattern: re.Pattern[str], at_start: bool = True) -> list[Piece]:
    """A text taken apart at its control tokens; `at_start`: nothing stands before it."""
    pieces: list[Piece] = []
    position = 0
    for match in pattern.finditer(text):
        if match.start() > position:
            kind: Kind = "start" if at_start and not position else "continuation"
            pieces.append(Piece(text[position : match.start()], kind))
        pieces.append(Piece(match[0], "literal"))
        position = match.end()
    if position < len(text):
        kind = "start" if at_start and not position else "continuation"
        pieces.append(Piece(text[position:], kind))
    return pieces


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in runs of some characters, so that one call of the tokenizer stays small."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _template_text(tokenizer: Any) -> str:
    """The text of the tokenizer's chat templates, whose control tokens text must not become."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else "\n".join(template.values())
