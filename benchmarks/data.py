"""How fast a file of conversations becomes packed, labelled rows, and how much memory that takes.

    LUTHIER_ASSETS=folder OMP_NUM_THREADS=1 python benchmarks/data.py --tenfold

Prints, for `bench/chat_mix` and the Qwen tokenizer, in seconds of the wall clock and, where others
use the machine too, of all cores together:

- `cold`: luthier reads, encodes, writes and packs the rows, with an empty cache;
- `warm`: the same again, as a second run does it: the cache is checked and the rows are packed;
- `TRL`: `SFTTrainer` loads the same file and prepares it with `packing` and `assistant_only_loss`,
  with an empty cache of its own;
- the peak memory of a process that does nothing but `cold`, for the set and, with `--tenfold`, for
  one of ten times as many rows, no two of them equal.

Imports, the tokenizer and the model are there before a clock starts. `--workers` is the number of
processes of both. Tokenizers have threads beside them: RAYON_NUM_THREADS=1 allows one.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from luthier.config.schema import DatasetConfig, SourceConfig
from luthier.data.batching.samplers import PackedSampler
from luthier.data.encoders.chat import ConversationEncoder
from luthier.data.prepare import PreparedData, prepare

LENGTH = 2048
"""Tokens of a packed row."""
WARMING = 200
"""Rows that go through first, so that what is imported late is there."""


def template(name: str) -> str:
    """The text of a template that TRL ships."""
    folder = Path(next(iter(find_spec("trl").submodule_search_locations))) / "chat_templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def qwen() -> Any:
    """The tokenizer. Qwen3's own template makes a sequence of each turn, Qwen2.5's one of all."""
    # Here and not above: each process that encodes imports this module.
    from transformers import AutoTokenizer

    folder = Path(os.environ["LUTHIER_ASSETS"], "tokenizers", "qwen3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template("qwen2_5")
    return tokenizer


def lines(count: int | None, copies: int = 1) -> Iterator[str]:
    """Rows of the mix, each `copies` times with another number in its text."""
    path = Path(os.environ["LUTHIER_ASSETS"], "bench/chat_mix.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in islice(file, count):
            row = json.loads(line)
            said = next(m for m in row["messages"] if m["role"] == "user")["content"]
            for copy in range(copies):
                if copy:
                    changed = [
                        m | {"content": f"{copy}. {said}"} if m["content"] == said else m
                        for m in row["messages"]
                    ]
                    line = json.dumps({"messages": changed}) + "\n"
                yield line


def write(path: Path, count: int | None, copies: int = 1) -> str:
    """A file of such rows."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(lines(count, copies))
    return str(path)


def ours(path: str, cache: str, workers: int, tokenizer: Any) -> tuple[PreparedData, PackedSampler]:
    """What luthier makes of a file."""

    def encoder(kind: str, source: SourceConfig, key: str) -> ConversationEncoder:
        settings = {
            "on_lost": "keep",
            "date": "2025-01-02",
            "max_length": LENGTH,
            # A few replies of the mix are empty; TRL trains them, too.
            "empty_replies": "train",
        }
        return ConversationEncoder(tokenizer, settings)

    config = DatasetConfig(path=path, cache=cache, workers=workers)
    prepared = prepare(config, encoder, tokenizer, 0)
    return prepared, PackedSampler(prepared.train, LENGTH)


class Clock:
    """Seconds since it was started, by the wall and of all cores."""

    def __init__(self) -> None:
        self._start = self._now()

    def read(self) -> Seconds:
        """The seconds since then."""
        return Seconds(*(now - then for now, then in zip(self._now(), self._start, strict=True)))

    def _now(self) -> tuple[float, float]:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)


class Seconds(NamedTuple):
    """How long something took."""

    wall: float
    cores: float

    def __str__(self) -> str:
        return f"{self.wall:.2f} s ({self.cores:.2f} s of all cores)"

    def over(self, other: Seconds) -> str:
        """How many times as long as another."""
        return f"{self.wall / other.wall:.1f} times ({self.cores / other.cores:.1f})"


