"""Training speed and memory of one GPU on models of real shapes, against TRL's own trainer.

    python benchmarks/gpu.py                                  # every cell, within eight minutes
    python benchmarks/gpu.py --only llama_8b --json gpu.json
    python benchmarks/gpu.py --pack FOLDER                    # for a machine without a network
    python benchmarks/gpu.py --shape tiny --device cpu        # a trial without a GPU

Llama-3.1-8B (LoRA, nf4) and Qwen3-1.7B (full, LoRA, nf4) with random weights that are made on the
device, and documents of random tokens, most of them shorter than a row: nothing is downloaded. Each
cell is a process of its own, whose imports run while the cell before it is measured:

- `luthier`: packed rows; attention and activation checkpointing as a run chooses them.
- `TRL`: `SFTConfig` as it is: padded rows in the order of chance, activations recomputed.
- `TRL, best`: packed by TRL where flash-attn is installed, else rows of like length; activations
  kept, or recomputed if that was too much memory.

Printed: tokens and trained tokens a second (padding is no token), the share of the device's peak
(model FLOPs as benchmarks/shapes.py counts them, peaks of the data sheets there), and for luthier
the memory that torch handed out against the plan's figure. `--minutes` is for all cells: those
without time left are named, and so are those that need too much memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from shapes import SHAPES, build_random_model, find_gpu, pack_to_nf4

WAYS = ("luthier", "TRL, best", "TRL")
TRAININGS = ("LoRA", "nf4", "full")
RANK = 16


class Sizes(NamedTuple):
    """How much a micro-batch of a shape holds."""

    length: int
    """Tokens of a packed row, and of the longest document."""
    rows: int
    """Packed rows."""
    padded: int
    """Padded rows, one document each."""


SIZES = {"llama_8b": Sizes(4096, 2, 8), "qwen_1_7b": Sizes(4096, 4, 16), "tiny": Sizes(128, 2, 4)}
RUNS = (
    ("llama_8b", "LoRA"), ("llama_8b", "nf4"), ("qwen_1_7b", "full"), ("qwen_1_7b", "LoRA"),
    ("qwen_1_7b", "nf4"),
)  # fmt: skip
"""In the order of measuring: first all of luthier, then TRL's best, then its defaults."""
AIMS = {
    ("llama_8b", "LoRA"): ("tokens/s", 12_500.0), ("llama_8b", "nf4"): ("tokens/s", 10_500.0),
    ("qwen_1_7b", "full"): ("of peak", 0.5),
}  # fmt: skip
"""What luthier aims at on one H200: aims, not measurements."""
WARMING, FEWEST = 2, 3
"""Steps before a clock starts, and the fewest that are measured."""
LIBRARIES = ("luthier", "torch", "transformers", "trl", "peft", "bitsandbytes", "flash-attn")


class Cell(NamedTuple):
    """One measurement."""

    shape: str
    training: str
    way: str
    recomputes: bool = False
    """Whether TRL's best settings recompute activations."""

    def __str__(self) -> str:
        return f"{self.shape} {self.training}, {self.way}"


