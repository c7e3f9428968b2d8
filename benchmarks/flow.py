"""How many of luthier's modules one chat row passes between `dataset.path` in YAML and a batch.

    python benchmarks/flow.py [--modules]

Writes a recipe, a file with one conversation and a tiny tokenizer to a temporary folder, and takes
that row the way that a run does, in legs:

- config: the recipe's YAML becomes a `RunConfig`;
- quick check: what a run looks at before it imports anything heavy;
- prepare: the row is read, encoded and written to an empty cache;
- prepare again: the same with the cache filled, as a second run does it;
- batch: the sampler chooses the row and the collator makes tensors of it.

There is no mixture and no evaluation set, and neither model nor trainer is built. `sys.setprofile`
reports each call of a Python function, in all threads. A module counts where one of its functions
runs, so a constant that is only imported does not count; nor does the code that runs while a module
is imported. Prints for each leg, and for all together, the calls, the different functions, the
different modules, and how often a call goes from one module of luthier into another. With
`--modules` it lists the modules of each leg, those that no leg before it has passed with a plus.

It needs no network and no file besides those that it writes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent / "src" / "luthier"
"""The package whose modules count."""
MESSAGES = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass
class Leg:
    """What ran in one leg, or in several together."""

    name: str
    calls: int = 0
    crossings: int = 0
    """Calls of one module of luthier by another, also through functions of libraries."""
    functions: set[tuple[str, str]] = field(default_factory=set)
    """File and qualified name of each function that ran."""

    @property
    def modules(self) -> set[str]:
        """The modules whose functions ran, such as `data/prepare`."""
        return {file for file, _ in self.functions}

    def add(self, other: Leg) -> None:
        """Take in what ran in another leg."""
        self.calls += other.calls
        self.crossings += other.crossings
        self.functions |= other.functions


class Recorder:
    """Counts the calls of luthier's functions while it is entered."""

    def __init__(self, name: str) -> None:
        self.leg = Leg(name)
        self._names: dict[str, str | None] = {}

    def __enter__(self) -> Leg:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self.leg

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        module = self._module(code.co_filename)
        # The body of a module and of a class is not the way of a row.
        if module is None or code.co_name == "<module>" or not code.co_flags & CO_NEWLOCALS:
            return
        self.leg.calls += 1
        self.leg.functions.add((module, code.co_qualname))
        caller = frame.f_back
        while caller is not None and self._module(caller.f_code.co_filename) is None:
            caller = caller.f_back
        if caller is not None and self._module(caller.f_code.co_filename) != module:
            self.leg.crossings += 1

    def _module(self, file: str) -> str | None:
        """The module's path without `.py`, relative to the package; None for other code."""
        if file not in self._names:
            path = Path(file)
            inside = path.is_relative_to(ROOT)
            self._names[file] = str(path.relative_to(ROOT).with_suffix("")) if inside else None
        return self._names[file]


CO_NEWLOCALS = 2
"""The flag of a code object that is a function's (module `inspect` of the standard library)."""


def save_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer without merges, with a chat template and its control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    # A folder is a model's to luthier once it has a config; no leg reads weights.
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")


def write_recipe(folder: Path) -> list[str]:
    """Write the row and the recipe that names it; returns the words of the command line."""
    rows = folder / "chats.jsonl"
    rows.write_text(json.dumps({"messages": MESSAGES}) + "\n", encoding="utf-8")
    recipes = folder / "recipes"
    recipes.mkdir()
    (recipes / "flow.yaml").write_text(
        "defaults:\n"
        "  - override /model: hub\n"
        "  - override /dataset: jsonl\n"
        "model:\n"
        f"  path: {folder / 'model'}\n"
        "dataset:\n"
        f"  path: {rows}\n"
        f"  cache: {folder / 'cache'}\n"
        "  eval: {share: null}\n"
        "chat:\n"
        "  max_length: 128\n",
        encoding="utf-8",
    )
    os.environ["LUTHIER_RECIPES"] = str(recipes)
    return ["recipe=flow", f"output_dir={folder / 'run'}"]


def run_legs(folder: Path) -> list[Leg]:
    """Take the row from the recipe to a batch; returns what ran in each leg."""
    # Imported here, so that `os.environ` is as it should be and no leg pays for it.
    from luthier import data
    from luthier.config import load_config
    from luthier.data.batching.samplers import SampledDataset, ShuffledSampler
    from luthier.data.batching.settings import read_batching_settings
    from luthier.data.prepare import prepare
    from luthier.model.tokenizer import load_tokenizer
    from luthier.train.dataloaders import build_collator
    from luthier.train.methods.encoders import make_row_encoders

    save_tokenizer(folder / "model")
    words = write_recipe(folder)
    with Recorder("config") as config_leg:
        config = load_config(words).config
    method = config.trainer.method
    with Recorder("quick check") as check_leg:
        sources = data.check_sources(config.dataset, method)
    legs = [config_leg, check_leg]
    tokenizer = load_tokenizer(config.model)
    for name in ("prepare", "prepare again"):
        with Recorder(name) as leg:
            row_encoders = make_row_encoders(config, tokenizer)
            prepared = prepare(config.dataset, row_encoders, tokenizer, config.seed, sources)
        legs.append(leg)
        sources = None  # another run opens its sources itself
    with Recorder("batch") as leg:
        sampler = ShuffledSampler(prepared.train, config.seed)
        batching = read_batching_settings(config)
        collate = build_collator(batching, False, False, tokenizer.pad_token_id, None)
        rows = SampledDataset(sampler)
        batch = collate([rows[numbers] for numbers in sampler])
    legs.append(leg)
    assert batch["labels"].shape == batch["input_ids"].shape, batch
    return legs


def print_table(legs: list[Leg], modules: bool) -> None:
    """Print the counts of each leg and of all; with `modules`, the modules of each leg, too."""
    total = Leg("all")
    print(f"{'leg':14} {'calls':>7} {'functions':>10} {'modules':>8} {'crossings':>10}")
    for leg in legs:
        total.add(leg)
    for leg in [*legs, total]:
        counts = f"{leg.calls:7,} {len(leg.functions):10,} {len(leg.modules):8} {leg.crossings:10,}"
        print(f"{leg.name:14} {counts}")
    before: set[str] = set()
    for leg in legs if modules else ():
        print(f"\n{leg.name}")
        for module in sorted(leg.modules):
            functions = sorted(name for file, name in leg.functions if file == module)
            print(f"  {' ' if module in before else '+'} {module}: {', '.join(functions)}")
        before |= leg.modules


def main() -> None:
    """Take one row through all legs and print what it passed."""
    parser = argparse.ArgumentParser(description="Modules that one row passes on its way.")
    parser.add_argument("--modules", action="store_true", help="list the modules of each leg")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        legs = run_legs(Path(folder))
    print_table(legs, arguments.modules)


if __name__ == "__main__":
    main()
