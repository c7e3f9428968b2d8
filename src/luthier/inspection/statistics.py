"""What each row of a source makes and what becomes of it, in numbers, and the first of each."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from luthier.chat import ChatSequence
from luthier.config.schema import DatasetConfig, EvalConfig
from luthier.data.examples import BadRows, LocatedExample, OpenedSource, train_sources
from luthier.data.fingerprints import (
    Fingerprints,
    fingerprint,
    normalised_fingerprint,
    pack_fingerprints,
)
from luthier.data.select import RowSelection, select_rows, source_starts
from luthier.inspection.dataset import OUTCOMES, InspectedRow, LoadedDataset, Outcome, describe_cut
from luthier.inspection.rules import EXAMPLES, RuleExample

# How a dataset is put together: the mixture, equal rows, and what is held out.

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class SourceShare:
    """What an epoch sees of one source."""

    rows: int
    """Its different rows that train."""
    epoch: int
    """The same as often as an epoch sees them."""
    tokens: int
    trained_tokens: int

    @property
    def repeats(self) -> float:
        """How many times an epoch sees a row."""
        return self.epoch / self.rows if self.rows else 0.0


@dataclass
class DuplicateRows:
    """Training rows that equal an earlier one, with the first of them."""

    rows: int = 0
    examples: list[RuleExample] = field(default_factory=list)


@dataclass(frozen=True)
class HeldOutOverlap:
    """What training shares with an evaluation set."""

    rows: int
    """The rows of the set."""
    equal: int
    """Rows left out of training because they equal one of the set."""
    similar: int
    """Rows that train and differ from one of the set only in case, space or Unicode form."""


def find_duplicates(
    prints: Fingerprints, places: Sequence[str], known: Fingerprints | None = None
) -> DuplicateRows:
    """Find the rows that equal an earlier one.

    `prints` tells which are equal, `places` where each row stands. `known`: other fingerprints;
    rows that equal an earlier one by these too are not counted.
    """
    first = _firsts(prints)
    repeated = first != np.arange(len(prints))
    if known is not None:
        repeated &= _firsts(known) == np.arange(len(known))
    rows = np.flatnonzero(repeated)
    shown = rows[:EXAMPLES].tolist()
    examples = [RuleExample(places[row], f"equals {places[first[row]]}") for row in shown]
    return DuplicateRows(len(rows), examples)


def describe_hold_out(config: EvalConfig, seed: int) -> str:
    """How rows are held out of the training sources, in words; empty where none are."""
    if config.share is None and config.count is None:
        return ""
    if config.by == "hash":
        return f"a share of {config.share:g} of the different rows, each by its own hash"
    what = f"a share of {config.share:g}" if config.share is not None else f"{config.count:,}"
    return f"{what} of the different rows, drawn with seed {seed}"


def _firsts(prints: Fingerprints) -> Positions:
    """For each row the first one that equals it."""
    _, first, group = np.unique(prints, return_index=True, return_inverse=True)
    return first[group]


# Which rows of the sources train and which are held out, as training has it.

SelectedRows = list[tuple[OpenedSource, Positions]]
"""Rows of several sources, each with where they stand in it."""


@dataclass(frozen=True)
class SourceSummary:
    """A source as far as the division asks: what its rows equal, and how much they make."""

    prints: Fingerprints
    """What tells whether two rows are equal."""
    normalised_prints: Fingerprints
    """The same, but for case, white space and Unicode form."""
    sequences: NDArray[Any]
    """How many sequences each row makes; a row that makes none is on no side."""

    def __len__(self) -> int:
        return len(self.prints)


def select_summarised(
    config: DatasetConfig,
    seed: int,
    trained: Mapping[str, SourceSummary],
    evaluated: Mapping[str, SourceSummary],
) -> RowSelection:
    """Leave out equal rows, hold rows out and mix the others; rows are numbered over all sources.

    Raises UserError as training does where nothing is left on a side.
    """
    # Of an encoded source, `select` takes no more than a `Seen` has.
    parts, sets = cast(Any, trained), cast(Any, evaluated)
    return select_rows(config, train_sources(config), parts, sets, seed)


def split_by_source(sizes: Mapping[str, Any], rows: Positions) -> dict[str, Positions]:
    """Rows numbered over all sources as the rows of each, in the same order.

    `sizes`: the sources by name, each as long as it has rows.
    """
    starts = source_starts(cast(Any, sizes))
    return {
        name: rows[(rows >= start) & (rows < start + len(part))] - start
        for (name, part), start in zip(sizes.items(), starts, strict=False)
    }


def select_split(material: LoadedDataset, which: str) -> SelectedRows:
    """The rows of one side.

    `which`: `train`, `held out` for rows held out of the training sources, or the config key of an
    evaluation set. All rows count as if each made a sequence. Raises UserError for rows that cannot
    be read, where the config does not drop them.
    """
    config = material.config.dataset
    if which in material.evaluated:
        opened = material.evaluated[which]
        return [(opened, np.arange(len(_seen(opened, config))))]
    trained = {name: _seen(opened, config) for name, opened in material.trained.items()}
    evaluated = {key: _seen(opened, config) for key, opened in material.evaluated.items()}
    chosen = select_summarised(config, material.config.seed, trained, evaluated)
    rows = split_by_source(trained, chosen.train if which == "train" else chosen.heldout)
    return [(material.trained[name], positions) for name, positions in rows.items()]


def read_examples(opened: OpenedSource, positions: Positions) -> Iterator[LocatedExample]:
    """The examples at these positions of a source, in its order; read no further than the last."""
    wanted = set(positions.tolist())
    if not wanted:
        return
    last = max(wanted)
    for number, row in enumerate(opened.examples(BadRows())):
        if number in wanted:
            yield row
        if number == last:
            return


def _seen(opened: OpenedSource, config: DatasetConfig) -> SourceSummary:
    """A source whose rows are only read."""
    bad = BadRows()
    # The division asks for one kind of them.
    print_of = normalised_fingerprint if config.deduplicate == "normalised" else fingerprint
    prints = pack_fingerprints(print_of(row.example) for row in opened.examples(bad))
    if config.on_bad_row == "error":
        bad.raise_if_any(opened)
    return SourceSummary(prints, prints, np.ones(len(prints), np.int32))


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


class RowOutcomes:
    """The rows of one source, as they come."""

    def __init__(self, name: str, opened: OpenedSource) -> None:
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

    def add(self, row: InspectedRow) -> None:
        """Note one row."""
        self.places.append(row.place)
        self._prints["exact"] += fingerprint(row.example)
        self._prints["normalised"] += normalised_fingerprint(row.example)
        self._fates.append(OUTCOMES.index(row.fate))
        self._sequences.append(len(row.sequences))
        self._cut.append(-1 if row.cut_turns is None else row.cut_turns)
        for sequence in row.sequences:
            self._lengths.append(len(sequence))
            self._trained.append(sequence.trained_tokens)
        self._find(row)

    def find(self, fate: str, reason: str) -> Finding:
        """The finding of this kind."""
        return self.findings.setdefault((fate, reason), Finding(fate, reason))

    def prints(self, kind: str) -> Fingerprints:
        """What tells whether rows are equal: `exact` or `normalised`, shape (rows,)."""
        return np.frombuffer(bytes(self._prints[kind]), "S16")

    def seen(self) -> SourceSummary:
        """What the division asks for."""
        return SourceSummary(self.prints("exact"), self.prints("normalised"), self.sequences)

    @property
    def sequences(self) -> NDArray[np.int32]:
        """How many sequences each row makes."""
        return _numbers(self._sequences)

    @property
    def cut(self) -> NDArray[np.int32]:
        """Trained turns that each row lost, -1 where it was not cut."""
        return _numbers(self._cut)

    def fated(self, fate: Outcome) -> NDArray[np.bool_]:
        """Which rows end this way."""
        return np.array(self._fates, np.int8) == OUTCOMES.index(fate)

    def tokens(self, rows: Positions) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The tokens and the trained tokens of each sequence of these rows, in their order."""
        counts = self.sequences.astype(np.int64)
        starts, chosen = (np.cumsum(counts) - counts)[rows], counts[rows]
        inside = np.arange(chosen.sum()) - np.repeat(np.cumsum(chosen) - chosen, chosen)
        numbers = np.repeat(starts, chosen) + inside
        return _numbers(self._lengths)[numbers], _numbers(self._trained)[numbers]

    def _find(self, row: InspectedRow) -> None:
        where = row.place
        if row.fate != "trains" and row.error is not None:
            self.find(row.fate, row.error.reason).note(where, lambda: row.words)
        if row.cut_turns is not None:
            cut = row.cut_turns
            self.find("cut", "longer than chat.max_length").note(where, lambda: describe_cut(cut))
        several = len(row.sequences)
        if several > 1 and self.opened.row_format.example_type == "text":
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


