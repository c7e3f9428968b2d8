"""The trials as rows: the best first, in the terminal and as `results.csv`."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from luthier.storage.atomic import write_text
from luthier.sweep.objective import Objective
from luthier.sweep.trials import Trial, short_names, shown_value

COLOURS = {
    "finished": "green",
    "running": "cyan",
    "pruned": "yellow",
    "failed": "red",
    "interrupted": "magenta",
    "waiting": "dim",
}
_ON_THE_WAY = ("eval_reward", "eval_loss", "reward", "loss")
_ORDER = ("finished", "running", "pruned", "interrupted", "waiting", "failed")


def ranked(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """The finished ones by the first objective, the best first; then the others by their state."""
    first = objectives[0]

    def place(trial: Trial) -> tuple[int, float, int]:
        value = first.key(trial.values.get(first.name)) if trial.state == "finished" else 0.0
        return _ORDER.index(trial.state), value, trial.number

    return sorted(trials, key=place)


def complete(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """The finished trials that have a number for every objective, the best first."""
    return [
        trial
        for trial in ranked(trials, objectives)
        if trial.state == "finished"
        and all(one.key(trial.values.get(one.name)) < float("inf") for one in objectives)
    ]


def best(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """The best trial; with several objectives all that no other beats: the Pareto front."""
    done = complete(trials, objectives)
    if len(objectives) == 1:
        return done[:1]
    keys = {one.number: [o.key(one.values.get(o.name)) for o in objectives] for one in done}

    def beaten(number: int) -> bool:
        mine = keys[number]
        return any(
            theirs != mine and all(a <= b for a, b in zip(theirs, mine, strict=True))
            for theirs in keys.values()
        )

    return [one for one in done if not beaten(one.number)]


def table(
    trials: Sequence[Trial],
    objectives: Sequence[Objective],
    where: dict[int, str] | None = None,
    limit: int | None = None,
) -> Table:
    """The trials as a table for the terminal; `where` names the slots of those that run."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    made = Table(box=box.SIMPLE_HEAD, show_edge=False)
    heads = ["trial", *(short for _, short in short_names(dict.fromkeys(keys)))]
    heads += [*(one.name for one in objectives), "step", "time"]
    for heading in heads:
        made.add_column(Text(heading), justify="right")
    made.add_column("state")
    front = {trial.number for trial in best(trials, objectives)}
    rows = ranked(trials, objectives)
    for trial in rows[:limit]:
        style = "bold" if trial.number in front else None
        cells = [trial.name, *(shown_value(trial.params.get(key, "")) for key in keys)]
        cells += [shown_number(trial.values.get(one.name)) for one in objectives]
        cells += [str(trial.step or ""), shown_time(trial.seconds) if trial.seconds else ""]
        made.add_row(*map(Text, cells), _state(trial, (where or {}).get(trial.number)), style=style)
    if limit is not None and len(rows) > limit:
        made.add_row(Text("..."), Text(f"{len(rows) - limit} more"), style="dim")
    return made


def _state(trial: Trial, place: str | None) -> Text:
    """How a trial stands; of one without a result, what it logged at last."""
    shown = Text(place or trial.state, style=COLOURS[trial.state])
    last = next((name for name in _ON_THE_WAY if name in trial.values), None)
    if last is not None and trial.state in ("running", "pruned", "interrupted"):
        shown.append(f"  {last} {shown_number(trial.values[last])}", style="dim")
    return shown


def shown_number(value: float | None) -> str:
    """A measure as tables show it."""
    return "" if value is None else f"{value:.5g}"


def shown_time(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d}"


def write_csv(trials: Sequence[Trial], objectives: Sequence[Objective], path: Path) -> None:
    """Write every trial with its parameters, its objectives and all other numbers."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    names = [one.name for one in objectives]
    others = sorted({name for trial in trials for name in trial.values} - set(names))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = [*(key.lstrip("+") for key in keys), *names, *others]
    writer.writerow(["trial", "state", *heads, "steps", "wall_seconds", "error"])
    for trial in ranked(trials, objectives):
        numbers = [trial.values.get(name, "") for name in [*names, *others]]
        params = [trial.params.get(key, "").strip("'\"") for key in keys]
        error = trial.error or ""
        row = [trial.name, trial.state, *params, *numbers, trial.step, f"{trial.seconds:.1f}"]
        writer.writerow([*row, error])
    write_text(path, text.getvalue())
