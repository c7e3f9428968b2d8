"""Which rows train and which are held out: duplicates, splits and the mixture, by fingerprints.

Rows of equal content never stand on both sides.
"""

from collections import Counter
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from luthier.config.schema import DatasetConfig, EvalConfig, SourceConfig
from luthier.data.examples import source_key
from luthier.data.fingerprints import Fingerprints, is_first_occurrence
from luthier.data.mixture import mix_sources
from luthier.data.seeded_random import RowNumbers, UInt64s, scatter
from luthier.errors import UserError


@dataclass(frozen=True)
class HeldOutSplit:
    """Positions of the training and of the held-out rows, both in the rows' own order."""

    train: RowNumbers
    heldout: RowNumbers
    equal: int
    """Rows on neither side, because a held-out row equals them."""


@dataclass(frozen=True)
class SeparatedRows:
    """Positions of the rows that train beside held-out rows from elsewhere."""

    train: RowNumbers
    equal: dict[str, int]
    """Rows left out of training because a row of that held-out set equals them, by its name."""


def hold_out_rows(prints: Fingerprints, config: EvalConfig, seed: int) -> HeldOutSplit:
    """Hold a share or a count of the different rows out; all others train.

    `by: draw` ranks the rows by a hash of their content and the seed and takes the first, so the
    count is exact, the order of the file does not matter, and added rows move few others across.
    `by: hash` holds a row out if its own hash falls in the share, so added rows move none, and the
    count is near the share only. Raises UserError where nothing would be left on either side.
    """
    if config.by == "hash" and config.share is None:
        raise UserError(_hash_needs_a_share(config))
    if config.share is None and config.count is None:
        return HeldOutSplit(np.arange(len(prints)), np.empty(0, np.int64), 0)
    # Equal rows are drawn as one, so that they never stand on both sides.
    different, first, group = np.unique(prints, return_index=True, return_inverse=True)
    ranks = _ranks(different, seed)
    held = _draw_by_hash(ranks, config) if config.by == "hash" else _draw_by_rank(ranks, config)
    train = np.flatnonzero(~held[group])
    heldout = np.sort(first[held])
    _check_both_sides(len(train), len(heldout), len(different), config)
    return HeldOutSplit(train, heldout, len(prints) - len(train) - len(heldout))


def exclude_held_out(prints: Fingerprints, heldout: Mapping[str, Fingerprints]) -> SeparatedRows:
    """Train on the rows that equal no held-out row; `heldout` has the config's key of each set.

    A row that stands in several sets is counted for each. Raises UserError if none is left.
    """
    # Against each set by itself, so that the record can say how many rows each took away.
    inside = {key: np.isin(prints, held) for key, held in heldout.items()}
    train = np.ones(len(prints), dtype=bool)
    for mask in inside.values():
        train &= ~mask
    if not train.any():
        raise UserError(
            f"{' and '.join(inside)} {'hold' if len(inside) > 1 else 'holds'} every training row "
            "too, which leaves none to train on. Hold out rows that are not in dataset.path."
        )
    return SeparatedRows(
        np.flatnonzero(train), {key: int(mask.sum()) for key, mask in inside.items()}
    )


def _draw_by_rank(ranks: UInt64s, config: EvalConfig) -> NDArray[np.bool_]:
    """Return the first rows by rank: the count, or the share rounded and at least one."""
    heldout_count = config.count or max(1, round((config.share or 0) * len(ranks)))
    if heldout_count >= len(ranks):
        raise UserError(_describe_none_to_train(heldout_count, len(ranks), config))
    held = np.zeros(len(ranks), dtype=bool)
    held[np.argsort(ranks, kind="stable")[:heldout_count]] = True
    return held


def _draw_by_hash(ranks: UInt64s, config: EvalConfig) -> NDArray[np.bool_]:
    """Return the rows whose rank, as a part of all 64-bit numbers, is below the share."""
    return ranks < np.uint64(int((config.share or 0) * 2**64))


def _ranks(prints: Fingerprints, seed: int) -> UInt64s:
    """Return a number for each fingerprint, evenly spread over 64 bits, that hangs on it and the
    seed."""
    # Little-endian on every machine, so that the same rows are held out on all of them.
    halves = prints.view("<u8").reshape(-1, 2)
    return scatter(scatter(halves[:, 0], "held out", seed) ^ halves[:, 1], "held out")


