"""Pieces of a reply: together the whole text, and never a part of a character."""

import os
import random
from pathlib import Path

import pytest
import torch
import transformers

from helpers import adapter_runs as material
from helpers.model_families import FAMILIES, family_config
from luthier.infer import generate
from luthier.infer.stream import TextStream

ASSETS = Path(os.environ.get("LUTHIER_ASSETS", "none"))
NAMES = ("smollm2", "qwen3", "llama3_1", "llama2", "mistral_tekken_v3")
TEXTS = ["Hello, naïve 琵琶 café 👩‍👩‍👧‍👦 x", "  two spaces\n\n\nx", " ' s n't don't ."]


@pytest.fixture(params=["tiny", *(NAMES if ASSETS.is_dir() else ())])
def tokenizer(request):
    if request.param == "tiny":
        return material.tokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ASSETS / "tokenizers" / request.param)


def pieces_of(tokenizer, ids):
    pieces = TextStream(lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    return [*(pieces.add(token) for token in ids), pieces.rest()]


def test_the_pieces_are_the_text(tokenizer):
    draw = random.Random(0)
    drawn = [[draw.randrange(len(tokenizer)) for _ in range(30)] for _ in range(40)]
    for ids in [*(tokenizer.encode(text, add_special_tokens=False) for text in TEXTS), *drawn]:
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(pieces_of(tokenizer, ids)) == whole


def test_a_character_of_several_tokens_comes_in_one_piece(tokenizer):
    ids = tokenizer.encode("a琵👧b", add_special_tokens=False)
    pieces = pieces_of(tokenizer, ids)
    assert "�" not in "".join(pieces)
    assert any("琵" in piece for piece in pieces) and any("👧" in piece for piece in pieces)


CACHED = {
    # Keys and values of two heads: 16 wide in two layers, and 32 in the two with full attention.
    "gemma4": 2 * 2 * (2 * 16 + 2 * 32) * 4,
    "mamba2": 0,
}


@pytest.mark.parametrize("family", CACHED)
def test_a_batch_counts_the_keys_of_each_layer(family):
    with torch.device("meta"):
        model = getattr(transformers, FAMILIES[family].architecture)(family_config(family))
    beside = 24 * 64 * 4 * 10 + 12 * 272
    assert generate.bytes_per_row(model, 10, 6) == CACHED[family] * 16 + beside


def test_a_batch_is_as_large_as_the_memory(tuned_llm, monkeypatch):
    # Keys and values 2 * 2 layers * 2 heads * 12 * 4 bytes; 24 * 48 * 4 while the prompt is read.
    assert generate.bytes_per_row(tuned_llm.model, 10, 6) == 384 * 16 + 4608 * 10 + 12 * 259
    for free, size in ((0, 1), (1_000_000, 10), (10**12, 64)):
        monkeypatch.setattr(generate, "free_memory", lambda model, free=free: (free, "cpu"))
        assert generate.choose_batch_size(tuned_llm.model, 10, 6) == size
