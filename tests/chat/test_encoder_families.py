"""What trains on templates of unusual shape: stop tokens, thoughts and headers, written by hand."""

import pytest

from helpers import family_templates as family
from helpers.conversations import (
    LOOK_UP,
    assert_labels,
    bot,
    call,
    pair,
    replies,
    system,
    tool,
    trl,
    user,
)
from luthier.chat import ChatEncoder, ChatError

GLM_ENDS = ["<|endoftext|>", "<|user|>", "<|observation|>"]
ASKED = [user("q"), bot("", tool_calls=[call("lute")]), tool("42"), bot("done")]
PARALLEL = [
    user("q"),
    bot("", tool_calls=[call("lute"), call("viol")]),
    tool("1"),
    tool("2"),
    bot("d"),
]
THOUGHT = [
    user("q1"),
    bot("a1", reasoning_content="r1"),
    user("q2"),
    bot("a2", reasoning_content="r2"),
]
PLAIN = [user("q1"), bot("a1"), user("q2"), bot("a2")]
LUTE = "<tool_call>look_up<arg_key>word</arg_key><arg_value>lute</arg_value></tool_call>"
VIOL = "<tool_call>look_up<arg_key>word</arg_key><arg_value>viol</arg_value></tool_call>"
GLM_LUTE = "<tool_call>look_up\n<arg_key>word</arg_key>\n<arg_value>lute</arg_value>\n</tool_call>"
GLM_VIOL = GLM_LUTE.replace("lute", "viol")

