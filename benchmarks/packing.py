"""How fast rows are packed, and how full the bins are, against TRL's packing in the same run.

    LUTHIER_ASSETS=folder OMP_NUM_THREADS=1 python benchmarks/packing.py

For each set of lengths, in seconds of the wall clock, the best of three:

- `pack`: luthier says which row lies in which bin (`pack`, over the whole set, one thread);
- `again`: another epoch of the same set, as the sampler does it;
- `layout`: every batch of an epoch as tensors, from a table in memory;
- `TRL`: `trl.pack_dataset`, strategy `bfd`, one process, without its cache. It writes the packed
  rows anew, so its time stands in a ratio to `pack`, and in one to `pack` and `layout` together.

Efficiency is the share of all places in the bins that holds a token. `--no-trl` leaves TRL out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.batching.collators import PackingCollator
from luthier.data.batching.packing import PackingPlan, pack_rows
from luthier.data.batching.samplers import PackedSampler, SampledDataset
from luthier.data.batching.token_rows import TokenRows

REPEATS = 3
BATCH = 8


class FlatTable:
    """Rows of made-up tokens, one behind the other in one array."""

    def __init__(self, lengths: np.ndarray) -> None:
        """Rows of these lengths."""
        self.lengths = lengths.astype(np.int32)
        self.ends = np.concatenate(([0], np.cumsum(lengths)))
        self.ids = np.arange(self.ends[-1], dtype=np.int32) % 1000

    def row(self, number: int) -> dict[str, np.ndarray]:
        """Views into the array."""
        part = self.ids[self.ends[number] : self.ends[number + 1]]
        return {"input_ids": part, "labels": part}


def best(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The shortest time that the work took."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def lognormal(rows: int, length: int, mean: int = 300) -> np.ndarray:
    """Lengths as chats have them: many short ones and a long tail, cut at `length`."""
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - 0.32, 0.8, rows)
    return drawn.astype(np.int64).clip(1, length)


def chat_mix(assets: Path, length: int) -> np.ndarray:
    """A quarter of the characters of each conversation, about its tokens, cut at `length`."""
    with gzip.open(assets / "bench" / "chat_mix.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = (json.loads(line)["messages"] for line in file)
        sizes = [sum(len(m["content"] or "") for m in messages) // 4 for messages in texts]
    return np.array(sizes).clip(1, length)


def lay_out(table: FlatTable, length: int) -> None:
    """Make all batches of an epoch."""
    sampler = PackedSampler(TokenRows(table), length)
    data, layout = SampledDataset(sampler), PackingCollator(0)
    rows = list(sampler)
    for at in range(0, len(rows), BATCH):
        layout([data[numbers] for numbers in rows[at : at + BATCH]])


def trl(table: FlatTable, length: int) -> tuple[float, float]:
    """Seconds that TRL takes, and the efficiency of its bins."""
    import datasets
    import pyarrow as pa
    from trl import pack_dataset

    datasets.disable_caching()
    datasets.disable_progress_bars()
    ids = pa.LargeListArray.from_arrays(pa.array(table.ends), pa.array(table.ids))
    rows = datasets.Dataset(pa.table({"input_ids": ids, "labels": ids}))
    packed: list[Any] = []
    seconds = best(lambda: packed.append(pack_dataset(rows, length, "bfd")), 1)
    return seconds, int(table.lengths.sum()) / (len(packed[0]) * length)


def measure(name: str, lengths: np.ndarray, length: int, with_trl: bool) -> None:
    """Print one line."""
    fit = PackingPlan(lengths, length)
    packing, again = best(lambda: pack_rows(lengths, length, 1)), best(lambda: fit.arranged(1, 2))
    table = FlatTable(lengths)
    lay_out(FlatTable(lengths[:100]), length)
    layout = best(lambda: lay_out(table, length), 1)
    line = (
        f"{name:<34} {len(lengths):>9,} rows {len(fit):>8,} bins  pack {packing:.3f} s  "
        f"again {again:.3f} s  layout {layout:.2f} s  {fit.efficiency:.3%}"
    )
    if with_trl:
        seconds, efficiency = trl(table, length)
        line += f"   TRL {seconds:.2f} s  {efficiency:.3%}  {seconds / packing:.0f} times `pack`, "
        line += f"{seconds / (packing + layout):.1f} times both"
    print(line, flush=True)


def main() -> None:
    """Measure every set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-trl", action="store_true")
    with_trl = not parser.parse_args().no_trl
    measure("lognormal, mean 300, in 2,048", lognormal(100_000, 2048), 2048, with_trl)
    measure("lognormal, mean 300, in 8,192", lognormal(100_000, 8192), 8192, with_trl)
    # TRL is left out where it would take minutes and all memory.
    measure("lognormal, mean 300, in 2,048", lognormal(1_000_000, 2048), 2048, False)
    measure("lognormal, mean 4,000, in 131,072", lognormal(100_000, 131_072, 4000), 131_072, False)
    assets = os.environ.get("LUTHIER_ASSETS")
    if assets:
        measure("chat_mix, in 2,048", chat_mix(Path(assets), 2048), 2048, with_trl)


if __name__ == "__main__":
    main()
