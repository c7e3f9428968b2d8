"""The whole dataset seen row by row: what the rows make, what becomes of them, which rules hold."""

from collections.abc import Callable
from functools import cached_property
from itertools import islice

from luthier.data.examples import Opened
from luthier.inspect.account import Account
from luthier.inspect.batches import Batches, batches_of
from luthier.inspect.comparison import Comparison, Sample
from luthier.inspect.conversations import ConversationReader
from luthier.inspect.material import Material, side_name
from luthier.inspect.reference import Reference
from luthier.inspect.rows import Row
from luthier.inspect.rules import Rule, SequenceRules
from luthier.inspect.sides import Side
from luthier.inspect.tokens import token_texts
from luthier.inspect.whole import Whole

_CHUNK = 512


class Survey:
    """All that is found in a dataset; `run` fills it."""

    def __init__(self, material: Material, limit: int | None = None) -> None:
        """`limit`: look at so many rows of each source."""
        self.material = material
        self.limit = limit
        text_of = token_texts(material.tokenizer)
        self.trained = {name: Account(name, opened) for name, opened in material.trained.items()}
        """What the training sources make, by name."""
        self.evaluated = {
            key: Account(side_name(key), opened) for key, opened in material.evaluated.items()
        }
        """What the evaluation sets make that have rows of their own, by config key."""
        self.comparison = Comparison(material.config.chat.boundaries, text_of)
        self._policy = Rule("no row stops the training", "rows")
        conversations = [account.opened for account in self.accounts if _is_chat(account.opened)]
        self._sample_share = 1 / max(len(conversations), 1)
        self._chat = _Chat(material, conversations[0]) if conversations else None

    @property
    def accounts(self) -> list[Account]:
        """The accounts of all sources, training first."""
        return [*self.trained.values(), *self.evaluated.values()]

    @property
    def looks_at_chats(self) -> bool:
        """Whether there are conversations, to which the rules of the encoder apply."""
        return self._chat is not None

    @property
    def rules(self) -> list[Rule]:
        """All rules, those that break the training first."""
        if self._chat is None:
            return [self._policy]
        # Tokens that are cut at every segment are not a server's; the config chose that.
        served = self.comparison.boundaries.chosen == "served"
        return [self._policy, *self._chat.rules.all, *([self.comparison.prompts] * served)]

    @cached_property
    def whole(self) -> Whole:
        """The sources put together; for a survey that has run."""
        return Whole(self.material.config, self.trained, self.evaluated)

    @cached_property
    def batches(self) -> Batches | None:
        """How an epoch fills its batches; None where nothing trains."""
        material = self.material
        return batches_of(self.train.lengths, material.config, material.batching)

    @property
    def train(self) -> Side:
        """The side that trains."""
        return self.whole.sides[0]

    @property
    def error(self) -> str | None:
        """Why training would stop before its first step, apart from single rows."""
        # Rows that were not looked at may be those that are missed.
        return self.whole.error if self.limit is None else None

    @property
    def holds(self) -> bool:
        """Whether no rule breaks and there is something to train on."""
        broken = any(rule.broken for rule in self.rules)
        return not broken and self.error is None and bool(len(self.train.lengths))

    @property
    def size(self) -> int | None:
        """How many rows are looked at, where that is known ahead."""
        sizes = [account.opened.source.size for account in self.accounts]
        if self.limit is not None:
            return sum(min(size or self.limit, self.limit) for size in sizes)
        return None if None in sizes else sum(size or 0 for size in sizes)

    def run(self, advance: Callable[[int], None] = lambda rows: None) -> "Survey":
        """Look at every row of all sources; `advance` is told of rows that are done."""
        for account in self.accounts:
            self._look(account, advance)
            self._note_bad(account)
        return self

    def _look(self, account: Account, advance: Callable[[int], None]) -> None:
        reader = self.material.readers.of(account.opened)
        sample = Sample(self._sample_share)
        placed = islice(account.opened.examples(account.bad), self.limit)
        while chunk := list(islice(placed, _CHUNK)):
            rows = reader.rows(chunk)
            for row in rows:
                account.add(row)
                self._policy.note(row.place, row.words if row.fate == "stops" else None)
            if isinstance(reader, ConversationReader) and self._chat is not None:
                self._chat.check(rows)
                self.comparison.compare(reader, self._chat.reference, rows, sample)
            advance(len(rows))

    def _note_bad(self, account: Account) -> None:
        """Account for rows that could not be read."""
        stops = self.material.config.dataset.on_bad_row == "error"
        for row in account.bad.rows:
            problem = row.problem
            finding = account.find("stops" if stops else "dropped", "cannot be read")
            finding.note(row.where, lambda problem=problem: problem)  # type: ignore[misc]
            self._policy.note(row.where, problem if stops else None)


class _Chat:
    """What is asked of conversations alone."""

    def __init__(self, material: Material, opened: Opened) -> None:
        """`opened`: one of the sources, for what all of them share."""
        encoder = material.readers.conversations(opened).encoder
        self.rules = SequenceRules(encoder, material.tokenizer)
        template = material.config.chat.template
        self.reference = Reference(material.tokenizer, encoder, template)

    def check(self, rows: list[Row]) -> None:
        """Hold the sequences of rows against the rules."""
        for row in rows:
            for sequence in row.sequences:
                self.rules.apply(sequence, row.place)


def _is_chat(opened: Opened) -> bool:
    return opened.shape.kind == "conversation"