# name: (template, end tokens of the generation config, messages, tools, expected replies)
CASES = {
    "GLM-4.5, plain": (
        trl("glm4moe"), GLM_ENDS, PLAIN, None,
        ["\n<think></think>\na1<|user|>", "\n<think></think>\na2<|user|>"],
    ),
    "GLM-4.5, a call ends in the observation's token": (
        trl("glm4moe"), GLM_ENDS, ASKED, [LOOK_UP],
        [f"\n<think></think>\n{GLM_LUTE}<|observation|>", "\n<think></think>\ndone<|user|>"],
    ),
    "GLM-4.5, parallel calls": (
        trl("glm4moe"), GLM_ENDS, PARALLEL, [LOOK_UP],
        [
            f"\n<think></think>\n{GLM_LUTE}\n{GLM_VIOL}<|observation|>",
            "\n<think></think>\nd<|user|>",
        ],
    ),
    "GLM-4.5, a call that ends the row": (
        trl("glm4moe"), GLM_ENDS, ASKED[:2], [LOOK_UP],
        [f"\n<think></think>\n{GLM_LUTE}<|observation|>"],
    ),
    "GLM-4.5, reasoning that history drops": (
        trl("glm4moe"), GLM_ENDS, THOUGHT, None,
        ["\n<think>r1</think>\na1<|user|>", "\n<think>r2</think>\na2<|user|>"],
    ),
    "thought closed by the turn, plain": (
        family.ROLE_ENDS, GLM_ENDS, PLAIN, None, ["</think>a1<|user|>", "</think>a2<|user|>"],
    ),
    "thought closed by the turn, call": (
        family.ROLE_ENDS, GLM_ENDS, ASKED, None,
        [f"</think>{LUTE}<|observation|>", "</think>done<|user|>"],
    ),
    "thought closed by the turn, parallel calls": (
        family.ROLE_ENDS, GLM_ENDS, PARALLEL, None,
        [f"</think>{LUTE}{VIOL}<|observation|>", "</think>d<|user|>"],
    ),
    "thought closed by the turn, reasoning": (
        family.ROLE_ENDS, GLM_ENDS, THOUGHT, None,
        ["r1</think>a1<|user|>", "r2</think>a2<|user|>"],
    ),
    "header behind every render": (
        family.ROLE_ENDS_STANDING_HEADER, ["<|endoftext|>", "<|user|>"], PLAIN, None,
        ["\na1<|user|>", "\na2<|user|>"],
    ),
    "header behind every render, texts that end alike": (
        family.ROLE_ENDS_STANDING_HEADER, ["<|endoftext|>", "<|user|>"],
        [user("the same"), bot("the same")], None, ["\nthe same<|user|>"],
    ),
    "prompt closes the thought": (
        family.CLOSED_THOUGHT, [], PLAIN, None,
        [
            "<|START_RESPONSE|>a1<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
            "<|START_RESPONSE|>a2<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        ],
    ),
    "prompt closes the thought, system and newlines": (
        family.CLOSED_THOUGHT, [], [system("s"), user("q"), bot("\na\n")], None,
        ["<|START_RESPONSE|>\na\n<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"],
    ),
    "prompt closes the thought, call": (
        family.CLOSED_THOUGHT, [], ASKED, None,
        [
            '<|START_ACTION|>look_up:{"word": "lute"};<|END_ACTION|><|END_OF_TURN_TOKEN|>',
            "<|START_RESPONSE|>done<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        ],
    ),
    "prompt opens the thought, plain": (
        family.OPENED_THOUGHT, [], PLAIN, None,
        [
            "<|END_THINKING|><|START_TEXT|>a1<|END_TEXT|><|END_OF_TURN_TOKEN|>",
            "<|END_THINKING|><|START_TEXT|>a2<|END_TEXT|><|END_OF_TURN_TOKEN|>",
        ],
    ),
    "prompt opens the thought, reasoning": (
        family.OPENED_THOUGHT, [], THOUGHT[:2], None,
        ["r1<|END_THINKING|><|START_TEXT|>a1<|END_TEXT|><|END_OF_TURN_TOKEN|>"],
    ),
    "no header behind a result": (
        family.NO_HEADER_BEHIND_RESULT, [], ASKED, None,
        [
            '<|tools_prefix|>look_up({"word": "lute"})<|tools_suffix|><|assistant_end|>',
            "done<|assistant_end|>",
        ],
    ),
    "no header behind a result, reasoning": (
        family.NO_HEADER_BEHIND_RESULT, [],
        [*ASKED[:3], bot("done", reasoning_content="r")], None,
        [
            '<|tools_prefix|>look_up({"word": "lute"})<|tools_suffix|><|assistant_end|>',
            "<|inner_prefix|>r<|inner_suffix|>done<|assistant_end|>",
        ],
    ),
    "thought in words, reasoning": (
        family.THOUGHT_IN_WORDS, [], THOUGHT, None,
        [
            "r1\n[BEGIN FINAL RESPONSE]\na1\n<|end|>",
            "r2\n[BEGIN FINAL RESPONSE]\na2\n<|end|>",
        ],
    ),
    "thought in words, plain": (
        family.THOUGHT_IN_WORDS, [], PLAIN[:2], None, ["\n[BEGIN FINAL RESPONSE]\na1\n<|end|>"],
    ),
    "tools as Python writes a dict": (
        family.THOUGHT_IN_WORDS, [], PLAIN[:2], [LOOK_UP],
        ["\n[BEGIN FINAL RESPONSE]\na1\n<|end|>"],
    ),
    "stop only in history, with thoughts that it drops": (
        family.STOP_ONLY_IN_HISTORY, ["<|hy_eos|>"], THOUGHT, None,
        ["r1</think>a1<|hy_eos|>", "r2</think>a2<|hy_eos|>"],
    ),
    "stop only in history, thoughts kept": (
        family.STOP_ONLY_IN_HISTORY.replace("keep_thoughts", "true"), ["<|hy_eos|>"], THOUGHT, None,
        ["r1</think>a1<|hy_eos|>", "r2</think>a2<|hy_eos|>"],
    ),
    "stop only in history, empty thoughts": (
        family.STOP_ONLY_IN_HISTORY, ["<|hy_eos|>"], PLAIN, None,
        ["</think>a1<|hy_eos|>", "</think>a2<|hy_eos|>"],
    ),
}  # fmt: skip


def encoder_of(source, ends, eos="</s>", **settings):
    tokenizer = pair("gpt2-words", source + "".join(ends), eos=eos)
    tokenizer.chat_template = source
    ids = tokenizer.convert_tokens_to_ids(ends)
    return ChatEncoder(tokenizer, eos_token_ids=ids, date="2025-01-02", **settings)


@pytest.mark.parametrize("name", CASES)
def test_trained_text(name):
    source, ends, messages, tools, expected = CASES[name]
    encoder = encoder_of(source, ends)
    sequences = encoder.encode(messages, tools)
    assert replies(encoder.tokenizer, sequences) == expected
    for sequence in sequences:
        assert_labels(sequence)
        for message, start, stop in sequence.replies:
            served = encoder.tokenizer.apply_chat_template(
                messages[:message], tools=tools, add_generation_prompt=True, return_dict=False
            )
            assert sequence.input_ids[:start] == served
            assert sequence.input_ids[stop - 1] in encoder.stop_token_ids


@pytest.mark.parametrize(
    ("source", "ends", "stops"),
    [
        (trl("glm4moe"), GLM_ENDS, ["<|user|>", "<|observation|>", "</s>", "<|endoftext|>"]),
        (family.ROLE_ENDS, GLM_ENDS, ["<|user|>", "<|observation|>", "</s>", "<|endoftext|>"]),
        (family.ROLE_ENDS_STANDING_HEADER, ["<|user|>"], ["<|user|>", "</s>"]),
        (family.CLOSED_THOUGHT, [], ["<|END_OF_TURN_TOKEN|>", "</s>"]),
        (family.CALL_WITHOUT_STOP, [], ["<|END_OF_TURN_TOKEN|>", "</s>"]),
        (trl("phi3"), ["<|endoftext|>", "<|assistant|>", "<|end|>"],
         ["<|end|>", "</s>", "<|endoftext|>", "<|assistant|>"]),
        (trl("llama3"), ["<|end_of_text|>"], ["<|eot_id|>", "</s>", "<|end_of_text|>"]),
    ],
    ids=["GLM-4.5", "GLM-4.7", "GLM-Edge", "R7B", "Command R+", "Phi-3", "Llama-3 base"],
)  # fmt: skip
def test_stop_tokens(source, ends, stops):
    """Never a tag that closes a call, never the token that opens the next turn."""
    encoder = encoder_of(source, ends)
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.stop_token_ids) == stops


@pytest.mark.parametrize(
    ("source", "ends", "messages", "reason", "words"),
    [
        (family.CALL_WITHOUT_STOP, [], ASKED, "no stop token", "writes no stop token"),
        (family.ROLE_ENDS_STANDING_HEADER, [], PLAIN, "no stop token", "writes no stop token"),
        (
            family.HEADLESS_PROMPT, [],
            [user("q"), bot("so", tool_calls=[call()]), tool("42"), bot("done")],
            "no prefix", "closes the turn before it and opens no other",
        ),
        (
            family.ROLE_ENDS_STANDING_HEADER, ["<|user|>"], ASKED[:2], "lost", "does not show",
        ),
        (
            family.CLOSED_THOUGHT, [], THOUGHT, "lost", "does not show this text .'r1'",
        ),
    ],
    ids=["call without stop", "no end", "no header", "call not shown", "closed thought"],
)  # fmt: skip
def test_refusals_name_their_cause(source, ends, messages, reason, words):
    with pytest.raises(ChatError, match=words) as caught:
        encoder_of(source, ends).encode(messages, [LOOK_UP])
    assert caught.value.reason == reason


@pytest.mark.parametrize("words", ["sentencepiece", "metaspace"])
def test_reply_begins_as_history_has_it(words):
    """Behind a header that takes the white space, a reply begins with a space of its own."""
    source = family.SPACE_EATING_HEADER
    tokens = "<|user|><|assistant|><|end|>"
    tokenizer = pair(words, source + tokens, eos="<|endoftext|>", rstrip=True)
    tokenizer.chat_template = source
    (sequence,) = ChatEncoder(tokenizer).encode(
        [user("Hi"), bot("lute"), user("more"), bot("lute")]
    )
    first, second = (sequence.input_ids[start:stop] for _, start, stop in sequence.replies)
    assert first == second
    ids = tokenizer.encode("<|assistant|>\nlute<|end|>", add_special_tokens=False)
    assert first == ids[1:]
    if words == "sentencepiece":
        assert tokenizer.convert_ids_to_tokens(first)[0].startswith("▁")
