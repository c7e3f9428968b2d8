"""Checkpoints on disk: whole or absent, found again by their seals, and kept within limits.

A checkpoint is written to `checkpoints/.new`, sealed with the SHA-256 of every file, put on the
disk and renamed. What has no seal, or other bytes than were sealed, is none. Needs no torch.
"""

import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.storage.atomic import write_text
from luthier.storage.disk_space import free_bytes
from luthier.storage.manifest import (
    DamagedFolderError,
    read_manifest,
    verify_manifest,
    write_manifest,
)
from luthier.storage.sizes import folder_size, format_bytes

NEW_FOLDER = ".new"
"""Where the next checkpoint is written, within the folder of checkpoints."""
STEP_LOGS = ("metrics.jsonl", "evaluations.jsonl")
"""The files of a run's directory to which lines of JSON are added while it trains: every logged
metric, and the replies of each evaluation."""
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class CheckpointLimits:
    """How many checkpoints are kept; the newest and the best always are. None is no limit."""

    max_count: int | None = None
    """How many of the newest (`trainer.args.save_total_limit`)."""
    max_bytes: int | None = None
    """Bytes of all together (`trainer.checkpoints.budget`)."""


@dataclass(frozen=True)
class NewestCheckpoint:
    """The newest complete checkpoint from which a training can go on, and what was passed over."""

    path: Path | None
    skipped: list[str]
    """A sentence for each newer one."""


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return the (step, path) of the checkpoints in a folder, complete or not, oldest first."""
    if not folder.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match and path.is_dir())


def checkpoint_step(path: Path) -> int:
    """Return the optimizer step behind which a checkpoint was taken."""
    return int(path.name.rpartition("-")[2])


def publish_checkpoint(written: Path, target: Path, facts: dict[str, Any]) -> None:
    """Seal what was written, put it on the disk, and give it its name.

    `facts` is what the seal keeps of the checkpoint: its step, whether it is planned, and so on.
    """
    write_manifest(written, facts)
    # The contents before the rename: after a power cut a name may be on the disk whose files are
    # not.
    for path in (*(file for file in written.rglob("*") if file.is_file()), written):
        _sync(path)
    aside = _aside(target)
    if target.exists():
        target.replace(aside)
    written.replace(target)
    with suppress(OSError):  # some network file systems keep what another process has open
        written.parent.rmdir()
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def recover_checkpoints(folder: Path) -> None:
    """Finish or undo what a killed run was doing in a folder of checkpoints."""
    for _, path in list_checkpoints(folder / NEW_FOLDER):
        # Whole, and killed between the seal and the rename: the work of its steps is not lost.
        if not (folder / path.name).exists() and _find_problem(path) is None:
            path.replace(folder / path.name)
    shutil.rmtree(folder / NEW_FOLDER, ignore_errors=True)
    for aside in folder.glob(".checkpoint-*.old"):
        target = folder / aside.name.removeprefix(".").removesuffix(".old")
        if target.exists() or _find_problem(aside):
            shutil.rmtree(aside)
        else:
            aside.replace(target)


def find_newest_checkpoint(folder: Path) -> NewestCheckpoint:
    """Find the newest complete checkpoint; every byte of it is compared with its seal."""
    skipped: list[str] = []
    for _, path in reversed(list_checkpoints(folder)):
        problem = _find_problem(path)
        if problem is None:
            return NewestCheckpoint(path, skipped)
        skipped.append(f"{path} is not used: {problem}")
    return NewestCheckpoint(None, skipped)


def read_checkpoint_facts(path: Path) -> dict[str, Any]:
    """Return the facts of a sealed checkpoint; DamagedFolderError where its seal is unreadable."""
    facts: dict[str, Any] = read_manifest(path)["made"]
    return facts


def is_planned(path: Path) -> bool:
    """Return whether a checkpoint is there and was taken as the settings say, not for a signal."""
    try:
        return bool(read_checkpoint_facts(path)["planned"])
    except (DamagedFolderError, FileNotFoundError):
        return False


def prune_checkpoints(
    folder: Path, step: int, best: Path | None, limits: CheckpointLimits
) -> list[str]:
    """Remove checkpoints beyond the limits, oldest first.

    `step` is the newest one's, and `best` is the best one, or None. What was taken for a signal
    goes as soon as there is a newer one. Returns a sentence where what must stay is still too
    large.
    """
    remaining = [path for number, path in list_checkpoints(folder) if number <= step]
    needed = {folder / f"checkpoint-{step}", *([best] if best else [])}
    # A copy of the list, from which the loop removes.
    for path in [path for path in remaining if path not in needed]:
        is_over_count = bool(limits.max_count) and len(remaining) > (limits.max_count or 0)
        if is_over_count or _excess_bytes(remaining, limits) or not is_planned(path):
            remaining.remove(path)
            _remove(path)
    if not _excess_bytes(remaining, limits):
        return []
    total, budget = sum(map(folder_size, remaining)), limits.max_bytes or 0
    return [
        f"trainer.checkpoints.budget: the newest and the best checkpoint take "
        f"{format_bytes(total)}, more than the {format_bytes(budget)} that they may."
    ]


def describe_missing_space(folder: Path) -> str | None:
    """Return why the next checkpoint does not fit on the disk, judged by the size of the last.

    None means that it may fit.
    """
    sizes = [folder_size(path) for _, path in list_checkpoints(folder)[-1:]]
    if not sizes or free_bytes(folder) >= sizes[0]:
        return None
    free = format_bytes(free_bytes(folder))
    return f"the last one took {format_bytes(sizes[0])}, and {free} are free"


def _excess_bytes(paths: list[Path], limits: CheckpointLimits) -> int:
    """Return how many bytes checkpoints take beyond the limit; 0 where there is none."""
    return max(0, sum(map(folder_size, paths)) - limits.max_bytes) if limits.max_bytes else 0


def _find_problem(path: Path) -> str | None:
    """Return why a checkpoint is not complete, or nothing can go on from it; None where it can."""
    try:
        facts = verify_manifest(path)
    except DamagedFolderError as damage:
        return str(damage)
    return None if facts["resumable"] else "it holds the model only (trainer.args.save_only_model)"


def _aside(target: Path) -> Path:
    """Return where a checkpoint lies while it is replaced or removed."""
    return target.with_name(f".{target.name}.old")


def _remove(path: Path) -> None:
    """Remove a checkpoint so that none that is half removed has its name."""
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    # Without its seal it is none, should the process end in between.
    (path / "manifest.json").unlink(missing_ok=True)
    path.replace(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the system put a file, or the names in a folder, on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_step_log(path: Path) -> list[dict[str, Any]]:
    """Return the rows of one of the `STEP_LOGS`, oldest first; none where it is missing.

    The last line of a process that was killed may be half a line, and is left out.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:-1] if line]
    return rows + _parse_complete_lines(lines[-1:])


def truncate_step_log(path: Path, count: int | None) -> None:
    """Keep the first `count` lines of a file; None keeps those of step 0, before the first step."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if count is None:
        lines = [
            line for line in lines if any(row["step"] == 0 for row in _parse_complete_lines([line]))
        ]
    write_text(path, "".join(lines[:count]))


def _parse_complete_lines(lines: list[str]) -> list[dict[str, Any]]:
    """Return the rows of these lines; none of them where a line is cut."""
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        return []
