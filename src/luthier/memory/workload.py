"""One step of a run as its configuration describes it, and the hardware that it runs on."""

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
from luthier.model.device import VARLEN_ATTENTION, Machine, choose_machine

ASSUMED_LENGTH = 2048
"""Tokens of a row that are assumed where `chat.max_length` sets no bound."""
AUTO_CHECKPOINTING = "auto"
"""The value of `trainer.args.activation_checkpointing` that leaves it to the plan."""
CUDA_CONTEXT = 723 * 2**20
"""Bytes that the driver and the kernels of a process take before its first tensor.

https://discuss.pytorch.org/t/what-is-the-reason-for-pytorchs-gpu-memory-floor/73021 has 723 MiB;
newer drivers load kernels as they are used, and take less.
"""
PROCESS_OVERHEAD = 620 * 2**20
"""Bytes of Python with torch, transformers, trl and bitsandbytes, before a model is loaded.

Measured by benchmarks/memory.py as `base`; the trainer's own imports are in it.
"""
FREE_SHARE = 0.05
"""The share of a device that a plan leaves free: allocators keep more than they hand out."""
MIB, GIB = 2**20, 2**30

_UNIT_BITS = {"": 30, "K": 10, "M": 20, "G": 30, "T": 40}
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

_PAIR_METHODS = ("dpo", "orpo", "cpo", "reward")
"""Methods whose rows are two sequences each, side by side in one forward."""
_REFERENCE_METHODS = ("dpo", "kto", "grpo", "rloo")
"""Methods for which full fine-tuning keeps a second model, with the weights as they were."""


@dataclass(frozen=True)
class Checkpointing:
    """Activations are computed again in the backward: `trainer.args.activation_checkpointing`."""

    every_n_layers: int = 1
    offload: bool = False
    """Whether the activations that are kept wait in main memory."""


@dataclass(frozen=True)
class Workload:
    """One micro-batch of a run and how it is computed."""

    rows: int
    """Sequences in one forward of one process."""
    length: int
    """Tokens of each sequence."""
    accumulation: int
    """Micro-batches of one optimizer step."""
    checkpointing: Checkpointing | None
    offload: bool
    """Whether activations wait in main memory: `trainer.args.activation_offloading`."""
    optimizer: str
    autocast: str | None
    """The number format of mixed precision; None without it."""
    masked: bool
    """Whether attention gets a mask of (length, length): rows of different lengths, or packed."""
    flash: bool
    """Whether attention has flash-attention's kernels, which need no mask."""
    full: bool
    """Whether the weights themselves train, all or some."""
    reference: bool = False
    """Whether a second model with the weights as they were is kept, in float32."""
    task: str = "CAUSAL_LM"
    """The task of the model in peft's words, such as CAUSAL_LM."""
    dropout: bool = True
    """Whether layers drop activations."""
    images: tuple[tuple[int, int], ...] = ()
    """The height and width, in pixels, of the images of each sequence; empty for text alone."""
    assumptions: tuple[str, ...] = field(default=())
    """Sentences on what the configuration leaves open or the plan does not count."""


def read_workload(config: RunConfig, machine: Machine) -> Workload:
    """Return the workload of a configuration; `auto` checkpointing counts as off."""
    method = config.trainer.base_method
    args = TrainerArgs(trainer_defaults(method) | config.trainer.args)
    rows = args.per_device_train_batch_size * (2 if method in _PAIR_METHODS else 1)
    length, assumptions = config.chat.max_length, _uncounted(method, args)
    if length is None:
        length = ASSUMED_LENGTH
        assumptions.insert(
            0,
            f"chat.max_length is null, so rows may have any length: {ASSUMED_LENGTH:,} tokens are "
            "assumed. Set chat.max_length for a bound that holds.",
        )
    # DPO and KTO always compare with a reference model, the online methods where beta says so.
    has_reference = method in _REFERENCE_METHODS and not args.precompute_ref_log_probs
    has_reference = has_reference and (method in ("dpo", "kto") or bool(args.beta))
    # Attention needs a mask where rows of different lengths or documents share a batch.
    packed, attention = args.packing, machine.attention
    flash = "flash" in attention or (packed and attention == VARLEN_ATTENTION)
    return Workload(
        rows=rows,
        length=length,
        accumulation=args.gradient_accumulation_steps,
        checkpointing=_checkpointing(args),
        offload=args.activation_offloading,
        optimizer=config.trainer.optimizer_name,
        autocast=_autocast(config.trainer.args, machine),
        masked=not flash and (packed or rows > 1 or config.trainer.padding == "max_length"),
        flash=flash,
        full=not config.lora.is_enabled,
        reference=not config.lora.is_enabled and has_reference,
        task=METHODS[method].task,
        dropout=not args.disable_dropout,
        assumptions=tuple(assumptions),
    )