# The sides of a dataset in numbers: what trains in an epoch, and each evaluation set.


class SplitRows(NamedTuple):
    """Rows of one source that are on a side."""

    account: RowOutcomes
    rows: Positions
    """Its different rows, those that make no sequence included."""
    epoch: Positions
    """Its rows as often as an epoch sees them."""


@dataclass(frozen=True)
class SplitStats:
    """What one side of the dataset makes."""

    name: str
    """`train`, `held out`, or the evaluation set's own."""
    rows: int
    lengths: NDArray[np.int32]
    """Tokens of each sequence of an epoch, shape (sequences,)."""
    trained_tokens: int
    dropped: int
    stops: int
    lossy: int
    cut_rows: int
    cut_turns: int
    split: int
    """Conversations that make several sequences."""
    windows: int
    """Documents that are cut into several windows."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows that are on no side, by reason; they are not in `rows`."""

    @property
    def tokens(self) -> int:
        """The tokens of an epoch."""
        return int(self.lengths.sum(dtype=np.int64))


def summarise_split(
    name: str, parts: list[SplitRows], left_out: dict[str, int] | None = None
) -> SplitStats:
    """Count a side: for each source the rows that are on it."""
    tokens = [part.account.tokens(part.epoch) for part in parts]
    none = np.empty(0, np.int32)
    return SplitStats(
        name=name,
        rows=sum(len(part.rows) for part in parts),
        lengths=np.concatenate([none, *(lengths for lengths, _ in tokens)]),
        trained_tokens=sum(int(trained.sum(dtype=np.int64)) for _, trained in tokens),
        dropped=_count(part.account.fated("dropped")[part.rows] for part in parts),
        stops=_count(part.account.fated("stops")[part.rows] for part in parts),
        lossy=_count(part.account.fated("lossy")[part.rows] for part in parts),
        cut_rows=_count(part.account.cut[part.rows] >= 0 for part in parts),
        cut_turns=sum(int(np.clip(p.account.cut[p.rows], 0, None).sum()) for p in parts),
        split=_several(parts, "conversation"),
        windows=_several(parts, "text"),
        left_out={reason: rows for reason, rows in (left_out or {}).items() if rows},
    )


def _several(parts: list[SplitRows], kind: str) -> int:
    """Rows of this kind that make several sequences."""
    return _count(
        part.account.sequences[part.rows] > 1
        for part in parts
        if part.account.opened.row_format.example_type == kind
    )


def _count(masks: Iterable[NDArray[np.bool_]]) -> int:
    return sum(int(mask.sum()) for mask in masks)
