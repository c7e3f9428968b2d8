"""Conversations: what each way to write them becomes, and what every mistake says."""

import copy
import json

import pytest

from luthier.data.formats.messages import find_other_keys
from luthier.data.rows import Row, RowError

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": None}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
BARE_TOOL = {"name": "f", "parameters": {}}
RESULT = {"role": "tool", "content": "1"}
HUMAN = {"from": "human", "value": "Hi"}
GPT = {"from": "gpt", "value": "Hello"}
QUESTION = {"role": "user", "content": "What is this?\n\nA lute."}


def calling(**more):
    return {"role": "assistant", "tool_calls": [CALL], **more}


def shown(value):
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(
    ("fields", "settings", "messages"),
    [
        pytest.param({"messages": [USER, REPLY]}, {}, [USER, REPLY], id="messages"),
        pytest.param({"conversation": [USER, REPLY]}, {}, [USER, REPLY], id="conversation"),
        pytest.param({"conversations": [USER, REPLY]}, {}, [USER, REPLY], id="conversations"),
        pytest.param({"dialogue": [USER, REPLY]}, {}, [USER, REPLY], id="dialogue"),
        pytest.param(
            {"chat": [USER, REPLY]},
            {"columns": {"messages": "chat"}},
            [USER, REPLY],
            id="mapped",
        ),
        pytest.param(
            {"data": {"chat": [USER, REPLY]}},
            {"columns": {"messages": "data.chat"}},
            [USER, REPLY],
            id="mapped-to-a-field-of-a-column",
        ),
        pytest.param({"messages": json.dumps([USER, REPLY])}, {}, [USER, REPLY], id="csv-cell"),
        pytest.param(
            {"messages": [USER, {**REPLY, "tool_calls": None, "name": None, "train": None}]},
            {},
            [USER, REPLY],
            id="nulls-are-absent",
        ),
        pytest.param(
            {"messages": [USER, {**REPLY, "tool_calls": []}]}, {}, [USER, REPLY], id="no-calls"
        ),
        pytest.param(
            {"messages": [USER, calling(content=None), {**RESULT, "tool_call_id": "x"}, REPLY]},
            {},
            [USER, calling(), {**RESULT, "tool_call_id": "x"}, REPLY],
            id="a-call-without-content",
        ),
        pytest.param(
            {"messages": [USER, calling(tool_calls=json.dumps([CALL]))]},
            {},
            [USER, calling()],
            id="calls-as-json",
        ),
        pytest.param(
            {"messages": [USER, calling(tool_calls=[{"id": "1", **CALL["function"]}])]},
            {},
            [USER, calling(tool_calls=[{"id": "1", **CALL}])],
            id="flat-calls-are-wrapped",
        ),
        pytest.param(
            {
                "messages": [
                    USER,
                    calling(
                        tool_calls=[
                            {
                                "id": None,
                                "index": None,
                                "type": "function",
                                "function": {"name": "f"},
                            }
                        ]
                    ),
                ]
            },
            {},
            [
                USER,
                calling(
                    tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}]
                ),
            ],
            id="filled-nulls-of-a-call-without-arguments",
        ),
        pytest.param(
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "content": None,
                        "function_call": {"name": "f", "arguments": '{"a": 1}'},
                    },
                    {"role": "function", "name": "f", "content": "1"},
                    REPLY,
                ]
            },
            {},
            [
                USER,
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
                    ],
                },
                {"role": "tool", "name": "f", "content": "1"},
                REPLY,
            ],
            id="openai-function-call",
        ),
        pytest.param(
            {"messages": [USER, {**REPLY, "reasoning_content": "Hm", "train": False}]},
            {},
            [USER, {**REPLY, "reasoning_content": "Hm", "train": False}],
            id="reasoning-and-train",
        ),
        pytest.param(
            {"messages": [USER, {"role": "assistant", "content": None, "thinking": "Hm"}]},
            {},
            [USER, {"role": "assistant", "thinking": "Hm"}],
            id="thinking-without-content",
        ),
        pytest.param(
            {"messages": [USER, {**REPLY, "weight": 0}, USER, {**REPLY, "weight": 1}]},
            {},
            [USER, {**REPLY, "train": False}, USER, {**REPLY, "train": True}],
            id="openai-weight",
        ),
        pytest.param(
            {"messages": [{**USER, "content": [{"type": "text", "text": "Hi"}]}, REPLY]},
            {},
            [USER, REPLY],
            id="one-part-of-text",
        ),
        pytest.param(
            {
                "messages": [
                    {
                        **USER,
                        "content": [
                            {"type": "text", "text": "Hi", "image_url": None},
                            {"type": "text", "value": "you"},
                        ],
                    },
                    REPLY,
                ]
            },
            {},
            [
                {
                    **USER,
                    "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}],
                },
                REPLY,
            ],
            id="parts-of-text-stay-parts",
        ),
        pytest.param(
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "reasoning", "value": "Hm"},
                            {"type": "text", "value": "Hello"},
                            {
                                "type": "tool_call",
                                "value": '{"name": "f", "arguments": {"a": null}}',
                            },
                        ],
                    },
                    {"role": "tool", "content": [{"type": "text", "value": "1"}]},
                ]
            },
            {},
            [USER, {**REPLY, "reasoning_content": "Hm", "tool_calls": [CALL]}, RESULT],
            id="llama-factory-parts",
        ),
        pytest.param(
            {"messages": [USER, calling(), {**RESULT, "content": {"n": 1}}]},
            {},
            [USER, calling(), {**RESULT, "content": {"n": 1}}],
            id="a-result-may-be-an-object",
        ),
        pytest.param(
            {"messages": [{"role": "system", "content": None}, USER, REPLY]},
            {"system": "No."},
            [{"role": "system"}, USER, REPLY],
            id="an-empty-system-slot",
        ),
        pytest.param({"conversations": [HUMAN, GPT]}, {}, [USER, REPLY], id="sharegpt"),
        pytest.param({"messages": [HUMAN, GPT]}, {}, [USER, REPLY], id="sharegpt-in-messages"),
        pytest.param(
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "Prompter", "value": "Hi"},
                    {"from": "bing", "value": "Hello"},
                    {"from": "user", "value": "Hi"},
                    {"from": "model", "value": "Hello"},
                ]
            },
            {},
            [SYSTEM, USER, REPLY, USER, REPLY],
            id="sharegpt-roles",
        ),
        pytest.param(
            {"conversations": [HUMAN, {**GPT, "weight": 0.0}, HUMAN, {**GPT, "weight": None}]},
            {},
            [USER, {**REPLY, "train": False}, USER, REPLY],
            id="sharegpt-weight",
        ),
        pytest.param(
            {
                "conversations": [
                    HUMAN,
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"a": null}}'},
                    {"from": "observation", "value": "1"},
                    GPT,
                ],
                "tools": json.dumps([BARE_TOOL]),
            },
            {},
            [USER, calling(), RESULT, REPLY],
            id="llama-factory-call",
        ),
        pytest.param(
            {
                "conversations": [
                    HUMAN,
                    {
                        "from": "function_call",
                        "value": "<think>\nHm\n</think>\n\n"
                        '[{"name": "f", "arguments": {"a": null}}, {"name": "g"}]',
                    },
                    {"from": "tool_response", "value": "1"},
                ]
            },
            {},
            [
                USER,
                {
                    "role": "assistant",
                    "reasoning_content": "Hm",
                    "tool_calls": [
                        CALL,
                        {"type": "function", "function": {"name": "g", "arguments": {}}},
                    ],
                },
                RESULT,
            ],
            id="llama-factory-thought-and-two-calls",
        ),
        pytest.param(
            {"conversations": [HUMAN, GPT], "system": "Be brief."},
            {"system": "No."},
            [SYSTEM, USER, REPLY],
            id="system-column-before-the-config's",
        ),
        pytest.param(
            {"conversations": [HUMAN, GPT], "system": ""},
            {"system": "Be brief."},
            [SYSTEM, USER, REPLY],
            id="an-empty-system-column-is-none",
        ),
        pytest.param(
            {"question": "Hi", "response": "Hello", "system_prompt": "Be brief."},
            {},
            [SYSTEM, USER, REPLY],
            id="system-prompt-column",
        ),
        pytest.param(
            {"instruction": "What is this?", "input": "A lute.", "output": "Hello"},
            {},
            [QUESTION, REPLY],
            id="alpaca",
        ),
        pytest.param(
            {"instruction": "Hi", "input": "", "output": "Hello", "text": "Below is ..."},
            {},
            [USER, REPLY],
            id="alpaca-without-input",
        ),
        pytest.param(
            {"instruction": "", "input": "Hi", "output": "Hello"},
            {},
            [USER, REPLY],
            id="alpaca-with-input-alone",
        ),
        pytest.param(
            {
                "instruction": "Hi",
                "output": "Hello",
                "history": [["Hi", "Hello"]],
                "system": "Be brief.",
            },
            {},
            [SYSTEM, USER, REPLY, USER, REPLY],
            id="alpaca-history",
        ),
        pytest.param(
            {"instruction": "What is this?", "context": "A lute.", "response": "Hello"},
            {},
            [QUESTION, REPLY],
            id="dolly",
        ),
        pytest.param(
            {"question": "What is this?", "context": "A lute.", "answer": "Hello"},
            {"columns": {"instruction": "question", "input": "context", "output": "answer"}},
            [QUESTION, REPLY],
            id="alpaca-mapped",
        ),
        pytest.param({"prompt": "Hi", "completion": "Hello"}, {}, [USER, REPLY], id="prompt"),
        pytest.param({"question": "Hi", "answer": "Hello", "id": 3}, {}, [USER, REPLY], id="q-a"),
        pytest.param({"query": "Hi", "response": "Hello"}, {}, [USER, REPLY], id="query"),
        pytest.param({"input": "Hi", "output": "Hello"}, {}, [USER, REPLY], id="input-output"),
        pytest.param(
            {"prompt": "Hi", "response": "Hello"}, {}, [USER, REPLY], id="prompt-response"
        ),
        pytest.param(
            {"q": "Hi", "a": "Hello"},
            {"columns": {"prompt": "q", "completion": "a"}},
            [USER, REPLY],
            id="prompt-mapped",
        ),
        pytest.param(
            {"prompt": [SYSTEM, USER], "completion": [REPLY]},
            {},
            [SYSTEM, USER, REPLY],
            id="lists-of-messages",
        ),
        pytest.param(
            {"prompt": [HUMAN], "completion": GPT}, {}, [USER, REPLY], id="turns-and-one-message"
        ),
        pytest.param(
            {"prompt": [USER], "completion": "Hello"}, {}, [USER, REPLY], id="list-and-text"
        ),
        pytest.param(
            {"prompt": json.dumps([USER]), "completion": json.dumps([REPLY])},
            {},
            [USER, REPLY],
            id="lists-in-csv-cells",
        ),
        pytest.param(
            {"prompt": "[1, 2] Sort it", "completion": '["no", "messages"]'},
            {},
            [
                {"role": "user", "content": "[1, 2] Sort it"},
                {"role": "assistant", "content": '["no", "messages"]'},
            ],
            id="other-lists-are-text",
        ),
        pytest.param(
            {"prompt": [USER, REPLY, USER], "completion": [REPLY]},
            {},
            [USER, {"train": False, **REPLY}, USER, REPLY],
            id="a-reply-in-the-prompt-is-context",
        ),
        pytest.param(
            {"prompt": [USER, {**REPLY, "train": True}, USER], "completion": [REPLY]},
            {},
            [USER, {**REPLY, "train": True}, USER, REPLY],
            id="unless-it-says-so",
        ),
        pytest.param(
            {"messages": [USER, REPLY], "prompt": "a", "completion": "b"},
            {"type": "messages"},
            [USER, REPLY],
            id="named-type",
        ),
        pytest.param(
            {"messages": [USER, REPLY]}, {"system": "Be brief."}, [SYSTEM, USER, REPLY], id="system"
        ),
        pytest.param(
            {"messages": [{**SYSTEM, "content": ""}, USER, REPLY]},
            {"system": "Be brief."},
            [{**SYSTEM, "content": ""}, USER, REPLY],
            id="its-own-empty-system-stays",
        ),
        pytest.param(
            {"messages": [{**SYSTEM, "role": "developer"}, USER]},
            {"system": "No."},
            [{**SYSTEM, "role": "developer"}, USER],
            id="developer-is-system",
        ),
        pytest.param(
            {"messages": [SYSTEM, USER], "system": "Be brief."}, {}, [SYSTEM, USER], id="said-twice"
        ),
    ],
)
def test_a_row_becomes_messages(read, fields, settings, messages):
    before = copy.deepcopy(fields)
    assert read(fields, **settings)["messages"] == messages
    assert fields == before


