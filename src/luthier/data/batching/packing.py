"""Best-fit packing of rows into bins of a fixed length, over the whole set at once.

Rows are taken from the longest to the shortest, and each goes into the fullest bin that still has
room for it (best fit decreasing, which never needs more than 11/9 of the fewest bins possible and a
constant: Johnson, Demers, Ullman, Garey and Graham, 1974). Rows of equal length, and bins with
equal room, are placed together, so the work grows with the number of different lengths.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from luthier.data.batching.token_rows import Array
from luthier.data.seeded_random import random_order

BinRun = tuple[int, int, int]
"""First bin, number of bins, rows of one length that each of them gets."""


def pack_rows(lengths: Array, length: int, seed: int | None) -> "Packing":
    """Pack rows of these lengths (in tokens) into bins of at most `length` tokens.

    The seed decides which of equally long rows goes where and in which order the bins come, never
    how many bins there are; None leaves both as they fall. The same arguments give the same
    packing in any process. Raises ValueError for a row that is empty or longer than a bin.
    """
    return PackingPlan(lengths, length).arranged(*(() if seed is None else (seed,)))


@dataclass(frozen=True)
class Packing:
    """Which rows lie in which bin."""

    rows: Array
    """All row numbers, int64, one bin after the other."""
    starts: Array
    """Where each bin begins in `rows`, int64, and where the last one ends."""
    efficiency: float
    """The share of all places in the bins that holds a token."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """Yield the row numbers of each bin."""
        rows, starts = self.rows.tolist(), self.starts.tolist()
        return (tuple(rows[start:stop]) for start, stop in pairwise(starts))


class PackingPlan:
    """The bins of a set of lengths, before it is said which of equally long rows goes where."""

    def __init__(self, lengths: Array, length: int) -> None:
        """`lengths` are the tokens of each row, and `length` those of a bin; see `pack_rows`."""
        self.lengths = np.asarray(lengths, dtype=np.int64)
        _check_lengths(self.lengths, length)
        runs, self.count = _place_best_fit(self.lengths, length)
        self._bins = _bin_of_each_row(runs)
        self.efficiency = float(self.lengths.sum() / max(self.count * length, 1))

    def __len__(self) -> int:
        """Return the number of bins."""
        return self.count

    def arranged(self, *seed: int) -> Packing:
        """Give each place to a row; the seed may have several parts, such as an epoch."""
        bins = self._bins
        if seed:
            # The inverse of a permutation: the place of each bin in the shuffled order. The last
            # number of the seed (0 here, 1 below) keeps the draws of bins and of rows apart.
            bins = np.argsort(random_order(self.count, *seed, 0), kind="stable")[bins]
        order = np.argsort(bins, kind="stable")
        starts = np.concatenate(([0], np.cumsum(np.bincount(bins, minlength=self.count))))
        return Packing(self._longest_first(seed)[order], starts, self.efficiency)

    def _longest_first(self, seed: tuple[int, ...]) -> Array:
        """Return all rows, the longest first; equally long ones by chance, or by their numbers."""
        if not seed:
            return np.argsort(-self.lengths, kind="stable")
        chance = random_order(len(self.lengths), *seed, 1)
        return chance[np.argsort(-self.lengths[chance], kind="stable")]


def _check_lengths(lengths: Array, length: int) -> None:
    wrong = np.flatnonzero((lengths < 1) | (lengths > length))
    if len(wrong):
        raise ValueError(
            f"row {wrong[0]} has {lengths[wrong[0]]} tokens, and bins hold 1 to {length}"
        )


def _place_best_fit(lengths: Array, length: int) -> tuple[list[BinRun], int]:
    """Place all rows, the longest first; return the runs and the number of bins."""
    sizes, counts = np.unique(lengths, return_counts=True)
    room = _OpenBins()
    runs: list[BinRun] = []
    bins = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            free, first, several = room.take(size)
            if not several:
                # No bin has room: as many new ones as the rows that are left need.
                free, first, several = length, bins, -(-count // (length // size))
                bins += several
            # Rows of one length fill bins of equal room together, so the work does not grow with
            # the number of rows.
            count -= _fill_bins(runs, room, (free, first, several), size, count)
    return runs, bins


def _fill_bins(
    runs: list[BinRun], room: "_OpenBins", group: tuple[int, int, int], size: int, count: int
) -> int:
    """Put up to `count` rows of one size into a group of equal bins, one bin after the other."""
    free, first, several = group
    each = free // size
    full = min(several, count // each)
    if full:
        runs.append((first, full, each))
        room.give(free - each * size, first, full)
    placed, rest = full * each, count - full * each
    if full < several:
        if rest:
            runs.append((first + full, 1, rest))
            room.give(free - rest * size, first + full, 1)
            placed, full = count, full + 1
        room.give(free, first + full, several - full)
    return placed


class _OpenBins:
    """Groups of bins by the number of tokens that still fit into each."""

    def __init__(self) -> None:
        self._groups: dict[int, list[tuple[int, int]]] = {}
        # Sorted, for bisection; it has at most as many entries as there are different rooms.
        self._free: list[int] = []

    def take(self, size: int) -> tuple[int, int, int]:
        """Take out the fullest bins with room for `size`: their room, first bin, and number."""
        at = bisect_left(self._free, size)
        if at == len(self._free):
            return 0, 0, 0
        free = self._free[at]
        groups = self._groups[free]
        first, several = groups.pop()
        if not groups:
            del self._free[at], self._groups[free]
        return free, first, several

    def give(self, free: int, first: int, several: int) -> None:
        """Put bins back with what room they have left."""
        # Full bins take no more rows, so they are forgotten.
        if not several or not free:
            return
        groups = self._groups.get(free)
        if groups is None:
            self._groups[free] = [(first, several)]
            insort(self._free, free)
        else:
            groups.append((first, several))


def _bin_of_each_row(runs: list[BinRun]) -> Array:
    """Return the bin of each row, int64: rows in the order of the runs, the longest first."""
    if not runs:
        return np.zeros(0, dtype=np.int64)
    first, several, each = np.array(runs, dtype=np.int64).T
    rows_of_run = several * each
    ends = np.cumsum(rows_of_run)
    within = np.arange(ends[-1]) - np.repeat(ends - rows_of_run, rows_of_run)
    return np.repeat(first, rows_of_run) + within // np.repeat(each, rows_of_run)
