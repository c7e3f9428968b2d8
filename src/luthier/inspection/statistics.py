"""What becomes of the rows of a dataset, which are equal, and what each split holds, in numbers."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from luthier.chat import ChatSequence
from luthier.config.schema import DatasetConfig, EvalConfig
from luthier.data.encode_source import expand_ranges
from luthier.data.encoders.chat import RowState
from luthier.data.examples import BadRows, LocatedExample, OpenedSource, train_sources
from luthier.data.fingerprints import (
    Fingerprints,
    fingerprint,
    normalised_fingerprint,
    pack_fingerprints,
)
from luthier.data.formats.image_parts import image_parts
from luthier.data.formats.messages import find_other_keys
from luthier.data.images.reader import ReadImage
from luthier.data.prepare import count_outcomes
from luthier.data.select import select_rows, split_by_source
from luthier.inspection.dataset import LoadedDataset
from luthier.inspection.readers import TIED, InspectedRow
from luthier.inspection.rules import EXAMPLES, RuleExample

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
    prints: Fingerprints, places: Sequence[str], other_prints: Fingerprints | None = None
) -> DuplicateRows:
    """Find the rows that equal an earlier one.

    `prints` tells which are equal, `places` where each row stands. Rows that equal an earlier one
    by `other_prints`, too, are not counted.
    """
    first = _firsts(prints)
    repeated = first != np.arange(len(prints))
    if other_prints is not None:
        repeated &= _firsts(other_prints) == np.arange(len(other_prints))
    rows = np.flatnonzero(repeated)
    first_rows = rows[:EXAMPLES].tolist()
    examples = [RuleExample(places[row], f"equals {places[first[row]]}") for row in first_rows]
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


UNREADABLE = "cannot be read"
"""The reason of a finding about rows that never became examples."""
SelectedRows = list[tuple[OpenedSource, Positions]]
"""Rows of several sources, each with where they stand in it."""


@dataclass(frozen=True)
class SourceSummary:
    """A source whose rows are read and not encoded: each counts as if it made a sequence."""

    fingerprints: Fingerprints
    normalised_fingerprints: Fingerprints
    first_location: str
    """The place of the first row; empty where there is none."""
    filtered: int
    """Rows that the filter left out."""

    def __len__(self) -> int:
        return len(self.fingerprints)

    @property
    def sequences(self) -> NDArray[np.int32]:
        """How many sequences each row makes."""
        return np.ones(len(self), np.int32)

    def drop_reasons(self) -> dict[str, int]:
        """How many rows make no sequence, by reason: none."""
        return {}


def select_split(material: LoadedDataset, split: str) -> SelectedRows:
    """Return the rows of one split.

    `split`: `train`, `held out` for rows held out of the training sources, or the config key of an
    evaluation set. All rows count as if each made a sequence. Raises UserError for rows that cannot
    be read, where the config does not drop them, and where training would stop for want of rows.
    """
    config = material.config.dataset
    if split in material.evaluated:
        opened = material.evaluated[split]
        return [(opened, np.arange(len(_summarise_source(opened, config))))]
    trained, evaluated = (
        {key: _summarise_source(opened, config) for key, opened in sources.items()}
        for sources in (material.trained, material.evaluated)
    )
    seed = material.config.seed
    selection = select_rows(config, train_sources(config), trained, evaluated, seed)
    numbers = selection.train if split == "train" else selection.heldout
    rows = split_by_source(trained, numbers)
    return [(material.trained[name], positions) for name, positions in rows.items()]


class ExampleWithImages(NamedTuple):
    """An example of a source, and its images in the order of their parts."""

    row: LocatedExample
    images: list[ReadImage]


def read_with_images(opened: OpenedSource, bad: BadRows) -> Iterator[ExampleWithImages]:
    """Yield all examples of a source, each with its images; `bad` gets the rows that are none."""
    images: list[ReadImage] = []
    for row in opened.examples(bad, keep_image=images.append):
        yield ExampleWithImages(row, [*images])
        images.clear()


def read_examples(opened: OpenedSource, positions: Positions) -> Iterator[ExampleWithImages]:
    """Yield the examples at these positions of a source, in its order.

    The source is read no further than the last of them.
    """
    numbers = set(positions.tolist())
    last = max(numbers, default=-1)
    if last < 0:
        return
    for number, example in enumerate(read_with_images(opened, BadRows())):
        if number in numbers:
            yield example
        if number == last:
            return


def _summarise_source(opened: OpenedSource, config: DatasetConfig) -> SourceSummary:
    """Read a source; raises UserError for bad rows unless the config drops them."""
    bad = BadRows()
    # The selection asks for one kind of fingerprints.
    is_normalised = config.deduplicate == "normalised"
    fingerprint_of = normalised_fingerprint if is_normalised else fingerprint
    digests, first_location = [], ""
    for row in opened.examples(bad):
        digests.append(fingerprint_of(row.example))
        first_location = first_location or row.where
    if config.on_bad_row == "error":
        bad.raise_if_any(opened)
    # The one kind stands for both, as the selection reads only the one that the config names.
    fingerprints = pack_fingerprints(digests)
    return SourceSummary(fingerprints, fingerprints, first_location, bad.filtered)


@dataclass
class Finding:
    """Rows of which there is something to say: what became of them, why, and the first ones."""

    outcome: str
    """The state of the rows, or what else there is to say: `cut`, `windows`, `split` or `tied`."""
    reason: str
    rows: int = 0
    examples: list[RuleExample] = field(default_factory=list)

    def note(self, where: str, words: Callable[[], str]) -> None:
        """Count one more; its words are asked for only if it is one of the first."""
        self.rows += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(RuleExample(where, words()))


class RowOutcomes:
    """What the rows of one source make and what becomes of them, as they come."""

    def __init__(self, name: str, opened: OpenedSource) -> None:
        self.name = name
        self.opened = opened
        self.places: list[str] = []
        """Where each row stands."""
        self.bad = BadRows()
        self.findings: dict[tuple[str, str], Finding] = {}
        self.other_keys: Counter[str] = Counter()
        """Keys of messages that are none of a message's own, each with its rows."""
        self._fingerprints, self._normalised_fingerprints = bytearray(), bytearray()
        # Arrays of numbers, as a dataset may have millions of rows.
        self._sequences, self._cut_turns, self._states = array("i"), array("i"), array("b")
        self._lengths, self._tokens, self._trained = array("i"), array("i"), array("i")
        self._images, self._image_tokens = array("i"), array("i")
        self.different_images: set[str] = set()
        """The SHA-256 of each image of its rows."""
        self.labels: Counter[str] = Counter()
        """How often each verdict, class or tag trains."""

    def __len__(self) -> int:
        return len(self.places)

    def add(self, row: InspectedRow) -> None:
        """Note one row."""
        outcome = row.outcome
        self.places.append(row.place)
        self.other_keys.update(find_other_keys(row.example))
        self._fingerprints += fingerprint(row.example)
        self._normalised_fingerprints += normalised_fingerprint(row.example)
        self._states.append(outcome.state)
        self._sequences.append(len(row.sizes))
        self._cut_turns.append(-1 if outcome.cut_turns is None else outcome.cut_turns)
        for size in row.sizes:
            self._lengths.append(size.length)
            self._tokens.append(size.tokens)
            self._trained.append(size.trained)
            self._images.append(size.images)
            self._image_tokens.append(size.image_tokens)
        self.labels.update(row.labels)
        self.different_images.update(part["image"]["sha256"] for part in image_parts(row.example))
        self._note_findings(row)

    def finding(self, outcome: str, reason: str) -> Finding:
        """Return the finding of this outcome and reason, which is new where there was none."""
        return self.findings.setdefault((outcome, reason), Finding(outcome, reason))

    @property
    def fingerprints(self) -> Fingerprints:
        """The fingerprint of each row, `S16`."""
        return np.frombuffer(bytes(self._fingerprints), "S16")

    @property
    def normalised_fingerprints(self) -> Fingerprints:
        """The fingerprint of each row's normalised text, `S16`."""
        return np.frombuffer(bytes(self._normalised_fingerprints), "S16")

    @property
    def sequences(self) -> NDArray[np.int32]:
        """How many sequences each row makes."""
        return _numbers(self._sequences)

    @property
    def cut_turns(self) -> NDArray[np.int32]:
        """Trained turns that each row lost, -1 where it was not cut."""
        return _numbers(self._cut_turns)

    @property
    def states(self) -> NDArray[np.int8]:
        """The `RowState` of each row."""
        return np.array(self._states, np.int8)

    @property
    def filtered(self) -> int:
        """Rows that the filter left out."""
        return self.bad.filtered

    def drop_reasons(self) -> dict[str, int]:
        """How many rows make no sequence, by reason."""
        return {
            finding.reason: finding.rows
            for finding in self.findings.values()
            if finding.outcome in ("dropped", "stops") and finding.reason != UNREADABLE
        }

    @property
    def first_location(self) -> str:
        """The place of the first row; empty where there is none."""
        return self.places[0] if self.places else ""

    def lengths(self, rows: Positions) -> NDArray[np.int32]:
        """Return the length of each sequence of these rows, in order: of a pair, the longer one."""
        return _numbers(self._lengths)[self._sequence_numbers(rows)]

    def count_tokens(self, rows: Positions) -> tuple[int, int]:
        """Return the tokens of the sequences of these rows, and those that train."""
        numbers = self._sequence_numbers(rows)
        tokens, trained = _numbers(self._tokens)[numbers], _numbers(self._trained)[numbers]
        return int(tokens.sum(dtype=np.int64)), int(trained.sum(dtype=np.int64))

    def count_images(self, rows: Positions) -> tuple[int, int]:
        """Return the images in the sequences of these rows, and the tokens that stand for them."""
        numbers = self._sequence_numbers(rows)
        images, tokens = _numbers(self._images), _numbers(self._image_tokens)
        return int(images[numbers].sum()), int(tokens[numbers].sum(dtype=np.int64))

    def _sequence_numbers(self, rows: Positions) -> Positions:
        counts = self.sequences.astype(np.int64)
        numbers: Positions = expand_ranges((np.cumsum(counts) - counts)[rows], counts[rows])
        return numbers

    def _note_findings(self, row: InspectedRow) -> None:
        where, outcome, sequences = row.place, row.outcome, len(row.sequences)
        if row.is_tied:
            self.finding("tied", TIED).note(where, lambda: "no reply is the better one")
        if outcome.state != RowState.TRAINS:
            name = outcome.state.name.lower()
            self.finding(name, outcome.reason).note(where, lambda: outcome.problem)
        if row.cut:
            self.finding("cut", "longer than chat.max_length").note(where, lambda: row.cut)
        if sequences > 1 and self.opened.row_format.example_type == "text":
            finding = self.finding("windows", "longer than chat.max_length")
            finding.note(where, lambda: f"{sequences:,} windows")
        elif sequences > 1:
            finding = self.finding("split", "each turn in its true context")
            finding.note(where, lambda: _turns(row.sequences))