@pytest.mark.parametrize(
    ("more", "settings", "tools"),
    [
        pytest.param({"tools": [TOOL]}, {}, [TOOL], id="tools"),
        pytest.param({"tools": json.dumps([TOOL])}, {}, [TOOL], id="json"),
        pytest.param({"tools": [json.dumps(TOOL)]}, {}, [TOOL], id="list-of-json"),
        pytest.param({"tools": [BARE_TOOL]}, {}, [TOOL], id="bare"),
        pytest.param(
            {"tools": [{"type": "function", **BARE_TOOL}]}, {}, [TOOL], id="responses-api"
        ),
        pytest.param({"functions": [BARE_TOOL]}, {}, [TOOL], id="functions"),
        pytest.param({"api": [TOOL]}, {"columns": {"tools": "api"}}, [TOOL], id="mapped"),
        pytest.param(
            {"tools": [{"type": "web_search"}]}, {}, [{"type": "web_search"}], id="other-types"
        ),
        pytest.param({"tools": None}, {}, None, id="null"),
        pytest.param({"tools": float("nan")}, {}, None, id="nan-is-absent"),
        pytest.param({"tools": ""}, {}, None, id="empty-text"),
        pytest.param({"tools": "[]"}, {}, None, id="empty-json"),
        pytest.param({"tools": []}, {}, None, id="empty-list"),
        pytest.param({}, {}, None, id="none"),
    ],
)
def test_the_tools_of_a_row(read, more, settings, tools):
    assert read({"messages": [USER, REPLY], **more}, **settings).get("tools") == tools


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"messages": "Hi"}, "'messages' must be the JSON text of a list of messages"),
        ({"messages": "[{'role': 'user'}]"}, "messages[0]: the content of this user message is"),
        ({"messages": "[{'role': user}]"}, "'messages' must be the JSON text of a list"),
        ({"messages": '{"a": 1}'}, "'messages' is text of an object; expected a list"),
        ({"messages": None}, "'messages' is null; expected a list"),
        ({"messages": float("nan")}, "'messages' is NaN; expected a list"),
        ({"messages": []}, "'messages' is an empty list"),
        ({"messages": ["Hi"]}, "messages[0]: this is text; expected an object with role"),
        (
            {"messages": [USER, {"content": "Hi"}]},
            "messages[1]: there is no role (it has: content)",
        ),
        ({"messages": [USER, HUMAN]}, "messages[1]: there is no role (it has: from, value); from"),
        ({"messages": [{"role": 3, "content": "Hi"}]}, "the role is a number"),
        ({"messages": [{"role": "", "content": "Hi"}]}, "expected a name such as user"),
        ({"messages": [{"role": "user"}]}, "the content of this user message is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "this user message is null"),
        ({"messages": [{"role": "assistant", "content": None}]}, "assistant message is null"),
        ({"messages": [{"role": "user", "content": float("nan")}]}, "the content is NaN"),
        ({"messages": [{"role": "user", "content": 3}]}, "the content is a number; expected text"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "the content is an object"),
        ({"messages": [{"role": "tool", "content": 3}]}, "the content is a number; expected text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {}}]}]},
            "messages[0]: a content part is 'video_url'; images are trained on, videos",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "chart", "value": "a.csv"}]}]},
            "a content part is 'chart'; only parts of text and images are read",
        ),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "a content part is 'text'"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "text", "value": "Hello"},
                            {"type": "reasoning", "value": "Hm"},
                        ],
                    }
                ]
            },
            "a reasoning part comes after other parts",
        ),
        ({"messages": [{**REPLY, "tool_calls": "f()"}]}, "tool_calls must be the JSON text"),
        ({"messages": [{**REPLY, "tool_calls": [3]}]}, "tool_calls[0] is a number; expected an"),
        ({"messages": [{**REPLY, "tool_calls": [{"a": 1}]}]}, "names no function (it has: a)"),
        (
            {"messages": [{**REPLY, "tool_calls": [{"name": "f", "arguments": [1]}]}]},
            "the arguments of tool_calls[0] are a list",
        ),
        (
            {"messages": [{**REPLY, "train": "no"}]},
            "train is 'no'; expected true or 1, or false or 0",
        ),
        (
            {"messages": [USER, {**REPLY, "weight": 0.5}]},
            "messages[1]: weight is 0.5, and a message trains whole (1) or not at all (0)",
        ),
        ({"messages": [{**REPLY, "reasoning": 1}]}, "reasoning is a number"),
        ({"messages": [USER], "tools": "[f]"}, "the tools ('tools') must be the JSON text"),
        ({"messages": [USER], "tools": {"a": 1}}, "the tools ('tools') are an object"),
        ({"messages": [USER], "tools": [3]}, "the tools ('tools') hold a number"),
        ({"messages": [USER], "system": 3}, "'system' is a number; expected text"),
        ({"messages": [SYSTEM, USER], "system": "No."}, "a system message and another system"),
        (
            {"conversations": [HUMAN, {"from": "gtp", "value": "Hello"}]},
            "conversations[1]: the role 'gtp' is not known (did you mean 'gpt'?); known are human,",
        ),
        ({"conversations": [{"from": 3, "value": "Hi"}]}, "from is a number"),
        ({"conversations": [HUMAN, {"from": "gpt"}]}, "the value of this gpt turn is missing"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "this gpt turn is null"),
        ({"conversations": [{"from": "human", "value": 3}]}, "the value is a number"),
        ({"conversations": [HUMAN, USER]}, "no from (it has: role, content); role and content"),
        (
            {"conversations": [HUMAN, {"from": "function_call", "value": "f(1)"}]},
            "conversations[1]: the value of this call must be the JSON text of {",
        ),
        ({"instruction": "a", "output": None}, "'output' is null; expected text"),
        ({"instruction": "a", "output": "b", "input": 3}, "'input' is a number; expected text"),
        (
            {"instruction": "a", "output": "b", "history": [["q"]]},
            "history[0] is a list; expected a question and its answer",
        ),
        ({"prompt": 3, "completion": "a"}, "'prompt' is a number; expected text or a list"),
        ({"prompt": "a", "completion": None}, "'completion' is null; expected text"),
        ({"question": "a", "answer": float("nan")}, "'answer' is NaN; expected text"),
        ({"prompt": [USER], "completion": []}, "'completion' is an empty list"),
    ],
    ids=shown,
)
def test_bad_rows_in_words(read, fields, problem):
    with pytest.raises(RowError) as error:
        read(fields)
    assert problem in str(error.value)


