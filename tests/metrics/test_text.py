"""Metrics of plain text, of numbers and of patterns, against values worked out by hand."""

import pytest

from luthier import patterns
from luthier.errors import UserError
from luthier.metrics import Prediction, parse_metrics, prepare_metrics


def measured(entry, prediction, reference):
    (metric,) = parse_metrics([entry])
    return metric.score([Prediction(prediction, reference)])[metric.name]


@pytest.mark.parametrize(
    ("entry", "prediction", "reference", "value"),
    [
        ("exact_match", '{"a": 1}\n', ' {"a": 1}', 1),
        ("exact_match", "Yes", "yes", 0),
        ("exact_match", "a  b", "a b", 0),
        ({"exact_match": {"ignore": ["case"]}}, "STRASSE", "Straße", 1),
        ({"exact_match": {"ignore": ["case"]}}, "Yes.", "yes", 0),
        ({"exact_match": {"ignore": ["space"]}}, " a \n b", "a b", 1),
        ({"exact_match": {"ignore": ["punctuation"]}}, "«Yes» — …", "Yes!", 1),
        ({"exact_match": {"ignore": ["articles", "space"]}}, "the end of a day", "end of day", 1),
        ({"exact_match": {"ignore": ["articles"]}}, "theatre", "atre", 0),
        ("normalised_match", " The  END. ", "the end", 1),
        ("normalised_match", "the ending", "the end", 0),
        ("contains", "It is Paris, I think.", "Paris", 1),
        ("contains", "It is paris.", "Paris", 0),
        ({"contains": {"ignore": ["case"]}}, "It is paris.", "Paris", 1),
        ("token_f1", "The cat sat", "a cat sat down.", 0.8),
        ("token_f1", "cat cat", "cat", 2 / 3),
        ("token_f1", "", "", 1),
        ("token_f1", "the", "cat", 0),
        ("length", " three small words\n", "", 3),
        ({"length": {"unit": "characters"}}, " abc\n", "", 3),
    ],
    ids=lambda value: str(value)[:40],
)
def test_text(entry, prediction, reference, value):
    assert measured(entry, prediction, reference) == pytest.approx(value)


def test_exact_match_ignores_surrounding_white_space_alone():
    pairs = [("a ", "a"), ("b", "B"), ("", " "), ("x y", "x  y"), ("\n1", "1"), ("2", "3")]
    (metric,) = parse_metrics(["exact_match"])
    found = metric.measure([Prediction(*pair) for pair in pairs])
    assert found.values == {"exact_match": 3 / 6}
    assert found.rows == {"exact_match": [1, 0, 1, 0, 1, 0]}


@pytest.mark.parametrize(
    ("said", "wanted", "value"),
    [
        ("so 40 + 2 = 42\n#### 42", "#### 42", 1),
        ("#### 42. I checked it 3 times", "#### 42", 1),
        ("#### 41\n#### 42", "42", 1),
        ("#### none of the 42", "42", 1),
        ("the answer is $1,234.50.", "#### 1234.5", 1),
        ("42.0", "42", 1),
        ("it falls to -3", "-3", 1),
        ("it falls to −3", "-3", 1),
        ("-$5", "-5", 1),
        ("10-5", "5", 1),
        ("(2)-3", "3", 1),
        ("10 - -5", "-5", 1),
        ("1,2", "2", 1),
        ("1,23456", "23456", 1),
        ("version 1.2.3", "3", 1),
        (".5", "0.5", 1),
        ("2e3", "2000", 1),
        ("1e99999999999", "7", 0),
        ("42km", "42", 1),
        ("none", "42", 0),
        ("", "42", 0),
        ("9" * 6000, "42", 0),
        ("0.1", "0.10000000000000000001", 0),
    ],
    ids=lambda value: str(value)[:25],
)
def test_number(said, wanted, value):
    assert measured("number", said, wanted) == value


