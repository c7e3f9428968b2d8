"""JSON fields and labels, counted by hand."""

import pytest

from luthier.errors import UserError
from luthier.metrics import Prediction, parse_metrics, prepare_metrics


@pytest.mark.parametrize(
    ("settings", "said", "wanted", "value"),
    [
        ({}, '{"b": 2, "a": 1}', '{"a": 1, "b": 2}', 1),
        ({}, '{"a": 1, "b": 3}', '{"a": 1, "b": 2}', 0.5),
        ({}, '{"a": 1}', '{"a": 1, "b": 2}', 2 / 3),
        ({}, '{"a": 1, "b": 2, "c": 3}', '{"a": 1}', 0.5),
        ({}, '{"a": 1.0}', '{"a": 1}', 1),
        ({}, '{"a": true}', '{"a": 1}', 0),
        ({}, '{"a": "1"}', '{"a": 1}', 0),
        ({}, '{"a": null}', '{"a": false}', 0),
        ({}, '{"a": {"b": [1, 2]}}', '{"a": {"b": [1, 3]}}', 0.5),
        ({}, "[1, 2]", "[2, 1]", 0),
        ({"lists": "unordered"}, "[1, 2]", "[2, 1]", 1),
        ({"lists": "unordered"}, "[1, 1]", "[1, 2]", 0.5),
        ({}, "{}", "{}", 1),
        ({}, "{}", "[]", 0),
        ({}, '{"a": []}', '{"a": {}}', 0),
        ({}, '{"a": "x "}', '{"a": "X"}', 0),
        ({"ignore": ["case"]}, '{"a": "x "}', '{"a": "X"}', 1),
        ({}, '```json\n{"a": 1}\n```', '{"a": 1}', 0),
        ({"fences": True}, '```json\n{"a": 1}\n```\n', '{"a": 1}', 1),
        ({}, 'Here: {"a": 1}', '{"a": 1}', 0),
        ({}, "", '{"a": 1}', 0),
    ],
    ids=["order of keys", "one wrong", "one missing", "two too many", "1.0 is 1", "true is not 1",
         "text is not number", "null is not false", "nested", "order of items", "unordered",
         "unordered counts", "empty objects", "empty kinds", "empty within", "case", "case ignored",
         "fence", "fence allowed", "talk", "nothing"],
)  # fmt: skip
def test_json_f1(settings, said, wanted, value):
    (metric,) = parse_metrics([{"json_f1": settings}])
    assert metric.score([Prediction(said, wanted)])["json_f1"] == pytest.approx(value)


def test_json_f1_is_the_mean_over_replies_with_the_share_of_valid_ones():
    (metric,) = parse_metrics(["json_f1"])
    wanted = '{"a": 1, "b": 2}'
    replies = [Prediction(said, wanted) for said in (wanted, '{"a": 1}', "no", '{"a"')]
    found = metric.measure(replies)
    assert found.values == {"json_f1": pytest.approx((1 + 2 / 3) / 4), "json_f1/valid": 0.5}
    assert found.rows["json_f1"] == [1, pytest.approx(2 / 3), 0, 0]
    assert found.rows["json_f1/valid"] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (' {"a": [1]}\n', 1),
        ("[]", 1),
        ("42", 0),
        ('"text"', 0),
        ("{'a': 1}", 0),
        ('{"a": NaN}', 0),
        ('{"a": Infinity}', 0),
        ('{"a": 1} and', 0),
        ("[" * 100_000, 0),
        ("[" + "9" * 5000 + "]", 0),
        ("", 0),
    ],
    ids=["object", "list", "number", "text", "Python", "NaN", "Infinity", "more", "stuck",
         "too many digits", "nothing"],
)  # fmt: skip
def test_json_valid(text, valid):
    (metric,) = parse_metrics(["json_valid"])
    assert metric.score([Prediction(text, "")]) == {"json_valid": valid}


@pytest.mark.parametrize(
    ("settings", "said", "value"),
    [
        ({}, "Card_Arrival.", 1),
        ({}, "card arrival", 1),
        ({}, "card", 0),
        ({}, "The label is card_arrival.", 0),
        ({"anywhere": True}, "The label is card_arrival.", 1),
        ({"anywhere": True}, "card_arrival or top_up", 0),
        ({"anywhere": True}, "scard arrivals", 0),
    ],
    ids=["written otherwise", "words", "another label", "among words", "anywhere", "two",
         "not whole words"],
)  # fmt: skip
def test_accuracy(settings, said, value):
    (metric,) = parse_metrics(
        [{"accuracy": {"labels": ["card", "card_arrival", "top_up"]} | settings}]
    )
    assert metric.score([Prediction(said, "card_arrival")]) == {"accuracy": value}


def test_macro_f1_counts_each_label_the_same():
    # a: 1 right of 1 said and 2 wanted, 2/3; b: 1 right of 2 said and 1 wanted, 2/3; c: missed, 0.
    replies = [
        Prediction("a", "a"),
        Prediction("b", "a"),
        Prediction("b", "b"),
        Prediction("?", "c"),
    ]
    (metric,) = parse_metrics(["macro_f1"])
    assert metric.score(replies) == {"macro_f1": pytest.approx(4 / 9)}


def test_macro_f1_leaves_out_labels_that_nobody_named():
    (metric,) = parse_metrics([{"macro_f1": {"labels": ["a", "b", "c"]}}])
    assert metric.score([Prediction("a", "a")]) == {"macro_f1": 1}


def test_labels_that_would_be_read_as_one_are_refused():
    with pytest.raises(UserError, match="'Top up' and 'top_up' differ by case"):
        prepare_metrics(parse_metrics(["accuracy"]), ["Top up", "top_up"])
