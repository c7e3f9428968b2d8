"""Files to which lines of JSON are added while a run trains, and how they are read back."""

import json
from pathlib import Path
from typing import Any

NAMES = ("metrics.jsonl", "evaluations.jsonl")
"""Those of a run's directory: every logged metric, and the replies of each evaluation."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file, oldest first; none where it is missing.

    The last line of a process that was killed may be half a line, and is left out.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:-1] if line]
    return rows + _whole(lines[-1:])


def cut(path: Path, count: int | None) -> None:
    """Keep the first lines of a file; without a count those of step 0, before the first step."""
    from luthier.storage.atomic import write_text

    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _is_of_the_start(line)] if count is None else lines[:count]
    write_text(path, "".join(kept))


def _is_of_the_start(line: str) -> bool:
    return any(row["step"] == 0 for row in _whole([line]))


def _whole(lines: list[str]) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        return []
