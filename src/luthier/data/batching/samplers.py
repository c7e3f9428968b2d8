"""Which rows stand in which batch: of an epoch, or of a stream that is too long to be known.

A sampler gives training rows: tuples of row numbers, those of one bin where rows are packed. What
it gives depends on the seed and the epoch alone, never on what it gave before, so a run that goes
on finds its place by counting. It asks no random generator of the process either.

Batches are the same for any number of processes: accelerate deals them out in turn, and
`multiple` fills the last ones up with empty training rows in place of rows from the epoch's
beginning, which would train twice.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import count, pairwise, repeat
from typing import Any

import numpy as np

from luthier.data.batching.packing import PackingPlan, pack_rows
from luthier.data.batching.token_rows import Array, Document, TokenRows, TrainingRow, check_row_fits
from luthier.data.seeded_random import random_bits, random_order
from luthier.errors import UserError

RowTuple = tuple[int, ...]


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

    def __iter__(self) -> Iterator[RowTuple]:
        yield from self._arrange()
        yield from repeat((), len(self) - self.count)

    @abstractmethod
    def _arrange(self) -> Iterator[RowTuple]:
        """Return the training rows of this epoch, in order."""

    def _numbers(self, positions: Array) -> list[int]:
        """Return the row numbers in the table of rows that take part."""
        return (positions if self.rows.index is None else self.rows.index[positions]).tolist()


class SequentialSampler(Sampler):
    """Gives row by row, in their order."""

    def _arrange(self) -> Iterator[RowTuple]:
        return zip(self._numbers(np.arange(self.count)))


class ShuffledSampler(Sampler):
    """Gives row by row, in another order each epoch."""

    def _arrange(self) -> Iterator[RowTuple]:
        return zip(self._numbers(random_order(self.count, self.seed, self.epoch)))


class PackedSampler(Sampler):
    """Gives bins of rows, packed best over the whole set and anew each epoch; see `packing`."""

    def __init__(
        self, rows: TokenRows, length: int, seed: int = 0, multiple: int = 1, shuffle: bool = True
    ) -> None:
        """`length`: the tokens that a bin holds; `shuffle=False`: the same bins each epoch.

        Raises ValueError for a row that is longer than a bin.
        """
        super().__init__(rows, seed, multiple)
        self.fit = PackingPlan(rows.lengths, length)
        self.shuffle = shuffle

    @property
    def count(self) -> int:
        """The number of bins, the same in every epoch."""
        return len(self.fit)

    def _arrange(self) -> Iterator[RowTuple]:
        packing = self.fit.arranged(*((self.seed, self.epoch) if self.shuffle else ()))
        starts = packing.starts.tolist()
        rows = self._numbers(packing.rows)
        return (tuple(rows[start:stop]) for start, stop in pairwise(starts))


class LengthGroupedSampler(Sampler):
    """Gives row by row, with rows of like length in one step.

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

    def _arrange(self) -> Iterator[RowTuple]:
        lengths = np.asarray(self.rows.lengths, dtype=np.int64)
        order = _longest_to_front(random_order(self.count, self.seed, self.epoch, 0), lengths)
        pools = np.arange(self.count) // (self.step * self.pool)
        # The rows left over behind the last whole step stay at the end, where a step may be small.
        grouped = self.count - self.count % self.step
        pools[grouped:] = self.count
        order = order[np.lexsort((-lengths[order], pools))]
        steps = order[:grouped].reshape(-1, self.step)
        chance = random_bits(len(steps), self.seed, self.epoch, 1)
        if len(steps):
            # 0 is the least of all numbers, so this step is sorted to the front.
            chance[lengths[steps].max(axis=1).argmax()] = 0
        steps = steps[np.argsort(chance, kind="stable")]
        return zip(self._numbers(np.concatenate((steps.ravel(), order[grouped:]))))


def _longest_to_front(order: Array, lengths: Array) -> Array:
    """Swap the longest row with the first one, so that it is in a whole step."""
    if len(order):
        at = int(lengths[order].argmax())
        order[[0, at]] = order[[at, 0]]
    return order


