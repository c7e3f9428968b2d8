"""From a dataset's config to token rows ready for a trainer, and what became of the rows."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from luthier.config.schema import DatasetConfig
from luthier.data.batching.token_rows import TokenRows
from luthier.data.encode_source import (
    EncodedSource,
    encode_source,
    expand_ranges,
    source_cache_key,
)
from luthier.data.encoders.chat import IMAGES_COLUMN, EncoderFactory, RowState
from luthier.data.examples import (
    DatasetSources,
    LocatedExample,
    OpenedSource,
    eval_set_name,
    source_key,
)
from luthier.data.formats import Example
from luthier.data.images.reader import ImageRef
from luthier.data.rows import excerpt
from luthier.data.seeded_random import RowNumbers
from luthier.data.select import RowSelection, select_rows, split_by_source
from luthier.data.store import Store, data_folder, tokenizer_digest
from luthier.data.store.table import JoinedTable, TokenTable
from luthier.data.streaming import TokenRowStream, open_stream


@dataclass(frozen=True)
class SplitCounts:
    """What became of the rows of the training split or of an evaluation set."""

    rows: int = 0
    """Different rows, those that give no sequence included."""
    sequences: int = 0
    """Sequences of an epoch; one that is repeated counts each time."""
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    """Tokens of the longest sequence."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows that give no sequence, by reason; those that could not be read, are equal to others or
    to a held-out row, or that the mixture leaves out, are not in `rows`."""
    cut_rows: int = 0
    """Rows that lost turns from their front to fit `chat.max_length`."""
    cut_turns: int = 0
    """Trained turns that went with them."""
    lossy_rows: int = 0
    """Rows that train although the template does not show all of their text."""
    sources: dict[str, int] = field(default_factory=dict)
    """Rows of an epoch from each of several sources."""
    images: int = 0
    """Images in the sequences of an epoch; one that stands in several counts each time."""


class OutcomeCounts(NamedTuple):
    """What became of some rows, which may be of several sources."""

    rows: int
    states: list[int]
    """Rows in each `RowState`, by its number."""
    cut_rows: int
    """Rows that were cut to fit the length."""
    cut_turns: int
    """Trained turns that they lost."""


class CountableRows(Protocol):
    """The rows of a source with their outcomes; encoded ones and those of a check are such."""

    @property
    def states(self) -> NDArray[Any]:
        """The state of each row."""

    @property
    def cut_turns(self) -> NDArray[Any]:
        """Trained turns that each row lost, -1 where it was not cut."""


def count_outcomes(split: Iterable[tuple[CountableRows, RowNumbers]]) -> OutcomeCounts:
    """Count what became of these rows of each source."""
    rows = cut_rows = cut_turns = 0
    states = np.zeros(len(RowState), np.int64)
    for source, numbers in split:
        cut = source.cut_turns[numbers]
        rows += len(numbers)
        cut_rows += int((cut >= 0).sum())
        cut_turns += int(cut[cut > 0].sum())
        states += np.bincount(source.states[numbers], minlength=len(RowState))
    return OutcomeCounts(rows, states.tolist(), cut_rows, cut_turns)


SplitRows = list[tuple[EncodedSource, RowNumbers]]
"""The rows of a split: some of each source."""


@dataclass(frozen=True)
class PreparedData:
    """A dataset as token rows, ready for a trainer, and its held-out examples."""

    train: TokenRows | TokenRowStream
    """A stream where `dataset.streaming` is set: without counts, and hashed by its settings."""
    eval: dict[str, TokenRows]
    """The evaluation sets by name; the main one, which `dataset.eval` holds out, is ``""``."""
    heldout: dict[str, "HeldOutExamples"]
    """The examples of each evaluation set that make a sequence, in order, for generation."""
    train_counts: SplitCounts
    eval_counts: dict[str, SplitCounts]
    content_hash: str
    """SHA-256 of the hashes of all token rows with their labels, in order, training first."""
    sources: dict[str, EncodedSource]
    """The encoded sources by config key, training first."""
    reports: list[dict[str, str]]
    """Each row that could not be read, was dropped or is not whole: `where`, `state`, `problem`
    and `text`, the start of the row."""
    train_rows: SplitRows = field(default_factory=list)
    """The different rows that train, by source; none of a stream."""

    def count_similar_rows(self) -> dict[str, int]:
        """Return how many training rows are like a held-out row, by the name of its set.

        They differ from it in case, white space or Unicode form alone; rows that equal a held-out
        row exactly never train. The fingerprints are made once for each source and kept with it.
        """
        counts = {}
        for name, examples in self.heldout.items():
            held = [source.normalised_fingerprints[rows] for source, rows in examples.split]
            counts[name] = sum(
                int(np.isin(source.normalised_fingerprints[rows], each).sum())
                for source, rows in self.train_rows
                for each in [np.concatenate(held)]
            )
        return counts

    @property
    def unread_keys(self) -> dict[str, list[tuple[str, int]]]:
        """Keys of messages that nothing reads with their rows, by the config key of the source.

        Of a stream they are those of the first rows.
        """
        found = {key: source.unread_keys for key, source in self.sources.items()}
        if isinstance(self.train, TokenRowStream):
            found |= {key: self.train.unread_keys(key) for key in self.train.opened}
        return {key: list(keys.items()) for key, keys in found.items() if keys}

    @property
    def has_images(self) -> bool:
        """Whether a row, of training or held out, has an image."""
        rows = [self.train, *self.eval.values()]
        return any(isinstance(each, TokenRows) and each.read_images is not None for each in rows)

    @property
    def largest_images(self) -> tuple[tuple[int, int], ...]:
        """The height and width of each image of the row with the most pixels."""
        sources = self.sources.values()
        return find_largest_images((each.tokens, each.images.table) for each in sources)

    def read_image(self, ref: ImageRef) -> bytes:
        """Return the bytes of an image that an example refers to.

        Raises UserError where its file is gone or has other content now.
        """
        for source in self.sources.values():
            with suppress(KeyError):
                return source.images.read_reference(ref)
        raise KeyError(ref["sha256"])

    def locate_rows(self, numbers: Sequence[int]) -> list[str]:
        """Return where the rows behind these rows of the training table stand: `data.jsonl:7`.

        Rows of a stream are not known by number, so there is nothing for them.
        """
        if not isinstance(self.train, TokenRows):
            return []
        return list(dict.fromkeys(_locations(self.sources.values(), numbers)))


class HeldOutExamples:
    """The examples of some rows; they are read when they are iterated over."""

    def __init__(self, split: SplitRows) -> None:
        self.split = split
        """The rows, by their sources."""

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self.split)

    def __iter__(self) -> Iterator[Example]:
        for example, _ in self.with_columns():
            yield example

    def with_columns(self) -> Iterator[tuple[Example, dict[str, Any]]]:
        """Yield each example with the columns of its row, which are empty if none are kept."""
        for source, rows in self.split:
            for row in rows:
                yield source.examples([row])[0], source.columns([row])[0]

    def by_source(self) -> Iterator[tuple[OpenedSource, list[LocatedExample]]]:
        """Yield the examples of each source with their places and the columns that are kept."""
        for source, rows in self.split:
            columns = source.examples(rows), source.locations(rows), source.columns(rows)
            yield source.opened, [LocatedExample(*row) for row in zip(*columns, strict=True)]


def prepare(
    config: DatasetConfig,
    encoders: EncoderFactory,
    tokenizer: Any,
    seed: int,
    sources: DatasetSources | None = None,
) -> PreparedData:
    """Read and encode all sources, hold rows out, and mix what is left.

    What has been encoded before is found in the cache. The same content, settings and seed give the
    same rows in any process. `sources` are those that the quick check has opened; None opens them.
    Raises UserError, with file and line, for rows that cannot be read or encoded, and where nothing
    is left to train on or to evaluate on.
    """
    sources = sources or DatasetSources(config)
    encode = _source_encoder(sources, encoders, tokenizer)
    if config.streaming:
        return _prepare_stream(open_stream(sources, encoders), sources, encode)
    trained = {name: encode(source_key(name, sources.train)) for name in sources.train}
    evaluated = {key: encode(key) for key in sources.eval}
    selection = select_rows(config, sources.train, trained, evaluated, seed)
    train = _epoch_rows(trained, selection)
    splits = _eval_splits(evaluated)
    if len(selection.heldout):
        splits = {"": _split_of(trained, selection.heldout)} | splits
    eval_rows = {name: _rows_of(split) for name, split in splits.items()}
    # In the order of reports and of the record: training first.
    encoded = {source.opened.key: source for source in (*trained.values(), *evaluated.values())}
    return PreparedData(
        train=train,
        eval=eval_rows,
        heldout={name: HeldOutExamples(split) for name, split in splits.items()},
        train_counts=_count_train(trained, selection, train),
        eval_counts=_count_eval(splits, eval_rows, evaluated),
        content_hash=_hash(trained, splits, train),
        sources=encoded,
        reports=[report for source in encoded.values() for report in _reports(source)],
        train_rows=_split_of(trained, selection.train),
    )


def _prepare_stream(
    stream: TokenRowStream, sources: DatasetSources, encode: Callable[[str], EncodedSource]
) -> PreparedData:
    """Return the training rows as a stream, and the evaluation sets as rows at hand."""
    evaluated = {key: encode(key) for key in sources.eval}
    splits = _eval_splits(evaluated)
    eval_rows = {name: _rows_of(split) for name, split in splits.items()}
    # The rows are not known before they train: the hash is of all that decides them but the files.
    settings = [
        [opened.settings(), stream.encoders[key].settings()]
        for key, opened in stream.opened.items()
    ]
    return PreparedData(
        train=stream,
        eval=eval_rows,
        heldout={name: HeldOutExamples(split) for name, split in splits.items()},
        train_counts=SplitCounts(),
        eval_counts=_count_eval(splits, eval_rows, evaluated),
        content_hash=hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        sources=evaluated,
        reports=[report for source in evaluated.values() for report in _reports(source)],
    )


def _source_encoder(
    sources: DatasetSources, encoders: EncoderFactory, tokenizer: Any
) -> Callable[[str], EncodedSource]:
    """Return the function that gives the encoded rows of the source under a config key."""
    config = sources.config
    store, digest = Store(data_folder(config.cache)), tokenizer_digest(tokenizer)
    workers, drop = config.workers or 1, config.on_bad_row == "drop"

    def encode(key: str) -> EncodedSource:
        opened = sources.open(key)
        encoder = encoders(opened.row_format.example_type, opened.config, key)
        return encode_source(opened, encoder, store, digest, workers, drop)

    return encode


class LargestRows(NamedTuple):
    """How large training rows get."""

    tokens: int
    """Those of the longest row."""
    images: tuple[tuple[int, int], ...]
    """The height and width of each image of the row with the most pixels."""


def find_largest_rows(
    config: DatasetConfig, encoders: EncoderFactory, tokenizer: Any
) -> LargestRows | None:
    """Return how large the training rows of all sources get, which the cache holds.

    None where one of them has not been encoded yet, or is a stream. Raises UserError as `prepare`
    does for sources that cannot be opened.
    """
    if config.streaming:
        return None
    sources, longest = DatasetSources(config), 0
    tables: list[tuple[TokenTable, TokenTable]] = []
    store, digest = Store(data_folder(config.cache)), tokenizer_digest(tokenizer)
    for name in sources.train:
        key = source_key(name, sources.train)
        opened = sources.open(key)
        encoder = encoders(opened.row_format.example_type, opened.config, key)
        stored = store.open(source_cache_key(opened, encoder, digest))
        if stored is None:
            return None
        tables.append((stored.table("tokens"), stored.table("images")))
        longest = max(longest, int(tables[-1][0].lengths.max(initial=0)))
    return LargestRows(longest, find_largest_images(tables)) if longest else None


def find_largest_images(
    tables: Iterable[tuple[TokenTable, TokenTable]],
) -> tuple[tuple[int, int], ...]:
    """Return the height and width of each image of the row with the most pixels.

    `tables` are those of the token rows and of the images of each source.
    """
    largest: tuple[tuple[int, int], ...] = ()
    for tokens, images in tables:
        if not len(images) or IMAGES_COLUMN not in tokens.columns:
            continue
        heights, widths = (images.column(name).astype(np.int64) for name in ("height", "width"))
        rows = tokens.values(IMAGES_COLUMN, range(len(tokens)))
        row_numbers = np.repeat(np.arange(len(rows)), [len(numbers) for numbers in rows])
        pixels = (heights * widths)[np.concatenate(rows)]
        most = int(np.bincount(row_numbers, weights=pixels, minlength=1).argmax())
        sizes = tuple((int(heights[number]), int(widths[number])) for number in rows[most])
        largest = max(largest, sizes, key=lambda each: sum(h * w for h, w in each))
    return largest


def _epoch_rows(trained: Mapping[str, EncodedSource], selection: RowSelection) -> TokenRows:
    """Return the sequences of an epoch."""
    table = JoinedTable([source.tokens for source in trained.values()])
    counts = np.concatenate([source.sequences for source in trained.values()]).astype(np.int64)
    starts = np.cumsum(counts) - counts
    index = expand_ranges(starts[selection.epoch], counts[selection.epoch])
    sources = [*trained.values()]
    return TokenRows(table, index, _column_reader(sources), _image_reader(sources))


def _eval_splits(evaluated: Mapping[str, EncodedSource]) -> dict[str, SplitRows]:
    """Return the rows of each evaluation set that has rows of its own."""
    return {
        eval_set_name(key): [(source, np.flatnonzero(source.sequences > 0))]
        for key, source in evaluated.items()
    }


def _split_of(trained: Mapping[str, EncodedSource], rows: RowNumbers) -> SplitRows:
    """Return rows that are numbered over all training sources with their sources."""
    numbers = split_by_source(trained, rows)
    return [(source, numbers[name]) for name, source in trained.items()]


def _rows_of(split: SplitRows) -> TokenRows:
    """Return the sequences that the rows of a split make."""
    table = JoinedTable([source.tokens for source, _ in split])
    index = [
        table.start_of(number) + source.sequences_of(rows)
        for number, (source, rows) in enumerate(split)
    ]
    sources = [source for source, _ in split]
    readers = _column_reader(sources), _image_reader(sources)
    return TokenRows(table, np.concatenate(index), *readers)


class SourceColumns:
    """Reads the columns of the row behind each sequence of several sources, by its number."""

    def __init__(self, sources: Sequence[EncodedSource]) -> None:
        """Take the sources in the order in which their sequences are numbered."""
        # The tables alone: a worker process gets them, too, and they pickle as their paths.
        self._tables = [source.rows for source in sources]
        self._ends = [np.cumsum(source.sequences, dtype=np.int64) for source in sources]
        self._starts = np.cumsum([0, *(len(source.tokens) for source in sources)])

    def __call__(self, number: int) -> Mapping[str, Any]:
        """Return the columns of a sequence's row as its source has them."""
        source = int(np.searchsorted(self._starts, number, side="right")) - 1
        within = number - self._starts[source]
        row = int(np.searchsorted(self._ends[source], within, side="right"))
        (text,) = self._tables[source].values("columns", [row])
        columns: Mapping[str, Any] = json.loads(text)
        return columns


