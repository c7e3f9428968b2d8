"""A row's own variables of the template: what it makes is what they make of all rows."""

import pytest

from helpers.conversations import bot, pair, system, trl, user
from luthier.chat import ChatEncoder, ChatError
from luthier.chat.encoder import ChatPromptEncoder
from luthier.chat.pipeline import MAX_VARIABLE_SETS

TALK = [system("Be brief."), user("1"), bot("2", reasoning_content="why"), user("3"), bot("4")]
PLAIN = [user("How?"), bot("So.")]
SETS = {
    "qwen3": [{"enable_thinking": False}, {"enable_thinking": True}],
    "qwen3_5_think": [{"enable_thinking": False}, {"enable_thinking": True}],
    "qwen3_6": [{"preserve_thinking": True}, {"preserve_thinking": False}],
    "gptoss": [{"reasoning_effort": "low"}, {"reasoning_effort": "high", "model_identity": "I."}],
}
UNREAD = {"enable_thinkin": True}


def encoder_of(name, **settings):
    source = trl(name)
    settings = {"on_lost": "keep", "date": "2025-01-02"} | settings
    return ChatEncoder(pair("gpt2-words", source), source, **settings)


def made(batch):
    return [
        [(s.input_ids, s.labels, s.replies, s.segments) for s in sequences]
        for sequences in batch.rows
    ]


@pytest.mark.parametrize("name", SETS)
def test_a_rows_variables_are_those_of_an_encoder_for_it_alone(name):
    """In one batch with others, on the fast path and beside it, cut to a length and as a prompt."""
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    rows = [
        {"messages": messages, **more, "chat_template_kwargs": kwargs}
        for kwargs in (*SETS[name], None)
        for messages in (PLAIN, TALK, PLAIN)
        for more in ({}, {"tools": [tool]})
    ]
    mixed, cut = encoder_of(name), encoder_of(name, max_length=60)
    batch, cut_batch = mixed.encode_batch(rows), cut.encode_batch(rows)
    found = set()
    for number, row in enumerate(rows):
        bare = {key: value for key, value in row.items() if key != "chat_template_kwargs"}
        settings = {"variables": row["chat_template_kwargs"] or {}}
        alone = encoder_of(name, **settings)
        assert made(batch)[number] == made(alone.encode_batch([bare]))[0], row
        (expected,) = made(encoder_of(name, **settings, max_length=60).encode_batch([bare]))
        assert made(cut_batch)[number] == expected, row
        asked = {"messages": row["messages"][:-1], "tools": row.get("tools")}
        prompt = alone.prompt(**asked)
        assert mixed.prompt(**asked, chat_template_kwargs=row["chat_template_kwargs"]) == prompt
        kwargs = {"chat_template_kwargs": row["chat_template_kwargs"]}
        assert ChatPromptEncoder(mixed).encode(**asked, **kwargs)[0] == prompt
        found.add(str((prompt, made(batch)[number])))
    # The variables change something, or nothing was compared.
    assert len(found) >= len(rows) / 3


def test_they_stand_over_those_of_all_rows():
    encoder = encoder_of("qwen3", variables={"enable_thinking": False})
    asked = [user("How?")]
    on = encoder_of("qwen3", variables={"enable_thinking": True}).prompt(asked)
    assert encoder.prompt(asked) != on
    assert encoder.prompt(asked, chat_template_kwargs={"enable_thinking": True}) == on


def test_rows_with_variables_have_a_fast_path_of_their_own():
    encoder = encoder_of("qwen3")
    pipelines = [
        encoder._pipelines.select(None, {"enable_thinking": value})[0] for value in (True, False)
    ]
    matched = [pipeline.fast_path.match({"messages": PLAIN}) for pipeline in pipelines]
    assert all(matched) and matched[0].plan is not matched[1].plan
    again, _ = encoder._pipelines.select(None, {"enable_thinking": True})
    assert again is pipelines[0]
    assert encoder._pipelines.select(None, {})[0] is encoder._pipelines.default


