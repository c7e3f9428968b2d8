"""Which rows stand in which batch of an epoch.

A sampler gives training rows: tuples of row numbers, those of one bin where rows are packed. What
it gives depends on the seed and the epoch alone, never on what it gave before, so a run that goes
on finds its place by counting. It asks no random generator of the process either.

Batches are the same for any number of processes: accelerate deals them out in turn, and
`multiple` fills the last ones up with empty training rows in place of rows from the epoch's
beginning, which would train twice.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise, repeat

import numpy as np

from luthier.data.batches.draws import random_bits, random_order
from luthier.data.batches.packing import Fit
from luthier.data.batches.rows import TokenRows

Array = np.ndarray
Numbers = tuple[int, ...]


class Sampler(ABC):
    """The training rows of one epoch, as row numbers of the table."""

    def __init__(self, rows: TokenRows, seed: int = 0, multiple: int = 1) -> None:
        """`multiple`: with this many processes times rows in a batch, every process gets as many
        batches as the others; 1 for a single process, whose last batch may be smaller."""
        self.rows = rows
        self.seed = seed
        self.multiple = multiple
        self.epoch = 0

    @property
    def count(self) -> int:
        """The training rows of an epoch, without those that fill up."""
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[Numbers]:
        yield from self._arrange()
        yield from repeat((), len(self) - self.count)

    @abstractmethod
    def _arrange(self) -> Iterator[Numbers]:
        """The training rows of this epoch, in order."""

    def _numbers(self, places: Array) -> list[int]:
        """The row numbers in the table of rows that take part."""
        return (places if self.rows.index is None else self.rows.index[places]).tolist()


class SequentialSampler(Sampler):
    """Row by row, in their order."""

    def _arrange(self) -> Iterator[Numbers]:
        return zip(self._numbers(np.arange(self.count)))


class ShuffledSampler(Sampler):
    """Row by row, in another order each epoch."""

    def _arrange(self) -> Iterator[Numbers]:
        return zip(self._numbers(random_order(self.count, self.seed, self.epoch)))


class PackedSampler(Sampler):
    """Bins of rows, packed best over the whole set and anew each epoch; see `packing`."""

    def __init__(
        self, rows: TokenRows, length: int, seed: int = 0, multiple: int = 1, shuffle: bool = True
    ) -> None:
        """`length`: the tokens that a bin holds; `shuffle=False`: the same bins each epoch.

        Raises ValueError for a row that is longer than a bin.
        """
        super().__init__(rows, seed, multiple)
        self.fit = Fit(rows.lengths, length)
        self.shuffle = shuffle

    @property
    def count(self) -> int:
        """The number of bins, the same in every epoch."""
        return len(self.fit)

    def _arrange(self) -> Iterator[Numbers]:
        packing = self.fit.arranged(*((self.seed, self.epoch) if self.shuffle else ()))
        starts = packing.starts.tolist()
        rows = self._numbers(packing.rows)
        return (tuple(rows[start:stop]) for start, stop in pairwise(starts))


class LengthGroupedSampler(Sampler):
    """Row by row, with rows of like length in one step.

    The shuffled rows are cut into pools of `pool` steps, each pool is sorted by length and cut into
    steps, and the steps of all pools are shuffled. The step with the longest row comes first, so
    that memory runs out at once or not at all.
    """

    def __init__(
        self, rows: TokenRows, step: int, seed: int = 0, multiple: int = 1, pool: int = 50
    ) -> None:
        """`step`: the rows of one step, over all processes and accumulated batches."""
        super().__init__(rows, seed, multiple)
        self.step = step
        self.pool = pool

    def _arrange(self) -> Iterator[Numbers]:
        lengths = np.asarray(self.rows.lengths, dtype=np.int64)
        order = _longest_to_front(random_order(self.count, self.seed, self.epoch, 0), lengths)
        pools = np.arange(self.count) // (self.step * self.pool)
        # The rows left over behind the last whole step stay at the end, where a step may be small.
        whole = self.count - self.count % self.step
        pools[whole:] = self.count
        order = order[np.lexsort((-lengths[order], pools))]
        steps = order[:whole].reshape(-1, self.step)
        chance = random_bits(len(steps), self.seed, self.epoch, 1)
        if len(steps):
            chance[lengths[steps].max(axis=1).argmax()] = 0
        steps = steps[np.argsort(chance, kind="stable")]
        return zip(self._numbers(np.concatenate((steps.ravel(), order[whole:]))))


def _longest_to_front(order: Array, lengths: Array) -> Array:
    """Swap the longest row with the first one, so that it is in a whole step."""
    if len(order):
        at = int(lengths[order].argmax())
        order[[0, at]] = order[[at, 0]]
    return order
