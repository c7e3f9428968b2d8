"""Response templates: what transformers reads of a reply is what luthier reads."""

import copy
import functools

import pytest
import trl.chat_template_utils as trl_templates
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS
from transformers.utils.chat_parsing import parse_response

from helpers import adapter_runs
from helpers.conversations import all_templates, pair, trl
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
    with pytest.warns(UserWarning, match="so another one is saved in its place"):
        assert choose_response_template(tokenizer, qwen3) == made


@functools.cache
def trl_encoder(name):
    """An encoder of a template that TRL ships, with a tokenizer that has its tokens."""
    source = trl(name)
    tokenizer = pair("llama3-words", source)
    ends = ["<|user|>", "<|observation|>"] if "<|observation|>" in source else []
    tokenizer.add_tokens(ends, special_tokens=True)
    return ChatEncoder(
        tokenizer, date=DATE, on_lost="keep", empty_replies="train",
        eos_token_ids=tokenizer.convert_tokens_to_ids(ends),
    )  # fmt: skip


SERVED = {name: each for names, each in _RESPONSE_TEMPLATE_FALLBACKS.items() for name in names}
"""What `transformers serve` takes for models whose tokenizer has none."""
MAKERS = {
    "qwen2_5": (SERVED["qwen2"], None),
    "qwen3": (trl_templates.qwen3_template, None),
    "qwen3_5_think": (SERVED["qwen3_5"], None),
    "qwen3_6": (trl_templates.qwen3_5_template, None),
    "nemotron_3_nano": (trl_templates.nemotron_3_template, None),
    "llama3_1": (trl_templates.llama3_template, None),
    "gptoss": (trl_templates.gptoss_template, None),
    "gemma4_v5": (SERVED["gemma4"], None),
    "lfm2_2_5": (trl_templates.lfm2_2_5_template, None),
    # Its calls end with another role's token than its replies do.
    "glm4moe": (trl_templates.glm4moe_template, "reads as '<|observation|>'"),
    # The prompt behind a tool's result ends otherwise than that behind a question.
    "deepseek_r1_distill": (
        trl_templates.deepseek_r1_distill_template, "tool▁outputs▁end｜>Well.'",
    ),
    # The template writes texts as Python does, with escapes.
    "lfm2_v2": (trl_templates.lfm2_2_5_template, r"""reads as [('look_up', {'word': 'a "b"\\nc"""),
    # The template writes null within a list as None.
    "gemma4": (trl_templates.gemma4_template, "cannot be read by it: json"),
}  # fmt: skip
NOT_MADE = {"lfm2_2_5", "lfm2_v2", "gemma4"}
"""Calls in Python's notation, and values that are neither JSON nor Python."""


@pytest.mark.parametrize("name", MAKERS)
def test_what_makers_ship_and_what_is_made(name):
    encoder = trl_encoder(name)
    template, problem = MAKERS[name]
    found = find_disagreement(template, encoder)
    assert found is None if problem is None else problem in found
    made = make_response_template(encoder)
    is_made = made is not None and find_disagreement(made, encoder, is_exact=True) is None
    assert is_made == (name not in NOT_MADE)


def test_arguments_in_tags_have_the_types_of_the_schema():
    made = make_response_template(trl_encoder("qwen3_5_think"))
    parameter = "<parameter={}>\n{}\n</parameter>\n".format
    text = (
        "hm\n</think>\n\nWell.\n\n<tool_call>\n<function=f>\n"
        f"{parameter('n', 3)}{parameter('text', '3')}{parameter('list', '[1]')}</function>\n"
        "</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call><|im_end|>"
    )
    types = {"n": "integer", "text": "string", "list": "array"}
    properties = {name: {"type": each} for name, each in types.items()}
    tool = {"name": "f", "parameters": {"type": "object", "properties": properties}}
    read = parse_response(
        text, made, prefix="<|im_start|>assistant\n<think>\n",
        tools=[{"type": "function", "function": tool}],
    )  # fmt: skip
    assert (read["reasoning_content"], read["content"]) == ("hm", "Well.")
    assert [call["function"] for call in read["tool_calls"]] == [
        {"name": "f", "arguments": {"n": 3, "text": "3", "list": [1]}},
        {"name": "g", "arguments": {}},
    ]


def test_a_makers_template_that_is_left_out_is_told():
    encoder = trl_encoder("gemma4")
    tokenizer = copy.copy(encoder.tokenizer)
    tokenizer.response_template = trl_templates.gemma4_template
    with pytest.warns(UserWarning, match="so none is saved in its place. '<.tool_call>call:look_"):
        assert choose_response_template(tokenizer, encoder) is None


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
