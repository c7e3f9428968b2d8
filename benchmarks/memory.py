"""How near `luthier plan` comes to what a run on a CPU really takes.

    OMP_NUM_THREADS=2 python benchmarks/memory.py
    OMP_NUM_THREADS=2 python benchmarks/memory.py --only nf4 --heap returned

Each case trains SmolLM2-135M for three steps in a process of its own, by luthier's own model and
trainer: the process notes its memory before the model is there (`base`), and the highest of the
training (VmHWM, put back when training begins). The difference is held against the plan's total
without the base. Rows have the full length, but for one that is a token shorter, so that
attention gets its mask.

`--heap as-is` leaves the C library alone, `returned` has it give large blocks back
(MALLOC_MMAP_THRESHOLD_=131072). Both are measured unless one is named. One run at a time, 10 to
60 s each on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

HEAPS = {"as-is": {}, "returned": {"MALLOC_MMAP_THRESHOLD_": "131072"}}
MB = 1e6
STEPS = 3
QUIET = [
    "trainer.args.eval_strategy=no",
    "trainer.evaluation.metrics=[]",
    f"trainer.args.max_steps={STEPS}",
    "trainer.args.disable_tqdm=true",
]


class Case(NamedTuple):
    """A run: rows and tokens of a micro-batch, and the words behind `recipe=quickstart`."""

    name: str
    rows: int
    length: int
    words: str
    processes: int = 1

    @property
    def overrides(self) -> list[str]:
        """The words of the command line."""
        sizes = [
            f"trainer.args.per_device_train_batch_size={self.rows}",
            f"chat.max_length={self.length}",
        ]
        return [*start(self.words), *self.words.split(), *sizes, *QUIET]


LORA, WHOLE = "recipe=quickstart", "model=smollm2_135m"
F32, BF16 = "model.dtype=float32", "model.dtype=bfloat16"
ON = "trainer.args.activation_checkpointing=true"
OFF = "trainer.args.activation_checkpointing=false"
PLAIN, OPTIM = "quantization=none", "trainer.args.optim"
CASES = [
    Case("full float32", 2, 128, f"{WHOLE} {F32} {OFF}"),
    Case("full float32", 4, 256, f"{WHOLE} {F32} {OFF}"),
    Case("full float32, checkpointing", 4, 256, f"{WHOLE} {F32} {ON}"),
    Case("full bf16 autocast", 4, 256, f"{WHOLE} {BF16} {OFF}"),
    Case("full bf16, 2 accumulated", 4, 128,
         f"{WHOLE} {BF16} {OFF} trainer.args.gradient_accumulation_steps=2"),
    Case("full float32, adafactor", 2, 128, f"{WHOLE} {F32} {OFF} {OPTIM}=adafactor"),
    Case("full float32, adamw_8bit", 2, 128, f"{WHOLE} {F32} {OFF} {OPTIM}=adamw_8bit"),
    Case("full float32, sgd", 2, 128, f"{WHOLE} {F32} {OFF} {OPTIM}=sgd"),
    Case("full float32, DDP", 2, 128, f"{WHOLE} {F32} {OFF}", 2),
    Case("LoRA float32", 2, 256, f"{PLAIN} {F32} {OFF}"),
    Case("LoRA float32", 4, 256, f"{PLAIN} {F32} {OFF}"),
    Case("LoRA float32, checkpointing", 4, 256, f"{PLAIN} {F32} {ON}"),
    Case("LoRA bf16", 4, 256, f"{PLAIN} {BF16} {OFF}"),
    Case("LoRA bf16, dropout", 4, 256, f"{PLAIN} {BF16} {OFF} lora.lora_dropout=0.05"),
    Case("LoRA bf16, checkpointing", 8, 256, f"{PLAIN} {BF16} {ON}"),
    Case("LoRA bf16, eager attention", 2, 512, f"{PLAIN} {BF16} {OFF} model.attention=eager"),
    Case("QLoRA nf4 float32", 2, 256, f"{F32} {OFF}"),
    Case("QLoRA nf4 bf16", 4, 256, f"{BF16} {OFF}"),
    Case("QLoRA nf4 bf16", 8, 128, f"{BF16} {OFF}"),
    Case("QLoRA nf4 bf16, checkpointing", 8, 256, f"{BF16} {ON}"),
    Case("QLoRA int8 float32", 2, 256, f"quantization=int8 {F32} {OFF}"),
]  # fmt: skip


def start(words: str) -> list[str]:
    """A recipe, or for full fine-tuning the dataset alone."""
    return ["dataset=quickstart", "dataset.eval.path=null"] if "model=" in words else [LORA]


def main() -> None:
    """Measure the cases that were asked for and print them beside their plans."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--heap", choices=list(HEAPS), help="one of the two heaps")
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        work(json.loads(given.case))
        return
    heaps = [given.heap] if given.heap else list(HEAPS)
    rows = []
    print(f"{'case':<32}{'rows':>10}  {'heap':<10}{'plan':>9}{'measured':>10}{'plan is':>9}")
    for case in (case for case in CASES if given.only in case.name):
        for name in heaps:
            rows.append(measure(case, name))
            show(rows[-1])
            if given.json:
                Path(given.json).write_text(json.dumps(rows, indent=1) + "\n")


