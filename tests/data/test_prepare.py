"""The way from sources to the rows of an epoch, with encoders that can be checked by hand."""

import os
from pathlib import Path

import numpy as np
import pytest
from data_material import NAMELESS, Letters, pair, prepared, replies, shown

from luthier.config.schema import DatasetConfig
from luthier.data.counts import Counts
from luthier.data.encoders import ConversationEncoder
from luthier.data.prepare import expand, prepare
from luthier.errors import UserError


@pytest.fixture
def files(write):
    """Two files of replies and one of documents."""
    write("a.jsonl", replies("a1", "a2", "a3", "a4"))
    write("b.jsonl", replies("b1", "b2"))
    write("t.jsonl", [{"text": "t1"}, {"text": "t2"}])


# What comes out of one file


def test_one_file(write):
    write("data.jsonl", [pair("ab", "cd"), pair("e", "f|gh"), pair("i", "-")])
    found = prepared({"path": "data.jsonl"})
    assert shown(found.train) == ["ab>cd", "e>f", "e>gh"]
    assert found.train.lengths.tolist() == [4, 2, 3]
    assert (found.eval, found.heldout, found.eval_counts) == ({}, {}, {})
    assert found.train_counts == Counts(
        rows=3, sequences=3, tokens=9, trained_tokens=5, longest=4, dropped={"nothing to train": 1}
    )
    assert list(found.parts) == ["dataset"]


def test_what_the_encoder_leaves_out_cuts_or_keeps_is_counted(write):
    write("data.jsonl", replies("a", "-", "?b", "<c", "-d", "<"))
    found = prepared({"path": "data.jsonl"})
    assert found.train_counts == Counts(
        rows=6, sequences=4, tokens=10, trained_tokens=6, longest=3,
        dropped={"nothing to train": 2}, cut_rows=2, cut_turns=2, lossy_rows=1,
    )  # fmt: skip
    row = (
        '{{"messages": [{{"content": "q", "role": "user"}}, '
        '{{"content": "{}", "role": "assistant"}}]}}'
    )
    nothing = {"state": "dropped", "problem": "no turn of the row trains"}
    lost = {"state": "lossy", "problem": "message 0, field `name`: it is not shown"}
    assert found.reports == [
        {"where": "data.jsonl:2", **nothing, "text": row.format("-")},
        {"where": "data.jsonl:3", **lost, "text": row.format("?b")},
        {"where": "data.jsonl:5", **nothing, "text": row.format("-d")},
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({"max_rows": 2}, ["q>a", "q>b"], id="the-first-rows"),
        pytest.param({"filter": "n > 1"}, ["q>c", "q>d"], id="a-filter"),
        pytest.param({"filter": "n > 1", "max_rows": 3}, ["q>c"], id="a-filter-sees-the-first"),
        pytest.param({"system": "S"}, ["Sq>a", "Sq>b", "Sq>c", "Sq>d"], id="a-system-prompt"),
        pytest.param(
            {"columns": {"completion": "n"}, "shape": "prompt_completion"}, None, id="int"
        ),
        pytest.param({"shape": "text", "columns": {"text": "prompt"}}, [">q"] * 4, id="a-shape"),
        pytest.param({"repeats": 2}, ["q>a", "q>b", "q>c", "q>d"] * 2, id="twice"),
    ],
)
def test_settings_of_a_source(write, settings, expected):
    rows = [pair("q", letter, n=n) for n, letter in enumerate("abcd")]
    write("data.jsonl", rows)
    if expected is None:
        with pytest.raises(UserError, match=r"data\.jsonl has 4 bad rows"):
            prepared({"path": "data.jsonl", **settings})
    else:
        assert shown(prepared({"path": "data.jsonl", **settings}).train) == expected


# Several sources


