"""Loaders in luthier's own order, for every trainer over rows of a table."""

from typing import Any

from luthier.data.batching.rows import TokenRows
from luthier.data.batching.samplers import SampledRows, Sampler
from luthier.data.batching.settings import Batching
from luthier.train.batching_loaders import eval_sampler, train_sampler
from luthier.train.methods.shared import Exact


class Ordered(Exact):
    """Stands before a trainer: `class Mine(Ordered, Trainer)`."""

    batching: Batching

    def sampler(self, rows: TokenRows, size: int, processes: int, is_training: bool) -> Sampler:
        """The order of the rows; `size`: those of a batch of one process."""
        make = train_sampler if is_training else eval_sampler
        return make(rows, self.batching, self.args, size, processes)

    def arranged(self, sampler: Sampler, is_training: bool) -> SampledRows:
        """The rows in this order, as the trainer's collator takes them."""
        return SampledRows(sampler)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        """Make a loader with luthier's own samplers."""
        in_step = self._train_batch_size * self.args.gradient_accumulation_steps
        processes = self.get_total_train_batch_size(self.args) // in_step
        sampler = self.sampler(dataset, batch_size, processes, is_training)
        return super()._get_dataloader(
            dataset=self.arranged(sampler, is_training),
            description=description,
            batch_size=batch_size,
            sampler_fn=lambda rows: sampler,
            is_training=is_training,
            dataloader_key=dataloader_key,
        )