def _column_reader(sources: Sequence[EncodedSource]) -> SourceColumns | None:
    """Return what reads the columns of sources; None where one does not keep them."""
    kept = all("columns" in source.rows.columns for source in sources)
    return SourceColumns(sources) if kept else None


class SourceImages:
    """Reads the images of each sequence of several sources, by the sequence's number."""

    def __init__(self, sources: Sequence[EncodedSource]) -> None:
        """Take the sources in the order in which their sequences are numbered."""
        # The tables alone, as `SourceColumns` has them.
        self._tables = [source.tokens for source in sources]
        self._images = [source.images for source in sources]
        self._starts = np.cumsum([0, *map(len, self._tables)])

    def __call__(self, number: int) -> tuple[bytes, ...]:
        """Return the bytes of a sequence's images in the order of their tokens.

        Raises UserError for an image that is gone or changed since it was encoded.
        """
        source = int(np.searchsorted(self._starts, number, side="right")) - 1
        if IMAGES_COLUMN not in self._tables[source].columns:
            return ()
        row = int(number - self._starts[source])
        (numbers,) = self._tables[source].values(IMAGES_COLUMN, [row])
        return tuple(map(self._images[source].read, numbers.tolist()))


def _image_reader(sources: Sequence[EncodedSource]) -> SourceImages | None:
    """Return what reads the images of sources; None where no source has any."""
    return SourceImages(sources) if any(len(source.images) for source in sources) else None


