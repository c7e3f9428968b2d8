"""From a dataset's config to token rows ready for a trainer."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.config.schema import DatasetConfig, SourceConfig
from luthier.data.batching.token_rows import TokenRows
from luthier.data.encode_source import DROPPED, FINE, LOSSY, EncodedSource, encode_source
from luthier.data.encoders.chat import RowEncoder
from luthier.data.examples import (
    LocatedExample,
    OpenedSource,
    eval_set_name,
    eval_sources,
    open_examples,
    train_sources,
)
from luthier.data.formats import Example
from luthier.data.mixture import source_key
from luthier.data.rows import excerpt
from luthier.data.select import RowSelection, select_rows, source_starts
from luthier.data.store import Store, data_folder, tokenizer_digest
from luthier.data.store.table import JoinedTable
from luthier.data.streaming import TokenRowStream, open_stream

# What became of the rows of a dataset, in numbers.


@dataclass(frozen=True)
class SplitCounts:
    """What became of the rows of one side, in rows, sequences and tokens."""

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
    """Rows kept although the template does not show all of their text."""
    sources: dict[str, int] = field(default_factory=dict)
    """Rows of an epoch from each of several sources."""


def count_split(
    parts: list[tuple[EncodedSource, NDArray[np.int64]]],
    lengths: NDArray[np.int32],
    tokens: NDArray[np.int32],
    trained: NDArray[np.int32],
    other: dict[str, int],
    sources: dict[str, int] | None = None,
) -> SplitCounts:
    """Count a side: for each source the rows that are on it, and its sequences' tokens.

    `other`: rows that are on no side, by reason.
    """
    dropped: dict[str, int] = {}
    rows = cut_rows = cut_turns = lossy = 0
    for encoded, chosen in parts:
        state, cut = encoded.rows.column("state")[chosen], encoded.rows.column("cut")[chosen]
        for reason in encoded.rows.values("reason", chosen[state == DROPPED]):
            dropped[reason] = dropped.get(reason, 0) + 1
        rows += len(chosen)
        lossy += int((state == LOSSY).sum())
        cut_rows += int((cut >= 0).sum())
        cut_turns += int(cut[cut > 0].sum())
    return SplitCounts(
        rows=rows,
        sequences=len(lengths),
        tokens=int(tokens.sum(dtype=np.int64)),
        trained_tokens=int(trained.sum(dtype=np.int64)),
        longest=int(lengths.max(initial=0)),
        dropped=dropped | {reason: count for reason, count in other.items() if count},
        cut_rows=cut_rows,
        cut_turns=cut_turns,
        lossy_rows=lossy,
        sources=sources or {},
    )


RowNumbers = NDArray[np.int64]
EncoderFactory = Callable[[str, SourceConfig, str], RowEncoder]
"""The encoder for the examples of a kind from a source; the last is the source's config key.

