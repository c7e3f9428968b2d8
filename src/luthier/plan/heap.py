"""What the C library keeps of the memory that a program on a CPU gives back."""

import os
import sys

FRAGMENTED, FRAGMENTED_BY_CHECKPOINTS = 0.3, 0.7
"""The shares by which glibc's heap outgrows what a step holds at once, as it comes.

Blocks of tensors lie in one heap between small long-lived ones, and a freed block seldom fits the
next tensor; layers that are computed again in the backward make many more of them. Measured by
benchmarks/memory.py: 0.14 to 0.47 without checkpointing, 0.6 to 0.7 with it, and up to a tenth of
the whole more or less from run to run.
"""
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
"""Either makes glibc give large blocks back when they are freed (man 3 mallopt)."""
ADVICE = "MALLOC_MMAP_THRESHOLD_=131072"
"""What to put before a command so that nothing is kept; it costs system time."""


def keeps() -> bool:
    """Tell whether this process's C library keeps large blocks: glibc does unless told not to."""
    return sys.platform == "linux" and not any(name in os.environ for name in VARIABLES)


def overhead(step: int, checkpoints: bool) -> int:
    """Return the bytes that the heap loses while a step holds so many at once."""
    share = FRAGMENTED_BY_CHECKPOINTS if checkpoints else FRAGMENTED
    return int(step * share) if keeps() else 0
