"""What tests of many rooms make: a tokenizer of bytes with ChatML, and a run's chat settings."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = {
    "template": None, "train_on": "all", "boundaries": "served", "on_lost": "error",
    "max_length": None, "on_long": "turns", "date": "2026-01-01", "variables": {},
    "eos_token_ids": [], "empty_replies": "error", "roles": [],
}  # fmt: skip
"""Chat settings as a run writes them down."""


def byte_tokenizer(before=SPECIAL, after=(), **facts):
    """A tokenizer of single bytes, with special tokens before and after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({t: n for n, t in enumerate([*before, *alphabet, *after])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*before, *after])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"eos_token": "<|im_end|>", "chat_template": CHATML} | facts
    )


def jsonl(path, rows):
    """Write rows to a file, one a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
