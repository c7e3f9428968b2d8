"""Where characters of a rendered text came from, and runs of them."""

from __future__ import annotations


class Origin:
    """The field of a message (or of the row's tools) that a run of characters was copied from."""

    __slots__ = ("covers", "encoded", "field", "message", "role", "text", "whole")

    def __init__(
        self, message: int | None, role: str | None, field: str, text: str | None = None
    ) -> None:
        self.message = message
        self.role = role
        self.field = field
        self.text = text
        """The field's text; None where the field has many texts that are not told apart."""
        self.covers: tuple[Origin, ...] = ()
        """The origins that this one stands for, if it stands for several."""
        self.encoded = False
        """Whether the field is JSON already, so that it must not be encoded once more."""
        self.whole = False
        """Whether all of the field has been seen in a sequence of the row."""

    @classmethod
    def of_many(cls, origins: list[Origin]) -> Origin:
        """One origin that stands for several: the text was made from all of them."""
        first = origins[0]
        if all(origin is first for origin in origins):
            return first
        joint = cls(first.message, first.role, first.field)
        leaves = [leaf for origin in origins for leaf in origin.covers or (origin,)]
        joint.covers = tuple({id(leaf): leaf for leaf in leaves}.values())
        return joint

    def __repr__(self) -> str:
        return f"Origin(message={self.message}, role={self.role!r}, field={self.field!r})"


Run = tuple[int, Origin | None, int]
"""(length, origin, start): so many characters of one origin (None: the template wrote them).

`start` is the place of the first of them in the field; -1 when the field was transformed, so that
its characters can no longer be told apart.
"""


def cut(runs: tuple[Run, ...], start: int, stop: int) -> tuple[Run, ...]:
    """The runs of `text[start:stop]`, for 0 <= start <= stop <= the text's length."""
    found = []
    position = 0
    for length, origin, source in runs:
        begin, end = max(start, position), min(stop, position + length)
        if begin < end:
            place = source + (begin - position) if source >= 0 else -1
            found.append((end - begin, origin, place))
        position += length
        if position >= stop:
            break
    return tuple(found)
