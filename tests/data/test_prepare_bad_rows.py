"""Rows that cannot be read, that the encoder refuses, or that the config leaves out."""

import json
from types import SimpleNamespace

import pytest

from helpers.letter_encoder import Letters, pair, prepared, replies, shown
from luthier.errors import UserError
from luthier.train.console import write_dropped

GOOD = [json.dumps(row) for row in replies("a", "b", "c")]
BAD = {
    "not-json": ('{"prompt": "q", "completion": Hello}', "this is not JSON: Expecting value"),
    "no-object": ('["q", "Hello"]', "this is a list, not a JSON object"),
    "twice": ('{"prompt": "q", "prompt": "r", "completion": "x"}', "appears twice"),
    "nan": ('{"prompt": "q", "completion": NaN}', "NaN"),
    "null": ('{"prompt": "q", "completion": null}', "completion"),
    "column-missing": ('{"prompt": "q"}', "completion"),
    "wrong-type": ('{"prompt": "q", "completion": {}}', "completion"),
    "half-a-surrogate": ('{"prompt": "q", "completion": "\\ud83d"}', "surrogate"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_stops_the_run_with_its_place_and_text(write, kind, tmp_path):
    line, problem = BAD[kind]
    write("data.jsonl", "\n".join([GOOD[0], line, GOOD[1]]))
    with pytest.raises(UserError) as error:
        prepared({"path": "data.jsonl"})
    words = str(error.value).split("\n")
    assert words[0] == "data.jsonl has 1 bad row:"
    assert words[1].startswith("  data.jsonl:2: ") and problem in words[1]
    assert words[2].strip() == line
    assert words[-1] == "To leave bad rows out: dataset.on_bad_row=drop."
    left = [path.name for path in (tmp_path / "luthier" / "data").iterdir()]
    assert all(name.endswith(".lock") for name in left), left


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_dropped_counted_and_listed(write, kind):
    line, problem = BAD[kind]
    write("data.jsonl", "\n".join([GOOD[0], line, GOOD[1], line]))
    found = prepared({"path": "data.jsonl", "on_bad_row": "drop"})
    assert shown(found.train) == ["q>a", "q>b"]
    assert found.train_counts.dropped == {"could not be read": 2}
    assert found.train_counts.rows == 2
    assert [row["where"] for row in found.reports] == ["data.jsonl:2", "data.jsonl:4"]
    assert {row["state"] for row in found.reports} == {"could not be read"}
    assert all(problem in row["problem"] and row["text"] == line for row in found.reports)


def test_many_bad_rows_are_counted_and_the_first_shown(write):
    write("data.jsonl", "\n".join([GOOD[0], *["{"] * 9, *GOOD]))
    with pytest.raises(UserError) as error:
        prepared({"path": "data.jsonl"})
    words = str(error.value)
    assert "data.jsonl has 9 bad rows:" in words and "... and 4 more" in words
    assert "data.jsonl:6: " in words and "data.jsonl:7: " not in words


def test_a_bad_row_behind_many_good_ones_is_found(write):
    write("data.jsonl", "\n".join([GOOD[0]] * 2500 + ["{"]))
    with pytest.raises(UserError, match=r"data\.jsonl:2501: this is not JSON"):
        prepared({"path": "data.jsonl"})


def test_what_was_dropped_once_is_listed_again_and_stops_a_strict_run(write):
    write("data.jsonl", "\n".join([*GOOD, "{"]))
    lenient = {"path": "data.jsonl", "on_bad_row": "drop"}
    first, second = prepared(lenient), prepared(lenient)
    assert first.reports == second.reports != []
    assert first.train_counts == second.train_counts
    with pytest.raises(UserError, match=r"data\.jsonl:4: this is not JSON"):
        prepared({"path": "data.jsonl"})


def test_bad_rows_of_each_source_and_set_are_told_apart(write):
    for name in "abh":
        write(f"{name}.jsonl", "\n".join([*GOOD, "{"]))
    write("h.jsonl", "\n".join(["[]", json.dumps(pair("q", "h")), "{"]))
    sources = {name: {"path": f"{name}.jsonl"} for name in "ab"}
    found = prepared({"sources": sources, "eval": {"path": "h.jsonl"}, "on_bad_row": "drop"})
    places = ["a.jsonl:4", "b.jsonl:4", "h.jsonl:1", "h.jsonl:3"]
    assert [row["where"] for row in found.reports] == places
    assert found.train_counts.dropped == {"could not be read": 2}
    assert found.eval_counts[""].dropped == {"could not be read": 2}


@pytest.mark.parametrize("mode", ["error", "drop"])
def test_a_row_that_the_encoder_refuses_is_named_by_its_place(write, mode):
    write("data.jsonl", replies("a", "!b", "!c"))
    with pytest.raises(UserError, match=r"^data\.jsonl:2: message 1: no loud replies$"):
        prepared({"path": "data.jsonl", "on_bad_row": mode})


def test_the_first_refused_row_is_named_where_chunks_run_ahead(write):
    write("data.jsonl", replies(*["a"] * 1999, "!", *["b"] * 1500, "!"))
    with pytest.raises(UserError, match=r"^data\.jsonl:2000: "):
        prepared({"path": "data.jsonl"})


# Filters


@pytest.mark.parametrize(
    ("expression", "rows"),
    [
        ("lang == 'en'", ["q>a"]),
        ("lang != 'en' and len(completion) < 2", ["q>b"]),
        ("'score' in row and score > 1", ["q>c"]),
    ],
)
def test_a_filter_looks_at_the_rows_own_columns(write, expression, rows):
    write("data.jsonl", [
        pair("q", "a", lang="en"), pair("q", "b", lang="de"), pair("q", "cc", lang="de", score=2),
    ])  # fmt: skip
    found = prepared({"path": "data.jsonl", "filter": expression})
    assert [row[:3] for row in shown(found.train)] == rows
    assert found.train_counts.dropped == {"left out by the filter": 2}
    assert found.train_counts.rows == 1
    assert found.reports == []


def test_a_row_that_the_filter_leaves_out_may_be_bad(write):
    write("data.jsonl", [pair("q", "a", lang="en"), pair("q", None, lang="de")])
    found = prepared({"path": "data.jsonl", "filter": "lang == 'en'"})
    assert shown(found.train) == ["q>a"]


def test_a_row_without_a_column_of_the_filter_is_bad(write):
    write("data.jsonl", [pair("q", "a", lang="en"), pair("q", "b")])
    with pytest.raises(UserError, match=r"data\.jsonl:2: .*lang"):
        prepared({"path": "data.jsonl", "filter": "lang == 'en'"})
    found = prepared({"path": "data.jsonl", "filter": "lang == 'en'", "on_bad_row": "drop"})
    assert found.train_counts.dropped == {"could not be read": 1}


def test_a_row_that_a_search_takes_years_for_ends_the_reading_and_is_not_dropped(
    write, monkeypatch
):
    monkeypatch.setattr("luthier.patterns.SEARCH_SECONDS", 0.1)
    write("data.jsonl", [pair("q", "a"), pair("q", "a" * 60 + "b")])
    settings = {"path": "data.jsonl", "filter": "matches(completion, '(a|aa)+$')"}
    with pytest.raises(UserError, match=r"^data\.jsonl:2: dataset\.filter: `matches\(.*0\.1 sec"):
        prepared(settings | {"on_bad_row": "drop"})


# The file of dropped rows


def test_the_file_of_dropped_rows(write, tmp_path):
    text = "x" * 500
    write("data.jsonl", "\n".join([*GOOD, "{", json.dumps(pair("ä", f"-{text}"))]))
    found = prepared({"path": "data.jsonl", "on_bad_row": "drop"})
    write_dropped(SimpleNamespace(reports=found.reports), tmp_path)
    unread, dropped = map(json.loads, (tmp_path / "dropped.jsonl").read_text().splitlines())
    assert unread == {
        "where": "data.jsonl:4",
        "state": "could not be read",
        "problem": "this is not JSON: Expecting property name enclosed in double quotes (column 2)",
        "text": "{",
    }
    assert dropped.pop("text").startswith('{"messages": [{"role": "user", "content": "ä"}')
    assert dropped == {
        "where": "data.jsonl:5",
        "state": "dropped",
        "problem": "no turn of the row trains",
    }
    assert "ä" in (tmp_path / "dropped.jsonl").read_text()


def test_no_file_where_all_rows_are_whole(write, tmp_path):
    write("data.jsonl", replies("a"))
    found = prepared({"path": "data.jsonl"}, encoder=Letters())
    write_dropped(found, tmp_path)
    assert not (tmp_path / "dropped.jsonl").exists()