def test_a_row_of_another_format_says_so(detect):
    row_format = detect({"messages": [USER, REPLY]}, {"messages": [USER, REPLY]})
    with pytest.raises(RowError) as error:
        row_format.read(Row({"prompt": "Hi", "completion": "Hello"}, "x.jsonl:9"))
    assert "there is no 'messages' (it has: prompt, completion)" in str(error.value)
    assert "the columns of prompt_completion, and the source is read as messages" in str(
        error.value
    )


def test_a_misspelt_column_of_one_row(detect):
    row_format = detect({"prompt": "Hi", "completion": "Hello"})
    with pytest.raises(RowError, match="did you mean 'completions'") as error:
        row_format.read(Row({"prompt": "Hi", "completions": "Hello"}, "x.jsonl:2"))
    assert "these are the columns" not in str(error.value)


def test_optional_columns_that_come_later_are_read(detect):
    row_format = detect({"messages": [USER, REPLY]})
    late = {"messages": [USER, REPLY], "functions": [BARE_TOOL], "system": "Be brief."}
    assert row_format.read(Row(late, "x:2")) == {"messages": [SYSTEM, USER, REPLY], "tools": [TOOL]}


TRAINS = [
    ({"train": False}, False), ({"training": False}, False), ({"trainable": False}, False),
    ({"loss": False}, False), ({"loss": 0}, False), ({"weight": 0}, False),
    ({"weight": 0.0}, False), ({"loss_weight": 0}, False), ({"loss_mask": 0}, False),
    ({"mask": 1}, False), ({"mask": True}, False), ({"masked": True}, False),
    ({"train": True}, True), ({"loss": 1}, True), ({"weight": 1.0}, True), ({"mask": 0}, True),
    ({"masked": False}, True), ({"loss": False, "mask": True, "weight": 0}, False),
    ({"loss": None, "train": True}, True),
]  # fmt: skip
CALL_REPLY = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
}


