"""Where training on many GPUs stops to scale: bytes on the wires, tokens a second, memory, data.

    python benchmarks/scaling.py                       # traffic and speed, by arithmetic
    python benchmarks/scaling.py --gpu A100 --batch 1e6
    python benchmarks/scaling.py --memory              # and memory, by luthier plan; a minute

Nothing is trained and nothing measured: docs/launch.md shows these tables and says what they rest
on. Every figure is of one optimizer step of one GPU, on machines of eight GPUs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapes import GPUS, SHAPES, Gpu, ModelShape

ROOT = Path(__file__).parents[1]
PER_MACHINE = 8
"""GPUs of one machine."""
COUNTS = (8, 64, 512)
RANK = 16
"""The rank of LoRA on all linear layers, as in `lora=default`."""
LENGTH = 4096
"""Tokens of a document, which decide what attention costs."""
COMPUTE_SHARE = 0.40
"""The share of the peak that a GPU reaches by itself. An assumption; published for 8B models in
bfloat16 on H100: 33 to 39 % (torchtitan) and 41 % (NeMo AutoModel, LoRA)."""
LINK_SHARE = 0.80
"""The share of the wires' data-sheet speed that large collectives reach. An assumption: nccl-tests
tells it of your machines (https://github.com/NVIDIA/nccl-tests)."""
SHARDINGS = {"ddp": "DDP", "zero2": "ZeRO-2", "fsdp2": "FSDP2", "hsdp": "HSDP"}
"""Kinds of sharding and their names in the tables."""
ETHERNET = 12.5e9
"""Bytes a second of a machine with one port of 100 Gb/s, which many clouds have."""
CASES = (
    ("qwen_1_7b", None), ("llama_8b", RANK), ("llama_8b", None), ("llama_70b", RANK),
    ("llama_70b", None),
)  # fmt: skip
"""Model, and the rank of LoRA or None for full fine-tuning."""


@dataclass(frozen=True)
class Traffic:
    """The bytes that arrive in one optimizer step."""

    link: float = 0.0
    """At one GPU, from the other GPUs of its machine."""
    network: float = 0.0
    """At one machine, from the other machines."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.link + other.link, self.network + other.network)

    def times(self, factor: float) -> Traffic:
        """Return the traffic of so many equal collectives."""
        return Traffic(self.link * factor, self.network * factor)

    def seconds(self, gpu: Gpu, share: float = LINK_SHARE) -> float:
        """Return the time on the wires; links and network work at the same moment."""
        if self.network and not gpu.network:
            raise ValueError("this GPU has no usual network between machines")
        across = self.network / gpu.network if self.network else 0.0
        return max(self.link / gpu.link, across) / share


def gather(size: float, processes: int) -> Traffic:
    """Return the traffic of an all-gather or a reduce-scatter of `size` bytes.

    Each GPU gets what it does not hold; what comes from other machines arrives once at a machine
    and goes round there over the links. An all-reduce is one of each.
    """
    machines = max(processes // PER_MACHINE, 1)
    return Traffic(size * (1 - 1 / processes), size * (1 - 1 / machines))


def step_traffic(
    sharding: str, shape: ModelShape, rank: int | None, processes: int, micro_batches: int = 1
) -> Traffic:
    """Return the traffic of one optimizer step.

    Weights travel with 2 bytes, gradients of DDP and FSDP2 in float32 with 4, those of ZeRO with 2.
    What travels how often is read from the libraries (torch 2.13, accelerate 1.15, DeepSpeed's
    papers):

    - DDP: gradients all-reduced, in the last micro-batch.
    - ZeRO-2: gradients reduce-scattered in each micro-batch, changed weights gathered once.
    - ZeRO-3: weights gathered for forward and backward, gradients reduce-scattered, each time.
    - FSDP2: as ZeRO-3, but gradients in the last micro-batch alone.
    - HSDP (copies of slices): FSDP2 within each machine, slices of gradients all-reduced between.
    """
    trained = shape.weights if rank is None else shape.lora_weights(rank)
    weights = 2.0 * (shape.weights + (0 if rank is None else trained))
    gradients = (2.0 if sharding.startswith("zero") else 4.0) * trained
    if sharding == "ddp":
        return gather(gradients, processes).times(2)
    if sharding == "zero2":
        return gather(gradients, processes).times(micro_batches + 1)
    group = min(processes, PER_MACHINE) if sharding == "hsdp" else processes
    gathered = gather(weights, group).times(2 * micro_batches)
    scattered = gather(gradients, group).times(micro_batches if sharding == "zero3" else 1)
    machines = max(processes // group, 1)
    between = Traffic(network=2 * gradients * (1 - 1 / machines)) if sharding == "hsdp" else None
    return gathered + scattered + (between or Traffic())


def step_flops(shape: ModelShape, rank: int | None, tokens: float) -> float:
    """Return the model FLOPs of `tokens` in documents of LENGTH tokens."""
    return shape.step_flops(tokens, tokens * (LENGTH + 1) / 2, rank)


def balance_tokens(
    sharding: str,
    shape: ModelShape,
    rank: int | None,
    processes: int,
    gpu: Gpu,
    micro_batches: int = 1,
) -> float:
    """Return the tokens of a micro-batch of one GPU at which the wires take as long as computing.

    With fewer the GPUs wait for each other, however well the two overlap.
    """
    traffic = step_traffic(sharding, shape, rank, processes, micro_batches)
    per_token = step_flops(shape, rank, 1) / (gpu.flops * COMPUTE_SHARE)
    return traffic.seconds(gpu) / per_token / micro_batches


def tokens_per_second(
    sharding: str, shape: ModelShape, rank: int | None, processes: int, gpu: Gpu, tokens: float
) -> float:
    """Return the tokens a second of one GPU with `tokens` a step, where all traffic overlaps."""
    computing = step_flops(shape, rank, tokens) / (gpu.flops * COMPUTE_SHARE)
    travelling = step_traffic(sharding, shape, rank, processes).seconds(gpu)
    return tokens / max(computing, travelling)


@dataclass(frozen=True)
class Preparation:
    """What benchmarks/data.py measured on one core: rows, tokens, and what they took."""

    rows: int
    tokens: int
    core_seconds: float
    megabytes: float
    """The peak memory of the process."""
    cache_megabytes: float


PREPARED = (
    Preparation(4_000, 690_847, 1.04, 555, 9),
    Preparation(57_002, 9_884_875, 9.61, 620, 127),
)
"""`benchmarks/data.py --no-trl`, with `--rows 4000` and with all rows."""
TENFOLD = (570_020, 692.0, 1_282.0)
"""Rows, MB of the process and MB of cache that `--tenfold` measured besides."""


def prepare_rows(tokens: float) -> dict[str, float]:
    """Return core seconds, MB of memory and MB of cache that so many tokens take, by the slopes."""
    small, large = PREPARED
    rows = tokens * large.rows / large.tokens
    seconds = (large.core_seconds - small.core_seconds) / (large.tokens - small.tokens)
    many_rows, many_memory, many_cache = TENFOLD
    memory = (many_memory - large.megabytes) / (many_rows - large.rows)
    return {
        "rows": rows,
        "core_seconds": small.core_seconds + seconds * (tokens - small.tokens),
        "memory": many_memory + memory * (rows - many_rows),
        "cache": many_cache * rows / many_rows,
    }


def planned_memory(
    name: str, rank: int | None, gib: int, quantization: str = "none"
) -> tuple[dict[tuple[str, int], float], bool]:
    """Return GiB by sharding and GPUs, and whether activations are recomputed.

    One row of LENGTH packed tokens a micro-batch, planned as `luthier plan --launch` does. HSDP
    holds what FSDP2 holds on one machine.
    """
    from luthier.config import load_config
    from luthier.memory.plan import plan_memory
    from luthier.memory.sharding import read_sharding
    from luthier.memory.workload import GIB, hypothetical_gpus

    keys = [(kind, count) for kind in ("ddp", "zero2") for count in COUNTS[:1]]
    keys += [(kind, count) for kind in ("zero3", "fsdp2") for count in COUNTS]
    with tempfile.TemporaryDirectory() as folder:
        SHAPES[name].config().save_pretrained(folder)
        words = [
            f"model.path={folder}", "model.dtype=bfloat16", "dataset=quickstart",
            "dataset.eval.path=null", f"chat.max_length={LENGTH}", "trainer.args.packing=true",
            "trainer.args.bf16=true", "trainer.args.per_device_train_batch_size=1",
            "trainer.args.gradient_accumulation_steps=1", f"quantization={quantization}",
        ]  # fmt: skip
        if rank is not None:
            words += ["lora=default", f"lora.r={rank}"]
        config = load_config(words).config
        shardings = [read_sharding(str(ROOT / f"launch/{k}.yaml"), count) for k, count in keys]
        plan = plan_memory(config, hypothetical_gpus(gib * GIB, COUNTS[0]), shardings)
    sizes = [estimate.total / GIB for estimate in plan.estimates]
    return dict(zip(keys, sizes, strict=True)), plan.workload.checkpointing is not None


def case_name(name: str, rank: int | None) -> str:
    """Return a model and its training in words."""
    return f"{name}, {'full' if rank is None else 'LoRA'}"


def print_table(heads: list[str], rows: list[list[str]]) -> None:
    """Print a table that is Markdown, too."""
    print("| " + " | ".join(heads) + " |")
    print("|" + "|".join([" --- ", *[" ---: "] * (len(heads) - 1)]) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def traffic_table(gpu: Gpu) -> tuple[list[str], list[list[str]]]:
    """Return GB a step at 64 GPUs, and the tokens at which computing takes as long."""
    heads = ["model, training", "sharding", "GB to a GPU", "GB to a machine"]
    heads += [f"tokens at {count}" for count in COUNTS] + ["64 by Ethernet"]
    rows = []
    for name, rank in CASES:
        shape = SHAPES[name]
        for sharding, label in SHARDINGS.items():
            traffic = step_traffic(sharding, shape, rank, 64)
            cells = [f"{traffic.link / 1e9:,.1f}", f"{traffic.network / 1e9:,.1f}"]
            slow = gpu._replace(network=ETHERNET)
            for count, wires in [*((count, gpu) for count in COUNTS), (64, slow)]:
                tokens = balance_tokens(sharding, shape, rank, count, wires)
                cells.append(f"{tokens:,.0f}")
            rows.append([case_name(name, rank), label, *cells])
    return heads, rows


def speed_table(gpu: Gpu, batch: float) -> tuple[list[str], list[list[str]]]:
    """Return thousands of tokens a second of all GPUs that share a batch of so many tokens."""
    heads = ["model, training", "sharding", *[f"{count} GPUs" for count in COUNTS]]
    rows = []
    for name, rank in CASES:
        for sharding, label in SHARDINGS.items():
            cells = []
            for count in COUNTS:
                tokens = batch / count
                speed = tokens_per_second(sharding, SHAPES[name], rank, count, gpu, tokens)
                cells.append(f"{speed * count / 1e3:,.0f}")
            rows.append([case_name(name, rank), label, *cells])
    return heads, rows


def memory_table(gib: int) -> tuple[list[str], list[list[str]]]:
    """Return GiB of each GPU by the plan; a `*` marks what does not fit into it."""
    rows = []
    keys: list[Any] = []
    packed = [("llama_8b", RANK, "nf4"), ("llama_70b", RANK, "nf4")]
    for name, rank, quantization in [*((*case, "none") for case in CASES), *packed]:
        sizes, recomputes = planned_memory(name, rank, gib, quantization)
        keys = list(sizes)
        limit = gib * 0.95
        cells = [f"{size:,.1f}{'' if size <= limit else '*'}" for size in sizes.values()]
        if quantization != "none":
            # A run refuses packed weights under ZeRO-3.
            pairs = zip(keys, cells, strict=True)
            cells = ["-" if kind == "zero3" else cell for (kind, _), cell in pairs]
        label = case_name(name, rank) if quantization == "none" else f"{name}, QLoRA"
        rows.append([label, "recomputed" if recomputes else "kept", *cells])
    return ["model, training", "activations", *[f"{k} {n}" for k, n in keys]], rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [name for name, gpu in GPUS.items() if gpu.network]
    parser.add_argument("--gpu", default="H100", choices=names)
    parser.add_argument("--batch", type=float, default=2**19, help="tokens of an optimizer step")
    parser.add_argument("--memory", action="store_true", help="memory of GPUs of 80 GiB, planned")
    parser.add_argument("--prepare", type=float, default=1e9, help="tokens of the data set")
    options = parser.parse_args()
    gpu = GPUS[options.gpu]
    print(f"{options.gpu}: {json.dumps(gpu._asdict())}\n")
    print("A step at 64 GPUs, and the tokens of a GPU's micro-batch that take as long:\n")
    print_table(*traffic_table(gpu))
    print(
        f"Thousand tokens a second of all GPUs, which share {options.batch:,.0f} tokens a step:\n"
    )
    print_table(*speed_table(gpu, options.batch))
    if options.memory:
        print(f"GiB of each GPU by the plan, one row of {LENGTH:,} tokens; * does not fit 80:\n")
        print_table(*memory_table(80))
    data = prepare_rows(options.prepare)
    print(
        f"{options.prepare:,.0f} tokens: {data['rows']:,.0f} rows, "
        f"{data['core_seconds'] / 60:,.0f} minutes of one core, {data['memory'] / 1e3:,.1f} GB of "
        f"memory, {data['cache'] / 1e3:,.1f} GB of cache"
    )


if __name__ == "__main__":
    main()
