"""`luthier runs`: the runs and sweeps below a folder, a line each."""

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from luthier.cli.arguments import CommandLine, Flag
from luthier.errors import UserError
from luthier.record.checkpoints import METRICS_FILE, read_step_log
from luthier.record.record import read_record
from luthier.record.run_dir import RUNS, is_run_folder
from luthier.storage import lock
from luthier.storage.output_folder import MARKER
from luthier.storage.sizes import folder_size, format_bytes
from luthier.terminal import format_duration, make_console, pluralize, print_json, printable

COMMAND_LINE = CommandLine(
    "runs",
    "luthier runs [FOLDER] [--json]\n\nLists the runs and sweeps below FOLDER (runs/ if none is "
    "named), the newest first: how each\nstands, when it began, its steps, its main result before "
    "and after training, how long it\ntook, and its size. A sweep is one line; `luthier sweep "
    "FOLDER` lists its trials.",
    (Flag("--json", None, "one line of JSON with every run, for programs"),),
    "  luthier runs\n  luthier runs runs/quickstart\n  luthier runs --json | jq '.[0].folder'\n",
)
_SWEEP_FILE = "sweep.json"
_LOSSES = ("eval_loss", "eval_reward", "loss", "reward")
"""Results and logged numbers that stand for a run without metrics, the first one that is there."""
_UNREADABLE = (UserError, OSError, ValueError, TypeError, KeyError, AttributeError)
"""What reading a damaged folder may end in; the folder is listed all the same."""


@dataclass
class RunSummary:
    """A run or a sweep as one line; what cannot be read of a damaged one is None."""

    kind: str
    """`run` or `sweep`."""
    folder: str
    status: str
    started: str = ""
    """The time in ISO format."""
    step: int | None = None
    trials: int | None = None
    """Of a sweep, how many have ended."""
    result: str | None = None
    """The name of the main result."""
    before: float | None = None
    after: float | None = None
    seconds: float | None = None
    bytes: int | None = None
    problem: str | None = None
    """What is damaged."""


def run(arguments: list[str]) -> int:
    """Print the list; returns 0. Raises UserError for a folder that is not there."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    parsed = COMMAND_LINE.parse(arguments)
    if len(parsed.overrides) > 1:
        raise UserError("`luthier runs` takes one folder, or none for runs/.")
    folder = Path(parsed.overrides[0]).expanduser() if parsed.overrides else RUNS
    if parsed.overrides and not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}. `luthier runs` lists the runs below a folder.")
    summaries = list_runs(folder)
    if "--json" in parsed.switches:
        print_json([asdict(summary) for summary in summaries])
    elif summaries:
        print_summaries(summaries, folder)
    else:
        print(f"There are no runs in {folder}/. `luthier train recipe=quickstart` makes one.")
    return 0


def list_runs(folder: Path) -> list[RunSummary]:
    """Return the runs and sweeps in a folder and below it, the newest first; none is skipped."""
    summaries = [
        _summarize_sweep(path) if kind == "sweep" else _summarize_run(path)
        for kind, path in _find_folders(folder)
    ]
    return sorted(summaries, key=lambda summary: (summary.started, summary.folder), reverse=True)


def _find_folders(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield each run and sweep with its kind; nothing within them, and nothing behind links."""
    for root, folders, files in os.walk(folder):
        path = Path(root)
        if _SWEEP_FILE in files:
            yield "sweep", path
        elif "run.json" in files or (MARKER in files and is_run_folder(path)):
            yield "run", path
        else:
            continue
        folders.clear()


def _summarize_run(folder: Path) -> RunSummary:
    summary = RunSummary("run", str(folder), "damaged", bytes=_size(folder))
    try:
        record = read_record(folder)
        summary.started = _started(record.get("started"), folder)
        summary.status = _status(folder, record)
        summary.seconds = record.get("seconds")
        _set_result(summary, folder, record)
    except _UNREADABLE as error:
        summary.problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        summary.status, summary.started = "damaged", summary.started or _started(None, folder)
    return summary


def _status(folder: Path, record: dict[str, Any]) -> str:
    """Return how a run stands, in a word or two."""
    status = str(record.get("status", "running"))
    # A killed process cannot write its end, but the system released its lock.
    if status == "running" and not lock.is_locked(folder):
        return "killed"
    return "no model" if status == "finished" and not (folder / "model").is_dir() else status