@pytest.mark.parametrize(
    ("settings", "said", "value"),
    [
        ({"tolerance": 0.01}, "3.14", 1),
        ({"tolerance": 0.001}, "3.14", 0),
        ({"tolerance": 0.01}, "pi", 0),
        ({"marker": "A:"}, "A: 3.1416, not 4", 1),
        ({"marker": None}, "#### 4 is wrong, 3.1416", 1),
    ],
    ids=["near", "far", "no number", "own marker", "no marker"],
)
def test_settings_of_number(settings, said, value):
    assert measured({"number": settings}, said, "3.1416") == value


@pytest.mark.parametrize(
    ("settings", "said", "wanted", "value"),
    [
        ({"pattern": r"\d"}, "a1", "", 1),
        ({"pattern": r"\d"}, "a", "", 0),
        ({"pattern": "#### (.+)", "group": 1}, "so #### 42 ", "because\n#### 42", 1),
        ({"pattern": "#### (.+)", "group": 1}, "#### 41", "#### 42", 0),
        ({"pattern": "#### (.+)", "group": 1}, "42", "#### 42", 0),
        ({"pattern": "(?P<x>[a-z])", "group": "x"}, "1a", "a", 1),
        ({"pattern": "(a)", "group": "1"}, "a", "a", 1),
        ({"pattern": "[a-z]+", "group": 0}, "1abc2", "abc", 1),
        ({"pattern": "<a>(.*?)</a>", "group": 1, "extract": "reply"}, "<a> 42 </a>", "42", 1),
        ({"pattern": "(.)", "group": 1, "match": "last"}, "ab", "cb", 1),
        ({"pattern": "(.)", "group": 1, "match": "first"}, "ab", "cb", 0),
        ({"pattern": "(.+)", "group": 1, "ignore": ["case"]}, "A", "a", 1),
        ({"pattern": "x|(a)", "group": 1}, "x", "a", 0),
    ],
    ids=["found", "not found", "same", "other", "no match", "named", "number as text", "whole",
         "plain reference", "last", "first", "case", "group without part"],
)  # fmt: skip
def test_regex(settings, said, wanted, value):
    assert measured({"regex": settings}, said, wanted) == value


@pytest.mark.parametrize("settings", [{}, {"group": 0, "extract": "reply"}], ids=["search", "all"])
def test_a_search_that_would_take_years_ends(settings, monkeypatch):
    monkeypatch.setattr(patterns, "SEARCH_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"metric regex: .*takes more than 0\.1 seconds in: 'aaaa"):
        measured({"regex": {"pattern": "(a|aa)+$", **settings}}, "a" * 60 + "b", "a")


@pytest.mark.parametrize(
    ("entry", "reference", "words"),
    [
        ("number", "forty-two", "1 of 3 references cannot be compared with. The first, row 1, "
         "has no number: 'forty-two'"),
        ({"regex": {"pattern": "#(.)", "group": 1}}, "2", "row 1, has no match of '#(.)': '2'"),
        ("contains", " ", "row 1, is empty and stands in every reply"),
        ("json_f1", "42", "row 1, is no JSON object or list: '42'"),
        ("rouge1", "猫在垫子上", "row 1, has none of the letters a to z"),
        ({"accuracy": {"labels": ["1", "up", "[3]"]}}, "upp", "Did you mean up?"),
    ],
    ids=["number", "regex", "contains", "json", "rouge", "label"],
)  # fmt: skip
def test_a_reference_that_cannot_be_compared_with_is_named_before_training(entry, reference, words):
    good = {"number": "1", "regex": "#1", "json_f1": "[3]"}
    name = entry if isinstance(entry, str) else next(iter(entry))
    references = [good.get(name, "1"), reference, good.get(name, "1")]
    with pytest.raises(UserError) as caught:
        prepare_metrics(parse_metrics([entry]), references)
    assert words in str(caught.value)
    assert str(caught.value).startswith("metric ")


@pytest.mark.parametrize(
    "entry",
    ["number", {"regex": {"pattern": "#(.)", "group": 1}}, "json_f1"],
    ids=["number", "regex", "json"],
)
def test_such_a_reference_is_never_scored_as_a_miss(entry):
    (metric,) = parse_metrics([entry])
    with pytest.raises(UserError, match="the reference"):
        metric.score([Prediction("x", "x")])
