"""From token rows to batches: packing, the order of an epoch, layouts; see docs/packing.md."""

from luthier.data.batching.packing import Packing, pack_rows
from luthier.data.batching.token_rows import (
    Document,
    InMemoryTable,
    RowTable,
    TokenRows,
    TrainingRow,
)

__all__ = [
    "Document",
    "InMemoryTable",
    "Packing",
    "RowTable",
    "TokenRows",
    "TrainingRow",
    "pack_rows",
]