def _count_train(
    trained: Mapping[str, EncodedSource], selection: RowSelection, train: TokenRows
) -> SplitCounts:
    """Count the training split, which rows that make no sequence are counted with."""
    sources = selection.sources if len(selection.sources) > 1 else None
    split = _with_dropped(_split_of(trained, selection.train))
    return _count_split(split, train, _unread_rows(trained.values()) | selection.other, sources)


def _count_eval(
    splits: Mapping[str, SplitRows],
    rows: Mapping[str, TokenRows],
    evaluated: Mapping[str, EncodedSource],
) -> dict[str, SplitCounts]:
    """Count each evaluation set; what training rows are dropped is counted with the training."""
    # Rows held out of the training sources have no source of their own to lose rows from.
    own_rows = {eval_set_name(key): source for key, source in evaluated.items()}
    counts = {}
    for name, split in splits.items():
        if name in own_rows:
            unread = _unread_rows([own_rows[name]])
            counts[name] = _count_split(_with_dropped(split), rows[name], unread)
        else:
            counts[name] = _count_split(split, rows[name], {})
    return counts


def _count_split(
    split: SplitRows,
    rows: TokenRows,
    in_no_split: Mapping[str, int],
    sources: dict[str, int] | None = None,
) -> SplitCounts:
    """Count a split: for each source the rows that are in it, and the tokens of its sequences.

    `in_no_split`: rows that are in none, by reason; `sources`: rows of an epoch by source.
    """
    table = rows.table
    assert isinstance(table, JoinedTable) and rows.index is not None
    outcomes = count_outcomes(split)
    dropped: Counter[str] = Counter()
    for source, numbers in split:
        dropped.update(source.drop_reasons(numbers))
    return SplitCounts(
        rows=outcomes.rows,
        sequences=len(rows.lengths),
        tokens=int(table.tokens[rows.index].sum(dtype=np.int64)),
        trained_tokens=int(table.column("trained")[rows.index].sum(dtype=np.int64)),
        longest=int(rows.lengths.max(initial=0)),
        dropped={**dropped, **{reason: count for reason, count in in_no_split.items() if count}},
        cut_rows=outcomes.cut_rows,
        cut_turns=outcomes.cut_turns,
        lossy_rows=outcomes.states[RowState.LOSSY],
        sources=sources or {},
        images=int(table.lengths_of(IMAGES_COLUMN)[rows.index].sum(dtype=np.int64)),
    )


