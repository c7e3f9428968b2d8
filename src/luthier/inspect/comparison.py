"""A sample of the conversations held against transformers, and against the other boundaries."""

from collections.abc import Callable
from dataclasses import dataclass

from luthier.chat import ChatSequence
from luthier.inspect.conversations import ConversationReader
from luthier.inspect.difference import parting, stretch
from luthier.inspect.reference import Reference
from luthier.inspect.rows import Row
from luthier.inspect.rules import Rule, RuleExample

TOKENS = 1_000_000
TURNS = 5_000
"""What is compared of a set before the sample gets thinner: transformers takes seconds for it."""


@dataclass
class Boundaries:
    """Rows that the other setting of `chat.boundaries` would make other tokens of."""

    chosen: str
    rows: int = 0
    differ: int = 0
    first: RuleExample | None = None


class Sample:
    """Which rows of a source are compared: all, then every second, every fourth, and so on.

    The first rows say little of a long set, and all of them take too long. Once the source's part
    of what may be compared is reached, and then at each further quarter of it, the distance between
    two rows doubles. So the sample goes on to the last row of a source of any length, and is the
    same on every machine.
    """

    def __init__(self, share: float) -> None:
        """`share`: the source's part of what may be compared."""
        self._share = share
        self._left = share
        self._every = 1
        self._rows = 0

    def takes(self) -> bool:
        """Whether the next row is compared."""
        self._rows += 1
        return (self._rows - 1) % self._every == 0

    def spend(self, tokens: int, turns: int) -> None:
        """Say what a comparison took."""
        self._left -= max(tokens / TOKENS, turns / TURNS)
        if self._left <= 0:
            self._left = self._share / 4
            self._every *= 2


class Comparison:
    """What differs from transformers' prompts, and from the other boundaries."""

    def __init__(self, chosen: str, text_of: Callable[[int], str]) -> None:
        """`chosen`: the config's boundaries; `text_of`: the text of a token."""
        self.prompts = Rule("prompts are those of apply_chat_template", "turns")
        self.boundaries = Boundaries(chosen)
        self.of = 0
        """How many rows make sequences, of which `boundaries.rows` were compared."""
        self._text_of = text_of

    def compare(
        self, reader: ConversationReader, reference: Reference, rows: list[Row], sample: Sample
    ) -> None:
        """Compare those of the rows that the sample takes, each before anything is cut."""
        for row in rows:
            if not row.sequences and (row.error is None or row.error.reason != "too long"):
                continue
            self.of += 1
            if sample.takes():
                whole = reader.whole(row)
                self._compare(row, whole, reader.otherwise(row))
                for sequence in whole:
                    sample.spend(*self._compare_prompts(reference, row, sequence))

    def _compare_prompts(
        self, reference: Reference, row: Row, sequence: ChatSequence
    ) -> tuple[int, int]:
        """Compare each prompt of a sequence; the tokens and turns that were compared."""
        for reply in sequence.replies:
            ids = sequence.input_ids[: reply.start]
            try:
                other = reference.agrees(row.example, reply.message, ids)
            except Exception as error:  # a template may raise anything
                wrong = f"message {reply.message}: transformers raises: {error}"
                self.prompts.note(row.place, wrong)
                continue
            if other is None:
                self.prompts.note(row.place, None)
                continue
            shown = self._shown({"luthier": ids, "transformers": other})
            self.prompts.note(row.place, f"the prompt of message {reply.message} differs", shown)
        return sum(reply.start for reply in sequence.replies), len(sequence.replies)

    def _compare(self, row: Row, whole: list[ChatSequence], others: list[ChatSequence]) -> None:
        found = self.boundaries
        found.rows += 1
        if list(map(_content, whole)) == list(map(_content, others)):
            return
        found.differ += 1
        if found.first is None:
            found.first = self._first_difference(row, whole, others)

    def _first_difference(
        self, row: Row, whole: list[ChatSequence], others: list[ChatSequence]
    ) -> RuleExample:
        names = ("served", "segments")
        chosen, other = names if self.boundaries.chosen == "served" else names[::-1]
        for one, two in zip(whole, others, strict=False):
            if one.input_ids != two.input_ids:
                named = {chosen: one.input_ids, other: two.input_ids}
                return RuleExample(row.place, "the tokens part here", self._shown(named))
        return RuleExample(
            row.place, f"{chosen}: {len(whole)} sequences, {other}: {len(others)} sequences"
        )

    def _shown(self, named: dict[str, list[int]]) -> dict[str, str]:
        """Both lists of tokens around the place where they part."""
        at = parting(*named.values())
        return {name: stretch(ids, at, self._text_of) for name, ids in named.items()}


def _content(sequence: ChatSequence) -> tuple[list[int], list]:
    """What a training sees of a sequence: the ids, and which of them train."""
    return sequence.input_ids, sequence.replies
