"""The bytes of optimizers: their states, and the temporary copies of an update."""

from collections.abc import Sequence
from dataclasses import dataclass

from luthier.memory.meta_model import Weight

BLOCK_8BIT, SMALLEST_8BIT = 256, 4096
"""bitsandbytes: the count of numbers that share a scale; the smallest tensor with 8-bit states."""
SMALLEST_PAGED = 100_000
"""bitsandbytes: states of smaller tensors stay on the GPU."""


@dataclass(frozen=True)
class OptimizerMemory:
    """The memory of an optimizer, by what it keeps for one weight and copies in an update."""

    states: int = 2
    """The count of numbers that it keeps for each trained weight."""
    bits: int = 32
    """Bits of a state; tables of embeddings get 32 from transformers where others get 8."""
    matrix_states: int | None = None
    """The same for matrices of transformer layers, where it differs."""
    paged: bool = False
    """Whether states may move to main memory where a GPU is short of its own."""
    factored: bool = False
    """Whether the states of a matrix are a row and a column in place of a matrix."""
    copies: int = 0
    """Copies of all trained weights that an update on a GPU makes at once."""
    largest: int = 0
    """Copies of the largest trained weight that an update makes."""
    is_known: bool = True
    """Whether the numbers are its own, and not those of an ordinary optimizer."""


_BNB_STEP = 3
OPTIMIZERS = {
    "adamw_torch": OptimizerMemory(copies=1, largest=2),
    "adamw_torch_fused": OptimizerMemory(),
    "adafactor": OptimizerMemory(states=1, factored=True, largest=3),
    "sgd": OptimizerMemory(states=0),
    "adagrad": OptimizerMemory(states=1, copies=1, largest=2),
    "rmsprop": OptimizerMemory(states=1, copies=1, largest=2),
    "adamw_8bit": OptimizerMemory(bits=8, largest=_BNB_STEP),
    "adamw_bnb_8bit": OptimizerMemory(bits=8, largest=_BNB_STEP),
    "paged_adamw_32bit": OptimizerMemory(paged=True, largest=_BNB_STEP),
    "paged_adamw_8bit": OptimizerMemory(bits=8, paged=True, largest=_BNB_STEP),
    "lion_32bit": OptimizerMemory(states=1, largest=_BNB_STEP),
    "lion_8bit": OptimizerMemory(states=1, bits=8, largest=_BNB_STEP),
    "paged_lion_32bit": OptimizerMemory(states=1, paged=True, largest=_BNB_STEP),
    "paged_lion_8bit": OptimizerMemory(states=1, bits=8, paged=True, largest=_BNB_STEP),
    "ademamix": OptimizerMemory(states=3, largest=_BNB_STEP),
    "ademamix_8bit": OptimizerMemory(states=3, bits=8, largest=_BNB_STEP),
    "paged_ademamix_32bit": OptimizerMemory(states=3, paged=True, largest=_BNB_STEP),
    "paged_ademamix_8bit": OptimizerMemory(states=3, bits=8, paged=True, largest=_BNB_STEP),
    "rmsprop_bnb": OptimizerMemory(states=1, largest=_BNB_STEP),
    "rmsprop_bnb_8bit": OptimizerMemory(states=1, bits=8, largest=_BNB_STEP),
    "rmsprop_bnb_32bit": OptimizerMemory(states=1, largest=_BNB_STEP),
    "muon": OptimizerMemory(matrix_states=1, largest=3),
    "lomo": OptimizerMemory(states=0),
    "adalomo": OptimizerMemory(states=1, factored=True),
    "schedule_free_sgd": OptimizerMemory(states=1),
    "schedule_free_adamw": OptimizerMemory(),
    "schedule_free_radam": OptimizerMemory(),
}
"""`trainer.args.optim` of transformers, and `muon` of `trainer.optimizer`. The first twenty are
held against the optimizers themselves in tests/memory/test_optimizers.py."""
UNKNOWN_OPTIMIZER = OptimizerMemory(is_known=False)


def find_optimizer(name: str) -> OptimizerMemory:
    """Return the memory of an optimizer; two states of 32 bits where its name is unknown."""
    return OPTIMIZERS.get(name, UNKNOWN_OPTIMIZER)


def state_bytes(
    optimizer: OptimizerMemory, weights: Sequence[Weight], on_gpu: bool
) -> tuple[int, int]:
    """Return the bytes of the states that stay on the device, and of those that may leave it."""
    stays = leaves = 0
    for weight in weights:
        size = _states_of_weight(optimizer, weight)
        if optimizer.paged and on_gpu and weight.elements >= SMALLEST_PAGED:
            leaves += size
        else:
            stays += size
    return stays, leaves


def update_bytes(optimizer: OptimizerMemory, weights: Sequence[Weight], on_gpu: bool) -> int:
    """Return the bytes that an update makes and drops again.

    On a CPU torch goes from weight to weight; on a GPU bitsandbytes works in place.
    """
    sizes = [weight.elements * 4 for weight in weights]
    if not sizes:
        return 0
    # bitsandbytes' steps are recognized by their number of copies.
    of_bitsandbytes = optimizer.largest == _BNB_STEP and not optimizer.factored
    if on_gpu and optimizer.copies:
        return optimizer.copies * sum(sizes)
    return 0 if on_gpu and of_bitsandbytes else optimizer.largest * max(sizes)


def _states_of_weight(optimizer: OptimizerMemory, weight: Weight) -> int:
    """Return the bytes of one weight's states, which are float32 unless they are quantized."""
    if optimizer.factored and len(weight.shape) > 1:
        rows = weight.elements // weight.shape[-1]
        columns = weight.elements // weight.shape[-2]
        return (rows + columns) * 4 * optimizer.states
    # bitsandbytes keeps small tensors in 32 bits, and transformers the tables of embeddings.
    if optimizer.bits == 8 and weight.elements >= SMALLEST_8BIT and not weight.embeds:
        scales = -(-weight.elements // BLOCK_8BIT) * 4
        return optimizer.states * (weight.elements + scales)
    is_hidden_matrix = bool(weight.layer) and len(weight.shape) == 2 and not weight.embeds
    states = optimizer.matrix_states if is_hidden_matrix else None
    return (optimizer.states if states is None else states) * weight.elements * 4
