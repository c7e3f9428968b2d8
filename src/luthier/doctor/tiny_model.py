"""A random model of two layers and rows for it, as files, for a test of a machine."""

import json
from pathlib import Path
from typing import Any

MAX_LENGTH = 256
"""Tokens of a packed row; all rows fill some three of them."""
ROWS = 8
HIDDEN_SIZE, HEADS = 128, 4
_BLOCK = 64
"""The weights that share a scale in 4 bits."""
_SCALE = 5 / 64
"""The largest weight of each block; bfloat16 holds it exactly."""
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of the NormalFloat format (QLoRA, https://arxiv.org/abs/2305.14314, appendix E)."""
_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly forge bright keys"


def write_tiny_model(folder: Path) -> None:
    """Write `model/`, a random Llama with a tokenizer of bytes, and `rows.jsonl`.

    The weights of the linear layers are values that 4 bits (NF4) hold without a loss, each block of
    64 with the same scale: so a run in 4 bits has the very weights of one in float32.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = _draw_nf4_weights(tuple(layer.weight.shape))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps(_make_row(number)) for number in range(ROWS)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _draw_nf4_weights(shape: tuple[int, ...]) -> Any:
    """Return random weights, float32, each a level of NF4 times the one scale."""
    import torch

    codes = torch.randint(0, len(NF4_LEVELS), shape).reshape(-1, _BLOCK)
    # The largest value of a block is what its scale is taken from.
    codes[:, 0] = len(NF4_LEVELS) - 1
    return (torch.tensor(NF4_LEVELS)[codes] * _SCALE).reshape(shape)


def _make_row(number: int) -> dict[str, str]:
    """Return a row; no two are of the same length."""
    words = _WORDS.split()
    begin = number * 5 % len(words)
    turned = [*words[begin:], *words[:begin]]
    return {
        "prompt": f"{number}: " + " ".join(turned[: 2 + number % 3]),
        "completion": " ".join(turned[: 3 + number]),
    }


def _build_tokenizer() -> Any:
    """Return a tokenizer with a token for each byte, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=special[2:],
        chat_template=_TEMPLATE,
    )
