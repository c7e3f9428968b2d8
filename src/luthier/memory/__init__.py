"""The memory of a run before it runs: weights, optimizer, activations, and what to change.

    from luthier.memory import choose_checkpointing, fits_in_memory, plan_memory

Everything here imports torch at the first use and not before.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.memory.plan import MemoryPlan, choose_checkpointing, fits_in_memory, plan_memory

__all__ = ["MemoryPlan", "choose_checkpointing", "fits_in_memory", "plan_memory"]


def __getattr__(name: str) -> Any:
    """Import the parts of `luthier.memory.plan` when they are asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from luthier.memory import plan

    return getattr(plan, name)
