"""The whole dataset seen row by row: what the rows make, what becomes of them, which rules hold."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil

from luthier.chat import IGNORED, ChatSequence
from luthier.data.prepare import Source
from luthier.inspect.difference import parting, stretch
from luthier.inspect.material import Material
from luthier.inspect.reference import Reference
from luthier.inspect.rows import Reader, Row
from luthier.inspect.rules import EXAMPLES, Example, Rule, SequenceRules
from luthier.inspect.tokens import token_texts
from luthier.inspect.view import cut_words, place

COMPARED_TOKENS = 2_000_000
COMPARED_TURNS = 10_000
"""About how many prompts are compared at most: transformers takes about ten seconds for them."""


@dataclass
class Finding:
    """Rows of which there is something to say: what became of them, why, and the first ones."""

    fate: str
    reason: str
    rows: int = 0
    examples: list[Example] = field(default_factory=list)


@dataclass
class Side:
    """What one side of the dataset makes."""

    rows: int = 0
    lengths: list[int] = field(default_factory=list)
    """Tokens of each sequence."""
    trained_tokens: int = 0
    dropped: int = 0
    stops: int = 0
    lossy: int = 0
    cut_rows: int = 0
    cut_turns: int = 0
    split: int = 0
    """Rows that make several sequences."""
    equal: int = 0
    """Rows left out because they equal a held-out row; they are not in `rows`."""
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)

    def find(self, fate: str, reason: str, where: str, words: str) -> None:
        """Note a row of which there is something to say."""
        finding = self.findings.setdefault((fate, reason), Finding(fate, reason))
        finding.rows += 1
        if len(finding.examples) < EXAMPLES:
            finding.examples.append(Example(where, words))


@dataclass
class Boundaries:
    """Rows that the other setting of `chat.boundaries` would make other tokens of."""

    chosen: str
    rows: int = 0
    differ: int = 0
    first: Example | None = None


class Survey:
    """All that is found in a dataset; `run` fills it."""

    def __init__(self, material: Material, limit: int | None = None) -> None:
        self.material = material
        self.limit = limit
        chat = material.config.chat
        self._reader = Reader(material.tokenizer, chat, material.end_tokens)
        self._reference = Reference(material.tokenizer, self._reader.encoder, chat.template)
        self._text_of: Callable[[int], str] = token_texts(material.tokenizer)
        self._rules = SequenceRules(self._reader.encoder, material.tokenizer)
        self._policy = Rule("no row stops the training", "rows")
        self.prompts = Rule("prompts are those of apply_chat_template", "turns")
        self.boundaries = Boundaries(chat.boundaries)
        self.sides: dict[str, Side] = {}
        self.compared_rows = 0
        self.every = 1
        """One in this many rows has its prompts compared."""

    @property
    def rules(self) -> list[Rule]:
        """All rules, those that break the training first."""
        # Tokens that are cut at every segment are not a server's; the config chose that.
        served = [self.prompts] if self.boundaries.chosen == "served" else []
        return [self._policy, *self._rules.all, *served]

    @property
    def holds(self) -> bool:
        """Whether no rule breaks and there is something to train on."""
        return not any(rule.broken for rule in self.rules) and bool(self.sides["train"].lengths)

    @property
    def size(self) -> int:
        """How many rows are looked at."""
        return len(self._first(self.material.train)) + len(self._first(self.material.heldout))

    def run(self, advance: Callable[[int], None] = lambda rows: None) -> "Survey":
        """Look at every row of both sides; `advance` is told of rows that are done."""
        self._look("train", self.material.train, self.material.equal, advance)
        if self.material.heldout.places:
            self._look("held out", self.material.heldout, 0, advance)
        return self

    def _first(self, source: Source) -> range:
        count = len(source.places)
        return range(count if self.limit is None else min(self.limit, count))

    def _look(self, name: str, source: Source, equal: int, advance: Callable[[int], None]) -> None:
        source = source.pick(self._first(source))
        side = self.sides[name] = Side(equal=equal)
        for rows in self._reader.read(source):
            if name == "train" and not side.rows:
                self.every = _stride(rows, len(source.places))
            for row in rows:
                self._account(side, row)
                self._check(row)
            self._compare_boundaries([row for row in rows if row.whole])
            advance(len(rows))

    def _account(self, side: Side, row: Row) -> None:
        """Count what the row makes and what becomes of it."""
        where = place(row.place)
        side.rows += 1
        side.lengths += map(len, row.sequences)
        side.trained_tokens += sum(map(_trained, row.sequences))
        if row.fate != "trains" and row.error is not None:
            side.find(row.fate, row.error.reason, where, row.words)
        side.dropped += row.fate == "dropped"
        side.stops += row.fate == "stops"
        side.lossy += row.fate == "lossy"
        if row.cut_turns is not None:
            side.cut_rows += 1
            side.cut_turns += row.cut_turns
            longest = max(map(len, row.whole))
            words = f"{longest:,} tokens; {cut_words(row.cut_turns)}"
            side.find("cut", "longer than chat.max_length", where, words)
        if len(row.sequences) > 1:
            side.split += 1
            words = " | ".join(_messages(sequence) for sequence in row.sequences)
            side.find("split", "each turn in its true context", where, f"messages {words}")

    def _check(self, row: Row) -> None:
        """Hold one row against the rules."""
        where = place(row.place)
        self._policy.note(where, row.words if row.fate == "stops" else None)
        for sequence in row.sequences:
            self._rules.apply(sequence, where)
        if row.whole and (row.number - 1) % self.every == 0:
            self.compared_rows += 1
            for sequence in row.whole:
                self._compare_prompts(row, sequence, where)

    def _compare_prompts(self, row: Row, sequence: ChatSequence, where: str) -> None:
        for reply in sequence.replies:
            ids = sequence.input_ids[: reply.start]
            try:
                other = self._reference.agrees(row.conversation, reply.message, ids)
            except Exception as error:  # a template may raise anything
                self.prompts.note(where, f"message {reply.message}: transformers raises: {error}")
                continue
            wrong = None if other is None else f"the prompt of message {reply.message} differs"
            named = {"luthier": ids, "transformers": other or []}
            self.prompts.note(where, wrong, {} if other is None else self._shown(named))

    def _compare_boundaries(self, rows: list[Row]) -> None:
        found = self.boundaries
        for row, others in zip(rows, self._reader.otherwise(rows), strict=True):
            found.rows += 1
            if _same(row.whole, others):
                continue
            found.differ += 1
            if found.first is None:
                found.first = self._first_difference(row, others)

    def _first_difference(self, row: Row, others: list[ChatSequence]) -> Example:
        names = ("served", "segments")
        chosen, other = names if self.boundaries.chosen == "served" else names[::-1]
        for one, two in zip(row.whole, others, strict=False):
            if one.input_ids != two.input_ids:
                named = {chosen: one.input_ids, other: two.input_ids}
                return Example(place(row.place), "the tokens part here", self._shown(named))
        words = f"{chosen}: {len(row.whole)} sequences, {other}: {len(others)}"
        return Example(place(row.place), words)

    def _shown(self, named: dict[str, list[int]]) -> dict[str, str]:
        """Both lists of tokens around the place where they part."""
        at = parting(*named.values())
        return {name: stretch(ids, at, self._text_of) for name, ids in named.items()}


def _same(some: list[ChatSequence], others: list[ChatSequence]) -> bool:
    return [(s.input_ids, s.labels) for s in some] == [(s.input_ids, s.labels) for s in others]


def _trained(sequence: ChatSequence) -> int:
    return len(sequence) - sequence.labels.count(IGNORED)


def _messages(sequence: ChatSequence) -> str:
    return ", ".join(str(reply.message) for reply in sequence.replies)


def _stride(rows: list[Row], count: int) -> int:
    """One in how many rows is compared, judged by the first rows; the same on every machine."""
    starts = [reply.start for row in rows for s in row.whole for reply in s.replies]
    share = max(sum(starts) / COMPARED_TOKENS, len(starts) / COMPARED_TURNS)
    return max(1, ceil(share * count / len(rows)))
