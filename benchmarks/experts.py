"""How fast the experts of a mixture are computed: transformers' three ways, in the same run.

    OMP_NUM_THREADS=2 python benchmarks/experts.py [--device cuda] [--tokens 256] [--batched]

A Qwen3-MoE of 4 layers, 16 experts of which each token takes 4, width 512, in float32 and bfloat16;
all of it trains, or LoRA of rank 8 on attention and experts. A step is forward and backward of rows
of 128 tokens. For each way of `experts_implementation`, against `eager`, a loop over the experts:

- `time`: the ratio of the shortest times of three steps (smaller is faster), taken in turns;
- `gradients`: the greatest distance of a weight's gradient, by the length of eager's;
- `repeats`: whether the same step gives the same gradients, bit by bit.

`batched_mm` copies the weights of its experts for each token, so it takes minutes on a CPU and is
measured with `--batched` alone. transformers (5.23) takes `grouped_mm` where nobody names one, and
luthier leaves it at that.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

WAYS = ("eager", "grouped_mm")
REPEATS = 3
LENGTH = 128


def make_model(way: str, dtype: torch.dtype, adapted: bool, device: str) -> Any:
    """The same random model each time, with its experts computed in one of the ways."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256,
        num_hidden_layers=4, num_experts=16, num_experts_per_tok=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, experts_implementation=way,
    )  # fmt: skip
    model: Any = Qwen3MoeForCausalLM(config).to(device, dtype)
    if adapted:
        lora = LoraConfig(
            r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        )  # fmt: skip
        torch.manual_seed(1)
        model = get_peft_model(model, lora)
    assert model.config._experts_implementation == way
    return model.train()


def take_step(model: Any, ids: torch.Tensor) -> float:
    """The seconds of one forward and backward."""
    model.zero_grad(set_to_none=True)
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """The gradients by name."""
    named = model.named_parameters()
    return {name: w.grad.detach().double() for name, w in named if w.grad is not None}


def measure(
    dtype: torch.dtype, adapted: bool, device: str, tokens: int, ways: tuple[str, ...]
) -> list[str]:
    """One line for each way."""
    ids = torch.randint(
        0,
        1024,
        (max(tokens // LENGTH, 1), min(tokens, LENGTH)),
        generator=torch.Generator().manual_seed(2),
    )
    ids = ids.to(device)
    models = {way: make_model(way, dtype, adapted, device) for way in ways}
    made, repeats = {}, {}
    for way, model in models.items():
        take_step(model, ids)
        made[way] = gradients(model)
        take_step(model, ids)
        again = gradients(model)
        repeats[way] = all(bool((again[name] == g).all()) for name, g in made[way].items())
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(REPEATS):
        for way, model in models.items():
            best[way] = min(best[way], take_step(model, ids))
    lines = []
    for way in ways:
        distance = max(
            float((made[way][name] - g).norm() / g.norm().clamp(min=1e-12))
            for name, g in made["eager"].items()
        )
        label = f"{str(dtype).removeprefix('torch.')}, {'LoRA' if adapted else 'full'}"
        lines.append(
            f"{label:16} {way:11} {best[way] * 1000:8.0f} ms  x {best[way] / best['eager']:5.2f}  "
            f"gradients {distance:.1e}  repeats {'yes' if repeats[way] else 'no'}"
        )
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batched", action="store_true")
    chosen = parser.parse_args()
    ways = (*WAYS, "batched_mm") if chosen.batched else WAYS
    for dtype in (torch.float32, torch.bfloat16):
        for adapted in (False, True):
            print(
                "\n".join(measure(dtype, adapted, chosen.device, chosen.tokens, ways)), flush=True
            )


if __name__ == "__main__":
    main()