@pytest.mark.parametrize(
    ("settings", "expected", "counts"),
    [
        pytest.param(
            {"sources": {"a": {"path": "a.jsonl"}, "b": {"path": "b.jsonl"}}},
            ["a1", "a2", "a3", "a4", "b1", "b2"],
            {"a": 4, "b": 2},
            id="one-after-the-other",
        ),
        pytest.param(
            {"sources": {"b": {"path": "b.jsonl", "repeats": 2}, "a": {"path": "a.jsonl"}}},
            ["b1", "b2", "b1", "b2", "a1", "a2", "a3", "a4"],
            {"b": 4, "a": 4},
            id="twice",
        ),
        pytest.param(
            {"sources": {"t": {"path": "t.jsonl"}, "b": {"path": "b.jsonl"}}},
            ["t1", "t2", "b1", "b2"],
            {"t": 2, "b": 2},
            id="documents-and-conversations",
        ),
        pytest.param(
            {"sources": {"a": {"path": "a.jsonl", "filter": "completion == 'a3'"},
                         "b": {"path": "b.jsonl", "max_rows": 1}}},
            ["a3", "b1"],
            {"a": 1, "b": 1},
            id="each-with-its-own-settings",
        ),
    ],
)  # fmt: skip
def test_sources_in_one_epoch(files, settings, expected, counts):
    found = prepared(settings)
    assert [row.split(">")[1] for row in shown(found.train)] == expected
    assert found.train_counts.sources == counts
    assert list(found.parts) == [f"dataset.sources.{name}" for name in settings["sources"]]


@pytest.mark.parametrize(
    ("weights", "counts", "left_out"),
    [
        pytest.param((None, None), {"a": 2, "b": 2}, 2, id="equal-shares"),
        pytest.param((2, 1), {"a": 4, "b": 2}, 0, id="as-they-are"),
        pytest.param((1, 2), {"a": 1, "b": 2}, 3, id="more-of-the-small-one"),
    ],
)
def test_sources_by_weight(files, weights, counts, left_out):
    sources = {
        name: {"path": f"{name}.jsonl", "weight": weight}
        for name, weight in zip("ab", weights, strict=True)
    }
    found = prepared({"sources": sources, "mix": "interleave"})
    rows = shown(found.train)
    assert len(set(rows)) == len(rows) == sum(counts.values())
    assert {name: sum(f">{name}" in row for row in rows) for name in "ab"} == counts
    assert found.train_counts.sources == counts
    assert found.train_counts.dropped.get("not in the mixture", 0) == left_out
    assert found.train_counts.rows == sum(counts.values())
    assert rows == shown(prepared({"sources": sources, "mix": "interleave"}).train)


def test_half_the_rows_are_drawn_by_the_seed(files):
    settings = {"path": "a.jsonl", "repeats": 0.5}
    draws = {tuple(shown(prepared(settings, seed).train)) for seed in range(8)}
    assert len(draws) > 1
    assert all(len(draw) == 2 and list(draw) == sorted(draw) for draw in draws)


def test_each_source_has_its_own_system_prompt_and_encoder(files):
    asked = []

    def encoders(kind, source, key):
        asked.append((kind, source.train_on, key))
        return Letters()

    sources = {
        "a": {"path": "a.jsonl", "system": "A", "train_on": "last"},
        "b": {"path": "b.jsonl", "system": "B"},
        "t": {"path": "t.jsonl"},
    }
    config = DatasetConfig.model_validate(
        {"sources": sources, "eval": {"sets": {"x": {"path": "b.jsonl", "max_rows": 1}}}}
    )
    found = prepare(config, encoders, NAMELESS, 0)
    assert asked == [
        ("conversation", "last", "dataset.sources.a"),
        ("conversation", None, "dataset.sources.b"),
        ("text", None, "dataset.sources.t"),
        ("conversation", None, "dataset.eval.sets.x"),
    ]
    heads = [row.split(">")[0] for row in shown(found.train)]
    assert heads == ["Aq"] * 4 + ["Bq"] * 2 + [""] * 2
    assert shown(found.eval["x"]) == ["q>b1"]


# Equal rows


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", ["A b", "a  B", "c", "A b", "c ", "A b", "d"]),
        ("exact", ["A b", "a  B", "c", "c ", "d"]),
        ("normalised", ["A b", "c", "d"]),
    ],
)
def test_equal_rows(write, mode, expected):
    write("a.jsonl", replies("A b", "a  B", "c", "A b"))
    write("b.jsonl", [pair("q", "c ", id=7), *replies("A b", "d")])
    sources = {name: {"path": f"{name}.jsonl"} for name in "ab"}
    found = prepared({"sources": sources, "deduplicate": mode})
    assert [row.split(">")[1] for row in shown(found.train)] == expected
    assert found.train_counts.dropped.get("duplicate", 0) == 7 - len(expected)
    assert found.train_counts.rows == len(expected)


