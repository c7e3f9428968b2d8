"""The map-style dataset that a data loader asks for training rows."""

from typing import Any

import numpy as np

from luthier.data.batches.rows import Document, TrainingRow
from luthier.data.batches.samplers import Numbers, Sampler


class SampledRows:
    """Turns what a sampler gives into training rows.

    accelerate tells the epoch to the sampler, except in a resumed epoch of several processes, where
    it stands behind two wrappers: then it tells the dataset. So `set_epoch` here passes it on.
    """

    def __init__(self, sampler: Sampler) -> None:
        """The rows of the sampler's table."""
        self.sampler = sampler
        self.table = sampler.rows.table
        self.count = sampler.count

    def __len__(self) -> int:
        """The training rows of an epoch."""
        return self.count

    def __getitem__(self, numbers: Numbers) -> TrainingRow:
        return tuple(document(self.table.row(number)) for number in numbers)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        self.sampler.set_epoch(epoch)

    def __getstate__(self) -> dict[str, Any]:
        """A worker process needs the table alone, not the order of all rows."""
        return {"table": self.table, "count": self.count}


def document(row: Any) -> Document:
    """The columns of a row that train."""
    return Document(np.asarray(row["input_ids"]), np.asarray(row["labels"]))
