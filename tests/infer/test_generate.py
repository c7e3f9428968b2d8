"""Batched replies equal single ones, and end before the stop token."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.infer.generate import generate, until_stop
from luthier.infer.questions import read_questions


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_a_batch_answers_as_one_by_one_and_keeps_the_order(model):
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16], [3, 4], [20] * 12]
    settings = {"stop_ids": [2], "pad_id": 0, "max_new_tokens": 8}
    single = [generate(model, [p], batch_size=1, **settings)[0] for p in prompts]
    assert generate(model, prompts, batch_size=3, **settings) == single
    assert len({tuple(reply) for reply in single}) > 1


def test_the_model_trains_on_as_before(model):
    model.train()
    generate(model, [[5, 6]], stop_ids=[2], pad_id=0, max_new_tokens=2, batch_size=1)
    assert model.training


@pytest.mark.parametrize(
    ("ids", "reply"),
    [([4, 5, 2, 7], [4, 5]), ([2], []), ([4, 5], [4, 5])],
    ids=["cut", "empty", "open"],
)
def test_a_reply_ends_before_its_stop_token(ids, reply):
    assert until_stop(ids, [2, 3]) == reply


def test_questions_end_before_a_reply_in_words():
    user, reply = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    call = {"role": "assistant", "tool_calls": []}
    rows = [{"messages": [user, reply]}, {"messages": [user]}, {"messages": [user, call]}] * 2
    found = read_questions([(row, {}) for row in rows], 5)
    assert [q.expected for q in found] == ["a", "a"]
    assert found[0].messages == [user]
