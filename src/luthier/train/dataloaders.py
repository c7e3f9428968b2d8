"""The data loaders of a trainer: samplers and collators for tables of rows, loaders for streams."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from luthier.data.batching.collators import FlatteningCollator, PackingCollator, PaddingCollator
from luthier.data.batching.image_collators import ImageCollator, ImageInputs
from luthier.data.batching.packing import PackingPlan
from luthier.data.batching.samplers import (
    LengthGroupedSampler,
    OpenRows,
    PackedSampler,
    Sampler,
    SequentialSampler,
    ShuffledSampler,
    pack_stream,
    repeat_stream,
)
from luthier.data.batching.settings import BatchingSettings
from luthier.data.batching.token_rows import InMemoryTable, TokenRows, TrainingRow, check_row_fits
from luthier.errors import UserError


class StreamDataset(IterableDataset):
    """An endless stream of training rows: pass after pass over a source, shuffled in a buffer.

    It has no end, because the trainer resumes a run by counting batches from the beginning of an
    epoch: with one epoch for all passes that is exact in any of them.
    """

    def __init__(
        self,
        open_rows: OpenRows,
        *,
        seed: int,
        shuffle_buffer: int = 10_000,
        length: int | None = None,
        pack_rows: int = 128,
    ) -> None:
        """`open_rows` begins a pass over the source.

        With a `length`, documents are packed into training rows of so many tokens, about
        `pack_rows` of them at a time; None gives each document a row.
        """
        super().__init__()
        self.open_rows = open_rows
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.length = length
        self.pack_rows = pack_rows
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin with this pass at the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[TrainingRow]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise UserError(_TOO_MANY_WORKERS)
        documents = repeat_stream(self.open_rows, self.shuffle_buffer, self.seed, self.epoch)
        if self.length is None:
            return ((document,) for document in documents)
        return pack_stream(documents, self.length, self.pack_rows)


_TOO_MANY_WORKERS = (
    "trainer.args.dataloader_num_workers: a stream is read by one worker, since each would read all"
    " of it.\nSet it to 1 or 0, and dataset.workers for more processes that encode."
)


def check_stream_arguments(args: Any) -> None:
    """Raise UserError, before the first step, for trainer arguments that a stream cannot have."""
    if args.max_steps <= 0:
        raise UserError(
            "dataset.streaming=true: a stream has no known end, so the number of steps must be "
            "said.\nSet trainer.args.max_steps, such as trainer.args.max_steps=10000."
        )
    if args.dataloader_num_workers > 1:
        raise UserError(_TOO_MANY_WORKERS)
    if args.train_sampling_strategy != "random":
        raise UserError(
            f"trainer.args.train_sampling_strategy={args.train_sampling_strategy} needs to know all"
            " rows, and a stream is read as it comes.\nRemove it, or set dataset.streaming=false."
        )


def build_stream_loader(
    rows: StreamDataset, accelerator: Accelerator, size: int, settings: Any
) -> Any:
    """Return a loader that reads on the first process and deals `size` rows of a batch to each.

    A batch of all processes is laid out as a whole, so its rows are as wide as each other, and the
    rows of a step are those of one process with a batch as large as all of them together.
    """
    # The first process alone reads: each of several would read the whole stream to find its rows.
    loader: DataLoader = DataLoader(rows, batch_size=size * accelerator.num_processes, **settings)
    return prepare_data_loader(
        loader,
        accelerator.device,
        split_batches=True,
        dispatch_batches=True,
        put_on_device=True,
        non_blocking=accelerator.non_blocking,
    )


def flatten_packed_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Lay packed rows end to end, as `FlatteningCollator` does, on the device they are on.

    Rows of a stream are dealt out to the processes as rows, so they are flattened behind that.
    """
    flat = {name: batch[name].reshape(1, -1) for name in ("input_ids", "labels", "position_ids")}
    # The positions of a document begin at 0, those of the padding too, and 0 stands nowhere else.
    starts = (flat["position_ids"][0] == 0).nonzero().flatten()
    ends = torch.cat((starts, starts.new_tensor([flat["input_ids"].numel()]))).int()
    sizes = ends.diff()
    numbers = torch.arange(len(sizes), dtype=torch.int32, device=sizes.device)
    longest = int(sizes.max())
    return flat | {
        "seq_idx": torch.repeat_interleave(numbers, sizes)[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        "tokens": batch["tokens"].sum()[None],
    }


Collator = PaddingCollator | PackingCollator | FlatteningCollator | ImageCollator


def as_token_rows(rows: Any) -> TokenRows:
    """Return `TokenRows` from what a trainer is given: those, a table of token rows, or a Dataset.

    A `datasets.Dataset` needs the columns `input_ids` and `labels`.
    """
    if isinstance(rows, TokenRows):
        return rows
    if isinstance(rows, Dataset):
        return TokenRows(InMemoryTable(rows["input_ids"], rows["labels"]))
    return TokenRows(rows)


def refuse_idle_processes(rows: Any, plan: BatchingSettings, processes: int) -> None:
    """Raise UserError where there are more processes than training rows, packed if they will be.

    `rows` is a table of token rows, or a stream, of which nothing is known.
    """
    if not isinstance(rows, TokenRows):
        return
    count, name = len(rows), "rows"
    if plan.packing:
        assert plan.length is not None
        # No packing needs fewer bins than the tokens fill, and to pack all of them takes long.
        is_enough = int(np.sum(rows.lengths, dtype=np.int64)) > plan.length * processes
        count = processes if is_enough else len(PackingPlan(rows.lengths, plan.length))
        name = f"packed rows of {plan.length} tokens"
    if count < processes:
        raise UserError(
            f"{processes} processes train together, but there are {count} {name} to train on, so "
            f"{processes - count} of them would never train.\nStart at most {count} "
            "(--num_processes of the launcher), or add rows."
        )


def build_train_sampler(
    rows: TokenRows, plan: BatchingSettings, args: Any, size: int, processes: int
) -> Sampler:
    """Return the order of training: packed, or as `train_sampling_strategy` says.

    `size` is the rows in a batch of one process, and `args` are the trainer's. Raises
    UserError for rows that are longer than the plan's length.
    """
    _check_lengths(rows, plan, plan.packing)
    # As in transformers: `data_seed` is for the order of the rows, `seed` for all without one.
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


def build_eval_sampler(
    rows: TokenRows, plan: BatchingSettings, args: Any, size: int, processes: int
) -> Sampler:
    """Return the order of an evaluation: always the same, and every row is in it."""
    _check_lengths(rows, plan, plan.eval_packing)
    # Trainer drops an evaluation's last batch, too, if it is small and `drop_last` is set.
    multiple = size * processes if processes > 1 or args.dataloader_drop_last else 1
    if plan.eval_packing:
        assert plan.length is not None
        return PackedSampler(rows, plan.length, multiple=multiple, shuffle=False)
    return SequentialSampler(rows, multiple=multiple)


def build_collator(
    plan: BatchingSettings,
    packed: bool,
    flat: bool,
    pad_token_id: int,
    multiple_of: int | None,
    with_columns: bool = False,
    images: ImageInputs | None = None,
) -> Collator:
    """Return the layout of batches; `flat` is that of attention kernels of variable length.

    `with_columns`: batches have the columns of their rows. `images` makes the inputs of pictures;
    None where rows have none.
    """
    collator_class = (
        (FlatteningCollator if flat else PackingCollator) if packed else PaddingCollator
    )
    length = plan.length if plan.constant else None
    layout = collator_class(pad_token_id, length, multiple_of, with_columns)
    return layout if images is None else ImageCollator(layout, images)


def _check_lengths(rows: TokenRows, plan: BatchingSettings, packed: bool) -> None:
    """Raise UserError for rows that are longer than batches of a fixed length allow."""
    if plan.length is not None and (packed or plan.constant):
        check_row_fits(int(np.max(rows.lengths, initial=0)), plan.length)
