"""`luthier sweep FOLDER`: how a sweep stands, or what came out of it."""

from pathlib import Path

from rich.console import Console

from luthier.errors import UserError
from luthier.inspect.arguments import Grammar
from luthier.storage.atomic import read_json
from luthier.sweep import trials as on_disk
from luthier.sweep.objective import Objective, measured
from luthier.sweep.plan import is_running
from luthier.sweep.progress import summary
from luthier.sweep.results import print_errors
from luthier.sweep.trials import Folder, table

GRAMMAR = Grammar(
    "sweep",
    "luthier sweep FOLDER\n\n"
    "Shows the trials of a sweep, the best first, while it runs or afterwards. FOLDER is what\n"
    "`python train.py -m ...` printed; runs/RECIPE/sweeps/NAME where none was typed.",
    (),
    "  luthier sweep runs/quickstart/sweeps/lora.r=8-16-32-1f0e9a3b\n",
)


def run(words: list[str]) -> int:
    """Print the table of a sweep; returns 0. Raises UserError for a folder that holds none."""
    if GRAMMAR.asks_help(words):
        return 0
    given = GRAMMAR.parse(words).overrides
    if len(given) != 1:
        raise UserError("luthier sweep takes one folder: luthier sweep runs/RECIPE/sweeps/NAME.")
    folder = Folder(Path(given[0]))
    definition = read_json(folder.definition)
    if definition is None:
        raise UserError(f"{folder.path} holds no sweep.{_near(folder.path)}")
    wanted = definition["objectives"].items()
    objectives = [Objective(name, direction == "maximize") for name, direction in wanted]
    trials = folder.load()
    running = is_running(folder.path)
    for trial in trials:
        if trial.state == "running":
            found = measured(
                on_disk.read_run(folder.run(trial)), on_disk.read_rows(folder.run(trial))
            )
            trial.step = int(found.get("step", trial.step))
            trial.values = found
            trial.state = "running" if running else "interrupted"
    console = Console(highlight=False)
    console.print(table(trials, objectives))
    console.print(summary(trials, objectives, definition["total"]))
    print_errors(trials, console)
    left = definition["total"] > len(trials) or any(not trial.is_ended for trial in trials)
    if left and not running:
        typed = " ".join(_shell(word) for word in definition["words"])
        console.print(f"\ngo on with  python train.py -m {typed}", markup=False, soft_wrap=True)
    return 0


def _near(path: Path) -> str:
    """The sweeps that lie below a folder, as advice."""
    found = sorted(path.glob("**/sweep.json"))[:5] if path.is_dir() else []
    listed = ", ".join(str(one.parent) for one in found)
    return f" Below it are: {listed}." if found else ""


def _shell(word: str) -> str:
    import shlex

    return shlex.quote(word)
