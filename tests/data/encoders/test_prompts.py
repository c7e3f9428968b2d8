"""Prompts of rows for a model that learns from what it answers itself."""

import pytest

from helpers.chatml import CHAT, CHATML, byte_tokenizer
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