def _turns(sequences: Sequence[ChatSequence]) -> str:
    listed = " | ".join(", ".join(map(str, sequence.messages)) for sequence in sequences)
    return f"messages {listed}"


def _numbers(values: "array[int]") -> NDArray[Any]:
    return np.array(values, np.int32)


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
    """Tokens of each sequence of an epoch, shape (sequences,): of a pair those of the longer."""
    tokens: int
    """The tokens of an epoch."""
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
    images: int = 0
    """Images in the sequences of an epoch; one that stands in several counts each time."""
    image_tokens: int = 0
    """The tokens that stand for them."""


def summarise_split(
    name: str, parts: list[SplitRows], left_out: dict[str, int] | None = None
) -> SplitStats:
    """Count a split: for each source the rows that are in it.

    `left_out`: rows that are in no split, by reason.
    """
    tokens = [part.account.count_tokens(part.epoch) for part in parts]
    outcomes = count_outcomes((part.account, part.rows) for part in parts)
    none = np.empty(0, np.int32)
    images = [part.account.count_images(part.epoch) for part in parts]
    return SplitStats(
        name=name,
        rows=outcomes.rows,
        lengths=np.concatenate([none, *(part.account.lengths(part.epoch) for part in parts)]),
        tokens=sum(count for count, _ in tokens),
        trained_tokens=sum(trained for _, trained in tokens),
        dropped=outcomes.states[RowState.DROPPED],
        stops=outcomes.states[RowState.STOPS],
        lossy=outcomes.states[RowState.LOSSY],
        cut_rows=outcomes.cut_rows,
        cut_turns=outcomes.cut_turns,
        split=_count_several(parts, "conversation"),
        windows=_count_several(parts, "text"),
        left_out={reason: rows for reason, rows in (left_out or {}).items() if rows},
        images=sum(count for count, _ in images),
        image_tokens=sum(tokens for _, tokens in images),
    )


def _count_several(parts: list[SplitRows], example_type: str) -> int:
    """Return how many rows of this kind make several sequences."""
    return sum(
        int((part.account.sequences[part.rows] > 1).sum())
        for part in parts
        if part.account.opened.row_format.example_type == example_type
    )
