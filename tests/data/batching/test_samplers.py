"""The order of an epoch: complete, stateless, and the same for any number of processes."""

import pickle

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SkipBatchSampler
from torch.utils.data import BatchSampler, DataLoader

from luthier.data.batching.samplers import (
    LengthGroupedSampler,
    PackedSampler,
    SampledDataset,
    SequentialSampler,
    ShuffledSampler,
)
from luthier.data.batching.token_rows import InMemoryTable, TokenRows

COUNT = 107
LENGTHS = np.random.default_rng(0).integers(2, 60, COUNT)


def rows(index=None):
    ids = [[1000 * number + place for place in range(n)] for number, n in enumerate(LENGTHS)]
    return TokenRows(InMemoryTable(ids, ids), index)


MAKE = {
    "sequential": lambda rows, multiple=1: SequentialSampler(rows, 3, multiple),
    "shuffled": lambda rows, multiple=1: ShuffledSampler(rows, 3, multiple),
    "packed": lambda rows, multiple=1: PackedSampler(rows, 64, 3, multiple),
    "packed for evaluation": lambda rows, multiple=1: PackedSampler(
        rows, 64, 3, multiple, shuffle=False
    ),
    "grouped by length": lambda rows, multiple=1: LengthGroupedSampler(rows, 8, 3, multiple, 4),
}
EVERY = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
SHUFFLED = pytest.mark.parametrize(
    "make", [MAKE[n] for n in ("shuffled", "packed", "grouped by length")],
    ids=["shuffled", "packed", "grouped by length"],
)  # fmt: skip


def epoch(sampler, number):
    sampler.set_epoch(number)
    return list(sampler)


@EVERY
def test_an_epoch_has_every_row_once(make):
    for number in range(3):
        given = epoch(make(rows()), number)
        assert sorted(row for training_row in given for row in training_row) == list(range(COUNT))


@EVERY
def test_a_row_of_a_mixture_comes_as_often_as_its_index_says(make):
    index = np.array([5, 9, 5, 7, 5, 9])
    given = [row for training_row in make(rows(index)) for row in training_row]
    assert sorted(given) == [5, 5, 5, 7, 9, 9]


@SHUFFLED
def test_epochs_differ_and_do_not_depend_on_what_came_before(make):
    one = make(rows())
    first, second = epoch(one, 0), epoch(one, 1)
    assert first != second
    assert epoch(make(rows()), 1) == second
    assert epoch(one, 0) == first


@EVERY
@pytest.mark.parametrize("multiple", [1, 8, 12])
def test_what_fills_up_is_empty_and_at_the_end(make, multiple):
    plain, filled = list(make(rows())), make(rows(), multiple)
    given = list(filled)
    assert len(given) == len(filled)
    assert len(given) % multiple == 0
    assert len(given) - len(plain) < multiple
    assert given == plain + [()] * (len(given) - len(plain))


@EVERY
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches_of_one_with_a_larger_batch(make, processes):
    sampler = make(rows(), 4 * processes)
    shards = [
        list(BatchSamplerShard(BatchSampler(sampler, 4, False), processes, rank))
        for rank in range(processes)
    ]
    together = [[row for batch in step for row in batch] for step in zip(*shards, strict=True)]
    alone = list(BatchSampler(make(rows()), 4 * processes, False))
    assert [[row for row in batch if row] for batch in together] == alone


def test_like_lengths_share_a_step_and_the_longest_comes_first():
    given = [number for (number,) in epoch(MAKE["grouped by length"](rows()), 2)]
    steps = [LENGTHS[given[at : at + 8]] for at in range(0, COUNT, 8)]
    assert LENGTHS.max() in steps[0]
    padding = sum(step.max() * len(step) - step.sum() for step in steps)
    shuffled = [number for (number,) in epoch(MAKE["shuffled"](rows()), 2)]
    by_chance = [LENGTHS[shuffled[at : at + 8]] for at in range(0, COUNT, 8)]
    assert padding < 0.4 * sum(step.max() * len(step) - step.sum() for step in by_chance)


@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_sets_about_the_size_of_a_step(count):
    given = epoch(MAKE["grouped by length"](rows(np.arange(count))), 0)
    assert sorted(given) == [(number,) for number in range(count)]


def shard(sampler, processes, rank, skip=0):
    """The loader that Trainer has, as accelerate builds it; with `skip`, as it is resumed."""
    batches = BatchSampler(sampler, 4, drop_last=False)
    if processes > 1:
        batches = BatchSamplerShard(batches, processes, rank)
    if skip:
        batches = SkipBatchSampler(batches, skip)
    return DataLoaderShard(SampledDataset(sampler), batch_sampler=batches, collate_fn=list)


@SHUFFLED
@pytest.mark.parametrize("processes", [1, 2], ids=["one process", "two processes"])
@pytest.mark.parametrize("skip", [0, 2], ids=["from its beginning", "from its middle"])
def test_the_epoch_reaches_the_sampler_through_accelerate(make, processes, skip):
    multiple = 4 * processes if processes > 1 else 1
    sampler = make(rows(), multiple)
    loader = shard(sampler, processes, processes - 1, skip)
    loader.set_epoch(5)
    given = list(loader)
    expected = epoch(make(rows(), multiple), 5)
    batches = [expected[at : at + 4] for at in range(0, len(expected), 4)]
    own = batches[processes - 1 :: processes][skip:]
    assert [[numbers(row) for row in batch] for batch in given] == own


def numbers(training_row):
    return tuple(int(document.input_ids[0]) // 1000 for document in training_row)


def test_a_worker_process_gets_the_table_alone():
    sampler = ShuffledSampler(rows(np.zeros(100_000, dtype=np.int64)))
    data = SampledDataset(sampler)
    assert len(pickle.dumps(data)) < len(pickle.dumps(data.table)) + 1000
    again = pickle.loads(pickle.dumps(data))
    assert len(again) == 100_000
    assert again[(3,)][0].input_ids[0] == 3000


def test_workers_give_what_the_process_itself_gives():
    plain, fetched = (
        list(
            DataLoader(SampledDataset(sampler), 4, sampler=sampler, num_workers=n, collate_fn=list)
        )
        for n, sampler in ((0, MAKE["packed"](rows())), (2, MAKE["packed"](rows())))
    )
    assert [[numbers(row) for row in batch] for batch in plain] == [
        [numbers(row) for row in batch] for batch in fetched
    ]
