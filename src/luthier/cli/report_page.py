"""`luthier report RUN`: a run as an HTML page; of several runs a page that compares them."""

from pathlib import Path

from luthier.cli.arguments import CommandLine, Flag
from luthier.storage.write_errors import explain_write_errors

COMMAND_LINE = CommandLine(
    "report",
    "luthier report RUN [RUN ...] [-o FILE]\n\n"
    "Writes a run as one HTML page: results, curves, data, replies, time and memory, and how to\n"
    "repeat it. Of several runs, or of a sweep's folder, the page compares them. A page needs no\n"
    "network and no other file. RUN is a run's folder, or its name below runs/.",
    (Flag("-o", "FILE", "where to write the page (RUN/report.html, or comparison.html)"),),
    "  luthier report quickstart/default\n"
    "  luthier report quickstart/default quickstart/r-8-3f2a1c -o rank.html\n"
    "  luthier report runs/sweeps/quickstart/lora.r\n",
)
_COMPARISON = "comparison.html"


def run(arguments: list[str]) -> int:
    """Write the page and print where it is; returns 0. Raises UserError where there is no run."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    from luthier.errors import UserError

    parsed = COMMAND_LINE.parse(arguments)
    if not parsed.overrides:
        raise UserError("`luthier report` needs a run: luthier report runs/RECIPE/NAME")
    folders = [folder for typed in parsed.overrides for folder in _find_runs(typed)]
    folders = list(dict.fromkeys(folders))
    output = parsed.texts.get("-o")
    path = Path(output).expanduser() if output else None
    if len(folders) == 1:
        from luthier.report.run_report import REPORT_FILE, write_report

        path = path or folders[0] / REPORT_FILE
        with explain_write_errors(path, "-o"):
            write_report(folders[0], path)
    else:
        from luthier.report.comparison import write_comparison

        path = path or Path(_COMPARISON)
        with explain_write_errors(path, "-o"):
            write_comparison(folders, path)
    print(path)
    return 0


def _find_runs(typed: str) -> list[Path]:
    """Return the folder of a run, or those of a sweep's trials, the best first."""
    from luthier.errors import UserError
    from luthier.record.run_dir import find_run
    from luthier.storage.typed_files import has_entry
    from luthier.sweep.objective import Objective
    from luthier.sweep.trials import TrialFolder, rank_trials

    sweep = TrialFolder(Path(typed).expanduser())
    definition = sweep.read_definition()
    if definition is None:
        return [find_run(typed)]
    objectives = [
        Objective(name, direction == "maximize")
        for name, direction in definition["objectives"].items()
    ]
    folders = [sweep.run(trial) for trial in rank_trials(sweep.load(), objectives)]
    folders = [folder for folder in folders if has_entry(folder / "run.json")]
    if not folders:
        raise UserError(f"{typed}: no trial of this sweep has begun.")
    return folders
