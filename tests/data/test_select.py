"""Held-out rows: how many, which, and never a row on both sides."""

import subprocess
import sys

import numpy as np
import pytest

from luthier.config.schema import EvalConfig
from luthier.data.fingerprints import (
    fingerprint,
    is_first_occurrence,
    normalised_fingerprint,
    pack_fingerprints,
)
from luthier.data.select import exclude_held_out, hold_out_rows
from luthier.errors import UserError


def prints_of(texts, print_=fingerprint):
    return pack_fingerprints(print_({"text": str(text)}) for text in texts)


HUNDRED = prints_of(range(100))


def split(prints, seed=0, **settings):
    return hold_out_rows(prints, EvalConfig(**settings), seed)


@pytest.mark.parametrize(
    ("settings", "held"),
    [
        ({"count": 1}, 1),
        ({"count": 99}, 99),
        ({"share": 0.1}, 10),
        ({"share": 0.001}, 1),
        ({}, 0),
    ],
    ids=["one", "most", "share", "small-share", "none"],
)
def test_as_many_rows_as_asked(settings, held):
    found = split(HUNDRED, **settings)
    assert len(found.heldout) == held
    assert sorted([*found.train, *found.heldout]) == list(range(100))
    assert found.equal == 0


@pytest.mark.parametrize("settings", [{"count": 10}, {"share": 0.1, "by": "hash"}])
def test_equal_rows_stand_on_one_side(settings):
    prints = np.tile(HUNDRED, 3)
    found = split(prints, **settings)
    once = split(HUNDRED, **settings)
    assert found.heldout.tolist() == once.heldout.tolist()
    assert not np.isin(prints[found.train], prints[found.heldout]).any()
    assert len(found.train) == 3 * len(once.train)
    assert found.equal == 2 * len(once.heldout)


def test_the_seed_draws_other_rows_and_the_same_again():
    first, again = split(HUNDRED, seed=1, count=20), split(HUNDRED, seed=1, count=20)
    assert first.heldout.tolist() == again.heldout.tolist()
    assert first.heldout.tolist() != split(HUNDRED, seed=2, count=20).heldout.tolist()


def test_the_draw_does_not_hang_on_the_files_order():
    backwards = HUNDRED[::-1]
    held = HUNDRED[split(HUNDRED, count=20).heldout]
    assert set(held.tolist()) == set(backwards[split(backwards, count=20).heldout].tolist())


def test_the_draw_is_the_same_in_any_process():
    code = (
        "from luthier.data.fingerprints import fingerprint, pack_fingerprints\n"
        "from luthier.data.select import hold_out_rows\n"
        "from luthier.config.schema import EvalConfig\n"
        "prints = pack_fingerprints(fingerprint({'text': str(n)}) for n in range(100))\n"
        "print(hold_out_rows(prints, EvalConfig(count=20), 0).heldout.tolist())"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == str(split(HUNDRED, count=20).heldout.tolist())


def test_added_rows_move_few_others_of_a_draw():
    more = prints_of(range(110))
    before, after = split(HUNDRED, share=0.2), split(more, share=0.2)
    moved = set(before.heldout.tolist()) - set(after.heldout.tolist())
    assert len(after.heldout) == 22
    assert len(moved) <= 5


def test_added_rows_move_no_other_of_a_draw_by_hash():
    many = prints_of(range(3000))
    for seed in range(5):
        before = split(many[:2000], seed=seed, share=0.1, by="hash")
        after = split(many, seed=seed, share=0.1, by="hash")
        shuffled = split(many[::-1], seed=seed, share=0.1, by="hash")
        assert after.heldout[after.heldout < 2000].tolist() == before.heldout.tolist()
        assert sorted(2999 - shuffled.heldout) == after.heldout.tolist()
        assert 230 <= len(after.heldout) <= 370  # 300, and four standard deviations of 16


def test_a_larger_share_by_hash_holds_out_the_rows_of_a_smaller_one():
    many = prints_of(range(2000))
    small, large = (split(many, share=share, by="hash").heldout for share in (0.05, 0.2))
    assert set(small) < set(large)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (range(100), {"count": 100}, r"dataset\.eval\.count=100 holds out 100 of 100 different"),
        (range(100), {"count": 500}, "leaves none to train on"),
        (range(1), {"share": 0.1}, r"dataset\.eval\.share=0\.1 holds out 1 of 1"),
        ([7] * 5, {"count": 1}, "holds out 1 of 1 different rows"),
        (range(9), {"share": 0.001, "by": "hash"}, "holds out none of 9 different rows"),
        (range(3), {"share": 0.9999, "by": "hash"}, "holds out 3 of 3 different rows and leaves"),
        (range(9), {"count": 3, "by": "hash"}, r"count=3 cannot be held out with .*by=hash"),
        (range(9), {"by": "hash"}, "by=hash needs the share"),
    ],
    ids=[
        "all",
        "too-many",
        "one-row",
        "equal-rows",
        "hash-none",
        "hash-all",
        "hash-count",
        "no-share",
    ],
)
def test_a_split_that_cannot_be_in_words(rows, settings, message):
    with pytest.raises(UserError, match=message):
        split(prints_of(rows), **settings)


@pytest.mark.parametrize(
    "print_", [fingerprint, normalised_fingerprint], ids=["exact", "normalised"]
)
def test_nothing_is_on_both_sides_after_deduplication(print_):
    texts = [f"{word} {number % 40}" for word in ("a", "A", "A ") for number in range(80)]
    prints = prints_of(texts, print_)
    kept = prints[is_first_occurrence(prints)]
    found = split(kept, count=15)
    assert not np.isin(kept[found.train], kept[found.heldout]).any()
    assert len(found.train) + len(found.heldout) == len(kept)
    assert found.equal == 0


def test_training_rows_that_are_held_out_elsewhere_are_left_out():
    held = {
        "dataset.eval.path": prints_of([*range(90, 100), "new"]),
        "dataset.eval.sets.maths": prints_of([1, 95]),
    }
    found = exclude_held_out(np.concatenate([HUNDRED, HUNDRED[:2]]), held)
    assert found.train.tolist() == [0, *range(2, 90), 100]
    assert found.equal == {"dataset.eval.path": 10, "dataset.eval.sets.maths": 3}


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"dataset.eval.path": HUNDRED}, r"^dataset\.eval\.path holds every training row too"),
        ({"a": HUNDRED[:50], "b": HUNDRED[50:]}, "^a and b hold every training row too"),
    ],
)
def test_heldout_files_that_hold_all_are_an_error(held, message):
    with pytest.raises(UserError, match=message):
        exclude_held_out(HUNDRED, held)