def _set_result(summary: RunSummary, folder: Path, record: dict[str, Any]) -> None:
    """Fill in the steps and the main result: of a metric, else of the held-out loss."""
    rows = read_step_log(folder / METRICS_FILE)
    summary.step = max((int(row["step"]) for row in rows), default=0)
    results = record.get("results") or {}
    losses = [name for name in _LOSSES if name in results]
    names = [name for name in results if name not in losses] + losses
    if names:
        summary.result, pair = names[0], results[names[0]]
        summary.before, summary.after = pair.get("before"), pair.get("after")
        return
    # A run that has not ended shows what it logged last.
    for name in _LOSSES:
        logged = [float(row[name]) for row in rows if row.get(name) is not None]
        if logged:
            summary.result, summary.after = name, logged[-1]
            summary.before = logged[0] if len(logged) > 1 else None
            return


def _summarize_sweep(folder: Path) -> RunSummary:
    from luthier.sweep.objective import Objective
    from luthier.sweep.sweep_plan import is_running
    from luthier.sweep.trials import TrialFolder, best_trial

    summary = RunSummary("sweep", str(folder), "damaged", bytes=_size(folder))
    summary.started = _started(None, folder)
    try:
        there = TrialFolder(folder)
        definition, trials = there.read_definition() or {}, there.load()
        ended = [trial for trial in trials if trial.is_ended]
        summary.trials = len(ended)
        summary.seconds = round(sum(trial.seconds for trial in trials), 1)
        directions = definition["objectives"]
        best = best_trial(trials, [Objective(n, d == "maximize") for n, d in directions.items()])
        if best:
            summary.result = next(iter(directions))
            summary.after = best[0].values[summary.result]
        is_done = len(ended) >= definition["total"]
        summary.status = (
            "running" if is_running(folder) else "finished" if is_done else "interrupted"
        )
    except _UNREADABLE as error:
        summary.problem = str(error).splitlines()[0] if str(error) else type(error).__name__
    return summary


def _started(started: Any, folder: Path) -> str:
    """Return when a run began; of one that does not say so, when its folder last changed."""
    try:
        moment = datetime.fromisoformat(str(started))
    except ValueError:
        files = [folder / name for name in (_SWEEP_FILE, "run.json", MARKER)]
        file = next((path for path in files if path.is_file()), folder)
        try:
            moment = datetime.fromtimestamp(file.stat().st_mtime, UTC)
        except OSError:  # removed in this moment
            return ""
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def _size(folder: Path) -> int | None:
    try:
        return folder_size(folder)
    except OSError:  # a run that writes right now, or a folder that may not be read
        return None


# How the list is printed: a line each where that fits, else two.

_HEADINGS = ("run", "status", "began", "steps", "result", "took", "size")


def print_summaries(summaries: list[RunSummary], folder: Path) -> None:
    """Print a table; in a terminal that is too narrow for it, two lines for each run."""
    rows = [_cells(summary) for summary in summaries]
    widths = [
        max(len(heading), *(len(row[column]) for row in rows))
        for column, heading in enumerate(_HEADINGS)
    ]
    console = make_console()
    is_wide = not sys.stdout.isatty() or sum(widths) + 2 * len(widths) <= console.width
    if is_wide:
        for row in (_HEADINGS, *rows):
            print(_line(row, widths))
    else:
        for row in rows:
            steps = f"step {row[3]}" if row[3].replace(",", "").isdigit() else row[3]
            print(f"{row[0]}  {row[1]}")
            cells = (row[2], steps, *row[4:])
            print(f"    {_line(cells, [widths[2], widths[3] + len('step '), *widths[4:]])}")
    for summary in summaries:
        if summary.problem:
            print(f"\n{printable(summary.folder)} is damaged: {printable(summary.problem)}")


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _cells(summary: RunSummary) -> tuple[str, ...]:
    """Return a run as texts, none of which is cut."""
    moment = summary.started and datetime.fromisoformat(summary.started).astimezone()
    trials = summary.trials
    return (
        printable(summary.folder.removeprefix(f"{RUNS}/")),
        summary.status,
        f"{moment:%Y-%m-%d %H:%M}" if moment else "",
        pluralize(trials, "trial") if trials is not None
        else "" if summary.step is None else f"{summary.step:,}",
        _result(summary),
        "" if summary.seconds is None else format_duration(summary.seconds),
        "" if summary.bytes is None else format_bytes(summary.bytes),
    )  # fmt: skip


def _result(summary: RunSummary) -> str:
    if summary.result is None or summary.after is None:
        return ""
    before = "" if summary.before is None else f"{summary.before:.4g} -> "
    best = "best " if summary.kind == "sweep" else ""
    return f"{best}{printable(summary.result)} {before}{summary.after:.4g}"
