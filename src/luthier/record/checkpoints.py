"""Checkpoints on disk: whole or absent, found again by their seals, and kept within bounds.

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

NEW = ".new"
"""Where the next checkpoint is written, within the folder of checkpoints."""
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Bounds:
    """How many checkpoints are kept; the newest and the best always are."""

    count: int | None = None
    """The newest so many (`trainer.args.save_total_limit`)."""
    budget: int | None = None
    """Bytes of all together (`trainer.checkpoints.budget`)."""


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a folder, whole or not, by step, oldest first."""
    entries = folder.iterdir() if folder.is_dir() else ()
    found = [(match, path) for path in entries if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found if path.is_dir())


def step_of(path: Path) -> int:
    """The optimizer step behind which a checkpoint was taken."""
    return int(path.name.rpartition("-")[2])


def publish(written: Path, target: Path, made: dict[str, Any]) -> None:
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


def recover(folder: Path) -> None:
    """Finish or undo what a killed run was doing in a folder of checkpoints."""
    for _, path in numbered(folder / NEW):
        if not (folder / path.name).exists() and _problem(path) is None:
            path.replace(folder / path.name)
    shutil.rmtree(folder / NEW, ignore_errors=True)
    for aside in folder.glob(".checkpoint-*.old"):
        target = folder / aside.name.removeprefix(".").removesuffix(".old")
        if target.exists() or _problem(aside):
            shutil.rmtree(aside)
        else:
            aside.replace(target)


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint from which a training can go on, and what was passed over."""

    path: Path | None
    passed_over: list[str]
    """A sentence for each newer one."""


def newest(folder: Path) -> Found:
    """Look for the newest whole checkpoint; every byte of it is compared with its seal."""
    passed_over: list[str] = []
    for _, path in reversed(numbered(folder)):
        problem = _problem(path)
        if problem is None:
            return Found(path, passed_over)
        passed_over.append(f"{path} is not used: {problem}")
    return Found(None, passed_over)


def made_of(path: Path) -> dict[str, Any]:
    """What is known of a sealed checkpoint; raises Damaged where its seal cannot be read."""
    made: dict[str, Any] = read_manifest(path)["made"]
    return made


def is_planned(path: Path) -> bool:
    """Whether a checkpoint is there and was taken as the settings say, not for a signal."""
    try:
        return bool(made_of(path)["planned"])
    except (Damaged, FileNotFoundError):
        return False


def prune(folder: Path, step: int, best: Path | None, bounds: Bounds) -> list[str]:
    """Remove checkpoints that are too many, oldest first; a sentence for what is still too large.

    `step`: the newest one's. What was taken for a signal goes as soon as there is a newer one.
    """
    kept = [path for number, path in numbered(folder) if number <= step]
    needed = {folder / f"checkpoint-{step}", *([best] if best else [])}
    for path in [path for path in kept if path not in needed]:
        if _is_too_much(kept, bounds) or not is_planned(path):
            kept.remove(path)
            _remove(path)
    total = sum(map(size_of, kept)) if bounds.budget else 0
    if bounds.budget and total > bounds.budget:
        return [
            f"trainer.checkpoints.budget: the newest and the best checkpoint take "
            f"{in_words(total)}, more than the {in_words(bounds.budget)} that they may."
        ]
    return []


def room_is_missing(folder: Path) -> str | None:
    """Why the next checkpoint does not fit on the disk, by the size of the last; None if it may."""
    sizes = [size_of(path) for _, path in numbered(folder)[-1:]]
    free = shutil.disk_usage(folder).free if folder.is_dir() else None
    if not sizes or free is None or free >= sizes[0]:
        return None
    return f"the last one took {in_words(sizes[0])}, and {in_words(free)} are free"


def _is_too_much(kept: list[Path], bounds: Bounds) -> bool:
    if bounds.count and len(kept) > bounds.count:
        return True
    return bool(bounds.budget) and sum(map(size_of, kept)) > (bounds.budget or 0)


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
