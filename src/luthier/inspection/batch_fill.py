"""How much of a batch is padding, as the config lays batches out and packed; lengths in numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.config.library_settings import TrainerArgs
from luthier.config.methods import METHODS
from luthier.config.schema import RunConfig
from luthier.data.batching.packing import PackingPlan
from luthier.data.batching.samplers import (
    LengthGroupedSampler,
    Sampler,
    SequentialSampler,
    ShuffledSampler,
)
from luthier.data.batching.settings import BatchingSettings
from luthier.data.batching.token_rows import TokenRows

Lengths = NDArray[np.int32]
Widths = NDArray[np.int64]


@dataclass(frozen=True)
class BatchLayout:
    """The training rows of an epoch."""

    rows: int
    length: int | None
    """The tokens of a row; None where rows are padded to the longest of their batch."""
    batch_size: int
    """Rows in a batch of one device."""
    batches: int
    efficiency: float
    """The share of all places that holds a token; the others are padding."""


@dataclass(frozen=True)
class BatchFill:
    """Both ways to lay an epoch out."""

    packing: bool
    """What the config chose."""
    strategy: str
    """The order of rows where they are not packed."""
    padded: BatchLayout
    packed: BatchLayout | None
    """None where `chat.max_length` does not say how long a row may be, or the method packs none."""


class _Unread:
    """Token rows of which only the lengths are known."""

    def __init__(self, lengths: Lengths) -> None:
        self.lengths = lengths

    def row(self, number: int, /) -> Mapping[str, Any]:
        raise LookupError(number)


def measure_batch_fill(
    lengths: Lengths,
    config: RunConfig,
    plan: BatchingSettings,
    tokens: int | None = None,
    sequences: int = 1,
) -> BatchFill | None:
    """Lay out sequences of these lengths (tokens) for one device; None where there is none.

    `sequences`: how many a row has side by side, all padded to one length, such as two of a pair;
    `tokens` are then those of all of them.
    """
    if not len(lengths):
        return None
    count = int(lengths.sum(dtype=np.int64)) if tokens is None else tokens
    args = config.trainer.args
    size, strategy = args.per_device_train_batch_size, args.train_sampling_strategy
    return BatchFill(
        packing=plan.packing,
        strategy=strategy,
        padded=_padded(
            lengths, _sampler(lengths, strategy, size, config), plan, args, count / sequences
        ),
        packed=_packed(lengths, plan.length, size) if can_pack(config) else None,
    )


def can_pack(config: RunConfig) -> bool:
    """Return whether the rows of the run's method are such as can be packed."""
    return bool({"conversation", "text"} & {*METHODS[config.trainer.base_method].row_types})


def _packed(lengths: Lengths, length: int | None, size: int) -> BatchLayout | None:
    if length is None:
        return None
    fit = PackingPlan(lengths, length)
    return BatchLayout(len(fit), length, size, -(-len(fit) // size), fit.efficiency)


def _padded(
    lengths: Lengths, sampler: Sampler, plan: BatchingSettings, args: TrainerArgs, tokens: float
) -> BatchLayout:
    """The rows of the first epoch, in their order; `tokens`: those of one sequence of each row."""
    size = args.per_device_train_batch_size
    length = plan.length if plan.constant else None
    ordered = lengths[[number for (number,) in sampler]]
    starts = np.arange(0, len(ordered), size)
    longest = np.maximum.reduceat(ordered, starts).astype(np.int64)
    rows = np.diff(np.append(starts, len(ordered)))
    positions = int((_widths(longest, length, args) * rows).sum())
    return BatchLayout(len(lengths), length, size, len(starts), tokens / positions)


def _widths(longest: Widths, length: int | None, args: TrainerArgs) -> Widths:
    """How wide each batch is."""
    multiple = args.pad_to_multiple_of
    widths = longest if length is None else np.full_like(longest, length)
    return -(-widths // multiple) * multiple


def _sampler(lengths: Lengths, strategy: str, size: int, config: RunConfig) -> Sampler:
    """The order in which a training on one device sees the sequences."""
    rows = TokenRows(_Unread(lengths))
    if strategy == "group_by_length":
        step = size * config.trainer.args.gradient_accumulation_steps
        return LengthGroupedSampler(rows, step, config.seed)
    return (SequentialSampler if strategy == "sequential" else ShuffledSampler)(rows, config.seed)


def quantiles(values: Sequence[int] | Lengths) -> dict[str, int]:
    """The least, the middle, the 90th and 99th percentile (nearest rank) and the most."""
    ranked = np.sort(values)
    if not len(ranked):
        return {}
    shares = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    last = len(ranked) - 1
    return {name: int(ranked[round(share * last)]) for name, share in shares.items()}


def histogram(values: Sequence[int] | Lengths, bins: int = 8) -> list[tuple[int, int | None, int]]:
    """Counts of values from (inclusive) and to (exclusive); None: no upper bound.

    The last bin takes what lies beyond the 99th percentile, so that one long row does not make
    all others equal.
    """
    if not len(values):
        return []
    marks = quantiles(values)
    width = _round_up(max((marks["p99"] - marks["min"] + 1) / bins, 1))
    start = marks["min"] // width * width
    edges = [start + n * width for n in range((marks["p99"] - start) // width + 2)]
    numbers = np.minimum((np.asarray(values) - start) // width, len(edges) - 1)
    counts = np.bincount(numbers, minlength=len(edges)).tolist()
    ends = [*edges[1:], None]
    rows = list(zip(edges, ends, counts, strict=True))
    return rows if counts[-1] else rows[:-1]


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= width:
                return step * power
        power *= 10
