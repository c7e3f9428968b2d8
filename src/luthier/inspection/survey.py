"""The whole dataset row by row against the rules, and its sources put together as a run does it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.config.methods import METHODS, MethodFacts
from luthier.config.schema import RunConfig
from luthier.data.encode_source import unread_keys
from luthier.data.encoders.chat import RowState
from luthier.data.examples import OpenedSource, train_sources
from luthier.data.fingerprints import Fingerprints
from luthier.data.images.decode import decode_image
from luthier.data.images.reader import ReadImage
from luthier.data.rows import RowError
from luthier.data.select import RowSelection, select_rows, split_by_source
from luthier.errors import UserError
from luthier.inspection.batch_fill import BatchFill, measure_batch_fill
from luthier.inspection.dataset import LoadedDataset, split_name
from luthier.inspection.readers import (
    ConversationReader,
    InspectedRow,
    ReplyReader,
    RowReader,
    shorten_location,
)
from luthier.inspection.rules import (
    PromptComparison,
    RowSample,
    Rule,
    SequenceRules,
    TransformersPrompts,
)
from luthier.inspection.statistics import (
    UNREADABLE,
    DuplicateRows,
    ExampleWithImages,
    HeldOutOverlap,
    Positions,
    RowOutcomes,
    SourceShare,
    SplitRows,
    SplitStats,
    find_duplicates,
    read_with_images,
    summarise_split,
)
from luthier.inspection.tokens import token_decoder
from luthier.inspection.warnings import RunWarning, collect_run_facts, find_warnings


class DatasetSummary:
    """What the rows of all sources make together."""

    def __init__(
        self, config: RunConfig, trained: dict[str, RowOutcomes], evaluated: dict[str, RowOutcomes]
    ) -> None:
        """`trained`: the training sources by name; `evaluated`: the others by config key."""
        self._config = config
        self._trained = trained
        self._evaluated = evaluated
        self.error: str | None = None
        """Why training stops before its first step, if it does."""
        self._usable = _joined(account.sequences > 0 for account in trained.values())
        self.selection = self._select()

    @property
    def equality(self) -> str:
        """How rows are compared: `exact` or `normalised`."""
        return "normalised" if self._config.dataset.deduplicate == "normalised" else "exact"

    @cached_property
    def sides(self) -> list[SplitStats]:
        """The training side, and each evaluation set."""
        rows = split_by_source(self._trained, self._with_unusable(self.selection.train))
        epoch = split_by_source(self._trained, self.selection.epoch)
        parts = [SplitRows(self._trained[name], rows[name], epoch[name]) for name in rows]
        sides = [summarise_split("train", parts, self.selection.other)]
        if len(self.selection.heldout):
            sides.append(self._drawn())
        for key, account in self._evaluated.items():
            everything = np.arange(len(account))
            sides.append(
                summarise_split(split_name(key), [SplitRows(account, everything, everything)])
            )
        return sides

    @cached_property
    def mixture(self) -> dict[str, SourceShare]:
        """What an epoch sees of each source, by name."""
        rows = split_by_source(self._trained, self.selection.train)
        epoch = split_by_source(self._trained, self.selection.epoch)
        shares = {}
        for name, account in self._trained.items():
            tokens, trained = account.count_tokens(epoch[name])
            shares[name] = SourceShare(
                rows=len(rows[name]),
                epoch=len(epoch[name]),
                tokens=tokens,
                trained_tokens=trained,
            )
        return shares

    def equals(self) -> dict[str, DuplicateRows]:
        """Rows that equal an earlier one: `exact`, and `normalised` for those that only look so."""
        rows = np.flatnonzero(self._usable)
        locations = [place for account in self._trained.values() for place in account.places]
        locations = [locations[row] for row in rows.tolist()]
        exact, normalised = (self._prints(kind)[rows] for kind in ("exact", "normalised"))
        return {
            "exact": find_duplicates(exact, locations),
            "normalised": find_duplicates(normalised, locations, exact),
        }

    def overlaps(self) -> dict[str, HeldOutOverlap]:
        """What training shares with each evaluation set, by the set's name."""
        held = {split_name(key): account for key, account in self._evaluated.items()}
        overlaps = {name: self._overlap(account) for name, account in held.items()}
        if len(self.selection.heldout):
            overlaps = {"held out": self._overlap(None)} | overlaps
        return overlaps

    def _select(self) -> RowSelection:
        """The selection of a training; where that stops, all rows that can train."""
        rows = np.flatnonzero(self._usable)
        everything = RowSelection(rows, rows[:0], rows, {}, {})
        if not len(rows):
            return everything
        empty = [key for key, part in self._evaluated.items() if not (part.sequences > 0).any()]
        if empty:
            self.error = f"{empty[0]}: none of its rows can be used to evaluate on."
        trained, evaluated = (
            {key: account for key, account in accounts.items() if key not in empty}
            for accounts in (self._trained, self._evaluated)
        )
        try:
            dataset = self._config.dataset
            sources = train_sources(dataset)
            return select_rows(dataset, sources, trained, evaluated, self._config.seed)
        except UserError as error:
            self.error = str(error)
            return everything

    def _with_unusable(self, rows: Positions) -> Positions:
        """The rows that train, and those that make no sequence, which no side has."""
        return np.union1d(rows, np.flatnonzero(~self._usable))

    def _drawn(self) -> SplitStats:
        """The rows that are held out of the training sources."""
        rows = split_by_source(self._trained, self.selection.heldout)
        rows_of_sources = [
            SplitRows(self._trained[name], chosen, chosen) for name, chosen in rows.items()
        ]
        return summarise_split("held out", rows_of_sources)

    def _overlap(self, account: RowOutcomes | None) -> HeldOutOverlap:
        """What training shares with a set; None: with the rows held out of its own sources."""
        held = self.selection.heldout
        candidates = np.setdiff1d(np.flatnonzero(self._usable), held)
        rows = len(held) if account is None else int((account.sequences > 0).sum())

        def inside(equality: str) -> NDArray[np.bool_]:
            prints = self._prints(equality)
            other = prints[held] if account is None else _fingerprints(account, equality)
            return np.isin(prints[candidates], other)

        equal = inside(self.equality)
        trains = np.isin(candidates, self.selection.train)
        similar = inside("normalised") & ~equal & trains
        return HeldOutOverlap(rows, int(equal.sum()), int(similar.sum()))

    def _prints(self, equality: str) -> Fingerprints:
        """The fingerprints of all training rows."""
        return _joined(_fingerprints(account, equality) for account in self._trained.values())


