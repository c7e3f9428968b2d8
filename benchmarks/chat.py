"""How fast conversations become ids and labels, against what the task needs at the least.

    LUTHIER_ASSETS=folder OMP_NUM_THREADS=1 python benchmarks/chat.py --rows 4000

Prints, for the same rows and tokenizer in one run:

- against the floor: `tokenizers.encode_batch` over the bare message texts, same threads;
- against TRL: `SFTTrainer` with `assistant_only_loss`, one process, rows to labels;
- the cost per token of a conversation of 128 turns against one of 2 turns.

Each time is the best of several, in seconds of the wall clock; ratios are of times for the same
rows, so above 1 means that luthier is faster. `--no-trl` leaves TRL out (it imports torch).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from luthier.chat import ChatEncoder

Row = dict[str, Any]
REPEATS = 4


def best(work: Callable[..., Any], prepare: Callable[[], tuple] = tuple) -> float:
    """The shortest time that the work took on what was prepared for it."""
    times = []
    for _ in range(REPEATS):
        prepared = prepare()
        start = time.perf_counter()
        work(*prepared)
        times.append(time.perf_counter() - start)
    return min(times)


def mixed_rows(assets: Path, count: int) -> list[Row]:
    """Rows from all over the mix."""
    with gzip.open(assets / "bench" / "chat_mix.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [{"messages": json.loads(line)["messages"]} for line in file]
    return rows[:: max(len(rows) // count, 1)][:count]


def long_rows(rows: list[Row], turns: int, count: int) -> list[Row]:
    """Conversations of so many turns, made of the messages of others."""
    talk = [m for row in rows for m in row["messages"] if m["role"] in ("user", "assistant")]
    asked = [m for m in talk if m["role"] == "user"]
    told = [m for m in talk if m["role"] == "assistant"]
    found = []
    for start in range(0, min(count * turns, len(asked), len(told)) - turns + 1, turns):
        pairs = zip(asked[start : start + turns], told[start : start + turns], strict=True)
        found.append({"messages": [message for pair in pairs for message in pair]})
    return found


def floor(tokenizer: Any, rows: list[Row]) -> float:
    """Seconds that the bare texts take."""
    texts = [message["content"] for row in rows for message in row["messages"]]
    backend = tokenizer.backend_tokenizer
    return best(lambda: [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)])


def ours(tokenizer: Any, template: str | None, rows: list[Row]) -> tuple[float, int]:
    """Seconds that a fresh luthier takes, and the tokens it makes."""
    tokens = 0

    def work(encoder: ChatEncoder) -> None:
        nonlocal tokens
        batch = encoder.encode_batch(rows)
        tokens = sum(len(sequence.input_ids) for sequence in batch.sequences)

    def prepare() -> tuple[ChatEncoder]:
        return (ChatEncoder(tokenizer, template=template, on_lost="keep", date="2025-01-02"),)

    return best(work, prepare), tokens


def trl_preparation(tokenizer: Any, template: str, rows: list[Row]) -> float:
    """Seconds that TRL takes from rows to labels, with a template that marks what trains."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer.chat_template = template
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8,
            num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        )
    )  # fmt: skip
    bare = SFTTrainer.__dict__["_prepare_dataset"]
    taken: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        prepared = bare(*args, **kwargs)
        for batch in prepared.iter(1000):
            assert batch["input_ids"]
        taken.append(time.perf_counter() - start)
        return prepared

    SFTTrainer._prepare_dataset = timed
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, assistant_only_loss=True, max_length=None, report_to=[],
            use_cpu=True, bf16=False,
        )  # fmt: skip
        dataset = Dataset.from_list(rows)
        SFTTrainer(model=model, args=settings, train_dataset=dataset, processing_class=tokenizer)
    SFTTrainer._prepare_dataset = bare
    return taken[0]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--tokenizers", nargs="*", default=["smollm2", "llama3_1", "qwen3"])
    parser.add_argument("--no-trl", action="store_true")
    options = parser.parse_args()
    assets = Path(os.environ["LUTHIER_ASSETS"])
    folder = Path(next(iter(find_spec("trl").submodule_search_locations))) / "chat_templates"
    rows = mixed_rows(assets, options.rows)
    for name in options.tokenizers:
        tokenizer = AutoTokenizer.from_pretrained(assets / "tokenizers" / name)
        # Qwen3's own template makes one sequence per turn; Qwen2.5's has the same tokens.
        template = (folder / "qwen2_5.jinja").read_text() if name == "qwen3" else None
        bare = floor(tokenizer, rows)
        taken, tokens = ours(tokenizer, template, rows)
        print(f"{name}: {len(rows)} rows, {tokens} tokens")
        print(
            f"  floor {bare:.2f} s, luthier {taken:.2f} s: {bare / taken:.2f} of the floor's speed"
        )
        costs = {}
        for turns, count in ((2, 4800), (128, 75)):
            seconds, made = ours(tokenizer, template, long_rows(rows, turns, count))
            costs[turns] = seconds / made
        print(f"  128 turns cost {costs[128] / costs[2]:.2f} of 2 turns, per token")
        if name == "qwen3" and not options.no_trl:
            marked = (folder / "qwen2_5_training.jinja").read_text()
            for kind, some in (("mix", rows), ("long chats", long_rows(rows, 32, 60))):
                theirs = trl_preparation(tokenizer, marked, some)
                taken, _ = ours(tokenizer, template, some)
                print(
                    f"  TRL, {kind}: {theirs:.2f} s, luthier {taken:.2f} s: "
                    f"{theirs / taken:.1f} times"
                )


if __name__ == "__main__":
    main()