def _with_dropped(split: SplitRows) -> SplitRows:
    """Return the rows of a split, and those of its sources that make no sequence."""
    return [
        (source, np.union1d(rows, np.flatnonzero(source.states == RowState.DROPPED)))
        for source, rows in split
    ]


def _unread_rows(sources: Iterable[EncodedSource]) -> dict[str, int]:
    """Return how many rows never became examples, by reason."""
    sources = list(sources)
    return {
        "could not be read": sum(len(source.bad_rows) for source in sources),
        "left out by the filter": sum(source.filtered for source in sources),
    }


def _locations(sources: Iterable[EncodedSource], numbers: Sequence[int]) -> Iterator[str]:
    """Yield the place of the row that made each sequence, numbered over all sources."""
    rest = list(numbers)
    for source in sources:
        ends = np.cumsum(source.sequences.astype(np.int64))
        count = len(source.tokens)
        inside = [number for number in rest if number < count]
        yield from source.locations(np.searchsorted(ends, inside, side="right").tolist())
        rest = [number - count for number in rest if number >= count]


def _reports(source: EncodedSource) -> Iterator[dict[str, str]]:
    """Yield what is wrong with the rows of a source."""
    for bad in source.bad_rows:
        yield _report(bad.where, "could not be read", bad.problem, bad.text)
    rows = np.flatnonzero(source.states != RowState.TRAINS)
    states = [RowState(state).name.lower() for state in source.states[rows].tolist()]
    columns = rows, source.locations(rows), states, source.rows.values("problem", rows)
    for row, where, state, problem in zip(*columns, strict=True):
        yield _report(where, state, problem, excerpt(source.examples([row])[0]))


def _report(where: str, state: str, problem: str, text: str) -> dict[str, str]:
    return {"where": where, "state": state, "problem": problem, "text": text}


def _hash(
    trained: Mapping[str, EncodedSource], splits: Mapping[str, SplitRows], train: TokenRows
) -> str:
    """Return one hash of the sequences' hashes, in order, with the count of each split first."""
    assert train.index is not None
    hash_arrays = [np.concatenate([source.hashes for source in trained.values()])[train.index]]
    for split in splits.values():
        rows = [source.hashes[source.sequences_of(numbers)] for source, numbers in split]
        hash_arrays.append(np.concatenate(rows))
    digest = hashlib.sha256()
    for hashes in hash_arrays:
        # The count tells where one split ends: the same rows split elsewhere are another dataset.
        digest.update(len(hashes).to_bytes(8, "little") + hashes.tobytes())
    return digest.hexdigest()
