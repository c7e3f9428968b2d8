"""Shapes and messages: what is found, what it becomes, and what every mistake says."""

import os
from pathlib import Path

import pytest

from luthier.config.schema import DatasetConfig
from luthier.data.files import read_file
from luthier.data.formats import find_shape, to_conversation, to_conversations
from luthier.data.rows import Row
from luthier.errors import UserError

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": None}}}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def convert(fields, **settings):
    config = DatasetConfig(path="x.jsonl", **settings)
    rows = [Row(fields, "x.jsonl:1")]
    return to_conversations(rows, find_shape(config, rows, "x.jsonl"), "x.jsonl")[0]


@pytest.mark.parametrize(
    ("fields", "settings", "expected"),
    [
        ({"messages": [USER, REPLY]}, {}, {"messages": [USER, REPLY]}),
        ({"prompt": "Hi", "completion": "Hello"}, {}, {"messages": [USER, REPLY]}),
        (
            {"prompt": [SYSTEM, USER], "completion": [REPLY]},
            {},
            {"messages": [SYSTEM, USER, REPLY]},
        ),
        (
            {"prompt": [USER, REPLY, USER], "completion": [REPLY]},
            {},
            {"messages": [USER, {"train": False, **REPLY}, USER, REPLY]},
        ),
        (
            {"prompt": [USER, {**REPLY, "train": True}, USER], "completion": [REPLY]},
            {},
            {"messages": [USER, {**REPLY, "train": True}, USER, REPLY]},
        ),
        (
            {"question": "Hi", "answer": "Hello", "id": 3},
            {"columns": {"prompt": "question", "completion": "answer"}},
            {"messages": [USER, REPLY]},
        ),
        ({"chat": [USER, REPLY]}, {"columns": {"messages": "chat"}}, {"messages": [USER, REPLY]}),
        (
            {"messages": [USER, REPLY], "prompt": "a", "completion": "b"},
            {"shape": "messages"},
            {"messages": [USER, REPLY]},
        ),
        (
            {"messages": [USER, REPLY]},
            {"system": "Be brief."},
            {"messages": [SYSTEM, USER, REPLY]},
        ),
        (
            {"prompt": "Hi", "completion": "Hello"},
            {"system": "Be brief."},
            {"messages": [SYSTEM, USER, REPLY]},
        ),
        (
            {"messages": [{**SYSTEM, "content": ""}, USER, REPLY]},
            {"system": "Be brief."},
            {"messages": [{**SYSTEM, "content": ""}, USER, REPLY]},
        ),
        (
            {"messages": [{**SYSTEM, "role": "developer"}, USER]},
            {"system": "No."},
            {"messages": [{**SYSTEM, "role": "developer"}, USER]},
        ),
        (
            {"messages": [USER, CALL], "tools": [TOOL]},
            {},
            {"messages": [USER, CALL], "tools": [TOOL]},
        ),
        (
            {"messages": [USER, CALL], "tools": '[{"type": "function"}]'},
            {},
            {"messages": [USER, CALL], "tools": [{"type": "function"}]},
        ),
        ({"messages": [USER, REPLY], "tools": None}, {}, {"messages": [USER, REPLY]}),
        ({"messages": [USER, REPLY], "tools": ""}, {}, {"messages": [USER, REPLY]}),
        (
            {"messages": [USER, CALL], "functions": [TOOL]},
            {"columns": {"tools": "functions"}},
            {"messages": [USER, CALL], "tools": [TOOL]},
        ),
        (
            {"messages": [USER, {**REPLY, "tool_calls": None, "name": None}]},
            {},
            {"messages": [USER, REPLY]},
        ),
        (
            {
                "messages": [
                    USER,
                    {**CALL, "content": None},
                    {"role": "tool", "content": "1", "tool_call_id": "x", "name": "f"},
                    {**REPLY, "reasoning_content": "Hm", "train": False},
                ]
            },
            {},
            {
                "messages": [
                    USER,
                    {**CALL, "content": None},
                    {"role": "tool", "content": "1", "tool_call_id": "x", "name": "f"},
                    {**REPLY, "reasoning_content": "Hm", "train": False},
                ]
            },
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, REPLY]},
            {},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, REPLY]},
        ),
    ],
    ids=[
        "messages",
        "prompt-completion",
        "message-lists",
        "prompt-reply-is-context",
        "prompt-reply-trains-if-it-says-so",
        "mapped-texts",
        "mapped-messages",
        "named-shape",
        "system-added",
        "system-added-to-prompt",
        "empty-system-stays",
        "developer-is-system",
        "tools",
        "tools-as-json",
        "tools-null",
        "tools-empty-text",
        "tools-mapped",
        "null-fields-absent",
        "every-field-kept",
        "parts",
    ],
)
def test_a_row_becomes_a_conversation(fields, settings, expected):
    assert convert(fields, **settings) == expected