Raises UserError for a kind that the training method does not take.
"""
SourceRows = tuple[EncodedSource, RowNumbers]
"""Some rows of a source."""


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

    def locate_rows(self, numbers: Sequence[int]) -> list[str]:
        """Where the rows behind these rows of the training table stand, such as `data.jsonl:7`."""
        if not isinstance(self.train, TokenRows):
            return []
        return list(dict.fromkeys(_places(self.sources.values(), numbers)))


def prepare(
    config: DatasetConfig, encoders: EncoderFactory, tokenizer: Any, seed: int
) -> PreparedData:
    """Read and encode all sources, hold rows out, and mix what is left.

    What has been encoded before is found in the cache. The same content, settings and seed give the
    same rows in any process. Raises UserError, with file and line, for rows that cannot be read or
    encoded, and where nothing is left to train on or to evaluate on.
    """
    if config.streaming:
        return _streamed(config, encoders, tokenizer)
    sources = train_sources(config)
    encode = _encoder(config, encoders, tokenizer)
    trained = {name: encode(source, source_key(name, sources)) for name, source in sources.items()}
    evaluated = {key: encode(source, key) for key, source in eval_sources(config).items()}
    chosen = select_rows(config, sources, trained, evaluated, seed)
    train = _train_rows(trained, chosen)
    sides = _sides(trained, evaluated, chosen)
    rows = {name: _rows_of(side) for name, side in sides.items()}
    return PreparedData(
        train=train,
        eval=rows,
        heldout={name: HeldOutExamples(side) for name, side in sides.items()},
        train_counts=_train_counts(trained, chosen, train),
        eval_counts=_eval_counts(sides, rows, evaluated),
        content_hash=_hash(trained, sides, train),
        sources={source_key(name, sources): part for name, part in trained.items()} | evaluated,
        reports=[
            row for part in (*trained.values(), *evaluated.values()) for row in _reports(part)
        ],
    )


def _places(parts: Iterable[EncodedSource], numbers: Sequence[int]) -> Iterator[str]:
    """The place of the row that made each sequence; sequences are numbered over all parts."""
    left = list(numbers)
    for part in parts:
        ends = np.cumsum(part.sequences.astype(np.int64))
        here = [number for number in left if number < len(part.tokens)]
        yield from part.locations(np.searchsorted(ends, here, side="right").tolist())
        left = [number - len(part.tokens) for number in left if number >= len(part.tokens)]


class HeldOutExamples:
    """The examples of some rows; they are read when they are asked for."""

    def __init__(self, parts: list[SourceRows]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self._parts)

    def __iter__(self) -> Iterator[Example]:
        for part, rows in self._parts:
            for row in rows:
                yield from part.examples([row])

    def with_columns(self) -> Iterator[tuple[Example, dict[str, Any]]]:
        """Each example with the columns of its row, where they are kept."""
        for part, rows in self._parts:
            for row in rows:
                yield part.examples([row])[0], part.columns([row])[0]

    def by_source(self) -> Iterator[tuple[OpenedSource, list[LocatedExample]]]:
        """The examples of each source with their places and the columns that are kept."""
        for part, rows in self._parts:
            found = zip(part.examples(rows), part.locations(rows), part.columns(rows), strict=True)
            yield part.opened, [LocatedExample(*each) for each in found]


def _streamed(config: DatasetConfig, encoders: EncoderFactory, tokenizer: Any) -> PreparedData:
    """The training rows as a stream, and the evaluation sets as rows at hand."""
    stream = open_stream(config, encoders)
    encode = _encoder(config, encoders, tokenizer)
    evaluated = {key: encode(source, key) for key, source in eval_sources(config).items()}
    sides = _eval_sides(evaluated)
    rows = {name: _rows_of(side) for name, side in sides.items()}
    settings = [
        [part.settings(), stream.encoders[key].settings()] for key, part in stream.opened.items()
    ]
    return PreparedData(
        train=stream,
        eval=rows,
        heldout={name: HeldOutExamples(side) for name, side in sides.items()},
        train_counts=SplitCounts(),
        eval_counts=_eval_counts(sides, rows, evaluated),
        content_hash=hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        sources=evaluated,
        reports=[row for part in evaluated.values() for row in _reports(part)],
    )


def _encoder(
    config: DatasetConfig, encoders: EncoderFactory, tokenizer: Any
) -> Callable[[SourceConfig, str], EncodedSource]:
    """What gives the encoded rows of a source."""
    store, digest = Store(data_folder(config.cache)), tokenizer_digest(tokenizer)
    workers, drop = config.workers or 1, config.on_bad_row == "drop"

    def encode(source: SourceConfig, key: str) -> EncodedSource:
        opened = open_examples(source, key)
        encoder = encoders(opened.row_format.example_type, source, key)
        return encode_source(opened, encoder, store, digest, workers, drop)

    return encode


def _train_rows(trained: Mapping[str, EncodedSource], chosen: RowSelection) -> TokenRows:
    """The sequences of an epoch."""
    table = JoinedTable([part.tokens for part in trained.values()])
    counts = np.concatenate([part.sequences for part in trained.values()]).astype(np.int64)
    starts = np.cumsum(counts) - counts
    return TokenRows(table, expand_ranges(starts[chosen.epoch], counts[chosen.epoch]))


def expand_ranges(starts: RowNumbers, counts: RowNumbers) -> RowNumbers:
    """The numbers `start`, `start + 1`, ... of each pair, one after the other."""
    inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts, counts) + inside


def _sides(
    trained: Mapping[str, EncodedSource],
    evaluated: Mapping[str, EncodedSource],
    chosen: RowSelection,
) -> dict[str, list[SourceRows]]:
    """The rows of each evaluation set."""
    sides: dict[str, list[SourceRows]] = {}
    if len(chosen.heldout):
        sides[""] = _parted(trained, chosen.heldout)
    return sides | _eval_sides(evaluated)


def _eval_sides(evaluated: Mapping[str, EncodedSource]) -> dict[str, list[SourceRows]]:
    """The rows of each evaluation set that has rows of its own."""
    return {
        eval_set_name(key): [(part, np.flatnonzero(part.sequences > 0))]
        for key, part in evaluated.items()
    }


def _parted(trained: Mapping[str, EncodedSource], rows: RowNumbers) -> list[SourceRows]:
    """Rows, numbered over all sources, by source."""
    starts = source_starts(trained)
    return [
        (part, rows[(rows >= start) & (rows < start + len(part))] - start)
        for part, start in zip(trained.values(), starts, strict=False)
    ]


def _rows_of(side: list[SourceRows]) -> TokenRows:
    table = JoinedTable([part.tokens for part, _ in side])
    index = [
        table.start_of(number) + part.sequences_of(rows) for number, (part, rows) in enumerate(side)
    ]
    return TokenRows(table, np.concatenate(index))


def _train_counts(
    trained: Mapping[str, EncodedSource], chosen: RowSelection, train: TokenRows
) -> SplitCounts:
    """The account of the training side, which the rows that no side has are part of."""
    other = _unread([*trained.values()]) | chosen.other
    sources = chosen.sources if len(chosen.sources) > 1 else None
    parts = [_with_dropped(*part) for part in _parted(trained, chosen.train)]
    return count_split(parts, train.lengths, *_tokens(train), other, sources)


def _eval_counts(
    sides: Mapping[str, list[SourceRows]],
    rows: Mapping[str, TokenRows],
    evaluated: Mapping[str, EncodedSource],
) -> dict[str, SplitCounts]:
    """The account of each evaluation set; what training rows are dropped is none of theirs."""
    own = {eval_set_name(key): part for key, part in evaluated.items()}
    found = {}
    for name, side in sides.items():
        parts, other = side, {}
        if name in own:
            parts = [_with_dropped(*part) for part in side]
            other = _unread([own[name]])
        found[name] = count_split(parts, rows[name].lengths, *_tokens(rows[name]), other)
    return found


def _with_dropped(part: EncodedSource, rows: RowNumbers) -> SourceRows:
    """Rows of a source, and those that make no sequence."""
    return part, np.union1d(rows, np.flatnonzero(part.rows.column("state") == DROPPED))


def _unread(parts: list[EncodedSource]) -> dict[str, int]:
    """Rows that never became examples, by reason."""
    return {
        "could not be read": sum(len(part.bad_rows) for part in parts),
        "left out by the filter": sum(part.filtered for part in parts),
    }


def _tokens(rows: TokenRows) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """How many tokens a model reads of each row, and how many of them train."""
    table = rows.table
    assert isinstance(table, JoinedTable) and rows.index is not None
    return table.tokens[rows.index], table.column("trained")[rows.index]


def _reports(part: EncodedSource) -> Iterator[dict[str, str]]:
    """What is wrong with the rows of a source."""
    for bad in part.bad_rows:
        yield _report(bad.where, "could not be read", bad.problem, bad.text)
    state = part.rows.column("state")
    wrong = np.flatnonzero(state != FINE)
    columns = part.locations(wrong), part.rows.values("problem", wrong), state[wrong]
    for row, (where, problem, code) in zip(wrong, zip(*columns, strict=True), strict=True):
        text = excerpt(part.examples([row])[0])
        yield _report(where, "dropped" if code == DROPPED else "lossy", problem, text)


def _report(where: str, state: str, problem: str, text: str) -> dict[str, str]:
    return {"where": where, "state": state, "problem": problem, "text": text}


def _hash(
    trained: Mapping[str, EncodedSource], sides: Mapping[str, list[SourceRows]], train: TokenRows
) -> str:
    """One hash of the sequences' hashes, in order, with the count of each side before them."""
    assert train.index is not None
    found = [np.concatenate([part.hashes for part in trained.values()])[train.index]]
    for side in sides.values():
        found.append(np.concatenate([part.hashes[part.sequences_of(rows)] for part, rows in side]))
    digest = hashlib.sha256()
    for hashes in found:
        digest.update(len(hashes).to_bytes(8, "little") + hashes.tobytes())
    return digest.hexdigest()
