"""Rewards as TRL calls them, with their mistakes in words."""

import pickle

import pytest

from luthier.errors import UserError
from luthier.metrics.rewards import check_rewards, parse_rewards, prepare_rewards, try_rewards


def said(text):
    """A completion of a conversation."""
    return [{"role": "assistant", "content": text}]


def rewarded(entry, completions, **columns):
    ((reward,), _) = parse_rewards([entry])
    return reward(prompts=["q"] * len(completions), completions=completions, **columns)


@pytest.mark.parametrize(
    ("entry", "completion", "reference", "value"),
    [
        ("exact_match", "42\n", "42", 1),
        ("exact_match", "The 42", "42", 0),
        ("normalised_match", "Forty two.", "forty two", 1),
        ("contains", "It is 42.", "42", 1),
        ("number", "40 + 2\n#### 42", "#### 42", 1),
        ("number", "it is 42.0", 42, 1),
        ("json_f1", '{"a": 1, "b": 3}', '{"a": 1, "b": 2}', 0.5),
        ("json_f1", '{"a": "é"}', {"a": "é"}, 1),
        ({"regex": {"pattern": "<a>(.*)</a>", "group": 1, "extract": "reply"}}, "<a>x</a>", "x", 1),
        ("token_f1", "the cat sat", "cat sat down", 0.8),
        ("exact_match", "42", None, None),
    ],
    ids=["exact", "not exact", "normalised", "contains", "number", "a number in the column",
         "fields", "an object in the column", "regex", "words", "no reference in this row"],
)  # fmt: skip
@pytest.mark.parametrize("form", [str, said], ids=["text", "conversation"])
def test_rewards_that_compare(entry, completion, reference, value, form):
    found = rewarded(entry, [form(completion)], reference=[reference], trainer_state=None)
    assert found == [value if value is None else pytest.approx(value)]


@pytest.mark.parametrize(
    ("entry", "completion", "value"),
    [
        ("json_valid", "{}", 1),
        ("json_valid", "{", 0),
        ({"regex": {"pattern": r"\d"}}, "a1", 1),
        ("format", "<think>a\nb</think>\n<answer>c</answer>\n", 1),
        ("format", "<think>a</think> so <answer>c</answer>", 0),
        ("format", "<answer>c</answer><think>a</think>", 0),
        ("format", "<think>a</think><answer>c</answer> more", 0),
        ("format", "<think>a<think>b</think><answer>c</answer>", 0),
        ("format", "<think>a</think><answer>c</answer><answer>d</answer>", 0),
        ("format", "<think>a</think>", 0),
        ({"format": {"rest": True}}, "<think>a</think><answer>c</answer> more", 1),
        ({"format": {"rest": True}}, "<think>a</think><answer>c</answer></answer>", 0),
        ({"format": {"tags": ["think"], "rest": True}}, "<think>a</think>So it is 3 < 4.", 1),
        ({"format": {"tags": ["think"], "rest": True, "opened": True}}, "a</think>So.", 1),
        ({"format": {"tags": ["a.b"]}}, "<axb></axb>", 0),
        ({"length": {"target": 4, "unit": "words"}}, "a b c d", 0),
        ({"length": {"target": 4, "unit": "words"}}, "a b c", -0.25),
        ({"length": {"target": 4, "unit": "words"}}, "a b c d e f", -0.5),
        ({"length": {"target": 4, "unit": "words"}}, "a " * 100, -1),
        ({"length": {"target": 4, "slack": 2, "unit": "words"}}, "a b c", -0.5),
        ({"length": {"max": 4, "unit": "words"}}, "a", 0),
        ({"length": {"max": 4, "unit": "words"}}, "a b c d e", -0.25),
        ({"length": {"max": 4, "slack": 2, "unit": "words"}}, "a b c d e", -0.5),
        ({"length": {"max": 4, "unit": "characters"}}, "abcdef", -0.5),
        ({"length": {"max": 2}}, "any", -0.5),
    ],
)
def test_rewards_of_the_completion_alone(entry, completion, value):
    found = rewarded(entry, [said(completion)], completion_ids=[[5, 6, 7]])
    assert found == [pytest.approx(value)]


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ([], ""),
        ([{"role": "assistant", "content": None, "tool_calls": []}], ""),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}], "ab"),
        ([*said("x"), {"role": "tool", "content": "42"}, *said("ab")], "ab"),
        ([{"content": "ab"}], "ab"),
    ],
    ids=["no message", "only a call", "parts", "after a tool", "no role"],
)
def test_the_text_of_a_conversation_is_its_last_reply(completion, text):
    assert rewarded("exact_match", [completion], reference=[text]) == [1]
    assert rewarded("exact_match", [completion], reference=["?"]) == [0]


def test_names_and_weights_are_what_trl_logs_and_multiplies():
    rewards, weights = parse_rewards(
        [
            {"number": {"reference": "answer", "weight": 2, "tolerance": 0.5}},
            {"format": {"name": "tags"}},
            {"length": {"max": 9, "weight": -0.5}},
        ]
    )
    assert [reward.__name__ for reward in rewards] == ["number", "tags", "length"]
    assert weights == [2, 1, -0.5]
    assert pickle.loads(pickle.dumps(rewards)) == rewards
    assert rewards[0](prompts=["q"], completions=["1.4"], answer=["1"]) == [1]


