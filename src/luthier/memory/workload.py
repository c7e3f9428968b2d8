"""What one step of a run has to hold, read from its configuration."""

import re
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from luthier.config.library_settings import TrainerArgs
from luthier.config.methods import METHODS
from luthier.config.schema import ModelConfig, RunConfig
from luthier.errors import UserError
from luthier.model.device import Machine, choose_machine

ASSUMED_LENGTH = 2048
"""Tokens of a row where `chat.max_length` sets no bound."""
AUTO_CHECKPOINTING = "auto"


_PAIRS = ("dpo", "orpo", "cpo", "reward")
"""Methods of which a row is two sequences, side by side in one forward."""
_COMPARING = ("dpo", "kto", "grpo", "rloo")
"""Methods for which full fine-tuning keeps the model as it was."""


@dataclass(frozen=True)
class Checkpointing:
    """Activations are computed again in the backward: `trainer.args.activation_checkpointing`."""

    every_n_layers: int = 1
    offload: bool = False
    """What is kept waits in main memory."""


@dataclass(frozen=True)
class Workload:
    """One micro-batch of a run and how it is computed."""

    rows: int
    """Sequences in one forward of one process."""
    length: int
    """Tokens of each."""
    accumulation: int
    """Micro-batches of one optimizer step."""
    checkpointing: Checkpointing | None
    offload: bool
    """`trainer.args.activation_offloading`."""
    optimizer: str
    autocast: str | None
    """The number format of mixed precision."""
    masked: bool
    """Whether attention gets a mask of (length, length): rows of different lengths, or packed."""
    flash: bool
    """Whether attention has flash-attention's kernels, which need no mask."""
    full: bool
    """Whether the weights themselves train, all or some."""
    reference: bool = False
    """Whether the weights as they were are kept, too."""
    task: str = "CAUSAL_LM"
    """What the model does, as peft calls it."""
    dropout: bool = True
    """Whether layers drop activations."""
    assumptions: tuple[str, ...] = field(default=())
    """What the configuration leaves open, in words."""


def read_workload(config: RunConfig, machine: Machine) -> Workload:
    """Return the step of a configuration; `auto` checkpointing counts as off."""
    method = config.trainer.method
    args = TrainerArgs(trainer_defaults(method) | config.trainer.args)
    rows = args.per_device_train_batch_size * (2 if method in _PAIRS else 1)
    length, assumptions = _length(config)
    packed, flash = args.packing, "flash" in machine.attention
    return Workload(
        rows=rows,
        length=length,
        accumulation=args.gradient_accumulation_steps,
        checkpointing=_checkpointing(args),
        offload=args.activation_offloading,
        optimizer=args.optim,
        autocast=_autocast(config.trainer.args, machine),
        masked=not flash and (packed or rows > 1 or config.trainer.padding == "max_length"),
        flash=flash,
        full=not config.lora.is_enabled,
        reference=not config.lora.is_enabled and _has_reference(method, args),
        task=METHODS[method].task,
        dropout=not args.disable_dropout,
        assumptions=(*assumptions, *_unseen(method, args)),
    )


@cache
def trainer_defaults(method: str = "sft") -> dict[str, Any]:
    """The settings of a method's trainer where the configuration is silent."""
    package, file, name = METHODS[method].config
    module = ".".join([package, *file.removesuffix(".py").split("/")])
    return {f.name: f.default for f in fields(getattr(import_module(module), name))}


def _has_reference(method: str, args: TrainerArgs) -> bool:
    if method not in _COMPARING or args.precompute_ref_log_probs:
        return False
    return method in ("dpo", "kto") or bool(args.beta)


def _length(config: RunConfig) -> tuple[int, tuple[str, ...]]:
    if config.chat.max_length is not None:
        return config.chat.max_length, ()
    said = (
        f"chat.max_length is null, so rows may have any length: {ASSUMED_LENGTH:,} tokens are "
        "assumed. Set chat.max_length for a bound that holds."
    )
    return ASSUMED_LENGTH, (said,)


def _checkpointing(args: TrainerArgs) -> Checkpointing | None:
    wanted = args.activation_checkpointing
    if wanted is None:
        wanted = args["gradient_checkpointing"]  # TRL's trainers set the older name
    if not wanted or wanted == AUTO_CHECKPOINTING:
        return None
    given = args.activation_checkpointing_kwargs
    return Checkpointing(int(given.get("every_n_layers", 1)), bool(given.get("offload", False)))


def _autocast(args: TrainerArgs, machine: Machine) -> str | None:
    """Mixed precision as luthier's training sets it: the machine's format unless it is given."""
    if machine.dtype == "bfloat16" if args.bf16 is None else args.bf16:
        return "bfloat16"
    is_float16 = machine.dtype == "float16" if args.fp16 is None else args.fp16
    return "float16" if is_float16 else None


