"""The way from sources to the rows of an epoch, with encoders that can be checked by hand."""

import csv
import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from helpers.letter_encoder import NAMELESS, Letters, pair, prepared, replies, save, shown, texts
from luthier.config.schema import DatasetConfig
from luthier.data.encode_source import expand_ranges
from luthier.data.encoders.chat import ConversationEncoder, hash_sequences
from luthier.data.prepare import SplitCounts, find_largest_rows, prepare
from luthier.data.store import Ragged
from luthier.errors import UserError


@pytest.fixture
def files(write):
    """Two files of replies and one of documents."""
    write("a.jsonl", replies("a1", "a2", "a3", "a4"))
    write("b.jsonl", replies("b1", "b2"))
    write("t.jsonl", [{"text": "t1"}, {"text": "t2"}])


# What comes out of one file


def test_training_rows_like_a_held_out_row_are_counted(write):
    write("train.jsonl", replies("a", "B ", "c", "d"))
    write("held.jsonl", replies("b", "x"))
    write("other.jsonl", replies("C", "D", "d"))
    sets = {"other": {"path": "other.jsonl"}}
    found = prepared({"path": "train.jsonl", "eval": {"path": "held.jsonl", "sets": sets}})
    # "d" stands on both sides as it is, so it does not train.
    assert found.count_similar_rows() == {"": 1, "other": 1}
    normalised = {"path": "train.jsonl", "deduplicate": "normalised"}
    found = prepared(normalised | {"eval": {"path": "held.jsonl", "sets": sets}})
    assert found.count_similar_rows() == {"": 0, "other": 0}


def test_one_file(write):
    write("data.jsonl", [pair("ab", "cd"), pair("e", "f|gh"), pair("i", "-")])
    found = prepared({"path": "data.jsonl"})
    assert shown(found.train) == ["ab>cd", "e>f", "e>gh"]
    assert found.train.lengths.tolist() == [4, 2, 3]
    assert (found.eval, found.heldout, found.eval_counts) == ({}, {}, {})
    assert found.train_counts == SplitCounts(
        rows=3, sequences=3, tokens=9, trained_tokens=5, longest=4, dropped={"nothing to train": 1}
    )
    assert list(found.sources) == ["dataset"]


