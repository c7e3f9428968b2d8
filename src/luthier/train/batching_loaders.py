"""From token rows and a plan to the sampler and the collator of a data loader."""

from typing import Any

import numpy as np
from datasets import Dataset

from luthier.data.batching.collators import FlatRows, PackedRows, PaddedRows
from luthier.data.batching.rows import ListTable, TokenRows, check_fits
from luthier.data.batching.samplers import (
    LengthGroupedSampler,
    PackedSampler,
    Sampler,
    SequentialSampler,
    ShuffledSampler,
)
from luthier.data.batching.settings import Batching

Collator = PaddedRows | PackedRows | FlatRows


def token_rows(rows: Any) -> TokenRows:
    """The rows that take part: `TokenRows`, a table of token rows, or a `datasets.Dataset`."""
    if isinstance(rows, TokenRows):
        return rows
    if isinstance(rows, Dataset):
        return TokenRows(ListTable(rows["input_ids"], rows["labels"]))
    return TokenRows(rows)


def train_sampler(rows: TokenRows, plan: Batching, args: Any, size: int, processes: int) -> Sampler:
    """The order of training: packed, or as `train_sampling_strategy` says.

    `size`: rows in a batch of one process; `args`: the trainer's. Raises UserError for rows that
    are longer than the plan's length.
    """
    _check_lengths(rows, plan, plan.packing)
    seed = args.seed if args.data_seed is None else args.data_seed
    strategy = args.train_sampling_strategy
    # A single process may end an epoch on a smaller batch; several must stay in step.
    multiple = size * processes if processes > 1 and not args.dataloader_drop_last else 1
    if plan.packing:
        assert plan.length is not None
        return PackedSampler(rows, plan.length, seed, multiple, shuffle=strategy != "sequential")
    if strategy == "group_by_length":
        step = size * processes * args.gradient_accumulation_steps
        return LengthGroupedSampler(rows, step, seed, multiple)
    if strategy == "sequential":
        return SequentialSampler(rows, seed, multiple)
    return ShuffledSampler(rows, seed, multiple)


def eval_sampler(rows: TokenRows, plan: Batching, args: Any, size: int, processes: int) -> Sampler:
    """The order of an evaluation: always the same, and every row is in it."""
    _check_lengths(rows, plan, plan.eval_packing)
    # Trainer drops an evaluation's last batch, too, if it is small and `drop_last` is set.
    multiple = size * processes if processes > 1 or args.dataloader_drop_last else 1
    if plan.eval_packing:
        assert plan.length is not None
        return PackedSampler(rows, plan.length, multiple=multiple, shuffle=False)
    return SequentialSampler(rows, multiple=multiple)


def collator(
    plan: Batching, packed: bool, flat: bool, pad_token_id: int, multiple_of: int | None
) -> Collator:
    """The layout of batches; `flat`: for attention kernels of variable length."""
    kind = (FlatRows if flat else PackedRows) if packed else PaddedRows
    return kind(pad_token_id, plan.length if plan.constant else None, multiple_of)


def _check_lengths(rows: TokenRows, plan: Batching, packed: bool) -> None:
    if plan.length is not None and (packed or plan.constant):
        check_fits(int(np.max(rows.lengths, initial=0)), plan.length)
