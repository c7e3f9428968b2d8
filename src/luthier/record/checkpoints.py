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

from luthier.storage.manifest import Damaged, read_manifest, seal, unseal
from luthier.storage.sizes import in_words, size_of

NEW_FOLDER = ".new"
"""Where the next checkpoint is written, within the folder of checkpoints."""
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class CheckpointLimits:
    """How many checkpoints are kept; the newest and the best always are."""

    count: int | None = None
    """The newest so many (`trainer.args.save_total_limit`)."""
    budget: int | None = None
    """Bytes of all together (`trainer.checkpoints.budget`)."""


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a folder, whole or not, by step, oldest first."""
    entries = folder.iterdir() if folder.is_dir() else ()
    found = [(match, path) for path in entries if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found if path.is_dir())


def checkpoint_step(path: Path) -> int:
    """The optimizer step behind which a checkpoint was taken."""
    return int(path.name.rpartition("-")[2])


def publish_checkpoint(written: Path, target: Path, made: dict[str, Any]) -> None:
    """Seal what was written, put it on the disk, and give it its name."""
    seal(written, made)
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
        if not (folder / path.name).exists() and _problem(path) is None:
            path.replace(folder / path.name)
    shutil.rmtree(folder / NEW_FOLDER, ignore_errors=True)
    for aside in folder.glob(".checkpoint-*.old"):
        target = folder / aside.name.removeprefix(".").removesuffix(".old")
        if target.exists() or _problem(aside):
            shutil.rmtree(aside)
        else:
            aside.replace(target)


@dataclass(frozen=True)
class NewestCheckpoint:
    """The newest whole checkpoint from which a training can go on, and what was passed over."""

    path: Path | None
    passed_over: list[str]
    """A sentence for each newer one."""


def find_newest_checkpoint(folder: Path) -> NewestCheckpoint:
    """Look for the newest whole checkpoint; every byte of it is compared with its seal."""
    passed_over: list[str] = []
    for _, path in reversed(list_checkpoints(folder)):
        problem = _problem(path)
        if problem is None:
            return NewestCheckpoint(path, passed_over)
        passed_over.append(f"{path} is not used: {problem}")
    return NewestCheckpoint(None, passed_over)


def read_checkpoint_facts(path: Path) -> dict[str, Any]:
    """What is known of a sealed checkpoint; raises Damaged where its seal cannot be read."""
    made: dict[str, Any] = read_manifest(path)["made"]
    return made


def is_planned(path: Path) -> bool:
    """Whether a checkpoint is there and was taken as the settings say, not for a signal."""
    try:
        return bool(read_checkpoint_facts(path)["planned"])
    except (Damaged, FileNotFoundError):
        return False


def prune_checkpoints(
    folder: Path, step: int, best: Path | None, limits: CheckpointLimits
) -> list[str]:
    """Remove checkpoints that are too many, oldest first; a sentence for what is still too large.

    `step`: the newest one's. What was taken for a signal goes as soon as there is a newer one.
    """
    kept = [path for number, path in list_checkpoints(folder) if number <= step]
    needed = {folder / f"checkpoint-{step}", *([best] if best else [])}
    for path in [path for path in kept if path not in needed]:
        if _is_over_limits(kept, limits) or not is_planned(path):
            kept.remove(path)
            _remove(path)
    total = sum(map(size_of, kept)) if limits.budget else 0
    if limits.budget and total > limits.budget:
        return [
            f"trainer.checkpoints.budget: the newest and the best checkpoint take "
            f"{in_words(total)}, more than the {in_words(limits.budget)} that they may."
        ]
    return []


def describe_missing_space(folder: Path) -> str | None:
    """Why the next checkpoint does not fit on the disk, by the size of the last; None if it may."""
    sizes = [size_of(path) for _, path in list_checkpoints(folder)[-1:]]
    free = shutil.disk_usage(folder).free if folder.is_dir() else None
    if not sizes or free is None or free >= sizes[0]:
        return None
    return f"the last one took {in_words(sizes[0])}, and {in_words(free)} are free"


def _is_over_limits(kept: list[Path], limits: CheckpointLimits) -> bool:
    if limits.count and len(kept) > limits.count:
        return True
    return bool(limits.budget) and sum(map(size_of, kept)) > (limits.budget or 0)


def _problem(path: Path) -> str | None:
    """Why a checkpoint is not whole, or nothing can go on from it."""
    try:
        made = unseal(path)
    except Damaged as damage:
        return f"{damage}"
    return None if made["resumable"] else "it holds the model only (trainer.args.save_only_model)"


def _aside(target: Path) -> Path:
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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Files to which lines of JSON are added while a run trains, and how they are read back.

STEP_LOGS = ("metrics.jsonl", "evaluations.jsonl")
"""Those of a run's directory: every logged metric, and the replies of each evaluation."""


def read_step_log(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file, oldest first; none where it is missing.

    The last line of a process that was killed may be half a line, and is left out.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:-1] if line]
    return rows + _parse_complete_lines(lines[-1:])


def truncate_step_log(path: Path, count: int | None) -> None:
    """Keep the first lines of a file; without a count those of step 0, before the first step."""
    from luthier.storage.atomic import write_text

    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = (
        [line for line in lines if _is_before_first_step(line)] if count is None else lines[:count]
    )
    write_text(path, "".join(kept))


def _is_before_first_step(line: str) -> bool:
    return any(row["step"] == 0 for row in _parse_complete_lines([line]))


def _parse_complete_lines(lines: list[str]) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        return []