def _fingerprints(account: RowOutcomes, equality: str) -> Fingerprints:
    """Return what tells whether rows are equal: `exact`, or `normalised`."""
    return account.fingerprints if equality == "exact" else account.normalised_fingerprints


def _joined(arrays: Any) -> Any:
    return np.concatenate(list(arrays))


_CHUNK = 512


class DecodedImages:
    """Decodes each image of a dataset once, whose sizes alone are read to encode its rows."""

    def __init__(self) -> None:
        self.rule = Rule("every image can be decoded", "images")
        self._problems: dict[str, str | None] = {}

    def check(self, opened: OpenedSource, examples: list[ExampleWithImages]) -> None:
        """Decode the images of some examples of a source, several at a time."""
        different = {image.ref["sha256"]: image for each in examples for image in each.images}
        new = [sha256 for sha256 in different if sha256 not in self._problems]
        if new:
            with ThreadPoolExecutor() as pool:
                problems = pool.map(lambda sha256: _decode(opened, different[sha256]), new)
                self._problems.update(zip(new, problems, strict=True))
        for row, images in examples:
            for number, image in enumerate(images, start=1):
                problem = self._problems[image.ref["sha256"]]
                if problem is not None:
                    problem = f"image {number} of {len(images)} ({image.ref['source']}): {problem}"
                self.rule.note(shorten_location(row.where), problem)


def _decode(opened: OpenedSource, image: ReadImage) -> str | None:
    """Return what is wrong with an image whose header was read; None for one that is whole."""
    try:
        decode_image(opened.images.read_bytes(image))
    except RowError as error:
        return str(error)
    return None


