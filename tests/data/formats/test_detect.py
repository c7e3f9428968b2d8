"""Which row format is detected, and what is said where none is, or more than one."""

import json
import os
import pickle
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from luthier.config.schema import SourceConfig
from luthier.data.formats import detect_format
from luthier.data.rows import Row, RowError
from luthier.errors import UserError

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}
HUMAN = {"from": "human", "value": "Hi"}
MESSAGES = {"messages": [USER, REPLY]}
PROMPT = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("fields", "settings", "parts"),
    [
        pytest.param(
            {"a": 1, "b": "x", "c": "y"},
            {},
            [
                "dataset: the columns of x.jsonl do not say what kind of rows these are.",
                "columns: a, b, c",
                'first row (x.jsonl:1): {"a": 1, "b": "x", "c": "y"}',
                "If 'b' is a prompt and 'c' its reply: ",
                "dataset.columns.prompt=b dataset.columns.completion=c.",
            ],
            id="unknown",
        ),
        pytest.param(
            {"question": "a", "explanation": "b"},
            {},
            ["prompt_completion: has question (as prompt), lacks completion (or answer, response"],
            id="nearest",
        ),
        pytest.param(
            {"id": "a", "question": [[USER]]},
            {},
            ["If 'question' is a prompt, it has no reply: there is nothing to train."],
            id="prompts-alone",
        ),
        pytest.param(
            {"prompt": "a", "complete": "b"},
            {},
            ["'complete' looks like 'completion': dataset.columns.completion=complete"],
            id="misspelt",
        ),
        pytest.param(
            {"prompt": "a", "completions": ["b"], "labels": [True]},
            {},
            ["stepwise supervision", "luthier trains none"],
            id="stepwise",
        ),
        pytest.param(
            {"translation": {"en": "a", "de": "b"}},
            {},
            ["dataset.columns.source=translation.en dataset.columns.target=translation.de"],
            id="translation",
        ),
        pytest.param(
            {"conversations": [HUMAN], "messages": [USER]},
            {},
            ["dataset.type=messages or dataset.type=sharegpt"],
            id="two-spellings",
        ),
        pytest.param({"id": "a", "n": 3}, {}, ["do not say what kind"], id="an-id-is-no-text"),
        pytest.param({"prompt": "a"}, {}, ["do not say what kind"], id="a-prompt-is-no-text"),
        pytest.param(
            {"image": "a", "caption": "b"},
            {},
            ["video and audio are not read"],
            id="images",
        ),
        pytest.param(
            PROMPT,
            {"type": "messages"},
            [
                "the columns of x.jsonl do not show the type messages.",
                "messages: has none of its columns, lacks messages (or conversation",
            ],
            id="named-is-absent",
        ),
        pytest.param(
            {**MESSAGES, **PROMPT},
            {},
            [
                "fit 2 row formats",
                "columns: messages, prompt, completion",
                "first row (x.jsonl:1):",
                "messages would read messages",
                "prompt_completion would read prompt, completion",
                "dataset.type=messages or dataset.type=prompt_completion",
            ],
            id="two-types",
        ),
        pytest.param(
            {"question": "a", "answer": "b", "response": "c"},
            {},
            [
                "dataset.columns.prompt=question dataset.columns.completion=answer or "
                "dataset.columns.prompt=question dataset.columns.completion=response"
            ],
            id="two-replies",
        ),
        pytest.param(
            {**PROMPT, "label": 1},
            {},
            ["dataset.type=prompt_completion or dataset.type=unpaired"],
            id="numbers-that-may-be-verdicts",
        ),
        pytest.param(
            {"question": "a", "context": "b", "answer": "c"},
            {},
            [
                "has a column 'context' besides 'question' and 'answer'",
                "dataset.columns.instruction=question dataset.columns.input=context "
                "dataset.columns.output=answer",
                "To drop it: 'dataset.remove_columns=[context]'",
            ],
            id="a-question-about-a-text",
        ),
        pytest.param(
            {**MESSAGES, "system_prompt": "a", "system_message": "b"},
            {},
            ["dataset.columns.system=system_prompt or dataset.columns.system=system_message"],
            id="two-system-prompts",
        ),
        pytest.param(
            {"q": 1},
            {"columns": {"promt": "q"}},
            ["dataset.columns has the key 'promt' (did you mean 'prompt'?)", "Its keys are our"],
            id="mapping-key",
        ),
        pytest.param(
            {"q": 1},
            {"type": "text", "columns": {"prompt": "q"}},
            ["has the key 'prompt'", "our names for the type text, text;"],
            id="mapping-key-of-another-type",
        ),
        pytest.param(
            {"question": 1},
            {"columns": {"prompt": "questions"}},
            ["maps prompt to 'questions'", "did you mean 'question'?", "It has: question"],
            id="mapping-value",
        ),
        pytest.param(
            {"a": 1, "b": 1},
            {"columns": {"messages": "a", "source": "b"}},
            ["maps messages and source, and no type has all of these"],
            id="mapping-of-two-types",
        ),
        pytest.param(
            {"text": "a"}, {"system": "S"}, ["dataset.system is for conversations"], id="system"
        ),
    ],
)
def test_unclear_columns_in_words(detect, fields, settings, parts):
    with pytest.raises(UserError) as error:
        detect(fields, **settings)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("fields", "name", "unused"),
    [
        ({**MESSAGES, "prompt": "a", "prompt_id": "b"}, "messages", ("prompt", "prompt_id")),
        ({**MESSAGES, "source": "a", "label": "b"}, "messages", ("source", "label")),
        ({"instruction": "a", "input": "", "output": "b", "text": "c"}, "alpaca", ("text",)),
        ({**PROMPT, "label": "maths"}, "prompt_completion", ("label",)),
        ({**PROMPT, "context": "c"}, "prompt_completion", ("context",)),
        ({"question": "a", "answer": "b", "context": ""}, "prompt_completion", ("context",)),
        ({"type": "a", "query": "b", "original_question": "c", "response": "d"},
         "prompt_completion", ("type", "original_question")),
        ({"text": "a", "label": 1, "label_text": "b"}, "classification", ("label_text",)),
        ({"text": "a", "tokens": 3, "tags": ["b"]}, "text", ("tokens", "tags")),
        ({"prompt": "a", "text": "b"}, "text", ("prompt",)),
        ({"question": "a", "sentence": "b", "label": 1, "idx": 2}, "classification", ("idx",)),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score": 1}, "preference", ("score",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_format_that_says_most_is_found(detect, fields, name, unused):
    row_format = detect(fields)
    assert (row_format.type, row_format.unused) == (name, unused)


def test_the_format_of_most_rows_is_detected(detect):
    assert detect(PROMPT, MESSAGES, MESSAGES).type == "messages"
    assert detect(PROMPT, PROMPT, MESSAGES).type == "prompt_completion"
    assert detect(PROMPT, MESSAGES).type == "prompt_completion"


def test_rows_of_one_format_may_differ_in_their_columns(detect):
    row_format = detect(MESSAGES, {**MESSAGES, "tools": []}, {**MESSAGES, "id": 3})
    assert (row_format.type, row_format.unused) == ("messages", ("id",))


def test_no_row_is_an_error_in_words():
    with pytest.raises(UserError, match="has no row that can be read"):
        detect_format(SourceConfig(path="x"), [], "x")


def test_settings_are_named_by_their_place_in_the_config():
    with pytest.raises(UserError, match=r"dataset\.sources\.mine\.type=messages"):
        detect_format(
            SourceConfig(path="x"),
            [Row({**MESSAGES, **PROMPT}, "x:1")],
            "x",
            "dataset.sources.mine",
        )


def test_the_settings_are_what_decides_the_examples(detect):
    plain = detect(MESSAGES).settings()
    assert plain == detect(MESSAGES, type="messages").settings()
    assert plain == detect({**MESSAGES, "id": 3}).settings()
    assert plain != detect(MESSAGES, system="S").settings()
    mapped = detect({"chat": [USER]}, columns={"messages": "chat"}).settings()
    assert plain != mapped
    assert json.loads(json.dumps(mapped)) == mapped


def test_a_format_goes_to_another_process(detect):
    row_format = pickle.loads(pickle.dumps(detect(MESSAGES, system="S")))
    assert row_format.read(Row(MESSAGES, "x:1"))["messages"][0] == {
        "role": "system",
        "content": "S",
    }


CALL = {"id": "x", "type": "function", "function": {"name": "f", "arguments": {}}}
PART = {"type": "text", "text": "Hi"}
WHOLE = [
    {
        "messages": [
            {"role": "user", "content": [PART], "name": "N"},
            {"role": "assistant", "content": "Hello", "tool_calls": [CALL], "reasoning": "Hm"},
            {"role": "tool", "content": [PART], "tool_call_id": "x"},
        ],
        "tools": [{"name": "f"}],
        "system": "S",
    },
    {"conversations": [HUMAN, {"from": "function_call", "value": '{"name": "f"}'}], "tools": "[]"},
    {"instruction": "a", "input": "b", "output": "c", "history": [["q", "a"]], "system": "S"},
    PROMPT,
    {"prompt": [USER], "chosen": [REPLY], "rejected": "b"},
    {"chosen": [USER, REPLY], "rejected": [USER, {"role": "assistant", "content": "No"}]},
    {**PROMPT, "label": True},
    {"text": "a", "label": 1},
    {"tokens": ["a"], "tags": [1]},
]
JUNK = [
    None, 3, -1, 0.5, float("nan"), True, "", "x", "[", "[{", "{}", [], {}, [[]], [{}], [None],
    ["a"], {"a": 1}, USER, [HUMAN], [{"from": [1], "value": 2}], [{"role": {}, "content": []}],
]  # fmt: skip


def with_junk(value, junk):
    """Every copy of a value that has the junk in one place."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in inner if isinstance(value, dict | list) else ():
        for changed in (
            [junk, *with_junk(entry, junk)] if isinstance(entry, dict | list) else [junk]
        ):
            copied = value.copy()
            copied[key] = changed
            yield copied


@pytest.mark.parametrize("row", WHOLE, ids=lambda row: "-".join(row))
def test_whatever_stands_in_a_row_it_is_an_example_or_a_bad_row(detect, row):
    row_format = detect(row)
    results = {True: 0, False: 0}
    for junk in JUNK:
        for fields in with_junk(row, junk):
            try:
                results[isinstance(row_format.read(Row(fields, "x:1")), dict)] += 1
            except RowError as error:
                results[False] += bool(str(error))
    assert all(results.values())


ASSETS = os.environ.get("LUTHIER_ASSETS")
FILES = {
    "alpaca/llamafactory_alpaca_en_demo.json": ("alpaca", 999),
    "alpaca/llamafactory_alpaca_zh_demo.json": ("alpaca", 600),
    "alpaca/seed_tasks_alpaca.jsonl": ("alpaca", 175),
    "classification/banking77_test.jsonl": ("classification", 3080),
    "classification/banking77_train.jsonl": ("classification", 10003),
    "messages/mt_bench_questions_reference.jsonl": ("messages", 30),
    "messages/oasst_en_100_trees_paths.jsonl": ("messages", 400),
    "messages/openai_cookbook_toy_chat.jsonl": ("messages", 4),
    "messages/sgd_multi_turn_slice.jsonl": ("messages", 500),
    "preference/hh_rlhf_harmless_base_test_filtered.jsonl": ("preference", 200),
    "preference/llamafactory_dpo_en_demo.json": ("preference", 300),
    "preference/llamafactory_kto_en_demo.json": ("unpaired", 300),
    "preference/llamafactory_v1_dpo_messages.jsonl": ("preference", 10),
    "preference/oasst_ranked_pairs.jsonl": ("preference", 212),
    "prompt_completion/gsm8k_test.jsonl": ("prompt_completion", 1319),
    "seq2seq/disfl_qa_dev.jsonl": ("seq2seq", 1000),
    "seq2seq/disfl_qa_train.jsonl": ("seq2seq", 3000),
    "sharegpt/fastchat_dummy_conversation.json": ("sharegpt", 500),
    "sharegpt/oasst_en_sharegpt.jsonl": ("sharegpt", 300),
    "text/llamafactory_c4_demo.jsonl": ("text", 300),
    "tools/bfcl_v4_multi_turn_base_raw.jsonl": (None, 100),
    "tools/bfcl_v4_single_turn_messages.jsonl": ("messages", 640),
    "tools/llamafactory_glaive_toolcall_en_demo.json": ("sharegpt", 300),
    "tools/llamafactory_reason_tool_use_demo_50.jsonl": ("messages", 50),
    "tools/sgd_tool_dialogues.jsonl": ("messages", 200),
}
"""Every file, its format and its rows; `bfcl_v4_multi_turn_base_raw` has prompts and no replies."""


def rows_of(name):
    text = Path(ASSETS, "datasets", name).read_text(encoding="utf-8")
    rows = json.loads(text) if name.endswith(".json") else map(json.loads, text.split("\n")[:-1])
    return [Row(fields, f"{name}:{line}") for line, fields in enumerate(rows, start=1)]


@pytest.mark.skipif(not ASSETS, reason="LUTHIER_ASSETS is not set")
@pytest.mark.parametrize("name", FILES)
def test_real_files_load_with_no_setting_but_the_path(name):
    expected, count = FILES[name]
    rows = rows_of(name)
    assert len(rows) == count
    if expected is None:
        with pytest.raises(UserError, match="it has no reply: there is nothing to train"):
            detect_format(SourceConfig(path=name), rows[:1000], name)
        return
    row_format = detect_format(SourceConfig(path=name), rows[:1000], name)
    assert row_format.type == expected
    examples = [row_format.read(row) for row in rows]
    assert len(examples) == count


@pytest.mark.skipif(not ASSETS, reason="LUTHIER_ASSETS is not set")
def test_no_file_of_the_assets_is_forgotten():
    folder = Path(ASSETS, "datasets")
    files = {str(file.relative_to(folder)) for file in folder.rglob("*.json*")}
    assert files == set(FILES)


@pytest.mark.parametrize(
    ("fields", "type_", "names"),
    [
        ({"Question": "a", "Answer": "b"}, "prompt_completion", "prompt completion"),
        ({"PROMPT": "a", "Completion ": "b"}, "prompt_completion", "prompt completion"),
        (
            {"Instruction": "a", "Input": "b", "Output": "c"},
            "alpaca",
            "instruction input output",
        ),
        ({"Messages": [USER, REPLY], "System": "s"}, "messages", "messages system"),
        ({"Text": "a", "Label": 1}, "classification", "text label"),
        (
            {"prompt": "b", "completion": "c", "Prompt": "a"},
            "prompt_completion",
            "prompt completion",
        ),
        ({"Prompt": "a", "Chosen": "b", "Rejected": "c"}, "preference", "prompt chosen rejected"),
        ({"Text": "a"}, "text", "text"),
    ],
)
def test_names_are_matched_without_case(detect, fields, type_, names):
    row_format = detect(fields)
    assert row_format.type == type_
    assert {*names.split()} == {*row_format.columns.source_names}
    columns = [row_format.columns.source_names[name] for name in names.split()]
    assert columns == list(fields)[: len(columns)]


def test_two_columns_that_differ_in_case_alone_are_no_choice_of_ours(detect):
    with pytest.raises(UserError, match="fit 2 row formats"):
        detect({"Prompt": "a", "PROMPT": "b", "completion": "c"})


@pytest.mark.parametrize("column", ["Context", "CHOICES"])
def test_a_context_in_capitals_is_a_context(detect, column):
    with pytest.raises(UserError, match=f"has a column {column!r} besides"):
        detect({"Question": "a", "Answer": "b", column: "c"})


def test_columns_are_left_out_on_purpose(detect):
    fields = {"question": "a", "answer": "b", "context": "c"}
    row_format = detect(fields, remove_columns=["context"])
    assert row_format.type == "prompt_completion" and row_format.unused == ()
    with pytest.raises(UserError, match=r"remove_columns names 'contxt'.*did you mean 'context'"):
        detect(fields, remove_columns=["contxt"])


def test_answers_that_are_objects_name_their_setting(detect):
    fields = {"question": "a", "answer": {"item": "tea"}}
    with pytest.raises(UserError, match=r"as JSON text: dataset\.json_replies=true"):
        detect(fields)
    assert detect(fields, json_replies=True).type == "prompt_completion"


HINTED = [
    {"question": "a", "answer": "b", "response": "c"},
    {"question": "a", "an answer": "b", "respon$e": "c", "answer": "d", "response": "e"},
    {"messages": [USER], "system_prompt": "a", "system_message": "b"},
    {"question": "a", "answer": "b", "Context": "c"},
    {"prompt": "a", "com pletion": "b"},
    {"prompt": "a", 'comp"letion': "b"},
    {"prompt": "a", "comple'tion": "b"},
]


@pytest.mark.parametrize("fields", HINTED, ids=[" ".join(fields) for fields in HINTED])
def test_hints_can_be_pasted(detect, fields):
    """Each setting of an error goes through a shell and Hydra, and names columns that are there."""
    with pytest.raises(UserError) as error:
        detect(fields)
    last = str(error.value).splitlines()[-1]
    settings = [word for word in shlex.split(last.partition(": ")[2]) if "dataset." in word]
    assert settings
    for setting in settings:
        override = OverridesParser.create().parse_override(setting)
        value = override.value()
        for name in value if isinstance(value, list) else [str(value)]:
            assert str(name) in fields