def test_what_the_encoder_leaves_out_cuts_or_keeps_is_counted(write):
    write("data.jsonl", replies("a", "-", "?b", "<c", "-d", "<"))
    found = prepared({"path": "data.jsonl"})
    assert found.train_counts == SplitCounts(
        rows=6, sequences=4, tokens=10, trained_tokens=6, longest=3,
        dropped={"nothing to train": 2}, cut_rows=2, cut_turns=2, lossy_rows=1,
    )  # fmt: skip
    row = (
        '{{"messages": [{{"role": "user", "content": "q"}}, '
        '{{"role": "assistant", "content": "{}"}}]}}'
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
            {"columns": {"completion": "o"}, "type": "prompt_completion"}, None, id="object"
        ),
        pytest.param({"type": "text", "columns": {"text": "prompt"}}, [">q"] * 4, id="a-type"),
        pytest.param({"repeats": 2}, ["q>a", "q>b", "q>c", "q>d"] * 2, id="twice"),
    ],
)
def test_settings_of_a_source(write, settings, expected):
    rows = [pair("q", letter, n=n, o={}) for n, letter in enumerate("abcd")]
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
    assert list(found.sources) == [f"dataset.sources.{name}" for name in settings["sources"]]


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
            ["dataset: none of the 2 rows can be used to train on (nothing to train: 2)",
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
            ["dataset.eval.path: the only row, empty.jsonl:1, cannot be used to evaluate on"],
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
    assert expand_ranges(starts, counts).tolist() == [5, 6, 9, 10, 11]
    assert expand_ranges(starts[:0], counts[:0]).tolist() == []


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
    assert found.train_counts == SplitCounts(4, 3, 7, 4, 3, dropped)
    assert found.eval_counts == {"": SplitCounts(3, 3, 6, 3, 2, {"nothing to train": 1})}
    assert [row["where"] for row in found.reports] == ["data.jsonl:3", "held.jsonl:2"]
    assert [texts(example)[-1] for example in found.heldout[""]] == ["c", "e|f"]
    assert len(found.heldout[""]) == 2


def test_a_dropped_training_row_is_no_held_out_one(write):
    write("data.jsonl", replies("a", "b", "-", "c"))
    found = prepared({"path": "data.jsonl", "eval": {"count": 1}})
    assert found.eval_counts[""] == SplitCounts(1, 1, 2, 1, 2)
    assert found.train_counts == SplitCounts(3, 2, 4, 2, 2, {"nothing to train": 1})


def digest(settings, seed=0):
    return prepared(settings, seed).content_hash


def test_the_hash_is_of_all_ids_and_labels_in_order_training_first(write):
    write("data.jsonl", [pair("a", "b"), pair("c", "d")])
    write("held.jsonl", [pair("e", "f")])

    def one(*numbers):
        # The sizes in bytes, then the columns by name: input_ids, labels, trained.
        return hashlib.blake2b(struct.pack("<3i4iq", 8, 8, 8, *numbers), digest_size=16).digest()

    rows = [one(97, 98, -100, 98, 1), one(99, 100, -100, 100, 1), one(101, 102, -100, 102, 1)]
    train, held = struct.pack("<q", 2) + rows[0] + rows[1], struct.pack("<q", 1) + rows[2]
    expected = hashlib.sha256(train + held).hexdigest()
    assert digest({"path": "data.jsonl", "eval": {"path": "held.jsonl"}}) == expected


def test_token_rows_have_one_hash_however_they_come():
    rows = [[1, 2], [], [3]]
    flat = Ragged(*map(np.array, ([1, 2, 3], [0, 2, 2, 3])))
    lists, arrays = (
        hash_sequences({"a": rows, "b": [4, 5, 6]}),
        hash_sequences({"b": [4, 5, 6], "a": flat}),
    )
    assert lists.tolist() == arrays.tolist()
    assert len(set(lists.tolist())) == 3
    moved = hash_sequences({"a": [[1, 2], [3]], "b": [[3], [1, 2]]})
    assert len({*moved.tolist(), *hash_sequences({"a": [[1, 2, 3]], "b": [[]]}).tolist()}) == 3
    assert hash_sequences({"a": [], "b": []}).shape == (0,)


ROWS = replies("c", "d", "e", "f")


@pytest.mark.parametrize(
    ("rows", "settings", "is_same"),
    [
        pytest.param([{**row, "id": 7} for row in ROWS], {}, True, id="an-id"),
        pytest.param([*ROWS, pair("q", "-")], {}, True, id="a-row-that-gives-nothing"),
        pytest.param([*ROWS, ROWS[0]], {"deduplicate": "exact"}, True, id="a-duplicate"),
        pytest.param([*ROWS, pair("x", "g")], {"filter": "prompt == 'q'"}, True, id="filtered"),
        pytest.param(ROWS, {"eval": {"count": 1}}, False, id="a-row-held-out"),
        pytest.param([*ROWS, ROWS[0]], {}, False, id="a-row-twice"),
        pytest.param(ROWS[::-1], {}, False, id="another-order"),
        pytest.param(ROWS[:3], {}, False, id="a-row-less"),
        pytest.param([*ROWS[:3], pair("qf", "")], {}, False, id="other-labels"),
        pytest.param([*ROWS[:3], pair("q", "g")], {}, False, id="other-tokens"),
    ],
)
def test_the_hash_changes_with_tokens_labels_and_order_and_only_then(
    write, rows, settings, is_same
):
    write("data.jsonl", ROWS)
    write("other.jsonl", rows)
    assert (
        digest({"path": "data.jsonl"}) == digest({"path": "other.jsonl", **settings})
    ) is is_same


def test_the_hash_knows_neither_files_nor_sources(write):
    write("data.jsonl", ROWS)
    write("a.jsonl", ROWS[:1])
    write("b.jsonl", ROWS[1:])
    parted = {"sources": {name: {"path": f"{name}.jsonl"} for name in "ab"}}
    assert (
        digest({"path": "data.jsonl"}) == digest(parted) == digest({"path": ["a.jsonl", "b.jsonl"]})
    )


def test_the_seed_changes_the_hash_where_it_draws(write):
    write("data.jsonl", ROWS)
    held = {"path": "data.jsonl", "eval": {"count": 2}}
    assert digest({"path": "data.jsonl"}, 1) == digest({"path": "data.jsonl"}, 2)
    assert digest(held, 1) == digest(held, 1)
    assert len({digest(held, seed) for seed in range(8)}) > 1


def test_the_longest_row_is_known_once_all_sources_are_encoded(write):
    write("a.jsonl", replies("x" * 7, "y"))
    write("b.jsonl", replies("z" * 30))
    one = {"sources": {"a": {"path": "a.jsonl"}}}
    both = {"sources": {"a": {"path": "a.jsonl"}, "b": {"path": "b.jsonl"}}}

    def longest(settings):
        config = DatasetConfig.model_validate(settings)
        rows = find_largest_rows(config, lambda kind, source, key: Letters(), NAMELESS)
        return None if rows is None else rows.tokens

    assert longest(one) is None
    prepared(one)
    assert (longest(one), longest(both)) == (8, None)
    prepared(both)
    assert longest(both) == 31


LABELLED = {
    "stars": [1, 2, 3, 10, 11],
    "scores": [0.5, 2.0, -1.25, 3.0],
    "names": ["good", "bad", "10", "good"],
    "tags": [["a", "b"], ["a"], []],
}


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("written", ["csv", "tsv", "json", "python", "parquet"])
def test_labels_do_not_depend_on_the_file_format(name, written, tmp_path):
    """Cells of CSV are text: numbers and lists in them are the ones that JSON and Parquet have."""

    class Labels(Letters):
        def encode(self, examples):
            seen.extend(example["label"] for example in examples)
            return super().encode(examples)

    seen = []
    rows = [{"text": f"row {n}", "label": label} for n, label in enumerate(LABELLED[name])]
    file = tmp_path / {"json": "a.jsonl", "python": "a.csv"}.get(written, f"a.{written}")
    if written == "json":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif written == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        as_text = str if written == "python" else json.dumps
        with file.open("w", newline="") as stream:
            writer = csv.writer(stream, delimiter="\t" if written == "tsv" else ",")
            writer.writerow(["text", "label"])
            for row in rows:
                label = row["label"]
                writer.writerow([row["text"], label if isinstance(label, str) else as_text(label)])
    prepare(DatasetConfig(path=str(file)), lambda *_: Labels(), NAMELESS, 0)
    expected = [[label] if isinstance(label, str) else label for label in LABELLED[name]]
    assert [[label] if isinstance(label, str) else label for label in seen] == expected
    if name == "stars":
        assert {type(label) for label in seen} == {int}


def test_blank_cells_of_a_spreadsheet_say_nothing(write):
    """Alpaca's rows have a blank input, and exports a blank column of tools or system prompts."""
    write("a.csv", "instruction,input,output,tools,system\nq,,a,,\nr, ,b, , \ns,t,c,[],S\n")
    assert shown(prepared({"path": "a.csv"}).train) == ["q>a", "r>b", "Ss\n\nt>c"]


@pytest.mark.parametrize("streaming", [False, True], ids=["kept", "streamed"])
def test_keys_of_messages_that_nothing_reads_are_told(write, streaming):
    reply = {"role": "assistant", "content": "a", "weight": 1}
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}", "id": n, "seen": n}, reply]}
        for n in range(3)
    ]
    write("a.jsonl", [*rows, {"messages": [{**reply, "score": 1}]}])

    class Shown(Letters):
        def settings(self):
            return super().settings() | {"template": "{{ message.seen }}{{ score_of }}"}

    config = DatasetConfig(path="a.jsonl", streaming=streaming)
    made = prepare(config, lambda *_: Shown(), NAMELESS, 0)
    assert made.unread_keys == {"dataset": [("id", 3), ("score", 1)]}
    assert prepare(config, lambda *_: Shown(), NAMELESS, 0).unread_keys == made.unread_keys


