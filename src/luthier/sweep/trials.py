"""The trials of a sweep: one small file each on disk, whole or absent; their table and CSV file."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt
from rich import box
from rich.table import Table
from rich.text import Text

from luthier.record.checkpoints import read_step_log
from luthier.record.record import read_record
from luthier.redaction import redact_text
from luthier.storage.atomic import write_json, write_text
from luthier.storage.typed_files import DamagedFileError, load_json
from luthier.sweep.objective import Objective
from luthier.terminal import format_duration

State = Literal["waiting", "running", "finished", "pruned", "failed", "interrupted"]
ENDED = ("finished", "pruned", "failed")
"""States that the same command leaves as they are."""
_LINES = 12
_KILLED = 137
"""The exit code of what SIGKILL ended: 128 + 9."""


@dataclass
class Trial:
    """One point of a sweep, and how it stands."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    number: int
    params: dict[str, str]
    """What was chosen for each key, as it is typed."""
    state: State = "waiting"
    values: dict[str, float] = field(default_factory=dict)
    """All numbers that are known of it, by name."""
    step: int = 0
    seconds: float = 0.0
    attempts: int = 0
    error: str | None = None
    job: str | None = None
    """The number of its job on a cluster."""

    @property
    def name(self) -> str:
        """Return the trial's number as files show it."""
        return f"{self.number:03d}"

    @property
    def is_ended(self) -> bool:
        """Return whether there is nothing left to do for the trial."""
        return self.state in ENDED


_ADVICE = "Put it back from a copy, or search anew in another output_dir=..."


class SweepDefinition(BaseModel):
    """The content of `sweep.json`."""

    model_config = ConfigDict(extra="allow")

    recipe: str | None = None
    words: list[str]
    """What was typed behind `-m`."""
    identity: dict[str, Any]
    """What must not change while the sweep goes on."""
    objectives: Annotated[dict[str, Literal["minimize", "maximize"]], Field(min_length=1)]
    total: NonNegativeInt


@dataclass(frozen=True)
class TrialFolder:
    """Where everything of a sweep lies."""

    path: Path

    def run(self, trial: Trial) -> Path:
        """Return the folder of a trial's run."""
        return self.path / "trials" / trial.name

    def state(self, trial: Trial) -> Path:
        """Return the file that says how a trial stands."""
        return self.path / "state" / f"{trial.name}.json"

    def logs(self, trial: Trial) -> tuple[Path, Path]:
        """Return the files of what a trial printed, and of its error output."""
        logs = self.path / "logs"
        return logs / f"{trial.name}.out", logs / f"{trial.name}.err"

    @property
    def definition(self) -> Path:
        """Return the file that says what is searched."""
        return self.path / "sweep.json"

    def save(self, trial: Trial) -> None:
        """Write how a trial stands."""
        write_json(self.state(trial), asdict(trial))

    def load(self) -> list[Trial]:
        """Return all trials that were ever started, by number."""
        files = sorted((self.path / "state").glob("*.json"))
        trials = (Trial(**load_json(file, Trial, _ADVICE)) for file in files)
        return sorted(trials, key=lambda trial: trial.number)

    def read_definition(self) -> dict[str, Any] | None:
        """Return what `sweep.json` says; None where there is no sweep.

        Raises UserError for a damaged one.
        """
        content: dict[str, Any] | None = load_json(self.definition, SweepDefinition, _ADVICE)
        return content


