"""What a run records is enough to make the same ids again; generation uses the same encoder."""

import json
from pathlib import Path

import pytest

from helpers.conversations import (
    ASSETS,
    CHATML,
    asset_tokenizer,
    bot,
    call,
    pair,
    replies,
    system,
    trl,
    user,
)
from luthier.chat import ChatEncoder, ChatError


def test_settings_make_the_same_encoder():
    tokenizer = pair("gpt2-words", trl("gptoss"))
    encoder = ChatEncoder(
        tokenizer,
        train_on=["assistant"],
        on_lost="keep",
        max_length=400,
        date="2001-02-03",
        variables={"reasoning_effort": "high"},
    )
    settings = json.loads(json.dumps(encoder.settings()))
    tokenizer.chat_template = None
    again = ChatEncoder.from_settings(tokenizer, settings)
    assert again.settings() == encoder.settings()
    row = [user("q"), bot("a")]
    assert again.prompt(row[:1]) == encoder.prompt(row[:1])
    assert again.encode(row)[0].labels == encoder.encode(row)[0].labels
    assert "Reasoning: high" in tokenizer.decode(again.prompt(row[:1]))


def test_template_for_tools_is_chosen_as_transformers_chooses_it():
    tokenizer = pair("gpt2-words", trl("qwen2_5"), eos="<|im_end|>")
    tokenizer.chat_template = {"default": CHATML, "tool_use": trl("qwen2_5")}
    encoder = ChatEncoder(tokenizer)
    messages, tools = [user("q")], [{"type": "function", "function": {"name": "f"}}]
    for given in (None, tools):
        expected = tokenizer.apply_chat_template(
            messages, tools=given, add_generation_prompt=True, return_dict=False
        )
        assert encoder.prompt(messages, given) == expected
    assert set(encoder.settings()["template"]) == {"default", "tool_use"}


@pytest.mark.parametrize(
    ("template", "eos", "stops"),
    [
        ("qwen2_5", "<|im_end|>", ["<|im_end|>"]),
        ("gemma3", "<eos>", ["<end_of_turn>", "<eos>"]),
        ("phi3", "<|endoftext|>", ["<|end|>", "<|endoftext|>"]),
        ("gptoss", "<|return|>", ["<|return|>", "<|call|>"]),
        ("cohere2", "<eos>", ["<|END_OF_TURN_TOKEN|>", "<eos>"]),
    ],
)
def test_generation_stops_where_turns_end(template, eos, stops):
    tokenizer = pair("gpt2-words", trl(template), eos=eos)
    found = tokenizer.convert_ids_to_tokens(ChatEncoder(tokenizer).stop_token_ids)
    assert found == stops


def test_generation_stops_where_the_template_for_tools_ends_turns():
    tokenizer = pair("gpt2-words", CHATML + trl("gptoss"), eos="<|im_end|>")
    tokenizer.chat_template = {"default": CHATML, "tool_use": trl("gptoss")}
    found = tokenizer.convert_ids_to_tokens(ChatEncoder(tokenizer).stop_token_ids)
    assert found == ["<|im_end|>", "<|return|>", "<|call|>"]


def test_stop_ids_of_the_generation_config_are_used():
    """GLM ends a turn with the next speaker's token, which only the generation config knows."""
    tokenizer = pair("gpt2-words", trl("glm4moe"), eos="<|endoftext|>")
    stop = tokenizer.convert_tokens_to_ids("<|user|>")
    encoder = ChatEncoder(tokenizer, eos_token_ids=[stop])
    text = replies(tokenizer, encoder.encode([user("q"), bot("a")]))[0]
    assert text.endswith("a<|user|>") and stop in encoder.stop_token_ids


GOLDEN = json.loads(Path(__file__).with_name("golden_ids.json").read_text())


@pytest.mark.skipif(not ASSETS, reason="needs LUTHIER_ASSETS")
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_ids(name):
    """An upgrade of a library that changes tokens is seen here."""
    tokenizer = asset_tokenizer(name)
    row = [
        system("Be nice."),
        user("What is 1+1?\n"),
        bot("\n\nIt is 2."),
        user("Sure?"),
        bot("Yes"),
    ]
    found = ChatEncoder(tokenizer, date="2025-01-02").encode(row)
    assert [[s.input_ids, s.labels] for s in found] == GOLDEN[name]


EMPTY = {
    "empty": bot(""),
    "blank": bot(" \n\t"),
    "null beside blank reasoning": bot(None, reasoning_content=" "),
    "blank parts": bot([{"type": "text", "text": ""}, {"type": "text", "text": "\n"}]),
}
NOT_EMPTY = {
    "a call": bot("", tool_calls=[call()]),
    "reasoning": bot("", reasoning_content="So it is."),
    "thinking": bot(None, thinking="So it is."),
    "one letter": bot("a"),
    "not trained": bot("", train=False),
}


@pytest.mark.parametrize("reply", EMPTY.values(), ids=EMPTY)
def test_an_empty_reply_stops_or_drops_the_row(reply):
    tokenizer = pair("gpt2-words", trl("qwen3"), eos="<|im_end|>")
    rows = [{"messages": [user("q"), bot("a")]}, {"messages": [user("q"), reply]}]
    with pytest.raises(ChatError, match=r"row 1, message 1.*the model would learn to stop at once"):
        ChatEncoder(tokenizer).encode_batch(rows)
    # A row of other faults is another matter: `on_lost` does not let empty replies pass.
    with pytest.raises(ChatError, match=r"chat\.empty_replies=drop"):
        ChatEncoder(tokenizer, on_lost="drop").encode_batch(rows)
    batch = ChatEncoder(tokenizer, empty_replies="drop").encode_batch(rows)
    assert batch.dropped == {"empty reply": 1} and len(batch.rows[0]) == 1


@pytest.mark.parametrize("reply", NOT_EMPTY.values(), ids=NOT_EMPTY)
def test_what_says_something_is_no_empty_reply(reply):
    tokenizer = pair("gpt2-words", trl("qwen3"), eos="<|im_end|>")
    assert ChatEncoder(tokenizer).encode([user("q"), reply, user("r"), bot("yes")])


def test_an_empty_reply_trains_its_stop_token_where_that_is_meant():
    tokenizer = pair("gpt2-words", CHATML, eos="<|im_end|>")
    encoder = ChatEncoder(tokenizer, empty_replies="train")
    assert replies(tokenizer, encoder.encode([user("q"), bot("")])) == ["<|im_end|>"]


def test_only_replies_that_train_must_say_something():
    tokenizer = pair("gpt2-words", CHATML, eos="<|im_end|>")
    messages = [user("q"), bot(""), user("r"), bot("yes")]
    assert ChatEncoder(tokenizer, train_on="last").encode(messages)
    with pytest.raises(ChatError, match="the user's reply is empty"):
        ChatEncoder(tokenizer, train_on=["user"]).encode([user(""), bot("yes")])
