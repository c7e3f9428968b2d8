"""A sweep's folder: taken by one sweep at a time, and only by the one that made it."""

import fcntl
import os
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

import luthier
from luthier.config.compose import parse
from luthier.errors import UserError
from luthier.record.config_diff import NEUTRAL, changes
from luthier.record.run_dir import to_yaml
from luthier.record.secrets import redacted_override
from luthier.storage.atomic import read_json, write_json, write_text
from luthier.sweep.planning import Sweep
from luthier.sweep.settings import Optuna, Random

_PATIENCE = 15.0
"""Seconds beyond their grace in which trials of an ended sweep must be gone."""


def take(sweep: Sweep) -> int:
    """Make or find the sweep's folder and lock it; returns the open lock.

    Raises UserError where another sweep lies there, or this one runs already.
    """
    path = sweep.folder.path
    if path.exists() and not sweep.folder.definition.is_file() and any(path.iterdir()):
        raise UserError(
            f"output_dir: {path} holds files that are no sweep. Choose another output_dir=..."
        )
    (path / "state").mkdir(parents=True, exist_ok=True)
    lock = _lock(path, sweep.launcher.grace)
    _compare(sweep)
    write_json(sweep.folder.definition, _definition(sweep))
    write_text(path / "base.yaml", to_yaml(sweep.base.resolved))
    return lock


def is_running(path: Path) -> bool:
    """Whether a sweep or one of its trials lives in this folder."""
    file = path / "lock"
    if not file.is_file():
        return False
    with file.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _lock(path: Path, grace: float) -> int:
    """Take the lock, which every guard of a trial holds too; wait for those of an ended sweep."""
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + grace + _PATIENCE
    waited = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            owner = os.read(lock, 20).decode().strip()
            os.lseek(lock, 0, os.SEEK_SET)
            if owner.isdigit() and psutil.pid_exists(int(owner)):
                raise UserError(
                    f"{path} is being swept by process {owner}. `luthier sweep {path}` shows how "
                    "it stands."
                ) from None
            if time.monotonic() > deadline:
                raise UserError(f"{path}: trials of an ended sweep still run. End them.") from None
            if not waited:
                print("waiting for the trials of the ended sweep to stop", flush=True)
            waited = True
            time.sleep(0.2)
    os.ftruncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    return lock


def _definition(sweep: Sweep) -> dict[str, Any]:
    """What is searched, as `sweep.json` has it."""
    return {
        "luthier": luthier.__version__,
        "recipe": sweep.recipe,
        "words": [redacted_override(word) for word in sweep.words],
        "identity": _identity(sweep),
        "objectives": {one.name: one.direction for one in sweep.objectives},
        "total": len(sweep.points) if sweep.points is not None else _count(sweep),
    }


def _count(sweep: Sweep) -> int:
    assert isinstance(sweep.sweeper, Random)
    return sweep.sweeper.n_trials


def _identity(sweep: Sweep) -> dict[str, Any]:
    """What must not change while a sweep goes on."""
    sweeper = sweep.sweeper
    typed, _ = parse(sweep.space.fixed)
    fixed = [one.line for one in typed if one.key.split(".")[0] not in NEUTRAL]
    found: dict[str, Any] = {
        "hydra/sweeper": sweeper.kind,
        "words": sorted(redacted_override(line) for line in fixed),
        "params": {axis.name: axis.text for axis in sweep.space.axes},
    }
    if isinstance(sweeper, Random):
        found["seed"] = sweeper.seed
    if isinstance(sweeper, Optuna):
        found["objective"] = {one.name: one.direction for one in sweep.objectives}
    return found


def _compare(sweep: Sweep) -> None:
    """Refuse a folder in which something else was searched, or whose recipe has changed."""
    old = read_json(sweep.folder.definition)
    if old is None:
        return
    new = _identity(sweep)
    lines = [str(change) for change in changes(old["identity"], new)]
    file = sweep.folder.path / "base.yaml"
    if not lines and file.is_file():
        before = yaml.safe_load(file.read_text(encoding="utf-8"))
        lines = [str(change) for change in changes(before, sweep.base.resolved)]
    if lines:
        shown = "\n".join(f"  {line}" for line in lines[:10])
        raise UserError(
            f"output_dir: {sweep.folder.path} holds another sweep:\n{shown}\n"
            "Choose another output_dir=..., or type what was typed there."
        )
