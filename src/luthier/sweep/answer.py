"""The results of a sweep: table, `results.csv`, plots, HTML page, the best trial as a recipe."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from luthier.errors import UserError
from luthier.sweep import best as recipes
from luthier.sweep.page import write_page
from luthier.sweep.planning import Sweep
from luthier.sweep.plots import draw_plots, importance_hint
from luthier.sweep.table import best, table, write_csv
from luthier.sweep.trials import Trial

_MOST_RECIPES = 10
"""With several objectives, so many of the trials that none beats become recipes."""


def report_progress(planned: Sweep, trials: Sequence[Trial], console: Console) -> None:
    """Write `results.csv`, and print the table and the errors, also of a sweep that was stopped."""
    write_csv(trials, planned.objectives, planned.folder.path / "results.csv")
    console.print()
    console.print(table(trials, planned.objectives))
    print_errors(trials, console)


def report_results(planned: Sweep, trials: Sequence[Trial], console: Console) -> None:
    """Write everything that a sweep leaves when its trials have ended, and print the results."""
    folder = planned.folder.path
    plots = draw_plots(trials, planned.objectives, folder)
    written = _write_recipes(planned, trials, console)
    title = f"Sweep over {planned.recipe}" if planned.recipe else "Sweep"
    texts = [(command, path.read_text(encoding="utf-8")) for command, path in written]
    write_page(title, trials, planned.objectives, plots, texts, folder / "sweep.html")
    report_progress(planned, trials, console)
    names = ["results.csv", "sweep.html", *(path.name for path in plots)]
    _print_line(console, f"\nwritten   {folder}: {' '.join(names)}")
    hint = importance_hint(trials, planned.objectives)
    if hint:
        _print_line(console, f"left out  {hint}")
    for command, _ in written[:1]:
        _print_line(console, f"the best  {command}")


def print_errors(trials: Sequence[Trial], console: Console) -> None:
    """Print why trials failed, once for those that failed with the same error."""
    trials_by_error: dict[str, list[str]] = {}
    for trial in trials:
        if trial.error:
            trials_by_error.setdefault(trial.error, []).append(trial.name)
    for error, names in trials_by_error.items():
        indented = "\n".join(f"  {line}" for line in error.splitlines())
        _print_line(console, f"\nfailed    {', '.join(names)}\n{indented}")


def _write_recipes(
    planned: Sweep, trials: Sequence[Trial], console: Console
) -> list[tuple[str, Path]]:
    """Write the best trials as recipes, and return the command that trains each, and its file."""
    best_trials = best(trials, planned.objectives)[:_MOST_RECIPES]
    written = []
    for number, name in recipes.names(planned, best_trials).items() if best_trials else ():
        trial = next(trial for trial in best_trials if trial.number == number)
        try:
            path = recipes.write_recipe(planned, trial, name, len(trials))
        except UserError as error:  # the recipe it is made of is gone or has changed
            _print_line(console, f"no recipe of trial {trial.name}: {error}")
            continue
        written.append((recipes.command(planned, name), path))
    return written


def _print_line(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