class Survey:
    """All that is found in a dataset; `run` fills it."""

    def __init__(self, material: LoadedDataset, limit: int | None = None) -> None:
        """`limit`: look at so many rows of each source."""
        self.material = material
        self.limit = limit
        text_of = token_decoder(material.tokenizer)
        self.trained = {
            name: RowOutcomes(name, opened) for name, opened in material.trained.items()
        }
        """What the training sources make, by name."""
        self.evaluated = {
            key: RowOutcomes(split_name(key), opened) for key, opened in material.evaluated.items()
        }
        """What the evaluation sets make that have rows of their own, by config key."""
        self.comparison = PromptComparison(material.config.chat.boundaries, text_of)
        self._policy = Rule("no row stops the training", "rows")
        self._images = DecodedImages()
        conversations = [account.opened for account in self.accounts if _is_chat(account.opened)]
        self._sample_share = 1 / max(len(conversations), 1)
        self._chat = _Chat(material, conversations[0]) if conversations else None

    @property
    def accounts(self) -> list[RowOutcomes]:
        """The accounts of all sources, training first."""
        return [*self.trained.values(), *self.evaluated.values()]

    @property
    def looks_at_chats(self) -> bool:
        """Whether there are conversations, to which the rules of the encoder apply."""
        return self._chat is not None

    @property
    def method(self) -> MethodFacts:
        """What the method of the run trains on."""
        return METHODS[self.material.config.trainer.base_method]

    @property
    def reads_documents(self) -> bool:
        """Whether all rows are plain texts, which are counted in windows."""
        return all(a.opened.row_format.example_type == "text" for a in self.accounts)

    @property
    def rules(self) -> list[Rule]:
        """All rules, those that break the training first."""
        if self._chat is None:
            return [self._policy]
        images = [self._images.rule] if self._images.rule.checked else []
        # Tokens that are cut at every segment are not a server's; the config chose that.
        served = self.comparison.boundaries.chosen == "served"
        prompts = [self.comparison.prompts] if served else []
        return [self._policy, *images, *self._chat.rules.all, *prompts]

    @cached_property
    def summary(self) -> DatasetSummary:
        """The sources put together; for a survey that has run."""
        return DatasetSummary(self.material.config, self.trained, self.evaluated)

    @cached_property
    def batches(self) -> BatchFill | None:
        """How an epoch fills its batches; None where nothing trains."""
        material, side = self.material, self.train
        reader = material.readers.of(self.accounts[0].opened)
        sequences = 2 if isinstance(reader, ReplyReader) and reader.compares else 1
        return measure_batch_fill(
            side.lengths, material.config, material.batching, side.tokens, sequences
        )

    @cached_property
    def warnings(self) -> list[RunWarning]:
        """What usually ruins such a training; nothing where only the first rows were looked at."""
        if self.limit is not None or not len(self.train.lengths):
            return []
        material, overlaps = self.material, self.summary.overlaps()
        facts = collect_run_facts(
            material.config,
            material.tokenizer,
            self._chat and self._chat.encoder,
            material.batching,
            lengths=self.train.lengths,
            rows=self.train.rows,
            similar_rows={name: overlap.similar for name, overlap in overlaps.items()},
        )
        return find_warnings(facts)

    @property
    def train(self) -> SplitStats:
        """The side that trains."""
        return self.summary.sides[0]

    @property
    def error(self) -> str | None:
        """Why training would stop before its first step, apart from single rows."""
        # Rows that were not looked at may be those that are missed.
        return self.summary.error if self.limit is None else None

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

    def _look(self, account: RowOutcomes, advance: Callable[[int], None]) -> None:
        reader = self.material.readers.of(account.opened)
        sample = RowSample(self._sample_share)
        placed = islice(read_with_images(account.opened, account.bad), self.limit)
        while chunk := list(islice(placed, _CHUNK)):
            rows = reader.rows([example.row for example in chunk])
            self._images.check(account.opened, chunk)
            for row in rows:
                account.add(row)
                stops = row.outcome.state == RowState.STOPS
                self._policy.note(row.place, row.outcome.problem if stops else None)
            self._compare(account.opened, reader, rows, sample)
            advance(len(rows))

    def _compare(
        self, opened: OpenedSource, reader: RowReader, rows: list[InspectedRow], sample: RowSample
    ) -> None:
        """Check conversations, also those of compared replies, against rules and transformers."""
        if self._chat is None or not isinstance(reader, ConversationReader | ReplyReader):
            return
        chats = rows
        if isinstance(reader, ReplyReader):
            chats = [reply for row in rows for reply in row.replies]
            self.comparison.boundaries.unit = "replies"
        self._chat.check(chats)
        conversations = self.material.readers.conversations(opened)
        self.comparison.compare(conversations, self._chat.reference, chats, sample)

    def unread_keys(self, account: RowOutcomes) -> dict[str, int]:
        """Return the keys of messages that neither luthier nor the template reads."""
        return unread_keys(account.other_keys, self._chat and self._chat.template)

    def _note_bad(self, account: RowOutcomes) -> None:
        """Account for rows that could not be read."""
        stops = self.material.config.dataset.on_bad_row == "error"
        for row in account.bad.rows:
            problem = row.problem
            finding = account.finding("stops" if stops else "dropped", UNREADABLE)
            finding.note(row.where, lambda problem=problem: problem)  # type: ignore[misc]
            self._policy.note(row.where, problem if stops else None)


class _Chat:
    """What is asked of conversations alone."""

    def __init__(self, material: LoadedDataset, opened: OpenedSource) -> None:
        """`opened`: one of the sources, for what all of them share."""
        self.encoder = encoder = material.readers.conversations(opened).encoder
        # A score of the whole conversation trains no token of it.
        trains_tokens = METHODS[material.config.trainer.base_method].task == "CAUSAL_LM"
        self.rules = SequenceRules(encoder, material.tokenizer, trains_tokens)
        self.template = encoder.settings()["template"]
        template = material.config.chat.template
        self.reference = TransformersPrompts(material.tokenizer, encoder, template)

    def check(self, rows: list[InspectedRow]) -> None:
        """Hold the sequences of rows against the rules."""
        for row in rows:
            for sequence in row.sequences:
                self.rules.apply(sequence, row.place)


def _is_chat(opened: OpenedSource) -> bool:
    return opened.row_format.example_type in ("conversation", "preference", "unpaired")
