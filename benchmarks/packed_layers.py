"""The time of packed rows against padded ones in models whose layers run document by document.

    OMP_NUM_THREADS=1 python benchmarks/packed_layers.py

Random models of LFM2 (short convolutions), Qwen3.5's text part (gated linear attention), and
Llama, whose layers packing leaves alone, on the CPU, in float32, without kernel packages. All rows
go through once, forward and backward: packed, padded in random order, padded by like length.
Each is the best of several rounds, and the ratios are of one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from luthier.data.batching.collators import PackingCollator, PaddingCollator
from luthier.data.batching.packing import pack_rows
from luthier.data.batching.token_rows import Document
from luthier.train.packing_check import check_isolation

ROUNDS, ROWS, LENGTH, TOKENS = 2, 96, 512, 2048
"""Rounds, training rows, tokens of a packed row, tokens of a batch."""
SIZES: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "lfm2": lambda: transformers.Lfm2Config(
        **SIZES, layer_types=["conv", "conv", "full_attention", "conv"]
    ),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(
        **SIZES, head_dim=64, linear_num_key_heads=4, linear_num_value_heads=4,
        linear_key_head_dim=64, linear_value_head_dim=64,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
    ),
}  # fmt: skip


def draw_documents() -> list[Document]:
    """Return documents as chats have them: many short ones and a long tail."""
    drawn = np.random.default_rng(0)
    lengths = drawn.lognormal(np.log(90) - 0.32, 0.8, ROWS).astype(int).clip(4, LENGTH)
    rows = [drawn.integers(3, 1024, length) for length in lengths]
    return [Document(ids, ids) for ids in rows]


def train(model: Any, batches: list[dict[str, Any]], documents: Any = None) -> float:
    """Return the seconds that all batches take, forward and backward."""
    start = time.perf_counter()
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "tokens")}
        if documents is not None:
            documents.expect_batch(inputs["position_ids"])
        model(**inputs, use_cache=False).logits.logsumexp(-1).mean().backward()
    return time.perf_counter() - start


def main() -> None:
    """Print one line for each model."""
    rows = draw_documents()
    lengths = np.array([len(row.input_ids) for row in rows])
    layout, padding = PackingCollator(0), PaddingCollator(0)
    bins = [[rows[number] for number in numbers] for numbers in pack_rows(lengths, LENGTH, 1)]
    size = TOKENS // LENGTH
    packed = [layout(bins[at : at + size]) for at in range(0, len(bins), size)]

    def pad(order: Any) -> list[dict[str, Any]]:
        """Lay out as many rows a batch as packed batches hold in the mean."""
        count = len(rows) // len(packed)
        return [
            padding([(rows[number],) for number in order[at : at + count]])
            for at in range(0, len(rows), count)
        ]

    by_length = pad(np.argsort(lengths))
    at_random = pad(np.random.default_rng(1).permutation(len(rows)))
    print(
        f"{len(rows)} rows, {lengths.sum():,} tokens; tokens with padding: packed "
        f"{sum(b['input_ids'].numel() for b in packed):,}, by length "
        f"{sum(b['input_ids'].numel() for b in by_length):,}, random "
        f"{sum(b['input_ids'].numel() for b in at_random):,}"
    )
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config()).float()
        documents = check_isolation(model, layout).documents
        times = [
            (train(model, packed, documents), train(model, by_length), train(model, at_random))
            for _ in range(ROUNDS)
        ]
        best = [min(column) for column in zip(*times, strict=True)]
        print(
            f"{name:<8} packed {best[0]:.2f} s; padded by length {best[1] / best[0]:.2f} times "
            f"that, at random {best[2] / best[0]:.2f} times ({documents or 'left as it is'})",
            flush=True,
        )


if __name__ == "__main__":
    main()
