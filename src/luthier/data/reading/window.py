"""A text of JSON values that is read through a window, so that it is never held whole."""

import json
import re
from collections.abc import Iterator
from typing import Any

from luthier.data.reading.json_values import LENIENT, STRICT, of_value, sound
from luthier.data.rows import BadRow, Row, RowError, excerpt
from luthier.errors import UserError

_SPACE = re.compile(r"[ \t\r\n]*")
_LITERAL = 16
"""Characters that the longest word or escape of JSON stays under."""
_SHOWN = 200
"""Characters of which an error shows the start."""


class Window:
    """The text from the value that is read next, as far as it was needed."""

    def __init__(self, label: str, texts: Iterator[str]) -> None:
        self._label, self._texts = label, texts
        self._text, self._at = "", 0
        self._line, self._counted = 1, 0
        self._before = 0  # characters of the first line that were let go of

    @property
    def where(self) -> str:
        """The file and the line of the next character."""
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return f"{self._label}:{self._line}"

    def upcoming(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def step(self) -> None:
        """Go past one character."""
        self._at += 1

    def start(self) -> str:
        """The text from here on, as much as an error shows."""
        while len(self._text) - self._at < _SHOWN and self._more():
            pass
        return excerpt(self._text[self._at : self._at + _SHOWN]) or "the file ends"

    def row(self) -> Row | BadRow:
        """The value that begins here, and go past it; UserError where its syntax is broken."""
        where = self.where
        try:
            value, end = self._decode(STRICT)
            sound(value, self._text[self._at : end])
        except (RowError, RecursionError) as error:
            bad = BadRow(where, f"this is not JSON: {error}", self.start())
            self._at = self._end()
            return bad
        self._at = end
        return of_value(value, where)

    def broken(self, problem: str) -> UserError:
        """The error for a text that is no JSON from here on."""
        return UserError(f"dataset: {self.where}: {problem}\n  {self.start()}")

    def _end(self) -> int:
        """Where the value ends that begins here and is sound in its syntax only."""
        try:
            return self._decode(LENIENT)[1]
        except RecursionError as error:
            raise self.broken(f"this is not JSON: {error}") from error

    def _decode(self, decoder: json.JSONDecoder) -> tuple[Any, int]:
        """The value that begins here and its end, with as much more text as that takes."""
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not (self._is_cut(error) and self._more()):
                    raise self._wrong(error) from error
            except ValueError as error:
                raise self.broken(f"this is not JSON: {error}") from error
            else:
                # What a window cuts in a number is a shorter number.
                if end < len(self._text) or not self._more():
                    return value, end

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether more text could mend this, so that the rest is not read for nothing."""
        near_the_end = error.pos >= len(self._text) - _LITERAL
        return near_the_end or error.msg.startswith("Unterminated string")

    def _more(self) -> bool:
        """Let go of what was read and take as much text again; whether there was any."""
        taken, wanted = [], max(1, len(self._text) - self._at)
        while wanted > 0 and (text := next(self._texts, None)) is not None:
            taken.append(text)
            wanted -= len(text)
        if not any(taken):
            return False
        self._line += self._text.count("\n", self._counted, self._at)
        line_start = self._text.rfind("\n", 0, self._at) + 1
        self._before = self._at - line_start + (0 if line_start else self._before)
        self._text = self._text[self._at :] + "".join(taken)
        self._at = self._counted = 0
        return True

    def _wrong(self, error: json.JSONDecodeError) -> UserError:
        """The error for broken syntax, with the place in the file."""
        line = self._line + self._text.count("\n", self._counted, error.pos)
        column = error.colno + (self._before if error.lineno == 1 else 0)
        return self.broken(
            f"this is not JSON: {error.msg} (line {line}, column {column}), "
            "and what follows cannot be read"
        )
