"""Fingerprints: which examples are equal, and which of equal ones stay."""

import json
import subprocess
import sys

import numpy as np
import pytest

from luthier.data.fingerprints import (
    canonical_json,
    fingerprint,
    is_first_occurrence,
    normalised_fingerprint,
    pack_fingerprints,
)


def said(text, **more):
    return {"messages": [{"role": "user", "content": text, **more}]}


def test_the_canonical_json_gives_the_example_back():
    example = {**said("Grüße \ud800 \n"), "tools": [{"b": 1.5, "a": None}]}
    text, print_ = canonical_json(example)
    assert json.loads(text) == example
    assert text.startswith(b'{"messages":[{"content":"Gr\\u00fc')
    assert text.isascii()
    assert print_ == fingerprint(example)
    assert len(print_) == 16


def test_the_fingerprint_is_the_same_in_any_process():
    code = "from luthier.data.fingerprints import *; print(fingerprint({'text': 'a'}).hex())"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == fingerprint({"text": "a"}).hex()


SAME = [
    ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}),
]
DIFFERENT = [
    (said("a"), said("b")),
    (said("a"), {**said("a"), "tools": [{}]}),
    (said("a"), said("a", train=False)),
    (said("1"), said(1)),
    ({"text": "a", "label": True}, {"text": "a", "label": False}),
    ({"text": "a", "label": 1}, {"text": "a", "label": "1"}),
    ({"chosen": "a", "rejected": "b"}, {"chosen": "b", "rejected": "a"}),
    ({"tokens": ["a", "b"]}, {"tokens": ["a b"]}),
    ({"tokens": ["a", ""]}, {"tokens": ["a"]}),
    ({"a": [["x"], ["y"]]}, {"a": [["x", "y"]]}),
]
ALIKE = [
    (said("Hello  World"), said("hello world")),
    (said(" hello\n\tworld "), said("hello world")),
    (said("STRASSE"), said("straße")),
    (said("ﬁne ①"), said("fine 1")),
    (said("e\u0301"), said("\u00e9")),
    (said("a\u00a0b"), said("a b")),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_order_of_keys_does_not_count(one, other):
    assert fingerprint(one) == fingerprint(other)
    assert normalised_fingerprint(one) == normalised_fingerprint(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_all_other_content_counts(one, other):
    assert fingerprint(one) != fingerprint(other)
    assert normalised_fingerprint(one) != normalised_fingerprint(other)


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_case_white_space_and_unicode_form_count_for_exact_equality_only(one, other):
    assert fingerprint(one) != fingerprint(other)
    assert normalised_fingerprint(one) == normalised_fingerprint(other)


def test_half_a_surrogate_pair_has_a_fingerprint():
    assert fingerprint(said("\ud800")) != fingerprint(said("\ud801"))
    assert normalised_fingerprint(said("\ud800")) != normalised_fingerprint(said("\ud801"))


def test_the_first_of_equal_rows_stays():
    prints = pack_fingerprints(fingerprint(said(text)) for text in "abacbad")
    assert is_first_occurrence(prints).tolist() == [True, True, False, True, False, False, True]


def test_zero_bytes_at_the_end_count():
    prints = pack_fingerprints(
        [b"a" * 15 + b"\0", b"a" * 15 + b"b", b"a" * 14 + b"\0\0", b"\0" * 16]
    )
    assert is_first_occurrence(prints).all()
    assert (
        is_first_occurrence(np.concatenate([prints, prints])).tolist() == [True] * 4 + [False] * 4
    )


def test_no_rows():
    assert is_first_occurrence(pack_fingerprints([])).tolist() == []
