"""The answer of a sweep: table, `results.csv`, pictures, a page, and the best trial as a recipe."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from luthier.errors import UserError
from luthier.sweep import best as recipes
from luthier.sweep.page import write_page
from luthier.sweep.planning import Sweep
from luthier.sweep.plots import draw
from luthier.sweep.table import best, table, write_csv
from luthier.sweep.trials import Trial

_MOST_RECIPES = 10


def so_far(planned: Sweep, trials: Sequence[Trial], console: Console) -> None:
    """Write and print the table of a sweep that was stopped."""
    write_csv(trials, planned.objectives, planned.folder.path / "results.csv")
    console.print()
    console.print(table(trials, planned.objectives))
    say_errors(trials, console)


def answer(planned: Sweep, trials: Sequence[Trial], console: Console) -> None:
    """Write and print what came out of a sweep."""
    folder = planned.folder.path
    pictures = draw(trials, planned.objectives, folder)
    written = _recipes(planned, trials, console)
    title = f"Sweep over {planned.recipe}" if planned.recipe else "Sweep"
    texts = [(typed, path.read_text(encoding="utf-8")) for typed, path in written]
    write_page(title, trials, planned.objectives, pictures, texts, folder / "sweep.html")
    so_far(planned, trials, console)
    names = ["results.csv", "sweep.html", *(path.name for path in pictures)]
    _line(console, f"\nwritten   {folder}: {' '.join(names)}")
    for typed, _ in written[:1]:
        _line(console, f"the best  {typed}")


def say_errors(trials: Sequence[Trial], console: Console) -> None:
    """Print why trials failed, once for those that failed alike."""
    reasons: dict[str, list[str]] = {}
    for trial in trials:
        if trial.error:
            reasons.setdefault(trial.error, []).append(trial.name)
    for error, names in reasons.items():
        shown = "\n".join(f"  {line}" for line in error.splitlines())
        _line(console, f"\nfailed    {', '.join(names)}\n{shown}")


def _recipes(planned: Sweep, trials: Sequence[Trial], console: Console) -> list[tuple[str, Path]]:
    """Write the best trials as recipes; each with the command that trains it."""
    leaders = best(trials, planned.objectives)[:_MOST_RECIPES]
    written = []
    for number, name in recipes.names(planned, leaders).items() if leaders else ():
        trial = next(one for one in leaders if one.number == number)
        try:
            path = recipes.write_recipe(planned, trial, name, len(trials))
        except UserError as error:  # the recipe it is made of is gone or has changed
            _line(console, f"no recipe of trial {trial.name}: {error}")
            continue
        written.append((recipes.command(planned, name), path))
    return written


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