def test_more_sets_than_are_remembered():
    """A value for each row: every row gets its own, and no more pipelines than the limit stay."""
    encoder = encoder_of("gptoss")
    rows = [
        {"messages": PLAIN, "chat_template_kwargs": {"reasoning_effort": f"e{n}"}}
        for n in range(MAX_VARIABLE_SETS + 9)
    ]
    texts = [
        encoder.tokenizer.decode(sequences[0].input_ids)
        for sequences in encoder.encode_batch([*rows, *rows]).rows
    ]
    assert all(f"Reasoning: e{n}\n" in texts[n] for n in range(len(rows)))
    assert texts[: len(rows)] == texts[len(rows) :]
    assert len(encoder._pipelines._selected) == MAX_VARIABLE_SETS


WRONG = {
    "never read": (UNREAD, "'enable_thinkin' is set, and the chat template never reads it; "
                           "variables that it reads: enable_thinking"),
    "an input": ({"messages": 1}, "a row cannot set 'messages'"),
    "a special token": ({"eos_token": "x"}, "a row cannot set 'eos_token'"),
    "no name": ({"a b": 1}, "a row cannot set 'a b'"),
    "a control token": ({"enable_thinking": ["<|im_end|>"]},
                        "the value of 'enable_thinking' holds a control token"),
    "no mapping": ([1], "it must map names to values; found list"),
    "no json": ({"enable_thinking": float("nan")}, "a value is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("kwargs", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_names_the_row(kwargs, words):
    rows = [{"messages": PLAIN}, {"messages": PLAIN, "chat_template_kwargs": kwargs}]
    with pytest.raises(ChatError) as error:
        encoder_of("qwen3", on_lost="error").encode_batch(rows)
    assert str(error.value).startswith(f"row 1, field `chat_template_kwargs`: {words}")
    with pytest.raises(ChatError) as error:
        encoder_of("qwen3", on_lost="error").prompt([user("a")], None, kwargs)
    assert words in str(error.value)
    batch = encoder_of("qwen3", on_lost="drop").encode_batch(rows)
    assert [len(sequences) for sequences in batch.rows] == [1, 0]


def test_a_row_whose_variable_is_never_read_is_kept_and_counted():
    encoder = encoder_of("qwen3")
    rows = [{"messages": PLAIN, "chat_template_kwargs": UNREAD}, {"messages": PLAIN}]
    batch = encoder.encode_batch(rows)
    assert made(batch)[0] == made(batch)[1]
    assert batch.lossy_rows == 1
    assert [error.reason for error in batch.reports] == ["unread template variable"]
    _, _, lost = ChatPromptEncoder(encoder).encode([user("a")], None, UNREAD)
    assert lost is not None and "never reads it" in lost.text


def test_a_variable_of_all_rows_that_is_never_read_is_an_error():
    encoder = encoder_of("qwen3", variables=UNREAD | {"enable_thinking": False})
    with pytest.raises(ChatError) as error:
        encoder.check_variables()
    assert str(error.value) == (
        "chat.variables: 'enable_thinkin' is set, and the chat template never reads it; variables "
        "that it reads: enable_thinking"
    )
    encoder_of("qwen3", variables={"enable_thinking": False}).check_variables()


def test_a_reply_to_a_row_with_variables_is_parsed_behind_its_own_prompt():
    """Qwen3.5's prompt opens a thought or closes it, so the same text means two messages."""
    encoder = encoder_of("qwen3_5_think")
    messages = {
        value: encoder.parse("So.\n</think>\n\nYes.", [user("a")], None, {"enable_thinking": value})
        for value in (True, False)
    }
    assert messages[True].message["reasoning_content"] == "So."
    assert messages[True].message["content"] == "Yes."
    assert messages[False].message["content"].startswith("So.")