class SampledDataset:
    """Turns what a sampler gives into training rows.

    accelerate tells the epoch to the sampler, except in a resumed epoch of several processes, where
    it stands behind two wrappers: then it tells the dataset. So `set_epoch` here passes it on.
    """

    def __init__(self, sampler: Sampler, with_columns: bool = False) -> None:
        """Give the rows of the sampler's table; `with_columns`: with those of their sources."""
        self.sampler = sampler
        self.table = sampler.rows.table
        self.read_columns = sampler.rows.read_columns if with_columns else None
        self.read_images = sampler.rows.read_images
        self.count = sampler.count

    def __len__(self) -> int:
        """The training rows of an epoch."""
        return self.count

    def __getitem__(self, numbers: RowTuple) -> TrainingRow:
        documents = tuple(to_document(self.table.row(number)) for number in numbers)
        if self.read_images is not None:
            images = map(self.read_images, numbers)
            documents = tuple(d._replace(images=i) for d, i in zip(documents, images, strict=True))
        if self.read_columns is None:
            return documents
        columns = map(self.read_columns, numbers)
        return tuple(d._replace(columns=c) for d, c in zip(documents, columns, strict=True))

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        self.sampler.set_epoch(epoch)

    def __getstate__(self) -> dict[str, Any]:
        """A worker process needs the table alone, not the order of all rows."""
        names = ("table", "count", "read_columns", "read_images")
        return {name: getattr(self, name) for name in names}


def to_document(row: Any) -> Document:
    """Return the columns of a row that train."""
    return Document(np.asarray(row["input_ids"]), np.asarray(row["labels"]))


OpenRows = Callable[[], Iterable[Any]]
"""Begins a pass over a source: rows with `input_ids` and `labels`."""

_NUMBERS_AT_A_TIME = 4096
"""Random numbers that are drawn at a time."""


def repeat_stream(
    open_rows: OpenRows, buffer: int, seed: int, first: int = 0
) -> Iterator[Document]:
    """Read a source again and again, each pass shuffled in another way, from pass `first` on.

    The passes follow one another without an end or a gap, so that a place in the stream is a
    number of rows, whatever pass it is in. Raises UserError for a source without rows.
    """
    for number in count(first):
        rows = 0
        for row in shuffle_stream(open_rows(), buffer, seed, number):
            rows += 1
            yield to_document(row)
        # An empty source would be read for ever.
        if not rows:
            raise UserError("dataset: the stream has no row to train on.")


def shuffle_stream(rows: Iterable[Any], buffer: int, *seed: int) -> Iterator[Any]:
    """Give rows in another order, each drawn from the next `buffer` ones; nothing is lost."""
    draws = (
        number
        for chunk in count()
        for number in random_bits(_NUMBERS_AT_A_TIME, *seed, chunk).tolist()
    )
    buffered: list[Any] = []
    for row in rows:
        if len(buffered) < buffer:
            buffered.append(row)
            continue
        # The draws have 64 bits, so the remainder favours no row by more than buffer / 2^64.
        index = next(draws) % buffer
        buffered[index], row = row, buffered[index]
        yield row
    while buffered:
        index = next(draws) % len(buffered)
        # Swapped to the end, since taking from the middle of a list moves all that stands behind.
        buffered[index], buffered[-1] = buffered[-1], buffered[index]
        yield buffered.pop()


def pack_stream(documents: Iterable[Document], length: int, rows: int) -> Iterator[TrainingRow]:
    """Pack as many documents at a time as fill about `rows` training rows; nothing is lost.

    Each time the emptiest training row goes back to the next documents. Raises UserError for a
    document that is longer than `length`.
    """
    held: list[Document] = []
    tokens = 0
    for row in documents:
        check_row_fits(len(row.input_ids), length)
        held.append(row)
        tokens += len(row.input_ids)
        if tokens >= length * rows:
            # The emptiest bin waits for the next documents, which may still fill it.
            bins = _pack_documents(held, length)
            held = list(bins.pop()) if len(bins) > 1 else []
            tokens = sum(len(document.input_ids) for document in held)
            yield from bins
    yield from _pack_documents(held, length)


def _pack_documents(documents: list[Document], length: int) -> list[TrainingRow]:
    """Return the documents in bins, the emptiest bin last."""
    lengths = np.array([len(row.input_ids) for row in documents], dtype=np.int64)
    bins = list(pack_rows(lengths, length, None))
    bins.sort(key=lambda rows: -int(lengths[list(rows)].sum()))
    return [tuple(documents[row] for row in rows) for rows in bins]
