"""`--help`: what luthier is, what can be chosen, and how it is typed."""

from luthier.config.recipes import header, list_recipes, options
from luthier.config.schema import GROUPS

_WIDTH = 100

_TOP = """\
luthier turns a recipe into a fine-tuned language model.

  python train.py recipe=NAME [group=option ...] [key=value ...]
  accelerate launch train.py recipe=NAME ...        the same on several devices

Examples
  python train.py recipe=quickstart                      a real model on any machine, in minutes
  python train.py recipe=quickstart dry_run=true         everything up to the first step
  python train.py recipe=quickstart lora.r=8 trainer.args.learning_rate=5e-4
  python train.py recipe=qlora_llama dataset=jsonl dataset.path=my.jsonl
  python train.py model=hub model.path=Qwen/Qwen3-0.6B dataset=jsonl dataset.path=my.jsonl
  python train.py -m recipe=quickstart lora.r=8,16,32    a sweep: every value is a run
"""

_BOTTOM = """\
Settings of the libraries, by their own names
  trainer.args.NAME   trl.SFTConfig            lora.NAME          peft.LoraConfig
  model.kwargs.NAME   from_pretrained          quantization.NAME  transformers.BitsAndBytesConfig

Sweeps (-m): every combination of values is tried; how it is done
  hydra/sweeper=NAME  basic, random or optuna      hydra.sweeper.NAME   its settings
  hydra/launcher=NAME basic or submitit_slurm      hydra.launcher.NAME  its settings

Flags
  -m, --multirun           a sweep (docs/sweeps.md)
  --cfg job --resolve      print the whole configuration and stop (-p GROUP: a part of it)
  --info searchpath        where config groups and recipes are looked for
  --info defaults-tree     which file includes which
  --version                luthier's version

Your own files: ./conf/GROUP/NAME.yaml is group=NAME; ./recipes/NAME.yaml is recipe=NAME."""


def help_text() -> str:
    """Return the page that `--help` prints."""
    lines = [_TOP, "Recipes"]
    lines += _table({recipe.name: recipe.header for recipe in list_recipes()})
    lines += ["", "Groups and their options"]
    for group in GROUPS:
        found = {f"{group}={name}": header(path) for name, path in options(group).items()}
        lines += _table(found)
    return "\n".join([*lines, "", _BOTTOM])


def _table(rows: dict[str, str]) -> list[str]:
    width = max([29, *(len(name) + 1 for name in rows)])
    return [f"  {name:<{width}}{_cut(text, _WIDTH - width - 2)}" for name, text in rows.items()]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3].rstrip()}..."
