"""The hash of what trains: it changes with token ids, labels and their order, and only then."""

import hashlib
import struct

import numpy as np
import pytest
from data_material import pair, prepared, replies

from luthier.data.encoders import hashes_of
from luthier.data.store import Ragged


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
    lists, arrays = hashes_of({"a": rows, "b": [4, 5, 6]}), hashes_of({"b": [4, 5, 6], "a": flat})
    assert lists.tolist() == arrays.tolist()
    assert len(set(lists.tolist())) == 3
    moved = hashes_of({"a": [[1, 2], [3]], "b": [[3], [1, 2]]})
    assert len({*moved.tolist(), *hashes_of({"a": [[1, 2, 3]], "b": [[]]}).tolist()}) == 3
    assert hashes_of({"a": [], "b": []}).shape == (0,)


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