MAPS = """
def shout(row):
    return None if row["completion"] == "a2" else {**row, "completion": row["completion"] * 2}

def split(row):
    return [{**row, "completion": letter} for letter in row["completion"]]
"""


@pytest.mark.parametrize("workers", [None, 2], ids=["one process", "workers"])
def test_each_source_has_a_map_of_its_own_and_what_it_leaves_out_is_counted(
    files, write, workers, monkeypatch, tmp_path
):
    # A folder named as the package would be taken for it by processes that find it on their path.
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    write("own_maps.py", MAPS)
    sources = {
        "a": {"path": "a.jsonl", "map": "python:own_maps.py:shout"},
        "b": {"path": "b.jsonl", "map": "python:own_maps.py:split", "filter": "completion != '2'"},
    }
    found = prepared({"sources": sources, "workers": workers})
    assert shown(found.train) == ["q>a1a1", "q>a3a3", "q>a4a4", "q>b", "q>1", "q>b"]
    left_out = {key: source.left_out_by_map for key, source in found.sources.items()}
    assert left_out == {"dataset.sources.a": (1, 4), "dataset.sources.b": (0, 2)}
    # Counted alike where the rows come from the cache.
    again = prepared({"sources": sources, "workers": workers})
    assert again.content_hash == found.content_hash
    assert again.sources["dataset.sources.a"].left_out_by_map == (1, 4)
    assert again.locate_rows([2, 5]) == ["a.jsonl:4", "b.jsonl:2 (map row 1)"]


def test_rows_that_are_held_out_in_a_file_of_their_own_are_mapped_as_those_to_train_on(
    files, write
):
    write("own_maps.py", MAPS)
    settings = {"path": "a.jsonl", "map": "python:own_maps.py:shout", "eval": {"path": "b.jsonl"}}
    found = prepared(settings)
    assert shown(found.eval[""]) == ["q>b1b1", "q>b2b2"]
    write("own_maps.py", MAPS.replace("* 2", "* 3"))
    assert prepared(settings).content_hash != found.content_hash


def test_rows_that_a_map_fails_at_stop_the_run_or_are_left_out_as_bad_rows_are(files, write):
    write(
        "own_maps.py", "def broken(row):\n    return row if row['completion'] > 'a2' else 1 / 0\n"
    )
    settings = {"path": "a.jsonl", "map": "python:own_maps.py:broken"}
    with pytest.raises(UserError, match=r"(?s)a\.jsonl has 2 bad rows:.*jsonl:1: python:own_maps"):
        prepared(settings)
    found = prepared({**settings, "on_bad_row": "drop"})
    assert shown(found.train) == ["q>a3", "q>a4"]
    assert found.train_counts.dropped == {"could not be read": 2}
