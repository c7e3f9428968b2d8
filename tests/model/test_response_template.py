"""Response templates: what transformers reads of a reply is what luthier reads."""

import copy

import pytest
from transformers.utils.chat_parsing import parse_response

from helpers import adapter_runs
from helpers.conversations import all_templates
from luthier.chat import ChatEncoder
from luthier.model.response_template import (
    choose_response_template,
    compare_reading,
    find_disagreement,
    make_response_template,
)

TEMPLATES = all_templates()
DATE = "2026-01-01"


def encoder_of(source):
    tokenizer = adapter_runs.tokenizer()
    return ChatEncoder(tokenizer, source, date=DATE, on_lost="keep", empty_replies="train")


@pytest.fixture(scope="module")
def qwen3():
    return encoder_of(TEMPLATES["chat_templates/qwen3"])


def test_one_is_made_for_reasoning_and_calls(qwen3):
    made = make_response_template(qwen3)
    assert find_disagreement(made, qwen3, is_exact=True) is None
    call = '{"name": "f", "arguments": {"n": 1}}'
    text = f"<think>\nhm\n</think>\n\nWell.\n<tool_call>\n{call}\n</tool_call>"
    read = parse_response(f"{text}<|im_end|>", made, prefix="<|im_start|>assistant\n")
    assert (read["reasoning_content"], read["content"]) == ("hm", "Well.")
    (call,) = read["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {"n": 1}}


CHANGES = {
    "the close of reasoning": ("reasoning_content", {"close": ["</thinking>"]}),
    "the open of calls": ("tool_calls", {"open": ["<call>"]}),
    "the stop token": ("content", {"close": ["<|end|>"]}),
    "stripped content": ("content", {"content_args": {"strip": True}}),
    "the key of arguments": (
        "tool_calls", {"transform": {"function": {"name": "{content.name}", "arguments": "x"}}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_reads_otherwise_is_found(qwen3, change):
    name, fields = CHANGES[change]
    other = copy.deepcopy(make_response_template(qwen3))
    other["fields"][name] |= fields
    assert find_disagreement(other, qwen3, is_exact=True) is not None
    # Most makers' templates strip texts, which is no other message.
    assert (find_disagreement(other, qwen3) is None) == (change == "stripped content")


def test_the_tokenizers_own_stays_where_it_agrees(qwen3):
    tokenizer = adapter_runs.tokenizer()
    made = choose_response_template(tokenizer, qwen3)
    assert made == make_response_template(qwen3)
    tokenizer.response_template = made | {"defaults": {"role": "assistant", "content": ""}}
    assert choose_response_template(tokenizer, qwen3) == tokenizer.response_template
    tokenizer.response_template = {"fields": {"content": {}}}
    assert choose_response_template(tokenizer, qwen3) == made


def test_a_template_that_luthier_reads_otherwise_is_not_written():
    # Calls in one list: no field of a response template opens at each.
    source = (
        TEMPLATES["chat_templates/qwen3"]
        .replace("<tool_call>\\n", "")
        .replace("\\n</tool_call>", "")
    )
    assert choose_response_template(adapter_runs.tokenizer(), encoder_of(source)) is None


def test_a_difference_is_described(qwen3):
    made = make_response_template(qwen3)
    messages = [{"role": "user", "content": "a"}]
    prompt = qwen3.prompt(messages)
    reply = qwen3.tokenizer.encode("Well.<|im_end|>", add_special_tokens=False)
    assert compare_reading(made, qwen3, prompt, reply, {"content": "Well."}, None) is None
    problem = compare_reading(made, qwen3, prompt, reply, {"content": "Well!"}, None)
    assert problem == "'Well.<|im_end|>': its content is 'Well!', and reads as 'Well.'"