OWN = """
def polite(completions, **columns): return [float("please" in text) for text in completions]
def equal(completions, answer): return [a == b for a, b in zip(completions, answer)]
def scaled(prompts, completions, completion_ids, scale, **columns): return [scale, None]
def logs(completions, log_metric, log_extra, **columns):
    log_metric("n", 1.0); log_extra("x", [1, 2]); return [0, 0]
async def later(completions, **columns): return [1.0 for _ in completions]
def nan(completions, **columns): return [1.0, float("nan")]
def text(completions, **columns): return ["1", "2"]
def few(completions, **columns): return [1.0]
def single(completions, **columns): return 1.0
def fails(completions, **columns): return [columns["absent"]]
def lacks(completions, solution, **columns): return [0, 0]
async def late_nan(completions, **columns): return [float("inf")] * 2
def array(completions, **columns):
    import numpy as np
    return np.array([0.5, 1], dtype=np.float32)
"""

TRIAL = (["q", "r"], ["please", "no"], {"answer": ["please", "yes"], "completion_ids": [[1], [2]]})


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ("python:mine.polite", [1, 0]),
        ("python:mine.equal", [1, 0]),
        ({"python:mine.scaled": {"scale": 3, "weight": 2}}, [3, None]),
        ("python:mine.logs", [0, 0]),
        ("python:mine.later", [1, 1]),
        ("python:mine.array", [0.5, 1]),
    ],
    ids=["all columns", "only what it takes", "settings and None", "logs", "async", "array"],
)
def test_a_function_of_ones_own(entry, values, module):
    module("mine", OWN)
    rewards, _ = parse_rewards([entry])
    assert try_rewards(rewards, *TRIAL) == [values]
    assert try_rewards(pickle.loads(pickle.dumps(rewards)), *TRIAL) == [values]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nan", "reward nan: the reward of completion 1 is nan. Return a finite number, or None"),
        ("text", "reward text: the reward of completion 0 is '1'."),
        ("few", "reward few: it returned 1 numbers for 2 completions."),
        ("single", "reward single: it returned 1.0, and must return a list"),
        ("fails", "reward fails: python:mine.fails failed: KeyError: 'absent' ("),
        ("lacks", "python:mine.lacks needs solution, and there is no such column or setting."),
        ("late_nan", "the reward of completion 0 is inf."),
    ],
)
def test_a_function_that_does_not_serve(name, words, module):
    module("mine", OWN)
    rewards, _ = parse_rewards([f"python:mine.{name}"])
    with pytest.raises(UserError) as caught:
        try_rewards(rewards, *TRIAL)
    assert words in str(caught.value)


def test_an_async_function_is_one_for_trl(module):
    from inspect import iscoroutinefunction

    module("mine", OWN)
    rewards, _ = parse_rewards(["python:mine.later", "python:mine.polite"])
    assert [iscoroutinefunction(reward.__call__) for reward in rewards] == [True, False]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"anwser": ["1", "2"]}, "no column 'answer' to compare with. Did you mean anwser?"),
        ({"answer": ["1", "two"]}, "metric number: 1 of 2 references cannot be compared with. The "
         "first, row 1, has no number: 'two'"),
    ],
    ids=["no column", "no number"],
)  # fmt: skip
def test_rows_that_do_not_fit_are_named_before_training(columns, words):
    rewards, _ = parse_rewards([{"number": {"reference": "answer"}}, "format"])
    with pytest.raises(UserError) as caught:
        prepare_rewards(rewards, columns)
    assert words in str(caught.value)
    prepare_rewards(rewards, {"answer": ["1", None]})


def test_a_length_in_tokens_needs_tokens():
    with pytest.raises(UserError, match="Set unit: words"):
        rewarded({"length": {"max": 2}}, ["a"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["exact"], "there is no reward 'exact'. Did you mean exact_match?"),
        (["bleu"], "there is no reward 'bleu'."),
        (["length"], "length: set either target or max"),
        ([{"length": {"max": 3, "target": 3}}], "length: set either target or max"),
        ([{"length": {"max": 3, "unit": "word"}}], "Did you mean words?"),
        ([{"number": {"weigth": 2}}], "number has no setting 'weigth'. Did you mean weight?"),
        ([{"number": {"weight": float("nan")}}], "number.weight: nan does not fit"),
        ([{"format": {"tags": []}}], "format.tags: [] does not fit"),
        (["regex"], "regex needs pattern"),
        (["number", "number"], "number stands 2 times"),
        (["python:json.dumps2"], "Did you mean dumps?"),
    ],
)
def test_mistakes(given, words):
    (mistake,) = check_rewards(given)
    assert words in mistake.text
    with pytest.raises(UserError, match=r"^trainer\.rewards: "):
        parse_rewards(given)