@pytest.mark.parametrize(("flags", "trains"), TRAINS, ids=[str(flags) for flags, _ in TRAINS])
@pytest.mark.parametrize("form", ["messages", "sharegpt", "call", "call turn", "completion"])
def test_one_meaning_of_what_says_whether_a_message_trains(read, form, flags, trains):
    rows = {
        "messages": {"messages": [USER, {**REPLY, **flags}]},
        "sharegpt": {"conversations": [HUMAN, {"from": "gpt", "value": "Hello", **flags}]},
        "call": {"messages": [USER, CALL_REPLY | flags]},
        "call turn": {
            "conversations": [
                HUMAN, {"from": "function_call", "value": '{"name": "f", "arguments": {}}', **flags}
            ]
        },
        "completion": {"prompt": "Hi", "completion": [{**REPLY, **flags}]},
    }  # fmt: skip
    *_, reply = read(rows[form])["messages"]
    assert reply["train"] is trains
    assert not {"loss", "weight", "mask", "masked", "training", "loss_mask"} & {*reply}


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"train": True, "loss": False}, "train says that this message trains, and loss says that"),
        ({"weight": 1, "mask": 1}, "weight says that this message trains, and mask says that it"),
        ({"loss": 0.25}, "loss is 0.25, and a message trains whole (1) or not at all (0)"),
        ({"weight": 2}, "weight is 2; expected true or 1, or false or 0"),
        ({"weight": -1}, "weight is -1; expected"),
        ({"mask": [0, 1]}, "mask is 'a list'; expected"),
        ({"training": "false"}, "training is 'false'; expected"),
        ({"loss": float("nan")}, "loss is nan; expected"),
    ],
)
def test_flags_that_say_no_clear_thing(read, flags, problem):
    with pytest.raises(RowError) as error:
        read({"messages": [USER, {**REPLY, **flags}]})
    assert problem in str(error.value)
    assert "messages[1]" in str(error.value)


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_mask_that_is_a_loss_mask_is_refused(read, name):
    user, bot = (USER, REPLY) if name == "messages" else (HUMAN, {"from": "gpt", "value": "Hello"})
    with pytest.raises(RowError, match=r"as in a loss mask.*Rename it to loss_mask"):
        read({name: [{**user, "mask": 0}, {**bot, "mask": 1}]})
    turns = [{**user, "mask": 0}, {**bot, "mask": 1}, user, {**bot, "mask": 0}]
    assert [message.get("train") for message in read({name: turns})["messages"]] == [
        True, False, None, True,
    ]  # fmt: skip


