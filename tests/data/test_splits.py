"""Held-out rows: how many, which, and never a row on both sides."""

import subprocess
import sys

import pytest

from luthier.config.schema import EvalSplitConfig
from luthier.data.splits import apart, draw, fingerprint
from luthier.errors import UserError


def row(text):
    return {"messages": [{"role": "user", "content": text}]}


ROWS = [row(str(number)) for number in range(100)]


def split(rows, seed=0, **settings):
    return draw(rows, EvalSplitConfig(**settings), seed)


@pytest.mark.parametrize(
    ("settings", "held"),
    [({"count": 1}, 1), ({"count": 99}, 99), ({"share": 0.1}, 10), ({"share": 0.001}, 1)],
    ids=["one", "most", "share", "small-share"],
)
def test_as_many_rows_as_asked(settings, held):
    found = split(ROWS, **settings)
    assert len(found.heldout) == held
    assert sorted(found.train + found.heldout) == list(range(100))
    assert found.equal == 0


def test_equal_rows_stand_on_one_side():
    rows = [*ROWS, *ROWS, *ROWS]
    found = split(rows, count=10)
    train = {fingerprint(rows[index]) for index in found.train}
    held = [fingerprint(rows[index]) for index in found.heldout]
    assert len(set(held)) == len(held) == 10
    assert not train & set(held)
    assert len(found.train) == 270
    assert found.equal == 20


def test_the_seed_draws_other_rows_and_the_same_again():
    assert split(ROWS, seed=1, count=20) == split(ROWS, seed=1, count=20)
    assert split(ROWS, seed=1, count=20) != split(ROWS, seed=2, count=20)


def test_the_draw_does_not_hang_on_the_files_order():
    def contents(rows):
        return {fingerprint(rows[index]) for index in split(rows, count=20).heldout}

    assert contents(ROWS) == contents(ROWS[::-1])


def test_the_draw_is_the_same_in_any_process():
    code = (
        "from luthier.data.splits import draw; from luthier.config.schema import EvalSplitConfig\n"
        "rows = [{'messages': [{'role': 'user', 'content': str(n)}]} for n in range(100)]\n"
        "print(draw(rows, EvalSplitConfig(count=20), 0).heldout)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert shown.strip() == str(split(ROWS, count=20).heldout)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (ROWS, {"count": 100}, r"dataset\.eval\.count=100 holds out 100 of 100 different rows"),
        (ROWS, {"count": 500}, "leaves none to train on"),
        (ROWS[:1], {"share": 0.1}, r"dataset\.eval\.share=0\.1 holds out 1 of 1"),
        ([ROWS[0]] * 5, {"count": 1}, "holds out 1 of 1 different rows"),
    ],
    ids=["all", "too-many", "one-row", "equal-rows"],
)
def test_nothing_left_to_train_in_words(rows, settings, message):
    with pytest.raises(UserError, match=message):
        split(rows, **settings)


def test_training_rows_that_are_held_out_elsewhere_are_left_out():
    found = apart(ROWS, [*ROWS[90:], row("new")], "eval.path")
    assert found.train == list(range(90))
    assert found.heldout == list(range(11))
    assert found.equal == 10


def test_a_heldout_file_that_holds_all_is_an_error():
    with pytest.raises(UserError, match=r"dataset\.eval\.path holds every training row too"):
        apart(ROWS, ROWS, "eval.path")


def test_the_fingerprint_sees_content_and_no_order_of_keys():
    assert fingerprint({"messages": [{"role": "a", "content": "b"}]}) == fingerprint(
        {"messages": [{"content": "b", "role": "a"}]}
    )
    assert fingerprint(row("a")) != fingerprint({**row("a"), "tools": [{}]})
