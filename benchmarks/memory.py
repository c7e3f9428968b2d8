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
import time
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
    """A run: rows and tokens of a micro-batch, and the settings behind `recipe=quickstart`."""

    name: str
    rows: int
    length: int
    settings: str
    processes: int = 1

    @property
    def overrides(self) -> list[str]:
        """The settings on the command line."""
        sizes = [
            f"trainer.args.per_device_train_batch_size={self.rows}",
            f"chat.max_length={self.length}",
        ]
        return [*config_groups(self.settings), *self.settings.split(), *sizes, *QUIET]


RECIPE, MODEL = "recipe=quickstart", "model=smollm2_135m"
F32, BF16 = "model.dtype=float32", "model.dtype=bfloat16"
CKPT = "trainer.args.activation_checkpointing=true"
NO_CKPT = "trainer.args.activation_checkpointing=false"
PLAIN, OPTIMIZER = "quantization=none", "trainer.args.optim"
CASES = [
    Case("full float32", 2, 128, f"{MODEL} {F32} {NO_CKPT}"),
    Case("full float32", 4, 256, f"{MODEL} {F32} {NO_CKPT}"),
    Case("full float32, checkpointing", 4, 256, f"{MODEL} {F32} {CKPT}"),
    Case("full bf16 autocast", 4, 256, f"{MODEL} {BF16} {NO_CKPT}"),
    Case("full bf16, 2 accumulated", 4, 128,
         f"{MODEL} {BF16} {NO_CKPT} trainer.args.gradient_accumulation_steps=2"),
    Case("full float32, adafactor", 2, 128, f"{MODEL} {F32} {NO_CKPT} {OPTIMIZER}=adafactor"),
    Case("full float32, adamw_8bit", 2, 128, f"{MODEL} {F32} {NO_CKPT} {OPTIMIZER}=adamw_8bit"),
    Case("full float32, sgd", 2, 128, f"{MODEL} {F32} {NO_CKPT} {OPTIMIZER}=sgd"),
    Case("full float32, DDP", 2, 128, f"{MODEL} {F32} {NO_CKPT}", 2),
    Case("LoRA float32", 2, 256, f"{PLAIN} {F32} {NO_CKPT}"),
    Case("LoRA float32", 4, 256, f"{PLAIN} {F32} {NO_CKPT}"),
    Case("LoRA float32, checkpointing", 4, 256, f"{PLAIN} {F32} {CKPT}"),
    Case("LoRA bf16", 4, 256, f"{PLAIN} {BF16} {NO_CKPT}"),
    Case("LoRA bf16, dropout", 4, 256, f"{PLAIN} {BF16} {NO_CKPT} lora.lora_dropout=0.05"),
    Case("LoRA bf16, checkpointing", 8, 256, f"{PLAIN} {BF16} {CKPT}"),
    Case("LoRA bf16, eager attention", 2, 512, f"{PLAIN} {BF16} {NO_CKPT} model.attention=eager"),
    Case("QLoRA nf4 float32", 2, 256, f"{F32} {NO_CKPT}"),
    Case("QLoRA nf4 bf16", 4, 256, f"{BF16} {NO_CKPT}"),
    Case("QLoRA nf4 bf16", 8, 128, f"{BF16} {NO_CKPT}"),
    Case("QLoRA nf4 bf16, checkpointing", 8, 256, f"{BF16} {CKPT}"),
    Case("QLoRA int8 float32", 2, 256, f"quantization=int8 {F32} {NO_CKPT}"),
]  # fmt: skip


def config_groups(settings: str) -> list[str]:
    """Return a recipe, or for full fine-tuning the dataset alone."""
    return ["dataset=quickstart", "dataset.eval.path=null"] if "model=" in settings else [RECIPE]


def main() -> None:
    """Measure the chosen cases and print them beside their plans."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--heap", choices=list(HEAPS), help="one of the two heaps")
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run_case(json.loads(options.case))
        return
    heaps = [options.heap] if options.heap else list(HEAPS)
    results = []
    print(f"{'case':<32}{'rows':>10}  {'heap':<10}{'plan':>9}{'measured':>10}{'plan is':>9}")
    for case in (case for case in CASES if options.only in case.name):
        for name in heaps:
            results.append(measure(case, name))
            print_result(results[-1])
            if options.json:
                Path(options.json).write_text(json.dumps(results, indent=1) + "\n")


def print_result(row: dict[str, Any]) -> None:
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
    case_json = json.dumps(case._asdict())
    environ = os.environ | HEAPS[heap] | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, "--case", case_json]
    if case.processes > 1:
        environ["ACCELERATE_USE_CPU"] = "true"
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(case.processes)]
        command[1:1] = [*torchrun, "--standalone"]
    process = subprocess.run(command, env=environ, text=True, capture_output=True)
    if process.returncode:
        raise SystemExit(f"{case.name}: {process.stderr[-2000:]}")
    lines = [line for line in process.stdout.splitlines() if line.startswith('{"base"')]
    measured = json.loads(lines[0])
    return case._asdict() | {"heap": heap, "plan": planned_bytes(case, heap)} | measured


def planned_bytes(case: Case, heap: str) -> int:
    """Return the plan's total without what Python and its libraries take."""
    from luthier.config import load_config
    from luthier.memory import plan_memory
    from luthier.memory.sharding import Sharding
    from luthier.memory.workload import PROCESS_OVERHEAD

    sharding = Sharding("ddp", case.processes) if case.processes > 1 else Sharding()
    with patch.dict(os.environ, HEAPS[heap]):
        plan = plan_memory(load_config(case.overrides).config, shardings=[sharding])
    return plan.best.total - PROCESS_OVERHEAD


def run_case(case_fields: dict[str, Any]) -> None:
    """Build and train in this process, which is measured, and print its memory as JSON."""
    case = Case(**case_fields)
    build_trainer = prepare_case(case)
    base = process_memory("VmRSS")
    trainer = build_trainer()
    loaded = process_memory("VmRSS")
    # 5: put the highest memory back to what is used now (man 5 proc).
    Path("/proc/self/clear_refs").write_text("5")
    started = time.process_time()
    trainer.train()
    took = time.process_time() - started
    peak = process_memory("VmHWM") - base
    print(json.dumps({"base": base, "loaded": loaded - base, "peak": peak, "seconds": took}))


def prepare_case(case: Case) -> Any:
    """Import all that training needs; return a function that loads the model and its trainer."""
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

    def build_trainer() -> Any:
        model: Any = load_model(
            config.model, config.quantization, machine, full=not config.lora.is_enabled
        )
        if config.lora.is_enabled:
            model = add_adapter(model, config.lora, config.seed)
        data = Dataset.from_dict({"input_ids": short, "labels": short})
        args.train_sampling_strategy = "sequential"
        return TokenTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)

    return build_trainer


def process_memory(name: str) -> int:
    """Return the bytes of this process by its kernel name: VmRSS (now) or VmHWM (the most)."""
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"{name}:\s+(\d+) kB", text)
    assert match is not None
    return int(match[1]) * 1024


if __name__ == "__main__":
    main()