def test_the_keys_of_messages_that_mean_nothing_are_found():
    example = {
        "prompt": [{**USER, "id": 7}],
        "chosen": [{**REPLY, "train": True, "score": 3, "reasoning_content": "so"}],
        "rejected": [REPLY],
    }
    assert find_other_keys(example) == {"id", "score"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, "5"),
        (-2.5, "-2.5"),
        (1e21, "1e+21"),
        (12345678901234567890123, "12345678901234567890123"),
    ],
)
@pytest.mark.parametrize("form", ["alpaca", "completion", "messages", "sharegpt"])
def test_replies_that_are_numbers_become_text(read, form, value, text):
    rows = {
        "alpaca": {"instruction": "a", "output": value},
        "completion": {"question": "a", "answer": value},
        "messages": {"messages": [USER, {"role": "assistant", "content": value}]},
        "sharegpt": {"conversations": [HUMAN, {"from": "gpt", "value": value}]},
    }
    assert read(rows[form])["messages"][-1]["content"] == text


JSON_REPLIES = [
    ({"item": "tea", "é": None}, '{"item": "tea", "é": null}'), ([1, [2]], "[1, [2]]"),
    (True, "true"), ([{"type": "reminder", "who": "Ann"}], '[{"type": "reminder", "who": "Ann"}]'),
]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), JSON_REPLIES, ids=["object", "list", "bool", "objects"])
@pytest.mark.parametrize("form", ["alpaca", "completion", "messages", "sharegpt"])
def test_replies_that_are_objects_train_as_json_where_that_is_set(read, form, value, text):
    rows = {
        "alpaca": {"instruction": "a", "output": value},
        "completion": {"prompt": "a", "completion": value},
        "messages": {"messages": [USER, {"role": "assistant", "content": value}]},
        "sharegpt": {"conversations": [HUMAN, {"from": "gpt", "value": value}]},
    }
    assert read(rows[form], json_replies=True)["messages"][-1]["content"] == text
    with pytest.raises(RowError) as error:
        read(rows[form])
    if text.startswith("[{"):
        words = ("only parts of text and images are read", "json_replies")
        assert any(text in str(error.value) for text in words)
    else:
        assert "To train it as JSON text, set dataset.json_replies=true" in str(error.value)


