"""What each row of a source makes and what becomes of it, in numbers, and the first of each."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.chat import ChatSequence
from luthier.data.examples import BadRows, Opened
from luthier.data.fingerprints import Prints, fingerprint, normalised
from luthier.inspect.division import Positions, Seen
from luthier.inspect.rows import FATES, Fate, Row, cut_words
from luthier.inspect.rules import EXAMPLES, RuleExample


@dataclass
class Finding:
    """Rows of which there is something to say: what became of them, why, and the first ones."""

    fate: str
    reason: str
    rows: int = 0
    examples: list[RuleExample] = field(default_factory=list)

    def note(self, where: str, words: Callable[[], str]) -> None:
        """Count one more; its words are asked for only if it is one of the first."""
        self.rows += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(RuleExample(where, words()))


class Account:
    """The rows of one source, as they come."""

    def __init__(self, name: str, opened: Opened) -> None:
        self.name = name
        self.opened = opened
        self.places: list[str] = []
        """Where each row stands."""
        self.bad = BadRows()
        self.findings: dict[tuple[str, str], Finding] = {}
        self._prints = {"exact": bytearray(), "normalised": bytearray()}
        self._sequences, self._cut, self._fates = array("i"), array("i"), array("b")
        self._lengths, self._trained = array("i"), array("i")

    def __len__(self) -> int:
        return len(self.places)

    def add(self, row: Row) -> None:
        """Note one row."""
        self.places.append(row.place)
        self._prints["exact"] += fingerprint(row.example)
        self._prints["normalised"] += normalised(row.example)
        self._fates.append(FATES.index(row.fate))
        self._sequences.append(len(row.sequences))
        self._cut.append(-1 if row.cut_turns is None else row.cut_turns)
        for sequence in row.sequences:
            self._lengths.append(len(sequence))
            self._trained.append(sequence.trained_tokens)
        self._find(row)

    def find(self, fate: str, reason: str) -> Finding:
        """The finding of this kind."""
        return self.findings.setdefault((fate, reason), Finding(fate, reason))

    def prints(self, kind: str) -> Prints:
        """What tells whether rows are equal: `exact` or `normalised`, shape (rows,)."""
        return np.frombuffer(bytes(self._prints[kind]), "S16")

    def seen(self) -> Seen:
        """What the division asks for."""
        return Seen(self.prints("exact"), self.prints("normalised"), self.sequences)

    @property
    def sequences(self) -> NDArray[np.int32]:
        """How many sequences each row makes."""
        return _numbers(self._sequences)

    @property
    def cut(self) -> NDArray[np.int32]:
        """Trained turns that each row lost, -1 where it was not cut."""
        return _numbers(self._cut)

    def fated(self, fate: Fate) -> NDArray[np.bool_]:
        """Which rows end this way."""
        return np.array(self._fates, np.int8) == FATES.index(fate)

    def tokens(self, rows: Positions) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The tokens and the trained tokens of each sequence of these rows, in their order."""
        counts = self.sequences.astype(np.int64)
        starts, chosen = (np.cumsum(counts) - counts)[rows], counts[rows]
        inside = np.arange(chosen.sum()) - np.repeat(np.cumsum(chosen) - chosen, chosen)
        numbers = np.repeat(starts, chosen) + inside
        return _numbers(self._lengths)[numbers], _numbers(self._trained)[numbers]

    def _find(self, row: Row) -> None:
        where = row.place
        if row.fate != "trains" and row.error is not None:
            self.find(row.fate, row.error.reason).note(where, lambda: row.words)
        if row.cut_turns is not None:
            cut = row.cut_turns
            self.find("cut", "longer than chat.max_length").note(where, lambda: cut_words(cut))
        several = len(row.sequences)
        if several > 1 and self.opened.shape.kind == "text":
            found = self.find("windows", "longer than chat.max_length")
            found.note(where, lambda: f"{several:,} windows")
        elif several > 1:
            found = self.find("split", "each turn in its true context")
            found.note(where, lambda: _turns(row.sequences))


def _turns(sequences: Sequence[ChatSequence]) -> str:
    words = " | ".join(", ".join(map(str, sequence.messages)) for sequence in sequences)
    return f"messages {words}"


def _numbers(values: "array[int]") -> NDArray[Any]:
    return np.array(values, np.int32)
