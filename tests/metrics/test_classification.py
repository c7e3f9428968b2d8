"""Scores of classes, numbers and entities, against sums that were done by hand."""

import numpy as np
import pytest

from luthier.metrics.classification import (
    are_entity_tags,
    entity_scores,
    find_entities,
    multi_label_scores,
    regression_scores,
    single_label_scores,
)


def test_single_label():
    # Class 0: 1 right of 2 said and 1 there, F1 2/3. Class 1: 1 of 1 and 2, F1 2/3. Class 2: 0.
    scores = single_label_scores(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 3]), 5)
    assert scores["accuracy"] == scores["micro_f1"] == 0.5
    # Class 3: 0 of 1 there. Class 4 is nowhere and counts nothing.
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0 + 0) / 4)


def test_multi_label():
    said = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], bool)
    right = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], bool)
    scores = multi_label_scores(said, right)
    assert scores["accuracy"] == pytest.approx(1 / 3)
    # Class 0: TP 1, FP 1, FN 1. Class 1: TP 1, FP 0, FN 1. Class 2 is nowhere.
    assert scores["macro_f1"] == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert scores["micro_f1"] == pytest.approx(4 / 7)


def test_numbers():
    scores = regression_scores(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0]))
    assert scores["mae"] == 1.0
    assert scores["rmse"] == pytest.approx((5 / 3) ** 0.5)
    # Deviations -4/3, -1/3, 5/3 and -1, 1, 0: 1 / sqrt(14/3 * 2).
    assert scores["pearson"] == pytest.approx(1 / (28 / 3) ** 0.5)
    assert regression_scores(np.ones(3), np.array([1.0, 2.0, 3.0]))["pearson"] == 0.0


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-PER I-PER O", [("PER", 1, 2)]),
        ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("I-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),
        ("O I-PER", [("PER", 1, 1)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 0), ("LOC", 1, 2)]),
        ("B-PER I-PER E-PER S-PER", [("PER", 0, 2), ("PER", 3, 3)]),
        ("E-PER E-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("B-A-B I-A-B", [("A-B", 0, 1)]),
        ("O O", []),
        ("", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_entities_begin_and_end_as_conlleval_has_it(tags, found):
    assert list(find_entities(tags.split())) == found


def test_the_example_of_seqeval():
    # https://github.com/chakki-works/seqeval#usage: f1 0.5, accuracy 0.8.
    right = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    said = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert entity_scores(said, right) == {
        "entity_precision": 0.5, "entity_recall": 0.5, "entity_f1": 0.5
    }  # fmt: skip


def test_nothing_to_find_and_nothing_found():
    assert set(entity_scores([["O"]], [["O"]]).values()) == {0.0}
    assert entity_scores([["O"]], [["B-A"]])["entity_recall"] == 0.0


@pytest.mark.parametrize(
    ("tags", "expected"),
    [(["O", "B-PER", "I-PER"], True), (["B-PER"], True), (["O"], False), (["NN", "VB"], False),
     (["O", "B"], False), (["O", "B-PER", "X-PER"], False), (["0", "1"], False)],
)  # fmt: skip
def test_what_tags_of_entities_look_like(tags, expected):
    assert are_entity_tags(tags) is expected
