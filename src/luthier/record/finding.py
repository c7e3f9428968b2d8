"""A run by what a person types: its folder, or its name below `runs`."""

from pathlib import Path

from luthier.errors import UserError, nearest

RUNS = Path("runs")
"""Where runs are written that name no other place."""


def find_run(typed: str) -> Path:
    """The folder of a run; UserError, with the nearest name, where there is none."""
    for folder in (Path(typed).expanduser(), RUNS / typed):
        if (folder / "run.json").is_file():
            return folder
    within = sorted(str(path.parent) for path in RUNS.glob("*/*/run.json"))
    below = [name for name in within if Path(name).parent.name == typed]
    near = nearest(str(RUNS / typed), within) or (below[0] if below else None)
    hint = f" Did you mean {near}?" if near else ""
    known = f" There are: {', '.join(within[:8])}{' ...' if len(within) > 8 else ''}."
    raise UserError(
        f"{typed}: there is no run (a folder with run.json).{hint or known * bool(within)}"
    )