def _check_both_sides(train: int, heldout: int, different: int, config: EvalConfig) -> None:
    """Raise UserError if one side is empty, which a draw by hash can give."""
    if not heldout:
        raise UserError(
            f"dataset.eval.share={config.share} with dataset.eval.by=hash holds out none of "
            f"{different} different rows. Hold out a larger share, or set dataset.eval.by=draw."
        )
    if not train:
        raise UserError(_describe_none_to_train(heldout, different, config))


def _describe_none_to_train(heldout_count: int, different: int, config: EvalConfig) -> str:
    key = "count" if config.count else "share"
    return (
        f"dataset.eval.{key}={config.count or config.share} holds out {heldout_count} of "
        f"{different} different rows and leaves none to train on. Hold out fewer."
    )


def _hash_needs_a_share(config: EvalConfig) -> str:
    if config.count is None:
        return "dataset.eval.by=hash needs the share to hold out, such as dataset.eval.share=0.05."
    return (
        f"dataset.eval.count={config.count} cannot be held out with dataset.eval.by=hash, which "
        "looks at each row by itself. Give a share, or set dataset.eval.by=draw."
    )


@dataclass(frozen=True)
class RowSelection:
    """Rows of the training sources, numbered as if the sources were laid end to end."""

    train: RowNumbers
    """The different rows that train, in the order of the sources."""
    heldout: RowNumbers
    """The rows that are held out of the training sources."""
    epoch: RowNumbers
    """The rows of an epoch in their order; a row that is seen twice stands here twice."""
    sources: dict[str, int]
    """Rows of an epoch by source."""
    other: dict[str, int]
    """Rows on neither side, by reason."""


class SelectableRows(Protocol):
    """The rows of a source as far as they are selected by; the encoded ones and those of a check
    are such."""

    @property
    def fingerprints(self) -> Fingerprints:
        """The fingerprint of each row."""

    @property
    def normalised_fingerprints(self) -> Fingerprints:
        """The fingerprint of each row's normalised text."""

    @property
    def sequences(self) -> NDArray[Any]:
        """How many sequences each row makes; a row that makes none is on no side."""

    @property
    def filtered(self) -> int:
        """How many rows the filter left out."""

    def __len__(self) -> int: ...

    def drop_reasons(self) -> dict[str, int]:
        """Return how many rows make no sequence, by reason."""

    @property
    def first_location(self) -> str:
        """The place of the first row, such as `data.jsonl:7`."""


def select_rows(
    config: DatasetConfig,
    sources: Mapping[str, SourceConfig],
    trained: Mapping[str, SelectableRows],
    evaluated: Mapping[str, SelectableRows],
    seed: int,
) -> RowSelection:
    """Leave out duplicates, hold rows out, and mix what is left.

    Raises UserError where nothing is left to train on or to hold out.
    """
    prints = {name: _fingerprints_of(source, config) for name, source in trained.items()}
    all_prints = np.concatenate(list(prints.values()))
    usable = np.concatenate([source.sequences > 0 for source in trained.values()])
    _check_usable(trained, evaluated)
    # Duplicates go before rows are held out, so that a share is one of different rows; the mixture
    # comes last, as weights and repeats are about rows that train.
    usable_rows = np.flatnonzero(usable)
    if config.deduplicate != "none":
        usable_rows = usable_rows[is_first_occurrence(all_prints[usable_rows])]
    split = hold_out_rows(all_prints[usable_rows], config.eval, seed)
    train, equal = usable_rows[split.train], split.equal
    if evaluated:
        held = {
            key: _fingerprints_of(source, config)[source.sequences > 0]
            for key, source in evaluated.items()
        }
        separated = exclude_held_out(all_prints[train], held)
        equal += len(train) - len(separated.train)
        train = train[separated.train]
    rows_left = {
        "give no sequence": np.flatnonzero(usable),
        "equal other rows": usable_rows,
        "are held out": train,
    }
    _check_each_source(sources, trained, rows_left)
    epoch, counts = _mix(config, sources, trained, train, seed)
    used = np.unique(epoch)
    other = {
        "duplicate": int(usable.sum()) - len(usable_rows),
        "equal to a held-out row": equal,
        "not in the mixture": len(train) - len(used),
    }
    return RowSelection(used, usable_rows[split.heldout], epoch, counts, other)


