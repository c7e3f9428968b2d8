"""A tiny model with a template of reasoning and calls, and a way to make it write a text."""

import pytest
import torch

from helpers import adapter_runs
from helpers.conversations import all_templates
from luthier.infer import LLM


@pytest.fixture(scope="session")
def thinker_folder(tmp_path_factory):
    """A tiny model with Qwen3's template."""
    folder = tmp_path_factory.mktemp("thinker") / "model"
    adapter_runs.base(folder, max_position_embeddings=4096)
    tokenizer = adapter_runs.tokenizer()
    tokenizer.model_max_length = 4096
    tokenizer.chat_template = all_templates()["chat_templates/qwen3"]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def thinker(thinker_folder):
    """That model, loaded."""
    with LLM(str(thinker_folder)) as llm:
        yield llm


@pytest.fixture
def forced(thinker):
    """Let the model write a text, token by token: nothing else has a score."""
    state = {"ids": [], "step": 0}

    def start(_, args, inputs):
        # The prompt comes in one piece, and then each token by itself.
        if inputs["input_ids"].shape[1] > 1:
            state["step"] = 0

    def push(_, inputs, output):
        output = torch.zeros_like(output)
        output[..., -1, state["ids"][state["step"]]] = 1e4
        state["step"] += 1
        return output

    def force(text):
        state["ids"] = thinker.tokenizer.encode(text, add_special_tokens=False)

    hooks = [
        thinker.model.register_forward_pre_hook(start, with_kwargs=True),
        thinker.model.lm_head.register_forward_hook(push),
    ]
    yield force
    for hook in hooks:
        hook.remove()
