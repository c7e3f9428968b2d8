"""`train.py -m` plans and runs a sweep; `luthier sweep FOLDER` prints how a sweep stands."""

# Only what is light is imported here: `luthier.sweep.results` brings numpy and the tables bring
# rich, and a mistake in the configuration must be reported before either is loaded.
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli.arguments import TRUST, CommandLine
from luthier.errors import UserError
from luthier.terminal import make_console, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.sweep.controller import TrialPlace
    from luthier.sweep.local import LaunchCommand, Slot
    from luthier.sweep.strategies import Strategy
    from luthier.sweep.sweep_plan import SweepPlan

_WIDTH = 160
"""The columns of a table where the output is no terminal, which has a width of its own."""


def run_sweep(arguments: list[str], is_trusted: bool = False) -> int:
    """Try every point; returns 0, 1 if a trial failed, or 75 if the same command goes on.

    Typed under `accelerate launch`, the first process steers and the others leave. Raises UserError
    for a mistake of the user's, before anything runs. `is_trusted` lets recipes name code that is
    not the user's own, in the trials too.
    """
    from luthier.sweep.local import find_launch_command, is_first_rank
    from luthier.sweep.sweep_plan import lock_sweep, plan_sweep

    if not is_first_rank():
        return 0
    with _checking_status() as on_count:
        planned = plan_sweep(arguments, on_count, is_trusted)
        flags = (TRUST.name,) if is_trusted else ()
        launch = find_launch_command(planned.launcher, os.environ, flags)
    if planned.base.config.dry_run:
        return _dry_run(planned)
    from luthier.sweep.controller import orphan_check
    from luthier.train.launch.request import find_launcher_command

    # The parent is looked at before the trials start: one that ends later makes this an orphan.
    is_orphan = orphan_check(find_launcher_command() is not None)
    # The slots come before the lock: a mistake in them must leave no folder behind.
    slots = _check_slots(planned, launch)
    lock = lock_sweep(planned)
    try:
        return _run(planned, _trial_place(planned, launch, slots, lock), is_orphan)
    finally:
        # The lock ends with its last open descriptor: a guard that inherited it holds it until its
        # trial has ended, so no second sweep can begin beside a trial that is still running.
        os.close(lock)


def _check_slots(planned: "SweepPlan", launch: "LaunchCommand") -> "list[Slot]":
    """Return this machine's slots, none for a cluster; UserError where either cannot be used."""
    from luthier.sweep import local, slurm
    from luthier.sweep.settings import LocalSettings

    settings = planned.launcher
    if isinstance(settings, LocalSettings):
        on_cpu = launch.on_cpu or planned.base.config.model.device == "cpu"
        return local.make_slots(settings, launch.processes, on_cpu, launch.environ)
    slurm.check_slurm(settings)
    return []


def _trial_place(
    planned: "SweepPlan", launch: "LaunchCommand", slots: "list[Slot]", lock: int
) -> "TrialPlace":
    """Return what starts trials: this machine, whose processes inherit the lock, or a cluster."""
    from luthier.sweep.local import LocalMachine
    from luthier.sweep.settings import LocalSettings
    from luthier.sweep.slurm import SlurmCluster

    settings = planned.launcher
    if isinstance(settings, LocalSettings):
        return LocalMachine(launch, slots, planned.folder, settings.grace, lock)
    return SlurmCluster(planned, launch)


def _run(planned: "SweepPlan", trial_place: "TrialPlace", is_orphan: Callable[[], bool]) -> int:
    """Run the trials, print what came out, and return the controller's exit code."""
    from luthier.sweep.controller import RESUME, Controller
    from luthier.sweep.progress import make_view
    from luthier.sweep.results import report_progress, report_results

    console = _console()
    strategy = _strategy(planned)
    console.print(_opening(planned, strategy, trial_place), markup=False, soft_wrap=True)
    view = make_view(planned.objectives, strategy.total, console)
    controller = Controller(planned, strategy, trial_place, view)
    try:
        code = controller.run(is_orphan)
    finally:
        # The live table must be gone before anything else is printed, an error included.
        view.close()
    if code == RESUME:
        report_progress(planned, controller.trials, console)
        console.print("\nStopped. Run the same command to resume with the trials that are left.")
    else:
        report_results(planned, controller.trials, console)
    return code


def _console() -> "Console":
    """Return a console for results; in a file or a pipe it is wide enough for their tables."""
    console = make_console()
    # rich assumes 80 columns where there is no terminal, and folds the columns of long tables.
    return console if console.is_terminal else make_console(width=_WIDTH)


