"""The trials of a sweep on disk: one small file each, whole or absent."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from luthier.storage.atomic import read_json, write_json

State = Literal["waiting", "running", "finished", "pruned", "failed", "interrupted"]
ENDED = ("finished", "pruned", "failed")
"""States that the same command leaves as they are."""
_LINES = 12
_KILLED = 137


@dataclass
class Trial:
    """One point of a sweep, and how it stands."""

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
        """Its number as files show it."""
        return f"{self.number:03d}"

    @property
    def is_ended(self) -> bool:
        """Whether there is nothing left to do for it."""
        return self.state in ENDED


@dataclass(frozen=True)
class Folder:
    """Where everything of a sweep lies."""

    path: Path

    def run(self, trial: Trial) -> Path:
        """The folder of a trial's run."""
        return self.path / "trials" / trial.name

    def state(self, trial: Trial) -> Path:
        """The file that says how a trial stands."""
        return self.path / "state" / f"{trial.name}.json"

    def logs(self, trial: Trial) -> tuple[Path, Path]:
        """What a trial printed, and its error output."""
        logs = self.path / "logs"
        return logs / f"{trial.name}.out", logs / f"{trial.name}.err"

    @property
    def definition(self) -> Path:
        """What is searched."""
        return self.path / "sweep.json"

    def save(self, trial: Trial) -> None:
        """Write how a trial stands."""
        write_json(self.state(trial), asdict(trial))

    def load(self) -> list[Trial]:
        """All trials that were ever started, by number."""
        files = sorted((self.path / "state").glob("*.json"))
        return sorted((Trial(**read_json(file)) for file in files), key=lambda one: one.number)


def read_run(folder: Path) -> dict[str, Any]:
    """The record of a run, or an empty one where it left none."""
    try:
        return read_json(folder / "run.json") or {}
    except ValueError:
        return {}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The logged metrics of a run that may be writing this very moment."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line is not whole yet
            break
    return [row for row in rows if isinstance(row, dict)]


def status_since(folder: Path, start: float) -> str | None:
    """The status that a run has written since then; what stood there before says nothing."""
    path = folder / "run.json"
    is_new = path.is_file() and path.stat().st_mtime >= start
    return read_run(folder).get("status") if is_new else None


def stamp(folder: Path) -> tuple[int, ...]:
    """What changes when a run writes its record or its metrics."""
    files = [path for path in (folder / "run.json", folder / "metrics.jsonl") if path.is_file()]
    return tuple(
        number for path in files for number in (path.stat().st_mtime_ns, path.stat().st_size)
    )


def has_data(folder: Path) -> bool:
    """Whether a run has its data encoded, so that others find it in the cache."""
    return (folder / "data.png").exists() or "data" in read_run(folder)


def why_failed(folder: Path, log: Path, code: int) -> str:
    """The error of a trial in its own words: its record's, and the last lines that it printed."""
    said = read_run(folder).get("error")
    lines = _last_lines(log)
    parts = [str(said).strip()] if said else []
    parts += ["\n".join(lines)] if lines and str(said).strip() not in "\n".join(lines) else []
    killed = " (killed; often for want of memory)" if code == _KILLED else ""
    return "\n".join([f"exit code {code}{killed}", *(parts or lines)])


def _last_lines(log: Path) -> list[str]:
    """The last lines of an error output, without progress bars."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.rpartition("\r")[2].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return [line for line in lines if line and not re.search(r"\d+%\|", line)][-_LINES:]


def shown_value(text: str) -> str:
    """A parameter as a table shows it: long numbers are cut, quotes are left out."""
    bare = text.strip("'\"").replace("\\", "")
    try:
        return bare if len(bare) <= 8 else f"{float(bare):.4g}"
    except ValueError:
        return bare


def shown_params(params: Mapping[str, str]) -> str:
    """Parameters in one line, by the last part of their keys where that is enough."""
    return " ".join(f"{short}={shown_value(params[key])}" for key, short in short_names(params))


def short_names(keys: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each key with the shortest ending that no other key has."""
    found = []
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        others = [other for other in keys if other != key]
        found.append((key, next(e for e in endings if not any(_ends(o, e) for o in others))))
    return found


def _ends(key: str, ending: str) -> bool:
    return key == ending or key.endswith(f".{ending}")
