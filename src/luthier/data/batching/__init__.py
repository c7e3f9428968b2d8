"""From token rows to batches: packing, the order of an epoch, layouts; see docs/packing.md."""