def main() -> None:
    """Measure every cell that there is time for; print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all cells together")
    parser.add_argument("--seconds", type=float, default=12.0, help="of measured steps a cell")
    parser.add_argument("--only", default="", help="cells whose name has this in it")
    parser.add_argument("--shape", choices=["tiny"], help="this shape instead of the real ones")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", default="gpu.json", help="the file of the results")
    parser.add_argument("--pack", metavar="FOLDER", help="write all that it needs into a folder")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pack:
        from offline_folder import write_offline_folder

        write_offline_folder(Path(options.pack))
        return
    if options.cell:
        measure_here(Cell(*json.loads(options.cell)), options)
        return
    check_device(parser, options.device)
    runs = [(options.shape, training) for training in TRAININGS] if options.shape else RUNS
    cells = [Cell(*run, way) for way in WAYS for run in runs]
    chosen = [cell for cell in cells if options.only in str(cell)]
    results = measure_cells(chosen, options)
    print_results(results)
    report = {"versions": installed_versions(), "results": [r.as_values() for r in results]}
    Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """End the program in words where the device is not there."""
    from luthier.config.schema import ModelConfig
    from luthier.errors import UserError
    from luthier.model.device import choose_machine

    try:
        choose_machine(ModelConfig(path="random", device=device))
    except UserError as error:
        parser.error(f"--device {device}: {error}")


@dataclass
class Result:
    """What became of a cell."""

    cell: Cell
    values: dict[str, Any] = field(default_factory=dict)
    """The numbers of the process; empty where there are none."""
    problem: str = ""
    """Why there are no numbers."""
    output: str = ""
    """The end of what a process without numbers printed."""

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.values["tokens"] / self.values["seconds"]

    @property
    def peak_share(self) -> float | None:
        """The share of the peak of the device; None for a device without a data sheet."""
        gpu = find_gpu(self.values["device"])
        return self.values["flops"] / self.values["seconds"] / gpu.flops if gpu else None

    def as_values(self) -> dict[str, Any]:
        """Return the result as JSON can hold it."""
        values = {**self.cell._asdict(), **self.values, "problem": self.problem}
        if self.output:
            values["output"] = self.output
        if self.values:
            values |= {"tokens_per_second": self.speed, "peak_share": self.peak_share}
        return values


class CellProcess:
    """The process of a cell: it imports at once, and measures when it is told to."""

    def __init__(self, cell: Cell, options: argparse.Namespace) -> None:
        self.cell = cell
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        words = ["--cell", json.dumps(cell), "--seconds", str(options.seconds)]
        command = [sys.executable, __file__, *words, "--device", options.device]
        environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.output, stderr=self.output, env=environ
        )

    def finish(self, seconds: float) -> Result:
        """Let it measure, and return its result; it is stopped after so many seconds."""
        try:
            self.process.communicate(b"go\n", timeout=seconds)
        except subprocess.TimeoutExpired:
            self.stop()
            return Result(self.cell, problem=f"no end after {seconds:.0f} s")
        self.output.seek(0)
        lines = self.output.read().splitlines() or ["no output"]
        answers = [line for line in lines if line.startswith("RESULT ")]
        if not answers:
            problem = f"exit code {self.process.returncode}: {lines[-1]}"
            return Result(self.cell, problem=problem, output="\n".join(lines[-40:]))
        values = json.loads(answers[0].removeprefix("RESULT "))
        return (
            Result(self.cell, problem=values)
            if isinstance(values, str)
            else Result(self.cell, values)
        )

    def stop(self) -> None:
        """End it without a result."""
        self.process.kill()
        self.process.communicate()


OUT_OF_MEMORY = "out of memory"
RESERVE = 10.0
"""Seconds that are left for the table."""


def measure_cells(cells: list[Cell], options: argparse.Namespace) -> list[Result]:
    """Measure one cell after the other until the time is over."""
    end = time.monotonic() + options.minutes * 60 - RESERVE
    imports_ahead = (os.cpu_count() or 1) >= 4
    results, waiting = [], list(cells)
    following: CellProcess | None = None
    while waiting:
        cell, current = waiting.pop(0), following
        following = None
        left = end - time.monotonic()
        # Building a model and warming take about as long as the measured steps.
        if left < 2 * options.seconds:
            if current:
                current.stop()
            results.append(Result(cell, problem="no time left"))
            continue
        current = current or CellProcess(cell, options)
        if imports_ahead and waiting:
            following = CellProcess(waiting[0], options)
        print(f"{cell} ...", file=sys.stderr, flush=True)
        result = current.finish(left)
        if result.problem == OUT_OF_MEMORY and cell.way == "TRL, best" and not cell.recomputes:
            waiting.insert(0, cell._replace(recomputes=True))
            if following:
                following.stop()
                following = None
            continue
        results.append(result)
    return results


def print_results(results: list[Result]) -> None:
    """Print the table, the ratios to TRL, the aims, and the cells without numbers."""
    measured = {result.cell[:3]: result for result in results if result.values}
    if measured:
        print(next(iter(measured.values())).values["device"])
        heads = f"{'tokens/s':>10}{'trained/s':>11}{'of peak':>9}{'GiB':>8}{'plan':>8}"
        print(f"{'':<32}{heads}")
    for result in measured.values():
        values, share = result.values, result.peak_share
        plan = f"{values['plan'] / 2**30:>8.2f}" if values["plan"] else f"{'-':>8}"
        print(
            f"{result.cell!s:<32}{result.speed:>10,.0f}"
            f"{values['trained'] / values['seconds']:>11,.0f}"
            f"{f'{share:.1%}' if share else '-':>9}{values['memory'] / 2**30:>8.2f}{plan}"
            f"  {values['what']}"
        )
    for (shape, training, way), result in measured.items():
        ours = measured.get((shape, training, "luthier"))
        if ours is not None and way != "luthier":
            print(f"{shape} {training}: luthier / {way}: {ours.speed / result.speed:.2f}")
    for (shape, training), (name, aim) in AIMS.items():
        ours = measured.get((shape, training, "luthier"))
        if ours is not None and "H200" in ours.values["device"]:
            reached = ours.speed if name == "tokens/s" else ours.peak_share or 0.0
            print(f"{shape} {training}: {reached / aim:.0%} of the aim of {aim:,} {name}")
    for result in results:
        if result.problem:
            print(f"not measured: {result.cell}: {result.problem}")


def installed_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the speed, of those that are here."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def measure_here(cell: Cell, options: argparse.Namespace) -> None:
    """Measure a cell in this process and print its numbers, or the reason why there are none."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        training = Training(cell, Path(folder), options)
        if sys.stdin.readline() != "go\n":
            return
        try:
            values: Any = training.measure(options.seconds)
        except torch.OutOfMemoryError:
            values = OUT_OF_MEMORY
    print("RESULT " + json.dumps(values), flush=True)