def test_json_replies_leaves_messages_and_parts_as_they_are(read):
    row = {"prompt": "a", "completion": [REPLY]}
    assert read(row, json_replies=True) == read(row)
    parts = {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]}
    assert read(parts, json_replies=True)["messages"][-1]["content"] == "b"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_no_number_is_no_reply(read, value):
    with pytest.raises(RowError, match="'output' is"):
        read({"instruction": "a", "output": value}, json_replies=True)


PYTHON = (
    "[{'role': 'user', 'content': \"It's\\nso\"}, "
    "{'role': 'assistant', 'content': 'é', 'train': True}]"
)


def test_lists_that_python_printed_are_read(read):
    messages = [
        {"role": "user", "content": "It's\nso"},
        {"role": "assistant", "content": "é", "train": True},
    ]
    assert read({"messages": PYTHON})["messages"] == messages
    tools = "[{'name': 'f', 'parameters': {'a': None, 'b': (1, 2.5)}}]"
    (tool,) = read({"messages": messages, "tools": tools})["tools"]
    assert tool["function"] == {"name": "f", "parameters": {"a": None, "b": [1, 2.5]}}


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': 'user', 'content': 'a' 'b'}]",
        "[{'role': 'user', 'content': b'a'}]",
        "[{'role': 'user', 'content': {1, 2}}]",
        "[{'role': 'user', 1: 2}]",
        "[{'role': __import__('os')}]",
        "[{'role': 'user'}\n {'role': 'user'}]",
        "[" * 3000 + "]" * 3000,
        "[{'role': 'user'",
        "[{'role': 'us\\qer', 'content': 'a'}]",
    ],
    ids=["texts", "bytes", "set", "number as key", "code", "numpy", "deep", "cut", "escape"],
)
def test_what_python_printed_and_json_has_not_is_refused(read, text):
    with pytest.raises(RowError, match="'messages' must be the JSON text of a list of messages"):
        read({"messages": text}, type="messages")