def source_starts(sources: Mapping[str, Sized]) -> RowNumbers:
    """Return the number of each source's first row, and behind the last one the number of all."""
    return np.cumsum([0, *map(len, sources.values())])


def split_by_source(sources: Mapping[str, Sized], rows: RowNumbers) -> dict[str, RowNumbers]:
    """Return rows that are numbered over all sources as the rows of each, in the same order."""
    return {
        name: rows[(rows >= start) & (rows < start + len(source))] - start
        for (name, source), start in zip(sources.items(), source_starts(sources), strict=False)
    }


def _mix(
    config: DatasetConfig,
    sources: Mapping[str, SourceConfig],
    trained: Mapping[str, SelectableRows],
    train: RowNumbers,
    seed: int,
) -> tuple[RowNumbers, dict[str, int]]:
    """Return the rows of an epoch, and how many of each source."""
    bounds = np.searchsorted(train, source_starts(trained))
    sizes = dict(zip(trained, np.diff(bounds).tolist(), strict=True))
    mixed = mix_sources(sizes, sources, config.mix, seed)
    return train[mixed.order], mixed.counts


def _check_each_source(
    sources: Mapping[str, SourceConfig],
    trained: Mapping[str, SelectableRows],
    left: Mapping[str, RowNumbers],
) -> None:
    """Raise UserError for a source of which nothing is left, with what became of its rows.

    `left`: the rows that are left behind each step, by what has become of those that went.
    """
    starts = source_starts(trained)
    sizes = [np.diff(starts), *(np.diff(np.searchsorted(rows, starts)) for rows in left.values())]
    for number, name in enumerate(trained):
        counts = [int(size[number]) for size in sizes]
        went = {why: a - b for why, a, b in zip(left, counts, counts[1:], strict=False) if a > b}
        if went and not counts[-1]:
            outcomes = ", ".join(f"{count} {why}" for why, count in went.items())
            raise UserError(
                f"{source_key(name, sources)} has no row left to train on: of its {counts[0]} rows "
                f"{outcomes}. Remove the source, or fix its rows."
            )


def _fingerprints_of(source: SelectableRows, config: DatasetConfig) -> Fingerprints:
    """Return what tells whether two rows are equal, as the config means it."""
    is_normalised = config.deduplicate == "normalised"
    return source.normalised_fingerprints if is_normalised else source.fingerprints


def _check_usable(
    trained: Mapping[str, SelectableRows], evaluated: Mapping[str, SelectableRows]
) -> None:
    for key, source in evaluated.items():
        if not (source.sequences > 0).any():
            raise UserError(_describe_no_rows(key, [source], "to evaluate on"))
    if not any((source.sequences > 0).any() for source in trained.values()):
        raise UserError(_describe_no_rows("dataset", list(trained.values()), "to train on"))


_NO_ROWS_ADVICE = {
    "too long": "\nRaise chat.max_length; `luthier check` shows how long the rows are.",
    "nothing to train": "\nEach row needs a reply of the assistant; chat.train_on chooses which "
    "messages train.",
}
"""The most frequent reason for which rows are dropped -> what to do about it."""


def _describe_no_rows(key: str, selectable: list[SelectableRows], purpose: str) -> str:
    """Return the text for rows none of which makes a sequence."""
    total = sum(map(len, selectable))
    if not total:
        filtered = sum(source.filtered for source in selectable)
        why = f"the filter leaves out all of {filtered}" if filtered else "none could be read"
        return f"{key}: there is no row {purpose}; {why}."
    reasons: Counter[str] = Counter()
    for source in selectable:
        reasons.update(source.drop_reasons())
    listed_reasons = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
    first = next(source for source in selectable if len(source)).first_location
    advice = _NO_ROWS_ADVICE.get(reasons.most_common(1)[0][0], "") if reasons else ""
    if total == 1:
        return f"{key}: the only row, {first}, cannot be used {purpose} ({listed_reasons}).{advice}"
    return (
        f"{key}: none of the {total:,} rows can be used {purpose} ({listed_reasons}). "
        f"The first one is {first}.{advice}"
    )