def seconds_of_ours(path: str, workers: int, tokenizer: Any) -> tuple[Seconds, Seconds]:
    """Seconds with an empty cache and with a full one; prints what came out."""
    with tempfile.TemporaryDirectory() as cache:
        times = []
        for _ in range(2):
            clock = Clock()
            prepared, sampler = ours(path, cache, workers, tokenizer)
            times.append(clock.read())
        counts = prepared.train_counts
        print(
            f"luthier: {counts.rows:,} rows, {counts.tokens:,} tokens, {counts.trained_tokens:,} "
            f"trained, {sampler.count:,} packed rows",
            flush=True,
        )
    return times[0], times[1]


class TRL:
    """TRL's trainer, of which only the preparation is wanted."""

    def __init__(self, workers: int) -> None:
        """A trainer over one row, for a template that marks what trains."""
        from datasets import Dataset
        from transformers import LlamaConfig, LlamaForCausalLM
        from trl import SFTConfig, SFTTrainer

        self.tokenizer = qwen()
        self.tokenizer.chat_template = template("qwen2_5_training")
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(self.tokenizer), **sizes, **heads))
        row = {"messages": [{"role": role, "content": "Hi"} for role in ("user", "assistant")]}
        self.folder = tempfile.TemporaryDirectory()
        self.settings = SFTConfig(
            output_dir=self.folder.name, assistant_only_loss=True, max_length=LENGTH, packing=True,
            dataset_num_proc=workers if workers > 1 else None, report_to=[], use_cpu=True,
            bf16=False,
        )  # fmt: skip
        self.trainer = SFTTrainer(
            model=model,
            args=self.settings,
            train_dataset=Dataset.from_list([row] * 4),
            processing_class=self.tokenizer,
        )

    def seconds(self, path: str) -> Seconds:
        """Seconds from the file to packed rows with labels; prints what came out."""
        from datasets import load_dataset

        with tempfile.TemporaryDirectory() as cache:
            clock = Clock()
            rows = load_dataset("json", data_files=path, split="train", cache_dir=cache)
            packed = self.trainer._prepare_dataset(
                rows, self.tokenizer, self.settings, True, None, "train"
            )
            taken = clock.read()
            tokens, trained = 0, 0
            for batch in packed.with_format("numpy").iter(1000):
                tokens += sum(map(len, batch["input_ids"]))
                trained += sum(int((labels != -100).sum()) for labels in batch["labels"])
            print(f"TRL: {tokens:,} tokens, {trained:,} trained, {len(packed):,} packed rows")
        return taken


def peak_memory(path: str, workers: int) -> str:
    """What a fresh process says of itself after it has prepared the file."""
    words = [sys.executable, __file__, "--workers", str(workers), "--memory", path]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def say_memory(path: str, workers: int) -> None:
    """Prepare a file and print the peak memory of this process."""
    tokenizer = qwen()
    before = _peak()
    with tempfile.TemporaryDirectory() as cache:
        prepared, _ = ours(path, cache, workers, tokenizer)
        size = sum(file.stat().st_size for file in Path(cache).rglob("*.arrow"))
    print(
        f"{prepared.train_counts.rows:,} rows, {size / 1e6:,.0f} MB of cache: peak {_peak():,.0f} "
        f"MB, of which {before:,.0f} MB before the first row"
    )


def _peak() -> float:
    """MB that this process has had in memory at most, files that it maps included."""
    status = Path("/proc/self/status")
    if status.exists():
        # `ru_maxrss` counts what the process was a copy of when it was started.
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e3 * 1.024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, help="so many rows, the first; all unless given")
    parser.add_argument("--workers", type=int, default=1, help="processes that encode")
    parser.add_argument("--tenfold", action="store_true", help="also ten times as many rows")
    parser.add_argument("--no-trl", action="store_true")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        say_memory(options.memory, options.workers)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder, "mix.jsonl"), options.rows)
        few = write(Path(folder, "few.jsonl"), WARMING)
        tokenizer = qwen()
        seconds_of_ours(few, options.workers, tokenizer)
        cold, warm = seconds_of_ours(file, options.workers, tokenizer)
        print(f"  cold {cold}, warm {warm}", flush=True)
        if not options.no_trl:
            trl = TRL(options.workers)
            trl.seconds(few)
            theirs = trl.seconds(file)
            print(f"  TRL {theirs}: {theirs.over(cold)} cold, {theirs.over(warm)} warm")
        print(f"memory: {peak_memory(file, options.workers)}", flush=True)
        if options.tenfold:
            many = write(Path(folder, "many.jsonl"), options.rows, copies=10)
            print(f"memory: {peak_memory(many, options.workers)}")


if __name__ == "__main__":
    main()