def _unseen(method: str, args: TrainerArgs) -> tuple[str, ...]:
    """What changes memory and is not followed, in words."""
    names = {
        "torch_compile": "torch.compile mostly keeps less than what is counted here",
        "use_liger_kernel": "Liger's kernels keep less than what is counted here",
    }
    said = [f"trainer.args.{name}: {text}." for name, text in names.items() if args.get(name)]
    if method in ("grpo", "rloo", "distill"):
        said.append(f"trainer.method={method}: the keys and values of generation are not counted.")
    return tuple(said)


# Sizes of memory as people write and read them.

MIB, GIB = 2**20, 2**30
_UNITS = {"": 30, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str, key: str) -> int:
    """Return the bytes of a size such as `24GB`, `24GiB`, `80G` or `512MB`.

    GB is read as GiB, as GPUs are sold and as nvidia-smi counts. Raises UserError, naming `key`.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, flags=re.IGNORECASE)
    size = round(float(found[1]) * 2 ** _UNITS[found[2].upper()]) if found else 0
    if size < MIB:
        raise UserError(f"{key} {text}: write the memory of one GPU, such as {key} 24GB.")
    return size


def format_size(size: float) -> str:
    """Return a size in GiB, or in MiB below one: three or four digits are enough for a plan."""
    if abs(size) < GIB:
        return f"{size / MIB:,.0f} MiB"
    return f"{size / GIB:,.2f} GiB"


def format_parameter_count(number: int) -> str:
    """Return a number of parameters in millions or billions."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


# The memory that a plan is held against: this machine's, or that of GPUs one does not have.

CUDA_CONTEXT = 723 * MIB
"""What the driver and the kernels of a process take before its first tensor.

https://discuss.pytorch.org/t/what-is-the-reason-for-pytorchs-gpu-memory-floor/73021 has 723 MiB;
newer drivers load kernels as they are used, and take less.
"""
PROCESS_OVERHEAD = 620 * MIB
"""Python with torch, transformers, trl and bitsandbytes, before a model is loaded.

Measured by benchmarks/memory.py as `base`; the trainer's own imports are in it.
"""
FREE_SHARE = 0.05
"""The share of a device that a plan leaves free: allocators keep more than they hand out."""
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Hardware:
    """What a run would have."""

    kind: str
    """cuda, mps or cpu."""
    name: str
    memory: int
    """Bytes of one GPU; on a CPU or a Mac what all processes share, as far as it is free now."""
    count: int = 1
    """GPUs, or processes on a CPU."""
    imagined: bool = False
    """Whether it was described by flags, and is not this machine."""

    @property
    def room(self) -> int:
        """Bytes that one process may fill."""
        shared = 1 if self.kind == "cuda" else self.count
        return int(self.memory * (1 - FREE_SHARE)) // shared

    @property
    def overhead(self) -> int:
        """Bytes that a process takes before it holds anything."""
        return CUDA_CONTEXT if self.kind == "cuda" else PROCESS_OVERHEAD


def detect_hardware(config: ModelConfig, processes: int | None = None) -> Hardware:
    """Return this machine's device as the configuration chooses it.

    `processes` defaults to all GPUs, and to one process elsewhere. Raises UserError for a device
    that this machine does not have, or for more GPUs than it has.
    """
    kind = choose_machine(config).device_type
    if kind == "cuda":
        return _gpus(processes)
    return Hardware(kind, "this machine's main memory", _free(), processes or 1)


def hypothetical_gpus(memory: int, gpus: int) -> Hardware:
    """Return GPUs of so many bytes each, which need not be here."""
    return Hardware("cuda", f"GPU of {format_size(memory)}", memory, gpus, imagined=True)


def machine_for(config: ModelConfig, hardware: Hardware) -> Machine:
    """Return device, number format and attention as a run on that hardware would have them.

    Of imagined GPUs bfloat16 and torch's own attention are assumed.
    """
    if not hardware.imagined:
        return choose_machine(config)
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    attention = "sdpa" if config.attention == "auto" else config.attention
    return Machine("cuda:0", dtype, attention)


def _gpus(wanted: int | None) -> Hardware:
    import torch

    there = torch.cuda.device_count()
    if wanted is not None and wanted > there:
        raise UserError(
            f"--gpus {wanted}: this machine has {there}. To plan for others, say how much memory "
            f"each has: --gpus {wanted} --memory 24GB."
        )
    first = torch.cuda.get_device_properties(0)
    name = f"{first.name} of {format_size(first.total_memory)}"
    return Hardware("cuda", name, first.total_memory, wanted or there)


def _free() -> int:
    """Main memory that is free for a new process, within the container's limit."""
    import psutil

    free: int = psutil.virtual_memory().available
    try:
        limit = _CGROUP.read_text().strip()
    except OSError:
        return free
    return min(free, int(limit)) if limit.isdigit() else free
