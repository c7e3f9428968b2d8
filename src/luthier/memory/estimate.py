"""The plan: what each process holds at the fullest moment of a step, part by part."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from luthier.memory import optimizers
from luthier.memory.sharding import ProcessMemory, Sharding, process_memory
from luthier.memory.simulate import (
    ACTIVATIONS,
    BACKWARD,
    GRADIENTS,
    INPUTS,
    LOGITS,
    WEIGHTS,
    SimulatedStep,
)
from luthier.memory.workload import Hardware, Workload

# What the C library keeps of the memory that a program on a CPU gives back.

FRAGMENTED, FRAGMENTED_BY_CHECKPOINTS = 0.3, 0.7
"""The shares by which glibc's heap outgrows what a step holds at once, as it comes.

Blocks of tensors lie in one heap between small long-lived ones, and a freed block seldom fits the
next tensor; layers that are computed again in the backward make many more of them. Measured by
benchmarks/memory.py: 0.14 to 0.47 without checkpointing, 0.6 to 0.7 with it, and up to a tenth of
the whole more or less from run to run.
"""
MALLOC_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
"""Either makes glibc give large blocks back when they are freed (man 3 mallopt)."""
RETURN_FREED_BLOCKS = "MALLOC_MMAP_THRESHOLD_=131072"
"""What to put before a command so that nothing is kept; it costs system time."""


def keeps_freed_blocks() -> bool:
    """Tell whether this process's C library keeps large blocks: glibc does unless told not to."""
    return sys.platform == "linux" and not any(name in os.environ for name in MALLOC_VARIABLES)


def heap_overhead(step: int, checkpoints: bool) -> int:
    """Return the bytes that the heap loses while a step holds so many at once."""
    share = FRAGMENTED_BY_CHECKPOINTS if checkpoints else FRAGMENTED
    return int(step * share) if keeps_freed_blocks() else 0


_PHASES = {
    ACTIVATIONS: "activations",
    INPUTS: "activations",
    LOGITS: "output layer",
    BACKWARD: "backward",
}


@dataclass(frozen=True)
class MemoryItem:
    """A row of the plan."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """One process under one way of sharing the work."""

    sharding: Sharding
    parts: tuple[MemoryItem, ...]
    moment: str
    """When the most is held: `step` (forward and backward) or `update` (of the weights)."""
    elsewhere: int
    """Bytes of paged optimizer states: on the GPU while there is room, else in main memory."""
    room: int
    """Bytes that the process may fill."""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(part.bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        """Whether the process has room for it."""
        return self.total <= self.room


def estimate_memory(
    rehearsal: SimulatedStep,
    workload: Workload,
    sharding: Sharding,
    hardware: Hardware,
    file_dtype: str | None = None,
    teacher: int = 0,
) -> Estimate:
    """Add up what one process of a sharding holds; `rehearsal` must know its gradient share.

    `file_dtype` is the number format of the model's file, `teacher` the bytes of another model.
    """
    weights, on_gpu = rehearsal.weights, hardware.kind == "cuda"
    held = process_memory(sharding, weights, half=workload.autocast is not None)
    trained = [weight for weight in weights if weight.trains]
    optimizer = optimizers.find_optimizer(workload.optimizer)
    states, elsewhere = optimizers.state_bytes(optimizer, trained, on_gpu)
    share = held.optimizer_share
    always = [
        *_weights(held, workload, rehearsal),
        MemoryItem("teacher", teacher),
        MemoryItem("master copy float32", held.master),
        MemoryItem("optimizer", int(states * share)),
        MemoryItem("gathered weights", held.gathered),
        MemoryItem("gradient buckets", held.buckets),
    ]
    made = int(optimizers.update_bytes(optimizer, trained, on_gpu) * share)
    kept = sharding.gradient_share(workload.full, workload.autocast is not None)
    moment, passing = _fullest(rehearsal, kept if held.gradients_on_device else 0.0, made)
    if hardware.kind == "cpu":
        here = sum(part.bytes for part in passing)
        lost = heap_overhead(here, workload.checkpointing is not None)
        passing.append(MemoryItem("lost in the heap", lost))
        passing.append(MemoryItem("mapped file", _mapped(rehearsal, file_dtype)))
    context = "CUDA context" if on_gpu else "libraries"
    parts = [*always, *passing, MemoryItem(context, hardware.overhead)]
    return Estimate(
        sharding=sharding,
        parts=tuple(part for part in parts if part.bytes),
        moment=moment,
        elsewhere=int(elsewhere * share),
        room=hardware.room,
    )


def _weights(held: ProcessMemory, workload: Workload, rehearsal: SimulatedStep) -> list[MemoryItem]:
    """Frozen weights and trained ones, by format."""
    trained = "trained" if workload.full else "adapters"
    counted = sum(w.stored for w in rehearsal.weights)
    parts = [MemoryItem(f"weights {form}", size) for form, size in held.weights.items()]
    if workload.reference:
        parts.append(MemoryItem("reference", sum(w.elements for w in rehearsal.weights) * 4))
    parts += [MemoryItem(f"{trained} {form}", size) for form, size in held.trained.items()]
    return [*parts, MemoryItem("buffers", rehearsal.held - counted)]


def _fullest(rehearsal: SimulatedStep, share: float, made: int) -> tuple[str, list[MemoryItem]]:
    """The fuller of two moments: within forward and backward, or when the weights are changed."""
    peak = rehearsal.peaks[share]
    gradients = int(_gradients(rehearsal) * share)
    if gradients + made > peak.bytes:
        return "update", [MemoryItem("gradients", gradients), MemoryItem("update", made)]
    return "step", _phases(peak.kinds, share)


def _mapped(rehearsal: SimulatedStep, file_dtype: str | None) -> int:
    """Bytes of a file that stay in main memory because some of its weights are used from there.

    They are those of weights that were quantized from it. The system takes them back when memory is
    short, and until then they count as the process's.
    """
    used = any(w.format == file_dtype and not w.trains for w in rehearsal.weights)
    size = {"float32": 4, "float64": 8}.get(str(file_dtype), 2)
    return sum(w.elements * size for w in rehearsal.weights if w.is_quantized) if used else 0


def _phases(kinds: Mapping[str, int], share: float) -> list[MemoryItem]:
    sizes: dict[str, int] = {"gradients": int(kinds.get(GRADIENTS, 0) * share)}
    for kind, size in kinds.items():
        if kind not in (GRADIENTS, WEIGHTS):
            name = _PHASES[kind]
            sizes[name] = sizes.get(name, 0) + size
    return [MemoryItem(name, size) for name, size in sizes.items()]


def _gradients(rehearsal: SimulatedStep) -> int:
    """Bytes of the gradients of all trained weights, which have the weights' format."""
    return sum(weight.stored for weight in rehearsal.weights if weight.trains)


def gradient_shares(shardings: Sequence[Sharding], workload: Workload) -> set[float]:
    """The gradient shares that a rehearsal must follow for these shardings."""
    half = workload.autocast is not None
    return {0.0, *(sharding.gradient_share(workload.full, half) for sharding in shardings)}