@pytest.mark.parametrize(
    ("fields", "settings", "parts"),
    [
        (
            {"a": 1, "b": "x"},
            {},
            [
                "do not show the shape messages (messages) or prompt_completion "
                "(prompt, completion)",
                "columns: a, b",
                'first row (x.jsonl:1): {"a": 1, "b": "x"}',
                "map them with dataset.columns",
            ],
        ),
        ({"question": "a", "answer": "b"}, {}, ["{prompt: question, completion: answer}"]),
        ({"conversations": []}, {}, ["{messages: conversations}", "ShareGPT"]),
        (
            {"instruction": "a", "input": "", "output": "b"},
            {},
            ["{prompt: instruction, completion: output}", "input is not joined"],
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {}, ["preference pairs"]),
        ({"text": "a"}, {}, ["no reply to train"]),
        (
            {"message": []},
            {},
            ["'message' looks like 'messages': dataset.columns={messages: message}"],
        ),
        (
            {"prompt": "a", "completion": "b"},
            {"shape": "messages"},
            ["the shape messages (messages).", "columns: prompt, completion"],
        ),
        (
            {"messages": [USER], "prompt": "a", "completion": "b"},
            {},
            ["two shapes", "dataset.shape=messages or dataset.shape=prompt_completion"],
        ),
        (
            {"q": 1},
            {"columns": {"promt": "q"}},
            ["key 'promt' (did you mean 'prompt'?)", "Its keys are our"],
        ),
        (
            {"question": 1},
            {"columns": {"prompt": "questions"}},
            ["maps prompt to 'questions'", "did you mean 'question'?", "It has: question"],
        ),
    ],
    ids=[
        "unknown",
        "question-answer",
        "sharegpt",
        "alpaca",
        "preference",
        "text",
        "near",
        "named-is-absent",
        "two-shapes",
        "mapping-key",
        "mapping-value",
    ],
)
def test_unknown_columns_in_words(fields, settings, parts):
    with pytest.raises(UserError) as error:
        convert(fields, **settings)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"messages": "Hi"}, "'messages' is text; expected a list of messages"),
        ({"messages": None}, "'messages' is null; expected a list"),
        ({"messages": []}, "'messages' is an empty list"),
        ({"messages": ["Hi"]}, "messages[0]: this is text; expected an object with role"),
        (
            {"messages": [USER, {"content": "Hi"}]},
            "messages[1]: there is no role (it has: content)",
        ),
        ({"messages": [{"from": "human", "value": "Hi"}]}, "from and value are ShareGPT's names"),
        ({"messages": [{"role": 3, "content": "Hi"}]}, "the role is a number"),
        ({"messages": [{"role": "", "content": "Hi"}]}, "expected a name such as user"),
        ({"messages": [{"role": "user"}]}, "the content of this user message is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "this user message is null"),
        ({"messages": [{"role": "assistant", "content": None}]}, "assistant message is null"),
        ({"messages": [{"role": "user", "content": 3}]}, "the content is a number; expected text"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "the content is an object"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "a content part is 'image'; only parts of text",
        ),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "a content part is 'text'"),
        ({"messages": [{**REPLY, "tool_calls": "f()"}]}, "tool_calls is text; expected a list"),
        ({"messages": [{**REPLY, "tool_calls": ["f"]}]}, "tool_calls holds text; expected objects"),
        ({"messages": [{**REPLY, "train": "no"}]}, "train is text; expected true or false"),
        ({"messages": [{**REPLY, "reasoning_content": 1}]}, "reasoning_content is a number"),
        ({"messages": [USER], "tools": "[f]"}, "the tools are text that is not JSON"),
        ({"messages": [USER], "tools": {"a": 1}}, "the tools are an object; expected a list"),
        ({"prompt": "a", "completion": 3}, "'completion' is a number; both are to be text"),
        ({"prompt": "a", "completion": [REPLY]}, "'prompt' is text and 'completion' is a list"),
        ({"prompt": [USER], "completion": []}, "'completion' is an empty list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_rows_in_words(fields, problem):
    with pytest.raises(UserError) as error:
        convert(fields)
    assert "  x.jsonl:1: " in str(error.value)
    assert problem in str(error.value)


def test_bad_rows_are_counted_and_the_first_shown(write):
    rows = [{"prompt": "a", "completion": "b"}, *[{"prompt": "a", "complete": "b"}] * 8]
    found = read_file(write("a.jsonl", rows))
    shape = find_shape(DatasetConfig(path="a.jsonl"), found, "a.jsonl")
    with pytest.raises(UserError) as error:
        to_conversations(found, shape, "a.jsonl")
    text = str(error.value)
    assert "a.jsonl has 8 bad rows:" in text
    assert "a.jsonl:2: there is no 'completion' (it has: prompt, complete); did you mean" in text
    assert "a.jsonl:6" in text
    assert "a.jsonl:7" not in text
    assert "... and 3 more" in text
    assert "read as prompt_completion (columns: prompt, completion)" in text


def test_rows_stay_as_they_were_read():
    fields = {"prompt": [USER, REPLY], "completion": [REPLY]}
    row = Row(fields, "x:1")
    shape = find_shape(DatasetConfig(path="x", system="S"), [row], "x")
    assert to_conversation(row, shape) == to_conversation(row, shape)
    assert fields == {"prompt": [USER, REPLY], "completion": [REPLY]}
    assert "train" not in REPLY


ASSETS = os.environ.get("LUTHIER_ASSETS")


@pytest.mark.skipif(not ASSETS, reason="LUTHIER_ASSETS is not set")
@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("messages/oasst_en_100_trees_paths.jsonl", {}),
        ("messages/openai_cookbook_toy_chat.jsonl", {}),
        ("messages/sgd_multi_turn_slice.jsonl", {}),
        ("tools/bfcl_v4_single_turn_messages.jsonl", {}),
        ("tools/sgd_tool_dialogues.jsonl", {}),
        ("prompt_completion/gsm8k_test.jsonl", {"prompt": "question", "completion": "answer"}),
    ],
)
def test_real_files_load(name, columns):
    path = str(Path(ASSETS, "datasets", name))
    config = DatasetConfig(path=path, columns=columns)
    rows = read_file(path)
    assert len(to_conversations(rows, find_shape(config, rows, name), name)) == len(rows)
