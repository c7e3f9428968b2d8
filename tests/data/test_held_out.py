"""Held-out rows: which they are, that none of them trains, and the accounts of both sides."""

import pytest
from data_material import prepared, replies, save, shown, texts

from luthier.data.counts import Counts


@pytest.mark.parametrize(
    ("settings", "names", "held"),
    [
        pytest.param({}, [], 0, id="none"),
        pytest.param({"count": 3}, [""], 3, id="count"),
        pytest.param({"share": 0.25}, [""], 3, id="share"),
        pytest.param({"share": 0.25, "by": "hash"}, [""], None, id="hash"),
        pytest.param({"path": "held.jsonl"}, [""], 2, id="file"),
        pytest.param({"sets": {"x": {"path": "held.jsonl"}}}, ["x"], 2, id="set"),
        pytest.param(
            {"count": 2, "sets": {"x": {"path": "held.jsonl"}, "y": {"path": "held.jsonl"}}},
            ["", "x", "y"],
            6,
            id="count-and-sets",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["none", "exact", "normalised"])
def test_equal_rows_never_stand_on_both_sides(write, settings, names, held, mode):
    letters = [chr(ord("a") + number) for number in range(12)]
    write("data.jsonl", replies(*letters, *letters[:6], *(letter.upper() for letter in letters)))
    write("held.jsonl", replies("c", "new"))
    found = prepared({"path": "data.jsonl", "eval": settings, "deduplicate": mode})
    assert list(found.eval) == list(found.heldout) == list(found.eval_counts) == names
    sides = [shown(found.train), *map(shown, found.eval.values())]
    seen = [{row.lower() if mode == "normalised" else row for row in side} for side in sides]
    assert not any(seen[0] & other for other in seen[1:])
    different = {"none": 24, "exact": 24, "normalised": 12}[mode]
    heldout = sum(map(len, sides[1:]))
    if held is not None and settings.get("share") is None:
        assert heldout == held
    elif "share" in settings and "by" not in settings:
        assert heldout == round(different / 4)
    assert 0 < len(seen[0]) <= different
    out = sum(found.train_counts.dropped.values())
    drawn = len(sides[1]) if "" in names and "path" not in settings else 0
    assert len(sides[0]) + drawn + out == 30
    answers = [[texts(example)[-1] for example in rows] for rows in found.heldout.values()]
    assert answers == [[row.split(">")[1] for row in side] for side in sides[1:]]


def test_a_split_of_a_saved_dataset_is_held_out(tmp_path):
    save(tmp_path / "saved", train=replies(*"abc"), test=replies(*"bd"))
    found = prepared({"path": "saved", "eval": {"split": "test"}})
    assert shown(found.train) == ["q>a", "q>c"]
    assert shown(found.eval[""]) == ["q>b", "q>d"]
    assert found.train_counts.dropped == {"equal to a held-out row": 1}


def test_the_held_out_file_is_read_as_the_training_rows_are(write):
    write("data.jsonl", [{"frage": "q", "antwort": letter} for letter in "abcd"])
    write("held.jsonl", [{"frage": "q", "antwort": letter} for letter in "xyz"])
    settings = {"columns": {"prompt": "frage", "completion": "antwort"}, "system": "S"}
    chosen = {"max_rows": 2, "filter": "antwort != 'a'"}
    found = prepared({"path": "data.jsonl", "eval": {"path": "held.jsonl"}, **settings, **chosen})
    assert shown(found.train) == ["Sq>b"]
    assert shown(found.eval[""]) == ["Sq>x", "Sq>y", "Sq>z"]


def test_the_accounts_of_both_sides(write):
    write("data.jsonl", replies("a", "bb", "-", "c", "c", "d"))
    write("held.jsonl", replies("c", "-", "e|f"))
    found = prepared({"path": "data.jsonl", "eval": {"path": "held.jsonl"}})
    dropped = {"nothing to train": 1, "equal to a held-out row": 2}
    assert found.train_counts == Counts(4, 3, 7, 4, 3, dropped)
    assert found.eval_counts == {"": Counts(3, 3, 6, 3, 2, {"nothing to train": 1})}
    assert [row["where"] for row in found.reports] == ["data.jsonl:3", "held.jsonl:2"]
    assert [texts(example)[-1] for example in found.heldout[""]] == ["c", "e|f"]
    assert len(found.heldout[""]) == 2


def test_a_dropped_training_row_is_no_held_out_one(write):
    write("data.jsonl", replies("a", "b", "-", "c"))
    found = prepared({"path": "data.jsonl", "eval": {"count": 1}})
    assert found.eval_counts[""] == Counts(1, 1, 2, 1, 2)
    assert found.train_counts == Counts(3, 2, 4, 2, 2, {"nothing to train": 1})
