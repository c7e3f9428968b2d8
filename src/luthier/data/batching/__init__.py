"""From token rows to batches: packing, the order of an epoch, layouts; see docs/packing.md."""

from luthier.data.batching.packing import Packing, pack
from luthier.data.batching.rows import Document, ListTable, Table, TokenRows, TrainingRow

__all__ = ["Document", "ListTable", "Packing", "Table", "TokenRows", "TrainingRow", "pack"]
