"""The bootstrap against distributions that are known exactly."""

import numpy as np
import pytest

from luthier.metrics import Prediction, parse_metrics
from luthier.metrics.bootstrap import SumStatistics, bootstrap_interval, compare_paired


def test_the_interval_of_a_share_is_that_of_the_binomial():
    # 100 rows, 70 right: P(X <= 60) = 0.021, P(X <= 61) = 0.034; P(X <= 78) = 0.971,
    # P(X <= 79) = 0.984. So 2.5 % lie below 61 and 2.5 % above 79.
    found = bootstrap_interval([1] * 70 + [0] * 30, draws=200_000)
    assert (found.value, found.low, found.high) == pytest.approx((0.7, 0.61, 0.79))


def test_a_lower_level_is_a_narrower_interval():
    # Quartiles of the same binomial: P(X <= 66) = 0.221, P(X <= 67) = 0.287; P(X <= 72) = 0.697,
    # P(X <= 73) = 0.767.
    found = bootstrap_interval([1] * 70 + [0] * 30, level=0.5, draws=200_000)
    assert (found.low, found.high) == pytest.approx((0.67, 0.73))


def test_the_interval_of_a_mean_is_the_normal_one_where_rows_are_many():
    rows = np.random.default_rng(1).normal(5, 2, 400)
    found, error = bootstrap_interval(rows.tolist(), draws=100_000), rows.std() / np.sqrt(400)
    assert found.low == pytest.approx(rows.mean() - 1.96 * error, abs=0.05 * error)
    assert found.high == pytest.approx(rows.mean() + 1.96 * error, abs=0.05 * error)


def test_one_win_in_four_rows_is_drawn_by_the_chance_that_it_is_drawn():
    # The second is higher in each draw that has the one row in which they differ: 1 - (3/4)^4.
    found = compare_paired([0, 1, 1, 0], [1, 1, 1, 0], draws=100_000)
    assert found.difference.value == 0.25
    assert found.higher == pytest.approx(1 - 0.75**4, abs=0.005)
    assert found.lower == 0


def test_one_win_and_one_loss_are_undecided():
    # Of 2 draws of 2 rows: both the win 1/4, both the loss 1/4, one each 1/2.
    found = compare_paired([0, 1], [1, 0], draws=100_000)
    assert found.difference.value == 0
    assert found.higher == pytest.approx(0.25, abs=0.005)
    assert found.lower == pytest.approx(0.25, abs=0.005)
    assert (found.difference.low, found.difference.high) == (-1, 1)


def test_a_small_constant_gain_is_sure_where_the_single_intervals_overlap():
    rows = np.random.default_rng(2).random(200)
    found = compare_paired(rows.tolist(), (rows + 0.001).tolist())
    assert found.first.high > found.second.low
    assert found.higher == 1
    assert found.difference.low == pytest.approx(0.001)


def test_equal_systems_are_neither_higher_nor_lower():
    rows = np.random.default_rng(3).random(50).tolist()
    found = compare_paired(rows, list(rows))
    assert (found.higher, found.lower, found.difference.value) == (0, 0, 0)


def test_a_seed_is_a_result_and_chunks_change_nothing(monkeypatch):
    rows = np.random.default_rng(4).random(30).tolist()
    once = bootstrap_interval(rows, seed=7)
    assert bootstrap_interval(rows, seed=7) == once
    assert bootstrap_interval(rows, seed=8) != once
    monkeypatch.setattr("luthier.metrics.bootstrap._ELEMENTS", 30 * 7)
    assert bootstrap_interval(rows, seed=7).low == pytest.approx(once.low, abs=0.01)


def test_a_number_of_sums_is_taken_of_each_draw():
    # Right over all words, not the mean of the rows' shares: (1 + 8) / (1 + 9), not (1 + 8/9) / 2.
    ratio = SumStatistics(np.array([[1.0, 1.0], [8.0, 9.0]]), lambda sums: sums[:, 0] / sums[:, 1])
    found = bootstrap_interval(ratio, draws=2_000)
    assert found.value == 0.9
    # Draws: the first row twice (2/2), both (9/10), the second twice (16/18).
    assert (found.low, found.high) == (pytest.approx(16 / 18), 1)


def test_macro_f1_has_an_interval():
    replies = [
        Prediction("a", "a"),
        Prediction("b", "a"),
        Prediction("b", "b"),
        Prediction("?", "c"),
    ] * 25
    (metric,) = parse_metrics(["macro_f1"])
    found = bootstrap_interval(metric.measure(replies).sample("macro_f1"))
    assert found.value == pytest.approx(4 / 9)
    assert found.low < 4 / 9 < found.high < 0.55


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bootstrap_interval([]), "at least one row"),
        (lambda: compare_paired([1, 0], [1]), "2 of the first, 1 of the other"),
    ],
    ids=["no rows", "unequal"],
)
def test_what_cannot_be_drawn(call, words):
    with pytest.raises(ValueError, match=words):
        call()