def show(row: dict[str, Any]) -> None:
    """Print one row; the last column says how far the plan is from what was measured."""
    off = f"{row['plan'] / row['peak'] - 1:+.1%}"
    size = f"{row['rows']} x {row['length']}"
    print(
        f"{row['name']:<32}{size:>10}  {row['heap']:<10}{row['plan'] / MB:>6,.0f} MB"
        f"{row['peak'] / MB:>7,.0f} MB{off:>9}",
        flush=True,
    )


def measure(case: Case, heap: str) -> dict[str, Any]:
    """Plan a case and run it in a process of its own."""
    order = json.dumps(case._asdict())
    environ = os.environ | HEAPS[heap] | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, "--case", order]
    if case.processes > 1:
        environ["ACCELERATE_USE_CPU"] = "true"
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(case.processes)]
        command[1:1] = [*torchrun, "--standalone"]
    done = subprocess.run(command, env=environ, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{case.name}: {done.stderr[-2000:]}")
    found = [line for line in done.stdout.splitlines() if line.startswith('{"base"')]
    measured = json.loads(found[0])
    return case._asdict() | {"heap": heap, "plan": planned(case, heap)} | measured


def planned(case: Case, name: str) -> int:
    """The plan's total without what Python and its libraries take."""
    from luthier.config import load_config
    from luthier.memory import plan_memory
    from luthier.memory.sharding import Sharding
    from luthier.memory.workload import PROCESS_OVERHEAD

    shared = Sharding("ddp", case.processes) if case.processes > 1 else Sharding()
    with patch.dict(os.environ, HEAPS[name]):
        return (
            plan_memory(load_config(case.overrides).config, shardings=[shared]).best.total
            - PROCESS_OVERHEAD
        )


def work(order: dict[str, Any]) -> None:
    """Be the measured process: build and train, and print what it took as JSON."""
    case = Case(**order)
    import time

    trainer_of = prepare(case)
    base = memory("VmRSS")
    trainer = trainer_of()
    loaded = memory("VmRSS")
    # 5: put the highest memory back to what is used now (man 5 proc).
    Path("/proc/self/clear_refs").write_text("5")
    began = time.process_time()
    trainer.train()
    took = time.process_time() - began
    peak = memory("VmHWM") - base
    print(json.dumps({"base": base, "loaded": loaded - base, "peak": peak, "seconds": took}))


def prepare(case: Case) -> Any:
    """Import everything that training needs; returns what loads the model and makes the trainer."""
    import bitsandbytes  # noqa: F401
    from datasets import Dataset

    from luthier.config import load_config
    from luthier.model.adapters import add_adapter
    from luthier.model.device import choose_machine
    from luthier.model.load import load_model
    from luthier.model.tokenizer import load_tokenizer
    from luthier.train.arguments import build_sft_arguments
    from luthier.train.methods.sft import TokenTrainer

    config = load_config(case.overrides).config
    machine, tokenizer = choose_machine(config.model), load_tokenizer(config.model)
    folder = Path(config.output_dir)
    args = build_sft_arguments(config, machine, folder, has_eval=False)
    rows = [list(range(100, 100 + case.length))] * (case.rows * STEPS * 4)
    short = [row[:-1] if n % case.rows == 1 else row for n, row in enumerate(rows)]

    def trainer() -> Any:
        model: Any = load_model(
            config.model, config.quantization, machine, full=not config.lora.is_enabled
        )
        if config.lora.is_enabled:
            model = add_adapter(model, config.lora, config.seed)
        data = Dataset.from_dict({"input_ids": short, "labels": short})
        args.train_sampling_strategy = "sequential"
        return TokenTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)

    return trainer


def memory(name: str) -> int:
    """Bytes of this process by its kernel name: VmRSS (now) or VmHWM (the most)."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