def _opening(planned: "SweepPlan", strategy: "Strategy", trial_place: "TrialPlace") -> str:
    goal = ", ".join(f"{objective.direction} {objective.name}" for objective in planned.objectives)
    count = f"{strategy.total} trials" if strategy.total != 1 else "1 trial"
    side = (
        f"{len(trial_place.slots)} side by side" if len(trial_place.slots) > 1 else "one at a time"
    )
    return f"sweep     {count}, {side}: {goal}\nfolder    {planned.folder.path}"


def _strategy(planned: "SweepPlan") -> "Strategy":
    """Return what chooses the points: a list for a grid or a random search, else Optuna."""
    from luthier.sweep.settings import OptunaSettings
    from luthier.sweep.strategies import OptunaStrategy, PointList

    if planned.points is not None:
        return PointList(planned.points)
    assert isinstance(planned.sweeper, OptunaSettings)
    # The study is a file in the sweep's folder, so that the same command goes on with it.
    path = planned.folder.path / "study.log"
    return OptunaStrategy(path, planned.space, planned.sweeper, planned.objectives, planned.watched)


def _dry_run(planned: "SweepPlan") -> int:
    """Print what would be tried; returns 0."""
    from luthier.sweep.trials import format_params

    console = _console()
    points = planned.points or []
    for number, point in enumerate(points):
        console.print(f"{number:03d}  {format_params(point)}", markup=False, soft_wrap=True)
    size = f"{len(points)} trials" if points else "every value of the search space"
    console.print(f"dry run: {size} can be composed; nothing was run or written")
    return 0


@contextmanager
def _checking_status() -> Iterator[Callable[[int], None]]:
    """Show in the terminal that configurations are composed; yields what takes their number."""
    # On stderr, so that a redirected stdout holds the results alone.
    with make_console(stderr=True).status("checking the configurations") as status:
        yield lambda count: status.update(f"checking {count} configurations")


# `luthier sweep FOLDER` reads the folder alone: the sweep may run in another process, or be over.

COMMAND_LINE = CommandLine(
    "sweep",
    "luthier sweep FOLDER\n\n"
    "Shows the trials of a sweep, the best first, while it runs or afterwards. FOLDER is what\n"
    "`luthier train -m ...` printed; runs/RECIPE/sweeps/NAME where none was typed.",
    (),
    "  luthier sweep runs/quickstart/sweeps/r-8-16-32-1f0e9a\n",
)


def run(arguments: list[str]) -> int:
    """Print the table of a sweep; returns 0. Raises UserError for a folder that holds none."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    folders = COMMAND_LINE.parse(arguments).overrides
    if len(folders) != 1:
        raise UserError("luthier sweep takes one folder: luthier sweep runs/RECIPE/sweeps/NAME.")
    from luthier.record.record import read_metrics, read_record
    from luthier.sweep import trials as on_disk
    from luthier.sweep.objective import Objective, measure_objectives
    from luthier.sweep.progress import summary_line
    from luthier.sweep.results import print_errors
    from luthier.sweep.sweep_plan import is_running
    from luthier.train.launch.request import format_train_command

    folder = on_disk.TrialFolder(Path(folders[0]))
    definition = folder.read_definition()
    if definition is None:
        raise UserError(f"{folder.path} holds no sweep.{_sweeps_below(folder.path)}")
    directions = definition["objectives"].items()
    objectives = [Objective(name, direction == "maximize") for name, direction in directions]
    trials = folder.load()
    running = is_running(folder.path)
    for trial in trials:
        if trial.state == "running":
            # The controller writes a trial's values when it ends; until then its own files say
            # how far it is. Without a controller, "running" is what a killed sweep left behind.
            run_folder = folder.run(trial)
            measures = measure_objectives(read_record(run_folder), read_metrics(run_folder))
            trial.step = int(measures.get("step", trial.step))
            trial.values = measures
            trial.state = "running" if running else "interrupted"
    console = make_console()
    print_table(console, on_disk.trial_table(trials, objectives))
    console.print(summary_line(trials, objectives, definition["total"]))
    print_errors(trials, console)
    left = definition["total"] > len(trials) or any(not trial.is_ended for trial in trials)
    if left and not running:
        command = format_train_command("-m", *definition["words"])
        console.print(f"\nTo resume: {command}", markup=False, soft_wrap=True)
    return 0


def _sweeps_below(path: Path) -> str:
    """Name up to five sweeps below a folder, as advice for who typed the folder above them."""
    definitions = sorted(path.glob("**/sweep.json"))[:5] if path.is_dir() else []
    listed = ", ".join(str(definition.parent) for definition in definitions)
    return f" Below it are: {listed}." if definitions else ""