# Nothing left


@pytest.mark.parametrize(
    ("rows", "settings", "parts"),
    [
        pytest.param(
            replies("-", "-a"),
            {},
            ["dataset: none of the 2 rows gives anything to train on (nothing to train: 2)",
             "The first one is data.jsonl:1."],
            id="none-encodes",
        ),
        pytest.param(
            replies("a", "b"),
            {"filter": "prompt == 'x'"},
            ["dataset: there is no row to train on; the filter leaves out all of 2."],
            id="none-passes-the-filter",
        ),
        pytest.param(
            replies("a", "b"),
            {"eval": {"path": "empty.jsonl"}},
            ["dataset.eval.path: none of the 1 rows gives anything to evaluate on",
             "The first one is empty.jsonl:1."],
            id="none-of-the-held-out-file",
        ),
        pytest.param(
            replies("a", "b"),
            {"eval": {"sets": {"x": {"path": "data.jsonl", "filter": "prompt == 'x'"}}}},
            ["dataset.eval.sets.x: there is no row to evaluate on; the filter leaves out all of 2"],
            id="none-of-a-set",
        ),
        pytest.param(
            replies("a", "b"),
            {"eval": {"path": "data.jsonl"}},
            ["dataset.eval.path holds every training row too"],
            id="all-are-held-out",
        ),
        pytest.param(
            replies("a", "a"),
            {"eval": {"count": 1}},
            ["dataset.eval.count=1 holds out 1 of 1 different rows"],
            id="the-only-one-is-held-out",
        ),
        pytest.param(
            replies("a"),
            {"mix": "interleave", "path": None,
             "sources": {"a": {"path": "data.jsonl"}, "b": {"path": "empty.jsonl"}}},
            ["dataset.sources.b has no row left to train on: of its 1 rows 1 give no sequence."],
            id="a-source-gives-nothing",
        ),
        pytest.param(
            replies("a", "b", "a"),
            {"path": None, "deduplicate": "exact", "eval": {"path": "held.jsonl"},
             "sources": {"c": {"path": "held.jsonl"}, "a": {"path": "data.jsonl"}}},
            ["dataset.sources.c has no row left to train on: of its 3 rows 1 give no sequence, "
             "1 equal other rows, 1 are held out."],
            id="a-source-whose-rows-are-elsewhere",
        ),
    ],
)  # fmt: skip
def test_nothing_left_in_words(write, rows, settings, parts):
    write("data.jsonl", rows)
    write("empty.jsonl", replies("-"))
    write("held.jsonl", replies("-", "c", "c"))
    with pytest.raises(UserError) as error:
        prepared({"path": "data.jsonl", **settings})
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_the_numbers_of_what_rows_make():
    starts, counts = np.array([5, 0, 9]), np.array([2, 0, 3])
    assert expand(starts, counts).tolist() == [5, 6, 9, 10, 11]
    assert expand(starts[:0], counts[:0]).tolist() == []


# Real rows

ASSETS = os.environ.get("LUTHIER_ASSETS")
RECIPES = Path(__file__).parents[2] / "recipes" / "data"


@pytest.mark.skipif(not ASSETS, reason="LUTHIER_ASSETS is not set")
def test_the_quickstarts_rows_train_on_their_replies(monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.chdir(RECIPES)
    tokenizer = AutoTokenizer.from_pretrained(Path(ASSETS, "tokenizers", "smollm2"))
    settings = {"path": "reminders.train.jsonl", "eval": {"path": "reminders.heldout.jsonl"}}
    encoder = ConversationEncoder(tokenizer, {"max_length": 130})
    found = prepared(settings, encoder=encoder, tokenizer=tokenizer)
    assert (found.train_counts.sequences, found.eval_counts[""].sequences) == (1400, 120)
    assert (found.train_counts.cut_rows, found.reports) == (0, [])
    held = found.eval[""]
    for number, conversation in zip(held.index, found.heldout[""], strict=True):
        labels = held.table.row(number)["labels"]
        trained = labels[labels != -100]
        reply = conversation["messages"][-1]["content"]
        assert tokenizer.decode(trained) == f"{reply}<|im_end|>"
        assert len(trained) < 60
