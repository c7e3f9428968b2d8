"""A row with what the encoder makes of it, and what the config makes of that."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from luthier.chat import ChatError, ChatSequence
from luthier.data import Example
from luthier.data.examples import Placed

Fate = Literal["trains", "lossy", "dropped", "stops"]
"""`lossy`: trains, although not all of its text is shown; `stops`: training stops at this row."""
FATES: tuple[Fate, ...] = ("trains", "lossy", "dropped", "stops")


def place(text: str) -> str:
    """A row's place as one would type it from here."""
    return text.removeprefix(f"{Path.cwd()}/")


def cut_words(replies: int) -> str:
    """What went from a row's front, in words."""
    if not replies:
        return "turns went from its front, every reply still trains"
    return (
        f"turns went from its front, {replies} {'reply' if replies == 1 else 'replies'} with them"
    )


@dataclass
class Row:
    """One row: where it stands, what it makes, and what is wrong with it."""

    place: str
    example: Example
    sequences: list[ChatSequence] = field(default_factory=list)
    """What trains, cut as configured; for a row that is too long to fit, nothing."""
    error: ChatError | None = None
    fate: Fate = "trains"
    cut_turns: int | None = None
    """Trained turns that were cut off; None for a row that was not cut."""

    @property
    def words(self) -> str:
        """What is wrong with the row, with its message and field but without its place."""
        return self.error.words if self.error else ""


class RowReader(Protocol):
    """Makes rows of the examples of one kind, and goes on where training would stop."""

    def rows(self, placed: Sequence[Placed]) -> list[Row]:
        """What these examples make."""
        ...
