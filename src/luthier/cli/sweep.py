"""`train.py -m`: plan a sweep, run it, and say what came out."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from luthier.cli.arguments import CommandLine
from luthier.errors import UserError
from luthier.storage.atomic import read_json
from luthier.sweep import local, slurm
from luthier.sweep import trials as on_disk
from luthier.sweep.controller import RESUME, Controller, TrialPlace, orphan_check
from luthier.sweep.local import LocalMachine
from luthier.sweep.objective import Objective, measure_objectives
from luthier.sweep.progress import make_view, summary_line
from luthier.sweep.results import print_errors
from luthier.sweep.settings import LocalSettings, OptunaSettings
from luthier.sweep.strategies import OptunaStrategy, PointList, Strategy
from luthier.sweep.sweep_plan import SweepPlan, is_running, lock_sweep, plan_sweep
from luthier.sweep.trials import TrialFolder, format_params, trial_table
from luthier.train import launch_request

_WIDTH = 160
"""Columns where there is no terminal that has some."""

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=_WIDTH)


def run_sweep(arguments: list[str]) -> int:
    """Try every point; returns 0, 1 if a trial failed, or 75 if the same command goes on.

    Typed under `accelerate launch`, the first process steers and the others leave. Raises UserError
    for a mistake of the user's, before anything runs.
    """
    if not local.is_first_rank():
        return 0
    with _checking() as checking:
        planned = plan_sweep(arguments, checking)
        launch = local.find_launch_command(planned.launcher, os.environ)
    if planned.base.config.dry_run:
        return _dry_run(planned)
    is_orphan = orphan_check(launch_request.find_launcher_command() is not None)
    rooms = _rooms(planned, launch)
    lock = lock_sweep(planned)
    try:
        return _run(planned, _place(planned, launch, rooms, lock), is_orphan)
    finally:
        os.close(lock)


def _rooms(planned: SweepPlan, launch: local.LaunchCommand) -> list[local.Slot]:
    """The slots of this machine; what is wrong with them or a cluster is said before anything."""
    settings = planned.launcher
    if isinstance(settings, LocalSettings):
        on_cpu = launch.on_cpu or planned.base.config.model.device == "cpu"
        return local.make_slots(settings, launch.processes, on_cpu, launch.environ)
    slurm.check_slurm(settings)
    return []


def _place(
    planned: SweepPlan, launch: local.LaunchCommand, rooms: list[local.Slot], lock: int
) -> TrialPlace:
    settings = planned.launcher
    if isinstance(settings, LocalSettings):
        return LocalMachine(launch, rooms, planned.folder, settings.grace, lock)
    return slurm.SlurmCluster(planned, launch)


def _run(planned: SweepPlan, trial_place: TrialPlace, is_orphan: Callable[[], bool]) -> int:
    from luthier.sweep.results import report_progress, report_results

    strategy = _strategy(planned)
    console.print(_opening(planned, strategy, trial_place), markup=False, soft_wrap=True)
    view = make_view(planned.objectives, strategy.total, console)
    controller = Controller(planned, strategy, trial_place, view)
    try:
        code = controller.run(is_orphan)
    finally:
        view.close()
    if code == RESUME:
        report_progress(planned, controller.trials, console)
        console.print("\nstopped; the same command goes on with the trials that are left")
    else:
        report_results(planned, controller.trials, console)
    return code


def _opening(planned: SweepPlan, strategy: Strategy, trial_place: TrialPlace) -> str:
    goal = ", ".join(f"{objective.direction} {objective.name}" for objective in planned.objectives)
    count = f"{strategy.total} trials" if strategy.total != 1 else "1 trial"
    side = (
        f"{len(trial_place.slots)} side by side" if len(trial_place.slots) > 1 else "one at a time"
    )
    return f"sweep     {count}, {side}: {goal}\nfolder    {planned.folder.path}"


def _strategy(planned: SweepPlan) -> Strategy:
    if planned.points is not None:
        return PointList(planned.points)
    assert isinstance(planned.sweeper, OptunaSettings)
    path = planned.folder.path / "study.log"
    return OptunaStrategy(path, planned.space, planned.sweeper, planned.objectives, planned.watched)


def _dry_run(planned: SweepPlan) -> int:
    """Say what would be tried."""
    points = planned.points or []
    for number, point in enumerate(points):
        console.print(f"{number:03d}  {format_params(point)}", markup=False, soft_wrap=True)
    size = f"{len(points)} trials" if points else "every value of the search space"
    console.print(f"dry run: {size} can be composed; nothing was run or written")
    return 0


@contextmanager
def _checking() -> Iterator[Callable[[int], None]]:
    """A word in the terminal while many configurations are composed."""
    status = Console(stderr=True).status("checking the configurations")
    with status:
        yield lambda count: status.update(f"checking {count} configurations")


# `luthier sweep FOLDER`: how a sweep stands, or what came out of it.

GRAMMAR = CommandLine(
    "sweep",
    "luthier sweep FOLDER\n\n"
    "Shows the trials of a sweep, the best first, while it runs or afterwards. FOLDER is what\n"
    "`python train.py -m ...` printed; runs/RECIPE/sweeps/NAME where none was typed.",
    (),
    "  luthier sweep runs/quickstart/sweeps/lora.r=8-16-32-1f0e9a3b\n",
)


def run(arguments: list[str]) -> int:
    """Print the table of a sweep; returns 0. Raises UserError for a folder that holds none."""
    if GRAMMAR.asks_help(arguments):
        return 0
    folders = GRAMMAR.parse(arguments).overrides
    if len(folders) != 1:
        raise UserError("luthier sweep takes one folder: luthier sweep runs/RECIPE/sweeps/NAME.")
    folder = TrialFolder(Path(folders[0]))
    definition = read_json(folder.definition)
    if definition is None:
        raise UserError(f"{folder.path} holds no sweep.{_near(folder.path)}")
    directions = definition["objectives"].items()
    objectives = [Objective(name, direction == "maximize") for name, direction in directions]
    trials = folder.load()
    running = is_running(folder.path)
    for trial in trials:
        if trial.state == "running":
            measures = measure_objectives(
                on_disk.read_run_record(folder.run(trial)), on_disk.read_rows(folder.run(trial))
            )
            trial.step = int(measures.get("step", trial.step))
            trial.values = measures
            trial.state = "running" if running else "interrupted"
    console = Console(highlight=False)
    console.print(trial_table(trials, objectives))
    console.print(summary_line(trials, objectives, definition["total"]))
    print_errors(trials, console)
    left = definition["total"] > len(trials) or any(not trial.is_ended for trial in trials)
    if left and not running:
        typed = " ".join(_shell(word) for word in definition["words"])
        console.print(f"\ngo on with  python train.py -m {typed}", markup=False, soft_wrap=True)
    return 0


def _near(path: Path) -> str:
    """The sweeps that lie below a folder, as advice."""
    definitions = sorted(path.glob("**/sweep.json"))[:5] if path.is_dir() else []
    listed = ", ".join(str(definition.parent) for definition in definitions)
    return f" Below it are: {listed}." if definitions else ""


def _shell(word: str) -> str:
    import shlex

    return shlex.quote(word)