OFF = {"enable_thinking": False}
KWARGS = {
    "a mapping": ({"chat_template_kwargs": OFF}, OFF),
    "json, as in a csv": ({"chat_template_kwargs": '{"enable_thinking": false, "n": 2}'},
                          OFF | {"n": 2}),
    "what python printed": ({"chat_template_kwargs": "{'enable_thinking': False}"}, OFF),
    "keys that a table filled": ({"chat_template_kwargs": {"enable_thinking": False, "n": None}},
                                 OFF),
    "columns": ({"enable_thinking": True, "preserve_thinking": 0, "reasoning_effort": " low "},
                {"enable_thinking": True, "preserve_thinking": False, "reasoning_effort": "low"}),
    "text of true and false": ({"enable_thinking": "False"}, OFF),
    "a number of a table": ({"enable_thinking": 0.0}, OFF),
    "both": ({"chat_template_kwargs": {"n": 2}, "enable_thinking": False}, OFF | {"n": 2}),
    "both, the same": ({"chat_template_kwargs": OFF, "enable_thinking": False}, OFF),
}  # fmt: skip
NOTHING = [{"chat_template_kwargs": empty} for empty in ({}, None, "", "{}", {"n": None})]
NOTHING += [{"enable_thinking": empty} for empty in (None, "", float("nan"))]


