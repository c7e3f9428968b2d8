"""A tiny model with a chat template, and runs that trained it, made without training."""

import json
import random
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import chatml
from helpers.chatml import CHATML, byte_tokenizer

CONTEXT = 128
CHAT = chatml.CHAT | {"template": CHATML, "max_length": 64}


def tokenizer():
    """Bytes, and ChatML's control tokens; the padding token is none of a reply's."""
    return byte_tokenizer(
        bos_token="<|im_start|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        model_max_length=CONTEXT,
    )  # fmt: skip


def base(folder, seed=0, **changes):
    """A random Llama of two layers that ends about every tenth reply."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 259, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
        "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**settings | changes))
    model.lm_head.weight.data[2] *= 1.5  # the stop token
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def config_of(model, rows="rows.jsonl", **groups):
    """A run's resolved config."""
    return {
        "model": {"path": str(model), "device": "cpu", "dtype": "float32"},
        "dataset": {"path": str(rows)}, "lora": {"r": 4}, "chat": {"max_length": 64},
        "output_dir": "run", "recipe": "tiny",
    } | groups  # fmt: skip


def run(folder, base, rows="rows.jsonl", chat=CHAT, **groups):
    """A finished run with a LoRA adapter that changes what the base says."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(base)
    wanted = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, wanted)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data += 0.3 * torch.randn(weight.shape)
    tuned.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "README.md").unlink(missing_ok=True)
    write(folder, {"config.yaml": yaml.safe_dump(config_of(base, rows, **groups)),
                   "run.json": json.dumps({"status": "finished", "chat": chat}),
                   "model/chat.json": json.dumps(chat)})  # fmt: skip
    return folder


def write(folder, files):
    for name, text in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def questions(number, seed=5):
    """Users' messages of very different lengths."""
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefgh ", k=draw.randint(1, 60))) for _ in range(number)]
