"""Mixtures: exact counts, which rows, even order, and words for settings that say nothing."""

import subprocess
import sys

import numpy as np
import pytest

from luthier.config.schema import SourceConfig
from luthier.data.mixture import interleave_evenly, mix_sources
from luthier.data.seeded_random import seeded_order
from luthier.errors import UserError


def mixed(sizes, mix="concatenate", seed=0, **settings):
    """A mixture of sources with these settings by name."""
    sources = {name: SourceConfig(path="x", **settings.get(name, {})) for name in sizes}
    return mix_sources(sizes, sources, mix, seed)


def test_concatenate_takes_all_rows_in_order():
    found = mixed({"a": 3, "b": 2})
    assert found.order.tolist() == [0, 1, 2, 3, 4]
    assert found.counts == {"a": 3, "b": 2}


def test_repeats_take_whole_rounds_and_a_seeded_part():
    found = mixed({"a": 10, "b": 4}, a={"repeats": 2.5}, b={"repeats": 0.5})
    assert found.counts == {"a": 25, "b": 2}
    assert found.order[:20].tolist() == [*range(10), *range(10)]
    half, other = found.order[20:25].tolist(), found.order[25:].tolist()
    assert half == sorted(set(half)) and set(half) < set(range(10))
    assert other == sorted(set(other)) and set(other) < set(range(10, 14))
    again = mixed({"a": 10, "b": 4}, seed=1, a={"repeats": 2.5}, b={"repeats": 0.5})
    assert again.order[20:25].tolist() != half


@pytest.mark.parametrize(("repeats", "count"), [(1, 7), (3, 21), (0.5, 4), (1.1, 8), (2.99, 21)])
def test_repeats_are_rounded_to_rows(repeats, count):
    found = mixed({"a": 7}, a={"repeats": repeats})
    assert found.counts == {"a": count}
    times = np.bincount(found.order, minlength=7)
    assert times.max() - times.min() <= 1


def test_interleave_shows_the_scarce_source_whole_and_no_row_twice():
    weights = {"a": {"weight": 0.7}, "b": {"weight": 0.3}}
    found = mixed({"a": 1000, "b": 100}, "interleave", **weights)
    assert found.counts == {"a": 233, "b": 100}
    assert len(set(found.order.tolist())) == 333
    assert sorted(found.order[found.order >= 1000]) == list(range(1000, 1100))


def test_interleave_without_weights_takes_equal_shares():
    assert mixed({"a": 10, "b": 7, "c": 7}, "interleave").counts == {"a": 7, "b": 7, "c": 7}


def test_the_seed_draws_other_rows_and_the_same_again():
    sizes, weights = {"a": 100, "b": 10}, {"a": {"weight": 2}, "b": {"weight": 1}}
    first, again, other = (mixed(sizes, "interleave", seed, **weights).order for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert set(first.tolist()) != set(other.tolist())


def test_other_sources_change_nothing_in_which_rows_a_source_gives():
    weights = {"a": {"weight": 1}, "b": {"weight": 1}}
    few = mixed({"a": 100, "b": 10}, "interleave", **weights).order
    more = mixed({"a": 100, "b": 20}, "interleave", **weights).order
    assert few[few < 100].tolist() == more[more < 100].tolist()[:10]


@pytest.mark.parametrize(
    "counts", [[233, 100], [1, 999], [50, 50, 50], [700, 200, 100, 3], [5], [13] * 40]
)
def test_any_first_rows_hold_the_right_shares(counts):
    groups = np.repeat(np.arange(len(counts)), counts)[interleave_evenly(counts)]
    total = sum(counts)
    for group, count in enumerate(counts):
        share = count / total
        seen = np.cumsum(groups == group)
        off = np.abs(seen - share * np.arange(1, total + 1))
        assert off.max() <= (1 + len(counts) * share) / 2 + 1e-9
        assert seen[-1] == count


def test_a_spread_by_hand():
    # a stands at 1/8, 3/8, 5/8, 7/8 of the way, b at 1/4 and 3/4.
    assert interleave_evenly([4, 2]).tolist() == [0, 4, 1, 2, 5, 3]


def test_the_order_is_the_same_in_any_process():
    code = (
        "from luthier.data.seeded_random import seeded_order\n"
        "print(seeded_order(9, 'a', 1).tolist())"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == str(seeded_order(9, "a", 1).tolist())


def test_shuffled_puts_every_row_at_every_place_about_as_often():
    places = np.array([seeded_order(5, seed).tolist() for seed in range(2000)])
    assert (np.sort(places, axis=1) == np.arange(5)).all()
    for place in range(5):
        times = np.bincount(places[:, place], minlength=5)
        assert abs(times - 400).max() < 90  # five standard deviations of 18


@pytest.mark.parametrize(
    ("sizes", "mix", "settings", "message"),
    [
        (
            {"a": 5, "b": 5},
            "concatenate",
            {"a": {"weight": 2}},
            r"dataset\.sources\.a\.weight=2 has no effect with dataset\.mix=concatenate",
        ),
        (
            {"a": 5, "b": 5},
            "interleave",
            {"b": {"repeats": 2}},
            r"dataset\.sources\.b\.repeats=2 has no effect with dataset\.mix=interleave",
        ),
        ({"a": 5, "b": 5}, "interleave", {"a": {"weight": 2}}, r"sources\.b has no weight"),
        ({"a": 5, "b": 0}, "concatenate", {}, r"dataset\.sources\.b has no row left"),
        ({"dataset": 0}, "concatenate", {}, r"^dataset has no row left"),
        (
            {"dataset": 5},
            "concatenate",
            {"dataset": {"repeats": 0.01}},
            r"^dataset\.repeats=0\.01 takes none of its 5 rows",
        ),
        (
            {"a": 5, "b": 500},
            "interleave",
            {"a": {"weight": 100}, "b": {"weight": 1}},
            r"dataset\.sources\.b\.weight=1 takes none of its 500 rows",
        ),
    ],
    ids=["weight", "repeats", "one-weight", "empty", "empty-one", "few-repeats", "little-weight"],
)
def test_settings_that_give_nothing_in_words(sizes, mix, settings, message):
    with pytest.raises(UserError, match=message):
        mixed(sizes, mix, **settings)
