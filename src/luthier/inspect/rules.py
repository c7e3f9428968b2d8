"""The rules that every sequence must keep, each counted, with the first places where it breaks."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import ne
from typing import Any

from luthier.chat import IGNORED, ChatEncoder, ChatSequence

EXAMPLES = 3
"""How many places each rule and each finding shows."""


@dataclass
class RuleExample:
    """A place and what is to be seen there; `tokens` are named stretches of them."""

    place: str
    words: str
    tokens: dict[str, str] = field(default_factory=dict)


@dataclass
class Rule:
    """A rule in words, how often it was checked, and where it broke."""

    text: str
    unit: str
    checked: int = 0
    broken: int = 0
    examples: list[RuleExample] = field(default_factory=list)

    def note(self, place: str, wrong: str | None, tokens: dict[str, str] | None = None) -> None:
        """Count one case; `wrong` says what breaks the rule in it."""
        self.checked += 1
        if wrong is None:
            return
        self.broken += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(RuleExample(place, wrong, tokens or {}))


class SequenceRules:
    """What can be told from a sequence alone."""

    def __init__(self, encoder: ChatEncoder, tokenizer: Any) -> None:
        self._stops = set(encoder.stop_token_ids)
        self._bos = tokenizer.bos_token_id
        self.labels = Rule("labels are the token ids or -100", "sequences")
        self.bos = Rule("the sequence begins with one BOS at most", "sequences")
        self.stops = Rule("trained tokens end with a stop token", "replies")
        self.all = [self.labels, self.bos, self.stops]

    def apply(self, sequence: ChatSequence, place: str) -> None:
        """Check one sequence."""
        ids, labels = sequence.input_ids, sequence.labels
        self.labels.note(place, _wrong_labels(ids, labels))
        doubled = self._bos is not None and ids[:2] == [self._bos, self._bos]
        self.bos.note(place, f"it begins with token {self._bos} twice" if doubled else None)
        for start, stop in trained_runs(labels):
            last = ids[stop - 1]
            wrong = None if last in self._stops else f"tokens {start} to {stop} end with {last}"
            self.stops.note(place, wrong)


def trained_runs(labels: list[int]) -> Iterable[tuple[int, int]]:
    """Where each stretch of trained tokens starts and ends."""
    trains = bytes(map(IGNORED.__ne__, labels))
    start = trains.find(1)
    while start >= 0:
        stop = trains.find(0, start)
        stop = len(labels) if stop < 0 else stop
        yield start, stop
        start = trains.find(1, stop)


def _wrong_labels(ids: list[int], labels: list[int]) -> str | None:
    if len(ids) != len(labels):
        return f"{len(ids)} ids and {len(labels)} labels"
    ignored = labels.count(IGNORED)
    if ignored == len(labels):
        return "nothing in it trains"
    # No id is negative, so the ignored ones are among those that differ.
    if sum(map(ne, ids, labels)) == ignored:
        return None
    for place, (id_, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (IGNORED, id_):
            return f"token {place} is {id_} and its label {label}"
    return None
