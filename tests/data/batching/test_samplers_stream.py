"""Rows of a stream: shuffled in a buffer, packed in a buffer, none lost, any place found again."""

from itertools import islice

import numpy as np
import pytest

from luthier.data.batching.samplers import pack_stream, repeat_stream, shuffle_stream
from luthier.data.batching.token_rows import Document
from luthier.errors import UserError


def rows(count=50):
    return [{"input_ids": [n] * (1 + n % 7), "labels": [n] * (1 + n % 7)} for n in range(count)]


def documents(count=400, longest=30):
    lengths = np.random.default_rng(0).integers(1, longest, count)
    return [Document(np.full(n, k), np.full(n, k)) for k, n in enumerate(lengths)]


@pytest.mark.parametrize("buffer", [1, 8, 50, 1000])
def test_shuffling_loses_nothing(buffer):
    assert sorted(shuffle_stream(range(50), buffer, 1, 2)) == list(range(50))


def test_shuffling_depends_on_the_seed_and_draws_from_the_buffer():
    one, again, other = (
        list(shuffle_stream(range(5000), 100, *seed)) for seed in ((1,), (1,), (2,))
    )
    assert one == again
    assert one != other
    assert all(row <= place + 100 for place, row in enumerate(one))


def test_passes_follow_one_another_and_differ():
    given = [int(row.input_ids[0]) for row in islice(repeat_stream(rows, 20, seed=5), 150)]
    first, second, third = given[:50], given[50:100], given[100:]
    assert sorted(first) == sorted(second) == sorted(third) == list(range(50))
    assert len({tuple(first), tuple(second), tuple(third)}) == 3
    later = [int(row.input_ids[0]) for row in islice(repeat_stream(rows, 20, seed=5, first=1), 100)]
    assert later == second + third


def test_an_empty_stream_is_said():
    with pytest.raises(UserError, match="no row to train on"):
        next(repeat_stream(list, 10, 0))


@pytest.mark.parametrize("buffer", [1, 4, 1000])
def test_packing_loses_nothing_and_overflows_nowhere(buffer):
    given = list(pack_stream(documents(), 64, buffer))
    numbers = [int(document.input_ids[0]) for row in given for document in row]
    assert sorted(numbers) == list(range(400))
    assert all(sum(len(d.input_ids) for d in row) <= 64 for row in given)


def test_packing_in_a_buffer_is_nearly_as_good_as_over_the_whole():
    given = list(pack_stream(documents(4000), 64, 50))
    tokens = sum(len(d.input_ids) for row in given for d in row)
    assert tokens / (64 * len(given)) > 0.99


def test_a_row_that_fits_no_training_row():
    with pytest.raises(UserError, match=r"chat\.max_length=8: a row of 25 tokens"):
        list(pack_stream(documents(longest=30), 8, 4))
