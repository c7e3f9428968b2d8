"""Prompts of rows for a model that learns from what it answers itself."""

import pytest

from helpers.chatml import CHAT, CHATML, byte_tokenizer
from helpers.tool_templates import PLAIN
from luthier.chat import ChatError
from luthier.data.encoders.prompts import PromptEncoder

MOODY = "{{ mood }}" + CHATML
ASKED = [{"role": "user", "content": "Hi"}]
TOKENIZER = byte_tokenizer()


def encode(example, **settings):
    return PromptEncoder(TOKENIZER, CHAT | settings, None).encode([example])


def test_a_row_has_variables_of_its_own():
    made = encode({"messages": ASKED, "chat_template_kwargs": {"mood": "calm"}}, template=MOODY)
    ids = made.columns["input_ids"].values.tolist()
    assert TOKENIZER.decode(ids) == "calm<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("on_lost", ["error", "drop", "keep"])
def test_a_variable_that_the_template_never_reads(on_lost):
    example = {"messages": ASKED, "chat_template_kwargs": {"mood": "calm"}}
    if on_lost == "error":
        with pytest.raises(ChatError) as error:
            encode(example)
        assert str(error.value).startswith("row 0, field `chat_template_kwargs`: 'mood' is set")
        return
    (outcome,) = encode(example, on_lost=on_lost).outcomes
    assert outcome.reason == "unread template variable"
    assert outcome.sequences == int(on_lost == "keep")


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "sub", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("own", [None, [], [OTHER]], ids=["none", "an empty list", "one"])
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools of the run", "tools of the run"])
def test_a_row_has_tools_of_its_own(own, tools):
    example = {"messages": ASKED} | ({} if own is None else {"tools": own})
    encoder = PromptEncoder(TOKENIZER, CHAT | {"template": PLAIN}, None, tools)
    if own and tools:
        # A prompt would show tools that the model cannot call.
        with pytest.raises(ChatError) as error:
            encoder.encode([example])
        assert str(error.value).startswith(
            "row 0, field `tools`: the row has tools of its own, and"
        )
        return
    text = TOKENIZER.decode(encoder.encode([example]).columns["input_ids"].values.tolist())
    assert ('"add"' in text, '"sub"' in text) == (bool(tools), bool(own))