class Training:
    """One cell: data and plan are there when it is made, the model when it is measured."""

    def __init__(self, cell: Cell, folder: Path, options: argparse.Namespace) -> None:
        import datasets
        import trl  # noqa: F401

        from luthier.environment import quiet_bitsandbytes
        from luthier.model.device import choose_machine

        quiet_bitsandbytes()
        self.cell, self.folder = cell, folder
        self.shape, self.sizes = SHAPES[cell.shape], SIZES[cell.shape]
        self.rank = None if cell.training == "full" else RANK
        self.what = ""
        self.config = self._config(options.device)
        self.machine = choose_machine(self.config.model)
        self.on_gpu = self.machine.device_type == "cuda"
        self.plan = self._plan() if cell.way == "luthier" else 0
        rows = random_documents(self.sizes.length, self.shape.settings["vocab_size"])
        self.rows = datasets.Dataset.from_dict(rows)
        self.tokenizer = make_tokenizer()

    def _config(self, device: str) -> Any:
        """Return luthier's configuration of the run."""
        from luthier.config import load_config

        self.shape.config().save_pretrained(self.folder)
        words = [
            f"model.path={self.folder}", f"model.device={device}", "dataset=quickstart",
            "dataset.eval.path=null", "trainer.evaluation.metrics=[]",
            f"chat.max_length={self.sizes.length}", "trainer.args.packing=true",
            f"trainer.args.per_device_train_batch_size={self.sizes.rows}",
            "trainer.args.gradient_accumulation_steps=1", "trainer.args.eval_strategy=no",
            "trainer.args.save_strategy=no", "trainer.args.logging_steps=10",
            "trainer.args.max_steps=100000", "trainer.args.disable_tqdm=true",
            "trainer.args.activation_checkpointing=auto",
        ]  # fmt: skip
        if self.rank is not None:
            words += ["lora=default", f"lora.r={self.rank}", "lora.lora_dropout=0"]
        if self.cell.training == "nf4":
            words.append("quantization=nf4")
        return load_config(words).config

    def measure(self, seconds: float) -> dict[str, Any]:
        """Train for so many seconds behind the warming, and return what was counted."""
        import torch

        from memory import process_memory

        before = process_memory("VmRSS")
        trainer = self._luthier() if self.cell.way == "luthier" else self._trl()
        clock = StepClock(seconds, self.on_gpu)
        count_steps(trainer, clock)
        trainer.add_callback(clock.callback())
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            trainer.train()
            memory, device = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
        else:
            # 5: put the highest memory back to what is used now (man 5 proc).
            Path("/proc/self/clear_refs").write_text("5")
            trainer.train()
            memory, device = process_memory("VmHWM") - before, f"CPU, {os.cpu_count()} cores"
        tokens, trained, pairs = clock.totals()
        return {
            "device": device, "seconds": clock.seconds, "steps": len(clock.counts),
            "tokens": tokens, "trained": trained, "memory": memory, "plan": self.plan,
            "flops": self.shape.step_flops(tokens, pairs, self.rank), "what": self.what,
            "attention": trainer.model.config._attn_implementation,
        }  # fmt: skip

    def _plan(self) -> int:
        """Return the plan's bytes without what the process takes before its first tensor."""
        from luthier.memory import plan_memory
        from luthier.memory.workload import CUDA_CONTEXT, PROCESS_OVERHEAD

        plan = plan_memory(self.config)
        recomputes = plan.workload.checkpointing is not None
        self.config = self.config.with_trainer_args(activation_checkpointing=recomputes)
        self.what = f"{self.sizes.rows} packed rows, {'recomputed' if recomputes else 'kept'}"
        return plan.best.total - (CUDA_CONTEXT if self.on_gpu else PROCESS_OVERHEAD)

    def _model(self, attention: str) -> Any:
        """Return the model without an adapter; one that trains whole is in float32."""
        import torch

        device = self.machine.device
        dtype = "float32" if self.rank is None else self.machine.dtype
        model = build_random_model(self.shape, getattr(torch, dtype), device, attention)
        model.config.use_cache = False
        return pack_to_nf4(model, dtype, device) if self.cell.training == "nf4" else model

    def _luthier(self) -> Any:
        """Return luthier's trainer with the settings of a run."""
        from luthier.data.batching.settings import read_batching_settings
        from luthier.model.adapters import add_adapter
        from luthier.model.device import VARLEN_ATTENTION
        from luthier.model.load import resolve_attention
        from luthier.model.model_class import expose_backbone
        from luthier.model.varlen_attention import register_varlen_attention
        from luthier.train.arguments import build_sft_arguments
        from luthier.train.methods.sft import TokenTrainer

        machine = resolve_attention(self.config.model, self.machine, "CAUSAL_LM", packs=True)
        if machine.attention == VARLEN_ATTENTION:
            register_varlen_attention()
        model = self._model(machine.attention)
        expose_backbone(model)
        if self.rank is not None:
            model = add_adapter(model, self.config.lora, self.config.seed)
        return TokenTrainer(
            model,
            args=build_sft_arguments(self.config, machine, self.folder, has_eval=False),
            train_dataset=self.rows,
            batching=read_batching_settings(self.config),
            processing_class=self.tokenizer,
        )

    def _trl(self) -> Any:
        """Return TRL's trainer, with its defaults or its best settings."""
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer

        packs = find_spec("flash_attn") is not None and self.on_gpu
        best = self.cell.way == "TRL, best"
        settings = {
            "output_dir": str(self.folder / "trl"), "max_steps": 100_000, "report_to": [],
            "save_strategy": "no", "disable_tqdm": True, "max_length": self.sizes.length,
            "use_cpu": not self.on_gpu, "bf16": self.machine.dtype == "bfloat16",
            "dataloader_pin_memory": self.on_gpu,
            "per_device_train_batch_size": self.sizes.padded,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }  # fmt: skip
        self.what = f"{self.sizes.padded} padded rows"
        if best and packs:
            settings |= {"packing": True, "padding_free": True, "dataset_kwargs": None}
            settings |= {"per_device_train_batch_size": self.sizes.rows}
            self.what = f"{self.sizes.rows} packed rows, flash-attn"
        elif best:
            settings |= {"train_sampling_strategy": "group_by_length"}
            self.what += " of like length"
        recomputes = self.cell.recomputes or not best
        settings["gradient_checkpointing"] = recomputes
        self.what += ", recomputed" if recomputes else ", kept"
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"
        )
        return SFTTrainer(
            self._model("flash_attention_2" if best and packs else "sdpa"),
            args=SFTConfig(**settings),
            train_dataset=self.rows,
            processing_class=self.tokenizer,
            peft_config=None if self.rank is None else lora,
        )


