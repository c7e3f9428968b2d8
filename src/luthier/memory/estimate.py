"""The memory of one process at the fullest moment of a step, item by item.

On a CPU this includes the memory that the C library keeps of what a program gives back.
"""

import os
import sys
from collections.abc import Sequence
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

FRAGMENTED, FRAGMENTED_BY_CHECKPOINTS = 0.3, 0.7
"""The shares by which glibc's heap outgrows the bytes that a step holds at once, by default.

Blocks of tensors lie in one heap between small long-lived ones, and a freed block seldom fits the
next tensor; layers that are computed again in the backward make many more of them. Measured by
benchmarks/memory.py: 0.14 to 0.47 without checkpointing, 0.6 to 0.7 with it, and up to a tenth of
the total more or less from run to run.
"""
MALLOC_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
"""Either makes glibc give large blocks back when they are freed (man 3 mallopt)."""
RETURN_FREED_BLOCKS = "MALLOC_MMAP_THRESHOLD_=131072"
"""The variable to set before a command so that glibc keeps nothing; it costs system time."""


_PHASE_ROWS = {
    ACTIVATIONS: "activations",
    INPUTS: "activations",
    LOGITS: "output layer",
    BACKWARD: "backward",
}
"""Phases of a simulated step -> the row of the plan that their tensors are counted in."""


@dataclass(frozen=True)
class MemoryItem:
    """A row of the plan: a name and its bytes."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """The memory of one process under one sharding."""

    sharding: Sharding
    parts: tuple[MemoryItem, ...]
    moment: str
    """The fullest moment: `step` (forward and backward) or `update` (of the weights)."""
    elsewhere: int
    """Bytes of paged optimizer states: on the GPU while there is room, else in main memory."""
    room: int
    """Bytes that the process may fill."""

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return sum(item.bytes for item in self.parts)

    @property
    def fits(self) -> bool:
        """Whether the process has room for it."""
        return self.total <= self.room


def estimate_memory(
    step: SimulatedStep,
    workload: Workload,
    sharding: Sharding,
    hardware: Hardware,
    file_dtype: str | None = None,
    teacher: int = 0,
    reward_models: int = 0,
) -> Estimate:
    """Add up the memory of one process; `step` must have followed the sharding's gradient share.

    `file_dtype` is the number format of the model's file, None where it is unknown; `teacher` and
    `reward_models` are the bytes of further models.
    """
    weights, on_gpu = step.weights, hardware.kind == "cuda"
    is_half = workload.autocast is not None
    held = process_memory(sharding, weights, half=is_half)
    share = held.optimizer_share
    trained = [weight for weight in weights if weight.trains]
    optimizer = optimizers.find_optimizer(workload.optimizer)
    states, elsewhere = optimizers.state_bytes(optimizer, trained, on_gpu)
    # The memory that lasts through the step, then the memory of its fullest moment.
    items = [
        *_weight_items(held, workload, step),
        MemoryItem("teacher", teacher),
        MemoryItem("reward models", reward_models),
        MemoryItem("master copy float32", held.master),
        MemoryItem("optimizer", int(states * share)),
        MemoryItem("gathered weights", held.gathered),
        MemoryItem("gradient buckets", held.buckets),
    ]
    gradients = _gradient_share(sharding, workload) if held.gradients_on_device else 0.0
    update = int(optimizers.update_bytes(optimizer, trained, on_gpu) * share)
    # Either the step or the update is the fullest moment, never both at once.
    moment, momentary = _fullest_moment(step, gradients, update)
    items += momentary
    # On a CPU the heap keeps freed blocks, and pages of the model's file count as the process's.
    if hardware.kind == "cpu":
        step_bytes = sum(item.bytes for item in momentary)
        lost = heap_overhead(step_bytes, workload.checkpointing is not None)
        items.append(MemoryItem("heap overhead", lost))
        items.append(MemoryItem("mapped file", _mapped_file_bytes(step, file_dtype)))
    # What a process takes before it holds a tensor.
    items.append(MemoryItem("CUDA context" if on_gpu else "libraries", hardware.overhead))
    return Estimate(
        sharding=sharding,
        parts=tuple(item for item in items if item.bytes),
        moment=moment,
        elsewhere=int(elsewhere * share),
        room=hardware.room,
    )


def gradient_shares(shardings: Sequence[Sharding], workload: Workload) -> set[float]:
    """Return the shares of the gradients that a simulated step must follow for `shardings`."""
    return {0.0, *(_gradient_share(sharding, workload) for sharding in shardings)}


def _gradient_share(sharding: Sharding, workload: Workload) -> float:
    """Return the share of the gradients that stays on a process in a step of `workload`."""
    is_half = workload.autocast is not None
    return sharding.gradient_share(workload.full, is_half, workload.accumulation > 1)


def keeps_freed_blocks() -> bool:
    """Tell whether this process's C library keeps large blocks: glibc does unless told not to."""
    return sys.platform == "linux" and not any(name in os.environ for name in MALLOC_VARIABLES)


def heap_overhead(step_bytes: int, has_checkpoints: bool) -> int:
    """Return the bytes that the heap loses while a step holds `step_bytes` at once."""
    share = FRAGMENTED_BY_CHECKPOINTS if has_checkpoints else FRAGMENTED
    return int(step_bytes * share) if keeps_freed_blocks() else 0


def _weight_items(held: ProcessMemory, workload: Workload, step: SimulatedStep) -> list[MemoryItem]:
    """Return frozen weights and trained ones by number format, and the buffers."""
    name = "trained" if workload.full else "adapters"
    items = [MemoryItem(f"weights {dtype}", size) for dtype, size in held.weights.items()]
    if workload.reference:
        items.append(MemoryItem("reference", sum(w.elements for w in step.weights) * 4))
    items += [MemoryItem(f"{name} {dtype}", size) for dtype, size in held.trained.items()]
    return [*items, MemoryItem("buffers", step.held - sum(w.stored for w in step.weights))]


def _fullest_moment(step: SimulatedStep, share: float, update: int) -> tuple[str, list[MemoryItem]]:
    """Return the fuller of two moments with its items: forward and backward, or the update.

    `share` is that of the gradients which stays on the process, `update` the bytes that changing
    the weights takes.
    """
    peak = step.peaks[share]
    # Gradients have the format of the weights.
    gradients = int(sum(weight.stored for weight in step.weights if weight.trains) * share)
    if gradients + update > peak.bytes:
        return "update", [MemoryItem("gradients", gradients), MemoryItem("update", update)]
    sizes = {"gradients": int(peak.bytes_by_phase.get(GRADIENTS, 0) * share)}
    for phase, size in peak.bytes_by_phase.items():
        if phase not in (GRADIENTS, WEIGHTS):
            row = _PHASE_ROWS[phase]
            sizes[row] = sizes.get(row, 0) + size
    return "step", [MemoryItem(row, size) for row, size in sizes.items()]


def _mapped_file_bytes(step: SimulatedStep, file_dtype: str | None) -> int:
    """Return the bytes of a file that stay in main memory because some weights are used from there.

    They are those of weights that were quantized from it. The system takes them back when memory is
    short, and until then they count as the process's.
    """
    if not any(w.format == file_dtype and not w.trains for w in step.weights):
        return 0
    size = {"float32": 4, "float64": 8}.get(str(file_dtype), 2)
    return sum(w.elements * size for w in step.weights if w.is_quantized)