def bound_by_rows(config: RunConfig, longest: int) -> RunConfig:
    """Return the config with `chat.max_length` lowered to the longest training row, in tokens.

    It stays where rows are filled up to the bound (packing, padding), and where the rows do not say
    how long a sequence gets: with methods that write replies, and with a decoder of its own.
    `longest` is 0 where the rows are not known.
    """
    args, method = config.trainer.args, METHODS[config.trainer.base_method]
    fills_rows = args.packing or config.trainer.padding == "max_length"
    is_unknown = method.uses_rewards or method.uses_teacher or method.task == "SEQ_2_SEQ_LM"
    if not longest or fills_rows or is_unknown:
        return config
    multiple = args.pad_to_multiple_of
    length = -(-longest // multiple) * multiple
    bound = config.chat.max_length or length
    chat = config.chat.model_copy(update={"max_length": min(length, bound)})
    return config.model_copy(update={"chat": chat})


@cache
def trainer_defaults(method: str = "sft") -> dict[str, Any]:
    """Return the defaults of the arguments of a method's trainer, by name."""
    package, file, name = METHODS[method].config
    module = ".".join([package, *file.removesuffix(".py").split("/")])
    return {f.name: f.default for f in fields(getattr(import_module(module), name))}


def _checkpointing(args: TrainerArgs) -> Checkpointing | None:
    """Return the activation checkpointing of a trainer's arguments; None for none or `auto`."""
    setting = args.activation_checkpointing
    if setting is None:
        setting = args["gradient_checkpointing"]  # TRL's trainers set the older name
    if not setting or setting == AUTO_CHECKPOINTING:
        return None
    kwargs = args.activation_checkpointing_kwargs
    return Checkpointing(int(kwargs.get("every_n_layers", 1)), bool(kwargs.get("offload", False)))


def _autocast(args: TrainerArgs, machine: Machine) -> str | None:
    """Return the format of mixed precision, of `args` or else of the machine; None for none."""
    if machine.dtype == "bfloat16" if args.bf16 is None else args.bf16:
        return "bfloat16"
    is_float16 = machine.dtype == "float16" if args.fp16 is None else args.fp16
    return "float16" if is_float16 else None


def _uncounted(method: str, args: TrainerArgs) -> list[str]:
    """Return a sentence for each setting that changes memory and is not counted."""
    uncounted = {
        "torch_compile": "torch.compile mostly keeps less than what is counted here",
        "use_liger_kernel": "Liger's kernels keep less than what is counted here",
    }
    notes = [f"trainer.args.{name}: {text}." for name, text in uncounted.items() if args.get(name)]
    if method in ("grpo", "rloo", "distill"):
        notes.append(f"trainer.method={method}: the keys and values of generation are not counted.")
    return notes


def parse_size(text: str, key: str) -> int:
    """Return the bytes of a size such as `24GB`, `24GiB`, `80G` or `512MB`.

    GB is read as GiB, as GPUs are sold and as nvidia-smi counts. Raises UserError, naming `key`.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, flags=re.IGNORECASE)
    size = round(float(match[1]) * 2 ** _UNIT_BITS[match[2].upper()]) if match else 0
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


@dataclass(frozen=True)
class Hardware:
    """The device that a run is planned for."""

    kind: str
    """cuda, mps or cpu."""
    name: str
    memory: int
    """Bytes of one GPU; on a CPU or a Mac what all processes share, as far as it is free now."""
    count: int = 1
    """GPUs, or processes on a CPU."""
    imagined: bool = False
    """Whether it was described by flags and need not exist."""

    @property
    def room(self) -> int:
        """Bytes that one process may fill."""
        # The processes of a CPU or a Mac share its memory; each process has a GPU of its own.
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
    device_type = choose_machine(config).device_type
    if device_type == "cuda":
        return _local_gpus(processes)
    return Hardware(device_type, "this machine's main memory", _free_main_memory(), processes or 1)


def hypothetical_gpus(memory: int, gpus: int) -> Hardware:
    """Return `gpus` GPUs of `memory` bytes each, which need not be in this machine."""
    return Hardware("cuda", f"GPU of {format_size(memory)}", memory, gpus, imagined=True)


def machine_for(config: ModelConfig, hardware: Hardware) -> Machine:
    """Return device, number format and attention as a run on that hardware would have them.

    For hypothetical GPUs bfloat16 and torch's own attention are assumed.
    """
    # What libraries a machine has that need not exist cannot be known.
    if not hardware.imagined:
        return choose_machine(config)
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    attention = "sdpa" if config.attention == "auto" else config.attention
    return Machine("cuda:0", dtype, attention)


def _local_gpus(processes: int | None) -> Hardware:
    """Return `processes` of this machine's GPUs, or all of them if it is None."""
    import torch

    available = torch.cuda.device_count()
    if processes is not None and processes > available:
        raise UserError(
            f"--gpus {processes}: this machine has {available}. To plan for others, say how much "
            f"memory each has: --gpus {processes} --memory 24GB."
        )
    first = torch.cuda.get_device_properties(0)
    name = f"{first.name} of {format_size(first.total_memory)}"
    return Hardware("cuda", name, first.total_memory, processes or available)


def _free_main_memory() -> int:
    """Return the bytes of main memory that are free for a new process in this container."""
    import psutil

    # A container's limit is not in what psutil says of the machine.
    free: int = psutil.virtual_memory().available
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return free
    return min(free, int(limit)) if limit.isdigit() else free