class StepClock:
    """Times the steps behind the warming, without waiting for the device within them."""

    def __init__(self, seconds: float, on_gpu: bool) -> None:
        self.limit, self.on_gpu = seconds, on_gpu
        self.seconds = 0.0
        self.counts: list[Any] = []
        """Of each measured step: tokens, trained tokens and pairs that attention computes."""
        self._started = 0.0

    def now(self) -> float:
        """Return the time when the device has done all that it was told to."""
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def totals(self) -> tuple[int, int, int]:
        """Return the sums of all measured steps."""
        tokens, trained, pairs = (sum(int(n) for n in column) for column in zip(*self.counts))  # noqa: B905
        return tokens, trained, pairs

    def callback(self) -> Any:
        """Return the callback that starts the clock and ends the training."""
        from transformers import TrainerCallback

        clock = self

        class _Callback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == WARMING:
                    clock.counts.clear()
                    clock._started = clock.now()
                is_enough = state.global_step >= WARMING + FEWEST
                if is_enough and time.perf_counter() - clock._started > clock.limit:
                    clock.seconds = clock.now() - clock._started
                    control.should_training_stop = True

        return _Callback()


def count_steps(trainer: Any, clock: StepClock) -> None:
    """Note in the clock what each batch of a trainer holds."""
    step = trainer.training_step

    def counted(model: Any, inputs: Any, *rest: Any) -> Any:
        clock.counts.append(count_batch(inputs))
        return step(model, inputs, *rest)

    trainer.training_step = counted


