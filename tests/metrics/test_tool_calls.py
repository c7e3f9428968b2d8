"""Metrics of tool calls against scores worked out by hand."""

import json

import pytest

from luthier.errors import UserError
from luthier.metrics import Prediction, parse_metrics, score_replies


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def reply(made, expected):
    return Prediction("", "", has_reference=False, calls=(made, expected))


def score(metric, *pairs):
    return score_replies(parse_metrics([metric]), [reply(*pair) for pair in pairs])


RAIN, SUN = call("weather", city="Rome", days=2), call("weather", city="Oslo", days=1)
TIME = call("time", zone="UTC")

ACCURACY = {
    # made, expected -> right, names, order, number
    "equal": ([RAIN], [RAIN], (1, 1, 1, 1)),
    "no call where none should be": ([], [], (1, 1, 1, 1)),
    "a call that should not be": ([RAIN], [], (0, 0, 0, 0)),
    "no call where one should be": ([], [RAIN], (0, 0, 0, 0)),
    "another name": ([call("clima", city="Rome", days=2)], [RAIN], (0, 0, 0, 1)),
    "another value": ([call("weather", city="Rome", days=3)], [RAIN], (0, 1, 1, 1)),
    "an argument less": ([call("weather", city="Rome")], [RAIN], (0, 1, 1, 1)),
    "an argument more": ([call("weather", city="Rome", days=2, unit="C")], [RAIN], (0, 1, 1, 1)),
    "keys in another order": ([call("weather", days=2, city="Rome")], [RAIN], (1, 1, 1, 1)),
    "1 and 1.0": ([call("weather", city="Rome", days=2.0)], [RAIN], (1, 1, 1, 1)),
    "1 and true": ([call("f", a=True)], [call("f", a=1)], (0, 1, 1, 1)),
    "1 and its text": ([call("f", a="1")], [call("f", a=1)], (0, 1, 1, 1)),
    "a list in another order": ([call("f", a=[2, 1])], [call("f", a=[1, 2])], (0, 1, 1, 1)),
    "nested": ([call("f", a={"b": [1, {"c": None}]})], [call("f", a={"b": [1.0, {"c": None}]})],
               (1, 1, 1, 1)),
    "null and nothing": ([call("f", a=None)], [call("f")], (0, 1, 1, 1)),
    "parallel in another order": ([SUN, RAIN], [RAIN, SUN], (1, 1, 1, 1)),
    "tools in another order": ([TIME, RAIN], [RAIN, TIME], (1, 1, 0, 1)),
    "one twice": ([RAIN, RAIN], [RAIN], (0, 0, 0, 0)),
    "one twice in place of two": ([RAIN, RAIN], [RAIN, SUN], (0, 1, 1, 1)),
    "a call more": ([RAIN, TIME], [RAIN], (0, 0, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize(("made", "expected", "shares"), ACCURACY.values(), ids=ACCURACY)
def test_tool_call_accuracy(made, expected, shares):
    found = score("tool_call_accuracy", (made, expected)).values
    names = (
        "tool_call_accuracy",
        *(f"tool_call_accuracy/{n}" for n in ("name", "order", "number")),
    )
    assert found == dict(zip(names, shares, strict=True))


def test_the_order_of_calls_may_count():
    ordered = {"tool_call_accuracy": {"ordered": True}}
    assert score(ordered, ([SUN, RAIN], [RAIN, SUN])).values["tool_call_accuracy"] == 0
    assert score(ordered, ([RAIN, SUN], [RAIN, SUN])).values["tool_call_accuracy"] == 1


def test_texts_may_differ_as_the_leaderboard_lets_them():
    pair = ([call("f", city="new york,  NY")], [call("f", city="New York NY")])
    assert score("tool_call_accuracy", pair).values["tool_call_accuracy"] == 0
    lenient = {"tool_call_accuracy": {"ignore": ["case", "space", "punctuation"]}}
    assert score(lenient, pair).values["tool_call_accuracy"] == 1


FORMS = {
    "text of an object": {"function": {"name": "f", "arguments": '{"a": 1}'}},
    "without a wrapper": {"name": "f", "arguments": {"a": 1}},
}
NO_ARGUMENTS = [{}, None, "", "{}"]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_calls_of_every_form_are_read(form):
    assert score("tool_call_accuracy", ([form], [call("f", a=1)])).values["tool_call_accuracy"] == 1


@pytest.mark.parametrize("arguments", NO_ARGUMENTS, ids=repr)
def test_no_arguments_are_equal(arguments):
    made = {"function": {"name": "f", "arguments": arguments}}
    assert score("tool_arguments_f1", ([made], [call("f")])).values["tool_arguments_f1"] == 1


NO_JSON = {"words": "no json", "deep": "[" * 100_000, "nan": '{"a": NaN}'}


@pytest.mark.parametrize("text", NO_JSON.values(), ids=NO_JSON)
def test_arguments_that_are_no_json_are_wrong_and_no_crash(text):
    made = {"function": {"name": "f", "arguments": text}}
    found = score("tool_call_accuracy", ([made], [call("f", a=1)])).values
    assert (found["tool_call_accuracy"], found["tool_call_accuracy/name"]) == (0, 1)


NAMES = {
    "equal": ([RAIN], [RAIN], 1),
    "none": ([], [], 1),
    "one of two": ([RAIN], [RAIN, TIME], 2 / 3),
    "each as often": ([RAIN, RAIN], [RAIN], 2 / 3),
    "none of them": ([TIME], [RAIN], 0),
    "needless": ([TIME], [], 0),
}


@pytest.mark.parametrize(("made", "expected", "value"), NAMES.values(), ids=NAMES)
def test_tool_name_f1(made, expected, value):
    assert score("tool_name_f1", (made, expected)).values == {"tool_name_f1": pytest.approx(value)}


ARGUMENTS = {
    # made, expected -> F1 of arguments, F1 of their keys
    "equal": ([RAIN], [RAIN], 1, 1),
    "none": ([], [], 1, 1),
    "one value of two": ([call("weather", city="Rome", days=3)], [RAIN], 1 / 2, 1),
    "an argument less": ([call("weather", city="Rome")], [RAIN], 2 / 3, 2 / 3),
    "an argument more": ([call("weather", city="Rome", days=2, unit="C")], [RAIN], 4 / 5, 4 / 5),
    "another key": ([call("weather", town="Rome", days=2)], [RAIN], 1 / 2, 1 / 2),
    "the same arguments of another tool": ([call("w", city="Rome", days=2)], [RAIN], 0, 0),
    "parallel calls in another order": ([SUN, RAIN], [RAIN, SUN], 1, 1),
    # Rome with 1 and Oslo with 2: each call has one of its two values right.
    "values of two calls exchanged": (
        [call("weather", city="Rome", days=1), call("weather", city="Oslo", days=2)],
        [RAIN, SUN], 1 / 2, 1),
    "a call missing": ([RAIN], [RAIN, SUN], 2 / 3, 2 / 3),
    "nested by leaves": (
        [call("f", a={"b": 1, "c": 2})], [call("f", a={"b": 1, "c": 3})], 1 / 2, 1),
    "needless": ([RAIN], [], 0, 0),
}  # fmt: skip


@pytest.mark.parametrize(("made", "expected", "value", "keys"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_tool_arguments_f1(made, expected, value, keys):
    found = score("tool_arguments_f1", (made, expected)).values
    assert found == {
        "tool_arguments_f1": pytest.approx(value), "tool_arguments_f1/keys": pytest.approx(keys)
    }  # fmt: skip


def test_many_calls_of_one_tool_are_matched_without_trying_all():
    calls = [call("f", a=n, b=n) for n in range(40)]
    assert score("tool_arguments_f1", (calls[::-1], calls)).values["tool_arguments_f1"] == 1


def test_tool_use_accuracy():
    found = score("tool_use_accuracy", ([RAIN], [TIME]), ([], [TIME]), ([], []), ([RAIN], []),
                  ([], []))  # fmt: skip
    assert found.values == pytest.approx({
        "tool_use_accuracy": 3 / 5, "tool_use_accuracy/relevance": 1 / 2,
        "tool_use_accuracy/irrelevance": 2 / 3,
    })  # fmt: skip
    # Without such rows a share says nothing.
    assert set(score("tool_use_accuracy", ([], [TIME])).values) == {
        "tool_use_accuracy", "tool_use_accuracy/relevance"
    }  # fmt: skip


def test_each_metric_scores_the_replies_that_it_can():
    metrics = parse_metrics(["exact_match", "tool_call_accuracy", "tool_use_accuracy"])
    replies = [
        Prediction("a", "a"),
        reply([], [RAIN]),
        Prediction("b", "c", calls=([RAIN], [])),
        reply([RAIN], [RAIN]),
    ]
    found = score_replies(metrics, replies)
    assert found.rows["exact_match"] == [1, None, 0, None]
    assert found.rows["tool_call_accuracy"] == [None, 0, 0, 1]
    assert found.values["exact_match"] == 1 / 2
    assert found.values["tool_call_accuracy"] == pytest.approx(1 / 3)
    assert len(found.statistics["tool_use_accuracy/relevance"].rows) == 4


def test_replies_of_one_row_are_drawn_together():
    from luthier.metrics.bootstrap import bootstrap_interval

    metrics = parse_metrics(["tool_call_accuracy", "tool_use_accuracy"])
    pairs = [([RAIN], [RAIN]), ([TIME], [RAIN])] * 8
    alone = score_replies(metrics, [reply(*pair) for pair in pairs])
    # Rows of eight equal replies: there are two to draw from, and not sixteen.
    rows = [number % 2 for number in range(len(pairs))]
    together = alone.by_row(rows)
    assert together.values == alone.values and together.rows == alone.rows
    for name in ("tool_call_accuracy", "tool_use_accuracy/relevance"):
        wide, narrow = (bootstrap_interval(each.sample(name)) for each in (together, alone))
        assert wide.value == narrow.value == alone.values[name]
    assert len(together.statistics["tool_call_accuracy"].rows) == 2
    wide = bootstrap_interval(together.sample("tool_call_accuracy"))
    narrow = bootstrap_interval(alone.sample("tool_call_accuracy"))
    assert (wide.low, wide.high) == (0, 1) and 0.2 < narrow.low < narrow.high < 0.8
    assert alone.by_row(range(len(pairs))) is alone


def test_without_turns_that_offer_tools_there_is_nothing_to_score():
    with pytest.raises(UserError, match="metric tool_name_f1: there are no replies to score"):
        score_replies(parse_metrics(["tool_name_f1"]), [Prediction("a", "a")])


def test_scores_are_json():
    found = score("tool_use_accuracy", ([RAIN], [TIME]))
    assert json.loads(json.dumps(found.values)) == found.values
