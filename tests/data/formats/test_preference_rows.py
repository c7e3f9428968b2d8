"""Judged replies: preference pairs and single verdicts, in all spellings."""

import copy

import pytest

from luthier.data.rows import RowError

USER = {"role": "user", "content": "Hi"}
GOOD = {"role": "assistant", "content": "Hello"}
BAD = {"role": "assistant", "content": "What?"}
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
TEXTS = {"chosen": "Hello", "rejected": "What?"}
TURNS = {
    "chosen": {"from": "gpt", "value": "Hello"},
    "rejected": {"from": "gpt", "value": "What?"},
}
HUMAN = {"from": "human", "value": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("fields", "settings", "expected"),
    [
        pytest.param({"prompt": "Hi", **TEXTS}, {}, PAIR, id="texts"),
        pytest.param({"question": "Hi", **TEXTS, "system": ""}, {}, PAIR, id="question"),
        pytest.param(
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "n": 2}, {}, PAIR, id="messages"
        ),
        pytest.param({"prompt": [USER], **TEXTS}, {}, PAIR, id="messages-and-texts"),
        pytest.param({"prompt": "Hi", "chosen": GOOD, "rejected": BAD}, {}, PAIR, id="one-message"),
        pytest.param({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {}, PAIR, id="implicit"),
        pytest.param(
            {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {},
            PAIR,
            id="whole-conversations-beside-their-prompt",
        ),
        pytest.param(
            {
                "prompt": "Hi",
                "messages": [USER, GOOD],
                "chosen": [USER, GOOD],
                "rejected": [USER, BAD],
            },
            {"type": "preference"},
            PAIR,
            id="ultrafeedback",
        ),
        pytest.param(
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
            {},
            {"prompt": [USER, GOOD, USER], "chosen": [GOOD], "rejected": [BAD]},
            id="longest-prompt",
        ),
        pytest.param(
            {"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
            {},
            {"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD, USER, BAD]},
            id="each-keeps-a-reply",
        ),
        pytest.param(
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
                "rejected": "\n\nHuman: Hi\n\nAssistant: What?",
            },
            {},
            PAIR,
            id="hh-rlhf",
        ),
        pytest.param(
            {"prompt": "\n\nHuman: Hi\n\nAssistant:", **TEXTS}, {}, PAIR, id="hh-rlhf-prompt"
        ),
        pytest.param({"conversations": [HUMAN], **TURNS}, {}, PAIR, id="llama-factory-sharegpt"),
        pytest.param({"messages": [USER], **TEXTS}, {}, PAIR, id="messages-column"),
        pytest.param({"instruction": "Hi", "input": "", **TEXTS}, {}, PAIR, id="alpaca"),
        pytest.param(
            {"instruction": "Hi", "input": "there", **TEXTS, "history": [["Hi", "Hello"]]},
            {},
            PAIR | {"prompt": [USER, GOOD, {"role": "user", "content": "Hi\n\nthere"}]},
            id="alpaca-with-input-and-history",
        ),
        pytest.param(
            {"q": "Hi", "better": "Hello", "worse": "What?"},
            {"columns": {"prompt": "q", "chosen": "better", "rejected": "worse"}},
            PAIR,
            id="mapped",
        ),
        pytest.param(
            {"prompt": "Hi", **TEXTS, "tools": [TOOL]},
            {"system": "Be brief."},
            PAIR | {"prompt": [SYSTEM, USER], "tools": [TOOL]},
            id="system-and-tools",
        ),
    ],
)
def test_a_pair(detect, read, fields, settings, expected):
    before = copy.deepcopy(fields)
    assert detect(fields, **settings).example_type == "preference"
    assert read(fields, **settings) == expected
    assert fields == before


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
        ({"chosen": "a", "rejected": "b"}, "begin with different messages; expected two replies"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "begin with different messages"),
        (
            {"prompt": "Bye", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "whole conversations that do not begin with the prompt",
        ),
        ({"prompt": "Hi", "chosen": "a", "rejected": None}, "'rejected' is null; expected text"),
        ({"prompt": "Hi", "chosen": {"a": 3}, "rejected": "b"}, "'chosen' is an object"),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, SYSTEM]},
            "'rejected' has no reply: no message of an assistant",
        ),
        (
            {"prompt": "Hi", "chosen": [{"role": "assistant", "content": None}], "rejected": "b"},
            "chosen[0]: the content of this assistant message is null",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_pairs_in_words(read, fields, problem):
    with pytest.raises(RowError) as error:
        read(fields)
    assert problem in str(error.value)


JUDGED = {"prompt": [USER], "completion": [GOOD], "label": True}


@pytest.mark.parametrize(
    ("fields", "settings", "expected"),
    [
        pytest.param(
            {"prompt": "Hi", "completion": "Hello", "label": True}, {}, JUDGED, id="texts"
        ),
        pytest.param(
            {"prompt": "Hi", "completion": "Hello", "label": "False"},
            {},
            JUDGED | {"label": False},
            id="csv",
        ),
        pytest.param(
            {"prompt": [USER], "completion": [GOOD], "label": True}, {}, JUDGED, id="lists"
        ),
        pytest.param({"messages": [USER, GOOD], "label": True}, {}, JUDGED, id="messages"),
        pytest.param(
            {"conversations": [HUMAN, TURNS["chosen"]], "kto_tag": True},
            {},
            JUDGED,
            id="llama-factory",
        ),
        pytest.param(
            {"instruction": "Hi", "input": "", "output": "Hello", "kto_tag": 1},
            {},
            JUDGED,
            id="alpaca",
        ),
        pytest.param(
            {"prompt": "Hi", "completion": "Hello", "label": 0},
            {"type": "unpaired"},
            JUDGED | {"label": False},
            id="numbers-named",
        ),
        pytest.param(
            {"question": "Hi", "answer": "Hello", "good": True},
            {"columns": {"label": "good"}},
            JUDGED,
            id="mapped",
        ),
    ],
)
def test_a_verdict(detect, read, fields, settings, expected):
    assert detect(fields, **settings).example_type == "unpaired"
    assert read(fields, **settings) == expected


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {"prompt": "a", "completion": "b", "label": "maybe"},
            "'label' is 'maybe'; expected true or false",
        ),
        ({"prompt": "a", "completion": "b", "label": None}, "'label' is 'null'; expected true"),
        (
            {"prompt": "a", "completion": [USER], "label": True},
            "'completion' begins with a message",
        ),
        ({"messages": [USER, GOOD, USER], "label": True}, "ends with one of the role user"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_verdicts_in_words(read, fields, problem):
    with pytest.raises(RowError) as error:
        read(fields, type="unpaired")
    assert problem in str(error.value)
