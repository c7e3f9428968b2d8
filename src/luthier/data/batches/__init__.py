"""From token rows to batches: packing, the order of an epoch, layouts; see docs/packing.md."""

from luthier.data.batches.packing import Packing, pack
from luthier.data.batches.rows import Document, ListTable, Table, TokenRows, TrainingRow

__all__ = ["Document", "ListTable", "Packing", "Table", "TokenRows", "TrainingRow", "pack"]
