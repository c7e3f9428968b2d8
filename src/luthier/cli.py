"""The `luthier` command: the same grammar as train.py, and the tools around a run."""

import os
import sys
from collections.abc import Callable

from luthier import __version__
from luthier.errors import UserError, report

USAGE = """\
luthier: config-driven fine-tuning

  luthier train recipe=NAME [key=value ...]   train; same as: python train.py recipe=NAME ...
  luthier recipes                             the recipes that are found, a line each
  luthier --version

Under several processes: accelerate launch train.py recipe=NAME ...
All settings and groups:  luthier train --help
"""


def main() -> None:
    """Run one command; a user's mistake is printed in words and exits with 2."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        sys.exit(0)
    if words[0] == "--version":
        print(f"luthier {__version__}")
        sys.exit(0)
    command = COMMANDS.get(words[0])
    try:
        if command is None:
            raise UserError(unknown(words[0]))
        sys.exit(command(words[1:]))
    except UserError as error:
        sys.exit(report(error))
    except BrokenPipeError:
        # The reader of a pipe has seen enough; Python must not complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def unknown(word: str) -> str:
    """The message for a command that does not exist."""
    from difflib import get_close_matches

    near = get_close_matches(word, COMMANDS, n=1)
    hint = f" Did you mean `luthier {near[0]}`?" if near else ""
    return f"there is no command {word!r}.{hint} There are: {', '.join(COMMANDS)}."


def train(words: list[str]) -> int:
    """What train.py does."""
    from luthier import config
    from luthier.train.run import run

    sys.argv = ["luthier train", *words]
    return config.main(run)


def recipes(words: list[str]) -> int:
    """List the recipes that are found, with their header lines."""
    from luthier import config

    if words:
        raise UserError("`luthier recipes` takes no arguments.")
    found = config.recipes()
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        print(f"{recipe.name:<{width}}  {recipe.header}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {"train": train, "recipes": recipes}