def read_run_record(folder: Path) -> dict[str, Any]:
    """Return the record of a trial's run; an empty one where it left none, or a damaged one.

    A trial without a record has no result, and its sweep says so.
    """
    try:
        return read_record(folder)
    except DamagedFileError:
        return {}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the logged metrics of a run that may be writing this very moment."""
    try:
        return read_step_log(folder / "metrics.jsonl")
    except DamagedFileError:
        # The trial itself refuses the file when it goes on, and that is its error in the sweep.
        return []


def status_since(folder: Path, start: float) -> str | None:
    """Return the status that a run has written since then; what stood there before says nothing."""
    path = folder / "run.json"
    # A trial that crashed at once has the record of its start before, which may say `interrupted`.
    is_new = path.is_file() and path.stat().st_mtime >= start
    return read_run_record(folder).get("status") if is_new else None


def timestamp(folder: Path) -> tuple[int, ...]:
    """Return what changes when a run writes its record or its metrics."""
    files = [path for path in (folder / "run.json", folder / "metrics.jsonl") if path.is_file()]
    return tuple(
        number for path in files for number in (path.stat().st_mtime_ns, path.stat().st_size)
    )


def has_data(folder: Path) -> bool:
    """Return whether a run has its data encoded, so that others find it in the cache."""
    return (folder / "data.png").exists() or "data" in read_run_record(folder)


def failure_reason(folder: Path, log: Path, code: int) -> str:
    """Return why a trial failed: the error of its record, and the last lines that it printed."""
    error_text = read_run_record(folder).get("error")
    lines = _read_last_lines(log)
    sections = [str(error_text).strip()] if error_text else []
    sections += (
        # A traceback in the log often ends with the very error that the record has.
        ["\n".join(lines)] if lines and str(error_text).strip() not in "\n".join(lines) else []
    )
    killed = " (killed; often for want of memory)" if code == _KILLED else ""
    return "\n".join([f"exit code {code}{killed}", *(sections or lines)])


def _read_last_lines(log: Path) -> list[str]:
    """Return the last lines of an error output, without progress bars."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        # A log may have grown to gigabytes; its end is what says why.
        file.seek(max(0, log.stat().st_size - 20_000))
        text = file.read().decode("utf-8", errors="replace")
    # A progress bar writes itself over and over behind carriage returns.
    lines = [line.rpartition("\r")[2].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return [line for line in lines if line and not re.search(r"\d+%\|", line)][-_LINES:]


def format_value(text: str) -> str:
    """Return a parameter as a table shows it: long numbers are cut, quotes are left out."""
    bare = text.strip("'\"").replace("\\", "")
    try:
        return bare if len(bare) <= 8 else f"{float(bare):.4g}"
    except ValueError:
        return bare


def format_params(params: Mapping[str, str]) -> str:
    """Parameters in one line, by the last part of their keys where that is enough."""
    return " ".join(f"{short}={format_value(params[key])}" for key, short in short_names(params))


def short_names(keys: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return each key with the shortest ending that no other key has."""
    shortened = []
    for key in keys:
        components = key.split(".")
        endings = [".".join(components[start:]) for start in range(len(components) - 1, -1, -1)]
        # With a dot in front, `rate` is no ending of `learning_rate`.
        others = [f".{other}" for other in keys if other != key]
        short = next(e for e in endings if not any(other.endswith(f".{e}") for other in others))
        shortened.append((key, short))
    return shortened


# The trials as rows: the best first, in the terminal and as `results.csv`.

COLOURS = {
    "finished": "green",
    "running": "cyan",
    "pruned": "yellow",
    "failed": "red",
    "interrupted": "magenta",
    "waiting": "dim",
}
_ON_THE_WAY = ("eval_reward", "eval_loss", "reward", "loss")
_MOST_DIGITS = 10
"""Of a measured number; what differs further behind is rounding."""
_TIE = 1e-3
"""The share of a measure below which two trials tie: another seed moves it by more."""
_ORDER = ("finished", "running", "pruned", "interrupted", "waiting", "failed")


def rank_trials(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Sort finished trials by the first objective, the best first, then others by their state."""
    first = objectives[0]

    def place(trial: Trial) -> tuple[int, float, int]:
        value = first.key(trial.values.get(first.name)) if trial.state == "finished" else 0.0
        return _ORDER.index(trial.state), value, trial.number

    return sorted(trials, key=place)


def completed_trials(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Return the finished trials that have a number for every objective, the best first."""
    return [
        trial
        for trial in rank_trials(trials, objectives)
        if trial.state == "finished"
        and all(
            objective.key(trial.values.get(objective.name)) < float("inf")
            for objective in objectives
        )
    ]


def best_trial(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Return the best trial; with several objectives all that no other beats: the Pareto front."""
    done = completed_trials(trials, objectives)
    if len(objectives) == 1:
        return done[:1]
    keys = {trial.number: [o.key(trial.values.get(o.name)) for o in objectives] for trial in done}

    def beaten(number: int) -> bool:
        mine = keys[number]
        return any(
            theirs != mine and all(a <= b for a, b in zip(theirs, mine, strict=True))
            for theirs in keys.values()
        )

    return [trial for trial in done if not beaten(trial.number)]


def tied_trials(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Return the best trial with those that are as good, where there are any; else none.

    Of several objectives there is no best trial, and no tie.
    """
    if len(objectives) > 1:
        return []
    name, done = objectives[0].name, completed_trials(trials, objectives)
    best = done[0].values[name] if done else 0.0
    tied = [t for t in done if math.isclose(t.values[name], best, rel_tol=_TIE)]
    return tied if len(tied) > 1 else []


def describe_tie(trials: Sequence[Trial], objectives: Sequence[Objective]) -> str | None:
    """Return the sentence about trials that tie for the best; None where one is better."""
    tied = tied_trials(trials, objectives)
    if not tied:
        return None
    *names, last = sorted(trial.name for trial in tied)
    return (
        f"Trials {', '.join(names)} and {last} are a tie: their {objectives[0].name} differs by "
        f"less than {_TIE:.1%}, which another seed may turn around."
    )


def trial_table(
    trials: Sequence[Trial],
    objectives: Sequence[Objective],
    where: dict[int, str] | None = None,
    limit: int | None = None,
) -> Table:
    """Return the trials as a table for the terminal; `where` names the slots of those that run."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    table_view = Table(box=box.SIMPLE_HEAD, show_edge=False)
    heads = ["trial", *(short for _, short in short_names(dict.fromkeys(keys)))]
    heads += [*(objective.name for objective in objectives), "step", "time"]
    for heading in heads:
        table_view.add_column(Text(heading), justify="right")
    table_view.add_column("state")
    leaders = [*best_trial(trials, objectives), *tied_trials(trials, objectives)]
    front = {trial.number for trial in leaders}
    rows = rank_trials(trials, objectives)
    columns = [format_distinct([row.values.get(o.name) for row in rows]) for o in objectives]
    for number, trial in enumerate(rows[:limit]):
        style = "bold" if trial.number in front else None
        cells = [trial.name, *(format_value(trial.params.get(key, "")) for key in keys)]
        cells += [column[number] for column in columns]
        cells += [str(trial.step or ""), format_duration(trial.seconds) if trial.seconds else ""]
        table_view.add_row(
            *map(Text, cells), _format_state(trial, (where or {}).get(trial.number)), style=style
        )
    if limit is not None and len(rows) > limit:
        table_view.add_row(Text("..."), Text(f"{len(rows) - limit} more"), style="dim")
    return table_view


def _format_state(trial: Trial, slot: str | None) -> Text:
    """Return how a trial stands; of one without a result, what it logged at last."""
    cell = Text(slot or trial.state, style=COLOURS[trial.state])
    last = next((name for name in _ON_THE_WAY if name in trial.values), None)
    if last is not None and trial.state in ("running", "pruned", "interrupted"):
        cell.append(f"  {last} {format_number(trial.values[last])}", style="dim")
    return cell


def format_number(value: float | None) -> str:
    """Return a measure as tables show it."""
    return "" if value is None else f"{value:.5g}"


def format_distinct(values: Sequence[float | None], digits: int = 5) -> list[str]:
    """Return measures as a column shows them, with as many digits as tell the different ones apart.

    A missing one is an empty text. `digits` is the least number of significant digits.
    """
    different = {value for value in values if value is not None and math.isfinite(value)}
    while digits < _MOST_DIGITS and len({f"{v:.{digits}g}" for v in different}) < len(different):
        digits += 1
    return ["" if value is None else f"{value:.{digits}g}" for value in values]


def write_csv(trials: Sequence[Trial], objectives: Sequence[Objective], path: Path) -> None:
    """Write every trial with its parameters, its objectives and all other numbers."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    names = [objective.name for objective in objectives]
    others = sorted({name for trial in trials for name in trial.values} - set(names))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = [*(key.lstrip("+") for key in keys), *names, *others]
    writer.writerow(map(_as_cell, ["trial", "state", *heads, "steps", "wall_seconds", "error"]))
    for trial in rank_trials(trials, objectives):
        numbers = [trial.values.get(name, "") for name in [*names, *others]]
        params = [trial.params.get(key, "").strip("'\"") for key in keys]
        error = trial.error or ""
        row = [trial.name, trial.state, *params, *numbers, trial.step, f"{trial.seconds:.1f}"]
        writer.writerow(map(_as_cell, [*row, error]))
    write_text(path, redact_text(text.getvalue()))


_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\n")


def _as_cell(value: Any) -> Any:
    """Return a value that a spreadsheet takes for text or a number, and never for a formula."""
    if not isinstance(value, str):
        return value
    # Python 3.11 puts no quotes around a return, which ends the row where it is read.
    value = value.replace("\r\n", "\n").replace("\r", "\n")
    if not value.startswith(_FORMULA_STARTS):
        return value
    try:
        float(value)
    except ValueError:
        # What spreadsheets themselves write in front of text that is no formula.
        return f"'{value}"
    return value
