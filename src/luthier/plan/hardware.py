"""The memory that a plan is held against: this machine's, or that of GPUs one does not have."""

from dataclasses import dataclass
from pathlib import Path

from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model.device import Machine, choose
from luthier.plan import sizes

CUDA_CONTEXT = 723 * sizes.MIB
"""What the driver and the kernels of a process take before its first tensor.

https://discuss.pytorch.org/t/what-is-the-reason-for-pytorchs-gpu-memory-floor/73021 has 723 MiB;
newer drivers load kernels as they are used, and take less.
"""
PROCESS = 620 * sizes.MIB
"""Python with torch, transformers, trl and bitsandbytes, before a model is loaded.

Measured by benchmarks/memory.py as `base`; the trainer's own imports are in it.
"""
MARGIN = 0.05
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
        return int(self.memory * (1 - MARGIN)) // shared

    @property
    def overhead(self) -> int:
        """Bytes that a process takes before it holds anything."""
        return CUDA_CONTEXT if self.kind == "cuda" else PROCESS


def here(config: ModelConfig, processes: int | None = None) -> Hardware:
    """Return this machine's device as the configuration chooses it.

    `processes` defaults to all GPUs, and to one process elsewhere. Raises UserError for a device
    that this machine does not have, or for more GPUs than it has.
    """
    kind = choose(config).kind
    if kind == "cuda":
        return _gpus(processes)
    return Hardware(kind, "this machine's main memory", _free(), processes or 1)


def imagine(memory: int, gpus: int) -> Hardware:
    """Return GPUs of so many bytes each, which need not be here."""
    return Hardware("cuda", f"GPU of {sizes.show(memory)}", memory, gpus, imagined=True)


def machine_for(config: ModelConfig, hardware: Hardware) -> Machine:
    """Return device, number format and attention as a run on that hardware would have them.

    Of imagined GPUs bfloat16 and torch's own attention are assumed.
    """
    if not hardware.imagined:
        return choose(config)
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
    name = f"{first.name} of {sizes.show(first.total_memory)}"
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