@pytest.mark.parametrize(("columns", "kwargs"), KWARGS.values(), ids=KWARGS)
def test_a_rows_own_variables_of_the_template(detect, read, columns, kwargs):
    row = {"messages": [USER, REPLY]} | columns
    assert read(row) == {"messages": [USER, REPLY], "chat_template_kwargs": kwargs}
    # They may be in a later row than those that show the format.
    late = detect({"messages": [USER, REPLY]}).read(Row(row, "x.jsonl:2000"))
    assert late == read(row)
    assert detect(row).unused == ()
    assert read(row, remove_columns=[*columns]) == {"messages": [USER, REPLY]}


@pytest.mark.parametrize("columns", NOTHING, ids=str)
def test_no_value_is_no_variable(read, columns):
    assert read({"messages": [USER, REPLY]} | columns) == {"messages": [USER, REPLY]}


FORMS = {
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "unpaired": {"prompt": "a", "completion": "b", "label": True},
    "alpaca": {"instruction": "a", "output": "b"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_row_with_messages_may_have_variables(read, form):
    assert read(FORMS[form] | {"enable_thinking": False})["chat_template_kwargs"] == OFF
    named = read(FORMS[form] | {"think": False}, columns={"enable_thinking": "think"})
    assert named["chat_template_kwargs"] == OFF


WRONG_KWARGS = {
    "a list": ({"chat_template_kwargs": [1]}, "'chat_template_kwargs' is a list; expected an"),
    "text": ({"chat_template_kwargs": "off"}, "'chat_template_kwargs' must be the JSON text"),
    "a switch of text": ({"enable_thinking": "off"}, "'enable_thinking' is .*expected true or"),
    "a switch inside": ({"chat_template_kwargs": {"preserve_thinking": 2}},
                        "'chat_template_kwargs.preserve_thinking' is .*expected true or false"),
    "an effort": ({"reasoning_effort": True}, "'reasoning_effort' is .*expected text such as"),
    "two": ({"chat_template_kwargs": OFF, "enable_thinking": True},
            "'enable_thinking' is True, and 'chat_template_kwargs' says False; keep one"),
}  # fmt: skip


@pytest.mark.parametrize(("columns", "words"), WRONG_KWARGS.values(), ids=WRONG_KWARGS)
def test_variables_of_a_wrong_kind_are_bad_rows(read, columns, words):
    with pytest.raises(RowError, match=words):
        read({"messages": [USER, REPLY]} | columns)
