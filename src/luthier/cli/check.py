"""`luthier check`: the whole dataset against the rules, before anything is trained on it."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli.arguments import TRUST, CommandLine, Flag, ParsedArguments
from luthier.errors import UserError
from luthier.storage.write_errors import explain_write_errors
from luthier.terminal import make_console, print_json

if TYPE_CHECKING:
    from luthier.inspection.served import ServedCheck
    from luthier.inspection.survey import Survey

COMMAND_LINE = CommandLine(
    "check",
    "luthier check recipe=NAME [key=value ...] [flags]\n"
    "luthier check RUN --served [--limit N]\n\n"
    "Encodes the whole dataset and reports on it: sources, tokens, the lengths of sequences, the\n"
    "mixture, duplicates and held-out rows, rows that are dropped, shortened or split, how full\n"
    "batches are, and whether every rule holds. A row that would stop training does not stop the\n"
    "check. It loads no model weights and writes nothing but the file of --png.\n\n"
    "With --served, it checks on a run's own rows whether the tokenizer, template and end tokens\n"
    "that the run saved give other servers the prompts and stop tokens of its training, and\n"
    "whether each weight of its adapter belongs to a layer of the class that servers load.\n\n"
    "Exit code: 0 if every rule holds, 1 if a rule is broken, 2 for a mistake in the command.",
    (
        Flag("--limit", "N", "use only the first N rows of each source"),
        Flag("--served", None, "compare what a run saved with what it was trained on"),
        Flag("--json", None, "print one JSON object, for programs"),
        Flag("--png", "FILE", "draw the lengths and the mixture as a picture"),
        TRUST,
    ),
    "  luthier check recipe=quickstart\n"
    "  luthier check recipe=quickstart chat.max_length=80 --limit 200\n"
    "  luthier check recipe=quickstart --png lengths.png\n"
    "  luthier check recipe=quickstart --json | jq .rules\n"
    "  luthier check runs/quickstart/default --served\n",
)


def run(arguments: list[str]) -> int:
    """Check the dataset; returns 0 if every rule holds and 1 if one breaks."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    parsed = COMMAND_LINE.parse(arguments)
    if "--served" in parsed.switches:
        return run_served(parsed)
    # The survey reads data and brings numpy: flags that are wrong are reported before that.
    from luthier.inspection.dataset import load_dataset
    from luthier.inspection.survey import Survey

    # Bad rows are counted and reported here, where training would stop at the first.
    material = load_dataset(
        parsed.overrides, bad_rows=True, is_trusted=TRUST.name in parsed.switches
    )
    survey = Survey(material, parsed.numbers.get("--limit"))
    _run(survey)
    if "--json" in parsed.switches:
        from luthier.inspection.report import report_as_json

        print_json(report_as_json(survey))
    else:
        from luthier.inspection.report import print_report

        print_report(survey)
    if file := parsed.texts.get("--png"):
        _draw(file, survey)
    return 0 if survey.holds else 1


def _run(survey: "Survey") -> None:
    """Run the survey with a bar on the terminal, if there is one."""
    from rich.progress import Progress

    # The bar goes to stderr, so that `--json | jq` reads nothing but the object.
    console = make_console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking", total=survey.size)
        survey.run(lambda rows: bar.advance(task, rows))


def _draw(file: str, survey: "Survey") -> None:
    """Draw the training side, and say where the picture is."""
    from luthier.record.plots import DataNumbers, plot_data

    side, mixture = survey.train, survey.summary.mixture
    numbers = DataNumbers(
        lengths=side.lengths,
        trained_tokens=side.trained_tokens,
        max_length=survey.material.config.chat.max_length,
        sources={name: share.epoch for name, share in mixture.items()},
        images=side.images,
    )
    path = Path(file).expanduser()
    with explain_write_errors(path, "--png"):
        drawn = plot_data(numbers, survey.material.name, path)
    note = f"written {file}" if drawn else f"{file} is not written: nothing trains"
    # On stderr for the same reason: with --json stdout holds one object.
    print(note, file=sys.stderr)


# `luthier check RUN --served` compares a saved run with its training, not a dataset with rules.


def run_served(parsed: ParsedArguments) -> int:
    """Check what a run saved; returns 0 if every rule holds and 1 if one breaks."""
    if len(parsed.overrides) != 1:
        raise UserError("luthier check --served takes one run: luthier check RUN --served.")
    # A flag without an effect would look as if the file had been written.
    parsed.refuse_flags(["--png"], "--served draws nothing. Leave it out.")
    from luthier.config.trust import trust_of
    from luthier.inspection.served import check_served

    served = check_served(
        parsed.overrides[0], parsed.numbers.get("--limit"), trust_of(parsed.switches)
    )
    if "--json" in parsed.switches:
        rules = [asdict(rule) for rule in served.rules]
        report = {"name": parsed.overrides[0], "holds": served.holds, "rules": rules}
        print_json(report)
    else:
        _show(served)
    return 0 if served.holds else 1


def _show(served: "ServedCheck") -> None:
    """Print each rule and what they mean together for a server."""
    from rich.text import Text

    from luthier.inspection.report import print_rule

    console = make_console()
    console.print(Text(f"{served.artifact.folder}: as trained?", style="bold"))
    for rule in served.rules:
        print_rule(console, rule, "")
    if served.holds:
        end = "\nservers that read this folder get the tokens it was trained on"
    elif served.layers is not None and served.layers.broken:
        end = "\nservers that read this folder leave out a part of the adapter"
    else:
        end = "\nservers that read this folder get other tokens than it was trained on"
    console.print(Text(end, style="bold"))
