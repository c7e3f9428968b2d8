"""The `luthier` command reads overrides as train.py does, and has the tools around a run."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from luthier import __version__
from luthier.errors import UserError, report_error
from luthier.storage.write_errors import report_machine_error
from luthier.terminal import guard_output, leave_closed_pipe


class Command(NamedTuple):
    """A command has a line of help for how it is typed and what it does, and a function."""

    typed: str
    about: str
    place: str
    """`module:function`; imported only when the command is run."""

    def load(self) -> Callable[[list[str]], int]:
        """Import the function; it takes the words behind the command and returns an exit code."""
        module, function = self.place.split(":")
        return getattr(import_module(module), function)


# Shells report a process that a signal ended as 128 plus the signal's number; SIGINT is 2.
INTERRUPTED = 130
"""The exit code of a program that SIGINT ended, as shells have it."""

# Each function is named in a string, so that `luthier --help` imports no command, and a command
# only its own libraries.
COMMANDS = {
    "train": Command(
        "train recipe=NAME [key=value ...]",
        "train; same as: python train.py recipe=NAME ...",
        "luthier.cli.main:train",
    ),
    "launch": Command(
        "launch recipe=NAME [key=value ...]",
        "train on several devices, by accelerate",
        "luthier.cli.launch:run",
    ),
    "init": Command(
        "init DATA [key=value ...]",
        "a recipe for your own rows, written for you",
        "luthier.cli.init:run",
    ),
    "convert": Command(
        "convert FILE",
        "a recipe of another trainer's config",
        "luthier.cli.convert:run",
    ),
    "preview": Command(
        "preview recipe=NAME [key=value ...]",
        "show rows as tokens: what trains",
        "luthier.cli.preview:run",
    ),
    "check": Command(
        "check recipe=NAME [key=value ...]",
        "check the whole dataset against the rules",
        "luthier.cli.check:run",
    ),
    "plan": Command(
        "plan recipe=NAME [key=value ...]",
        "the memory that a run needs, part by part",
        "luthier.cli.plan:run",
    ),
    "prepare": Command(
        "prepare recipe=NAME [key=value ...]",
        "encode the dataset into the cache in advance",
        "luthier.cli.prepare:run",
    ),
    "runs": Command(
        "runs [FOLDER]",
        "the runs and sweeps here, the newest first",
        "luthier.cli.runs:run",
    ),
    "show": Command(
        "show RUN", "a run's status, what made it, its results", "luthier.cli.show:run"
    ),
    "diff": Command(
        "diff RUN RUN", "what differs between two runs, group by group", "luthier.cli.diff:run"
    ),
    "report": Command(
        "report RUN [RUN ...]",
        "a run as an HTML page; several runs compared",
        "luthier.cli.report_page:run",
    ),
    "reproduce": Command(
        "reproduce RUN",
        "train a run again from its record, and compare",
        "luthier.cli.reproduce:run",
    ),
    "sweep": Command(
        "sweep FOLDER",
        "the trials of a sweep, the best first",
        "luthier.cli.sweep:run",
    ),
    "chat": Command(
        "chat MODEL [key=value ...]",
        "talk to a run, an adapter or a model",
        "luthier.cli.chat:run",
    ),
    "generate": Command(
        "generate MODEL FILE -o OUT [key=value]",
        "answer every row of a file",
        "luthier.cli.generate:run",
    ),
    "evaluate": Command(
        "evaluate MODEL [key=value ...]",
        "base against tuned, with intervals",
        "luthier.cli.evaluate:run",
    ),
    "serve": Command(
        "serve MODEL [key=value ...]",
        "an OpenAI-compatible server, as it trained",
        "luthier.cli.serve:run",
    ),
    "merge": Command(
        "merge RUN [--out FOLDER]",
        "an adapter into its base: one model",
        "luthier.cli.merge:run",
    ),
    "push": Command(
        "push RUN --to USER/NAME",
        "a run's model with its card to the hub",
        "luthier.cli.push:run",
    ),
    "doctor": Command(
        "doctor [--test]",
        "what is here, and whether it trains right",
        "luthier.cli.doctor:run",
    ),
    "docs": Command("docs [PAGE]", "the documentation of this version", "luthier.cli.docs:run"),
    "explain": Command(
        "explain KEY [recipe=NAME]",
        "what a setting takes and means, and its value",
        "luthier.cli.explain:run",
    ),
    "schema": Command(
        "schema [-o FILE]",
        "a recipe's JSON Schema, for editors",
        "luthier.cli.schema:run",
    ),
    "completion": Command(
        "completion bash|zsh|fish",
        "a script that completes what is typed",
        "luthier.cli.completion:run",
    ),
    "recipes": Command(
        "recipes", "the recipes that are found, a line each", "luthier.cli.recipes:run"
    ),
}
_END = """\

More on a command:       luthier COMMAND --help
All settings and groups: luthier train --help
"""


def main() -> None:
    """Run one command; a user's mistake is printed in words and exits with 2."""
    guard_output()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        sys.exit(0)
    if arguments[0] == "--version":
        print(f"luthier {__version__}")
        sys.exit(0)
    try:
        if arguments[0] == "__complete":
            # What a completion script calls at each Tab; no user types it.
            from luthier.cli.completion import answer

            sys.exit(answer(arguments[1:]))
        if arguments[0] not in COMMANDS:
            raise UserError(unknown_command_message(arguments[0]))
        # Commands return an exit code: only this function ends the process, so tests can call them.
        sys.exit(COMMANDS[arguments[0]].load()(arguments[1:]))
    except UserError as error:
        sys.exit(report_error(error))
    except KeyboardInterrupt:
        # The terminal has echoed ^C on the current line: the message begins a new one.
        print("\ninterrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        leave_closed_pipe()
        sys.exit(0)
    except Exception as error:
        # Whatever else cannot be read or written: in words, if it is about a file.
        sys.exit(report_machine_error(error))


def usage() -> str:
    """Return the page that `luthier --help` prints."""
    width = max(len(command.typed) for command in COMMANDS.values()) + 3
    rows = [f"  luthier {c.typed:<{width}}{c.about}" for c in COMMANDS.values()]
    rows.append(f"  luthier {'--version':<{width}}luthier's version")
    return "\n".join(["luthier: config-driven fine-tuning", "", *rows, _END])


def unknown_command_message(word: str) -> str:
    """Return the message for a command that does not exist, with the nearest one that does."""
    from luthier.errors import nearest_option

    near = nearest_option(word, COMMANDS)
    hint = f" Did you mean `luthier {near}`?" if near else ""
    return f"there is no command {word!r}.{hint} There are: {', '.join(COMMANDS)}."


def train(arguments: list[str]) -> int:
    """Do what train.py does; returns its exit code."""
    from luthier.cli.train import main, train

    # `main` and Hydra read sys.argv, as they do under train.py.
    sys.argv = ["luthier train", *arguments]
    return main(train)
