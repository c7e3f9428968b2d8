"""Rows that are read while they train are the rows that would be read ahead."""

import json
from collections import Counter

import numpy as np
import pytest

from luthier.config.schema import DatasetConfig
from luthier.data.encoders.chat import EncodedRows, row_outcome
from luthier.data.examples import DatasetSources
from luthier.data.streaming import open_stream
from luthier.errors import UserError


class Letters:
    """Each conversation as the characters of its last message; one in capitals is dropped."""

    def settings(self):
        return {}

    def encode(self, examples):
        rows = [[ord(c) for c in e["messages"][-1]["content"]] for e in examples]
        upper = {n for n, e in enumerate(examples) if e["messages"][-1]["content"].isupper()}
        kept = [row for n, row in enumerate(rows) if n not in upper]
        return EncodedRows(
            {"input_ids": kept, "labels": kept},
            [
                row_outcome(0, ("capitals", "it is written in capitals"))
                if n in upper
                else row_outcome(1)
                for n in range(len(rows))
            ],
        )


def rows(*replies):
    return [{"prompt": "q", "completion": reply} for reply in replies]


def read(stream):
    return ["".join(map(chr, row["input_ids"])) for row in stream()]


def open_letters(settings, problems=None):
    config = DatasetConfig.model_validate({"streaming": True, **settings})
    note = problems.append if problems is not None else (lambda row: None)
    return open_stream(DatasetSources(config), lambda kind, source, key: Letters(), note)


def test_a_source_is_read_whole_and_again(write):
    write("a.jsonl", rows(*(f"r{n}" for n in range(600))))
    stream = open_letters({"path": "a.jsonl"})
    assert read(stream) == [f"r{n}" for n in range(600)]
    assert read(stream)[0] == "r0"
    row = next(iter(stream()))
    assert row["input_ids"].dtype == np.int32 and row["labels"].tolist() == [114, 48]


@pytest.mark.parametrize(
    ("mix", "settings", "expected"),
    [
        ("concatenate", ({}, {}), {"a": 4, "b": 2}),
        ("concatenate", ({}, {"repeats": 3}), {"a": 4, "b": 6}),
        ("interleave", ({}, {}), {"a": 3, "b": 2}),
        ("interleave", ({"weight": 2}, {"weight": 1}), {"a": 4, "b": 2}),
    ],
    ids=["all", "repeats", "equal shares", "weights"],
)
def test_several_sources(write, mix, settings, expected):
    write("a.jsonl", rows(*"aaaa"))
    write("b.jsonl", rows(*"bb"))
    sources = {
        name: {"path": f"{name}.jsonl", **own} for name, own in zip("ab", settings, strict=True)
    }
    found = Counter(read(open_letters({"sources": sources, "mix": mix})))
    assert found == expected


def test_interleaved_rows_alternate(write):
    write("a.jsonl", rows(*("a" * 40)))
    write("b.jsonl", rows(*("b" * 20)))
    sources = {"a": {"path": "a.jsonl", "weight": 2}, "b": {"path": "b.jsonl", "weight": 1}}
    text = "".join(read(open_letters({"sources": sources, "mix": "interleave"})))
    assert all(text[n : n + 3].count("a") == 2 for n in range(0, 57, 3))


def test_a_bad_row_stops_the_stream_or_is_told_once(write):
    lines = [json.dumps(row) for row in rows("a", "b", "CAPITALS")]
    write("a.jsonl", "\n".join([lines[0], "{broken", *lines[1:]]) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        read(open_letters({"path": "a.jsonl"}))
    problems = []
    stream = open_letters({"path": "a.jsonl", "on_bad_row": "drop"}, problems)
    assert read(stream) == read(stream) == ["a", "b"]
    assert [(p["where"], p["state"]) for p in problems] == [
        ("a.jsonl:2", "could not be read"),
        ("a.jsonl:4", "dropped"),
    ]


def test_filters_hold(write):
    write("a.jsonl", rows("a", "bb", "c"))
    assert read(open_letters({"path": "a.jsonl", "filter": "len(completion) == 1"})) == ["a", "c"]


@pytest.mark.parametrize(
    "settings",
    [{"deduplicate": "exact"}, {"eval": {"share": 0.1}}, {"eval": {"count": 1}}],
    ids=["duplicates", "share", "count"],
)
def test_what_needs_all_rows_is_refused(write, settings):
    write("a.jsonl", rows("a", "b"))
    with pytest.raises(UserError, match="needs all rows to be known"):
        open_letters({"path": "a.jsonl", **settings})


def test_a_map_is_applied_as_rows_come_and_says_once_what_it_left_out(write, tmp_path, capsys):
    write("a.jsonl", rows(*"abcd"))
    (tmp_path / "own_stream_map.py").write_text(
        "def odd(row):\n    return row if row['completion'] in 'bd' else None\n"
    )
    stream = open_letters({"path": "a.jsonl", "map": f"python:{tmp_path}/own_stream_map.py:odd"})
    assert [read(stream), read(stream)] == [["b", "d"]] * 2
    assert capsys.readouterr().err == "dataset.map left out 2 of 4 rows\n"
