"""Losses and gradients that are no numbers: at which step, in which rows, and what is left."""

import math
from collections.abc import Iterable, Sequence
from copy import copy
from itertools import islice
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from luthier.data.batching.samplers import SampledRows

SHOWN = 8
"""Rows that a message names."""


def broken_step(norms: Iterable[tuple[int, Any]]) -> int | None:
    """The first step whose gradient has no finite norm, of (step, norm) pairs in order."""
    return next((step for step, norm in norms if not math.isfinite(float(norm))), None)


def rows_of_step(trainer: Any, step: int) -> list[int]:
    """The numbers, in their table, of the rows that all ranks saw in an optimizer step.

    They follow from the order of the epoch; none where the rows come as a stream.
    """
    loader = trainer.callback_handler.train_dataloader
    rows = None if loader is None else loader.dataset
    if not isinstance(rows, SampledRows):
        return []
    sampler, size = copy(rows.sampler), trainer.get_total_train_batch_size(trainer.args)
    epoch, place = divmod(step - 1, -(-len(sampler) // size))
    sampler.set_epoch(epoch)
    seen = islice(sampler, place * size, (place + 1) * size)
    return list(dict.fromkeys(number for numbers in seen for number in numbers))


def words(trainer: Any, what: str, step: int, places: Sequence[str]) -> str:
    """The message that ends a run: what broke, where, what is left and what may mend it."""
    shown = ", ".join(places[:SHOWN])
    more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    rows = f"Rows of that step: {shown}{more}.\n" if places else ""
    last = get_last_checkpoint(trainer.args.output_dir)
    kept = (
        f"The last checkpoint before it: {last}." if last else "There is no checkpoint before it."
    )
    return (
        f"{what} at step {step}, so the run stops.\n{rows}{kept}\n"
        "A smaller trainer.args.learning_rate, more trainer.args.warmup_steps, or "
        "model.dtype=bfloat16 in place of float16 usually mends it; else look at those rows."
    )
