"""The time of packed rows with attention document by document, against a dense mask.

    OMP_NUM_THREADS=1 python benchmarks/packed_attention.py

One layer of attention with SmolLM2-135M's heads (9 of 64, 3 of keys and values) and whole tiny
models, on the CPU in float32, forward and backward of one packed row. Each is the best of several
rounds, and the ratios are of one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import create_masks_for_generate

from luthier.model.varlen_attention import register_varlen_attention

ROUNDS = 3
SIZES: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "all tokens before": lambda: transformers.Qwen3Config(**SIZES),
    "a window of 256": lambda: transformers.MistralConfig(**SIZES, sliding_window=256),
}
NAMES = ("sdpa", "varlen")


def draw_row(tokens: int) -> torch.Tensor:
    """Return the positions of a row of documents as chats have them, shape (1, tokens)."""
    drawn = np.random.default_rng(0)
    positions: list[int] = []
    while len(positions) < tokens:
        length = int(max(4, drawn.lognormal(np.log(300) - 0.32, 0.8)))
        positions += range(min(length, tokens - len(positions)))
    return torch.tensor(positions)[None]


def attend_once(config: Any, positions: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    """Return the seconds of mask and attention, forward and backward, and the gradients."""
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, heads, positions.shape[1], 64, generator=generator).requires_grad_()
        for heads in (9, 3, 3)
    ]
    module = torch.nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    empty = torch.zeros(*positions.shape, 0)
    name = config._attn_implementation
    assert name in AttentionMaskInterface()
    start = time.perf_counter()
    mask = create_masks_for_generate(config, empty, None, None, position_ids=positions)
    if isinstance(mask, dict):
        (mask,) = mask.values()
    output, _ = AttentionInterface()[name](module, *states, mask)
    output.square().sum().backward()
    return time.perf_counter() - start, [state.grad for state in states if state.grad is not None]


def train_once(model: Any, positions: torch.Tensor) -> float:
    """Return the seconds of a model's forward and backward."""
    ids = torch.arange(positions.shape[1])[None] % 1024
    start = time.perf_counter()
    outputs = model(input_ids=ids, position_ids=positions, use_cache=False)
    outputs.logits.logsumexp(-1).mean().backward()
    return time.perf_counter() - start


def main() -> None:
    """Print one line for each kind of attention and length."""
    register_varlen_attention()
    for label, make_config in CONFIGS.items():
        for tokens in (512, 2048, 4096):
            positions = draw_row(tokens)
            configs = {name: make_config() for name in NAMES}
            for name, config in configs.items():
                config._attn_implementation = name
            models = {
                name: transformers.AutoModelForCausalLM.from_config(config)
                for name, config in configs.items()
            }
            layer, whole, gradients = {}, {}, {}
            for name in NAMES:
                runs = [attend_once(configs[name], positions) for _ in range(ROUNDS)]
                layer[name], gradients[name] = min(seconds for seconds, _ in runs), runs[0][1]
                whole[name] = min(train_once(models[name], positions) for _ in range(ROUNDS))
            difference = max(
                float((a - b).abs().max() / b.abs().max())
                for a, b in zip(gradients["varlen"], gradients["sdpa"], strict=True)
            )
            print(
                f"{label:<18} {tokens:>5} tokens, {int((positions == 0).sum()):>2} documents: "
                f"attention {layer['sdpa'] * 1e3:6,.0f} -> {layer['varlen'] * 1e3:4,.0f} ms "
                f"({layer['sdpa'] / layer['varlen']:.1f} times), two layers and head "
                f"{whole['sdpa'] * 1e3:6,.0f} -> {whole['varlen'] * 1e3:5,.0f} ms "
                f"({whole['sdpa'] / whole['varlen']:.1f} times); gradients differ by "
                f"{difference:.0e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
