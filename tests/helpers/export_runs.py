"""Runs of tiny models, saved by the libraries themselves, without a training."""

import json
from pathlib import Path

import torch
import yaml

from helpers import chatml
from helpers.adapter_models import config_of, prepared, stir
from helpers.chatml import CHATML, byte_tokenizer
from luthier.model.adapters import convert_to_plain_lora
from luthier.storage.atomic import write_json

CHAT = chatml.CHAT | {"template": CHATML}
RESULTS = {
    "eval_loss": {"before": 1.5, "after": 0.25},
    "exact_match": {"before": 0.0, "after": 0.875},
}


def make_base(folder, tied=False, kind="llama", **changes):
    """A random model of two layers with a byte-level tokenizer."""
    import transformers

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    if kind == "gpt2":
        own = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
        names = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
        config = transformers.GPT2Config(**{n: settings[n] for n in names} | own)
    else:
        config = transformers.LlamaConfig(**settings | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size=changes.get("shard", "5GB"))
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer():
    return byte_tokenizer(
        bos_token="<|im_start|>", pad_token="<|im_end|>", unk_token="<|endoftext|>"
    )


def make_run(folder, base, name="default", **groups):
    """The folder of a finished run, its adapter moved as if it had trained."""
    groups.setdefault("lora", {"r": 4, "lora_alpha": 8})
    config = config_of(base, **groups)
    model, tokenizer = prepared(config)
    stir(model)
    if not config.lora.is_enabled:
        model.to(torch.float32)
    target = folder / "model"
    model.save_pretrained(target)
    if config.lora.is_enabled:
        (target / "README.md").unlink(missing_ok=True)
        convert_to_plain_lora(model, target)
    tokenizer.save_pretrained(target)
    write_json(target / "chat.json", CHAT)
    written = config.model_dump() | {"recipe": "tiny", "output_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    write_json(folder / "run.json", record(folder, base))
    (folder / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def record(folder, base):
    """What run.json holds, as far as a card reads it."""
    counts = {"rows": 40, "sequences": 40, "tokens": 900, "trained_tokens": 450}
    return {
        "status": "finished",
        "recipe": "tiny",
        "overrides": ["recipe=tiny", f"model.path={base}", f"output_dir={folder}"],
        "versions": {"python": "3.11.7", "luthier": "0.1.0", "transformers": "5.23.0"},
        "hardware": {"cpu": "A CPU", "cores": 2},
        "launch": {"processes": 1},
        "data": {"sha256": "ab" * 32, "train": counts, "held_out": counts | {"rows": 8}},
        "chat": CHAT,
        "results": RESULTS,
        "training_seconds": 75.0,
    }


def ids_of(text="What is it?"):
    """A prompt as the template writes it."""
    tokenizer = make_tokenizer()
    said = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        said, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def read(path):
    return json.loads(Path(path).read_text())