def count_batch(inputs: Any) -> tuple[Any, Any, Any]:
    """Return a batch's tokens, trained tokens, and pairs of a query and a key that it may see."""
    import torch

    labels, positions = inputs["labels"], inputs.get("position_ids")
    if positions is None:
        # One padded document a row.
        is_token = inputs["attention_mask"].bool()
        positions = inputs["attention_mask"].cumsum(-1) - 1
    else:
        # Documents side by side; luthier says how many tokens of each row are no padding.
        width = torch.arange(labels.shape[1], device=labels.device)
        used = inputs.get("tokens")
        is_token = width < (labels.shape[1] if used is None else used.to(labels.device)[:, None])
        is_token = is_token.expand_as(labels)
    pairs = ((positions + 1) * is_token).sum()
    return is_token.sum(), (labels[:, 1:] != -100).sum(), pairs


def random_documents(length: int, vocabulary: int, count: int = 2000) -> dict[str, list[list[int]]]:
    """Return documents of random tokens, of which the last two thirds train.

    Their lengths are log-normal around a sixth of a row, as chats have them, and no longer than it.
    """
    import numpy as np

    draw = np.random.default_rng(0)
    sizes = np.clip(draw.lognormal(np.log(length / 6), 0.8, count), 16, length).astype(int)
    ids = [draw.integers(4, vocabulary, size).tolist() for size in sizes]
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in ids]
    return {"input_ids": ids, "labels": labels}


def make_tokenizer() -> Any:
    """Return a tokenizer with little more than the tokens that trainers ask for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "<unk>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip


if __name__ == "__main__":
    main()
