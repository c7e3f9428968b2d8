"""Checkpoints on disk: whole or absent, found again by their seals, and kept within limits.

A checkpoint is written to `checkpoints/.new`, sealed with the SHA-256 of every file, put on the
disk and renamed. What has no seal, or other bytes than were sealed, is none. Needs no torch.
"""

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from luthier.storage.atomic import write_text
from luthier.storage.disk_space import free_bytes
from luthier.storage.manifest import (
    MANIFEST,
    DamagedFolderError,
    read_manifest,
    verify_manifest,
    write_manifest,
)
from luthier.storage.output_folder import (
    find_free_name,
    list_remaining_files,
    remove_listed_files,
)
from luthier.storage.sizes import folder_size, format_bytes
from luthier.storage.typed_files import DamagedFileError, load_json, load_json_lines

NEW_FOLDER = ".new"
"""Where the next checkpoint is written, within the folder of checkpoints."""
METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
STEP_LOGS = (METRICS_FILE, "evaluations.jsonl", ROLLOUTS_FILE)
"""The files of a run's directory to which lines of JSON are added while it trains: every logged
metric, and the replies of each evaluation."""
START_FILE = "before.json"
"""The file of a run's directory with what was measured before the first step."""
COUNTERS_FILE = "counted_{rank}.json"
"""The file of a checkpoint with what one process has counted since the last line of metrics."""
LOGS_FOLDER = "logs"
"""The folder of a checkpoint with the logs of its run as they were then, under its seal."""
_BROKEN_SEAL = "removed.json"
"""The name of a checkpoint's manifest while the checkpoint is removed."""
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
    """Return the (step, path) of the checkpoints in a folder, complete or not, oldest first.

    Raises UserError where something else has the folder's name.
    """
    if not folder.is_dir():
        if folder.exists() or folder.is_symlink():
            raise DamagedFileError(f"{folder}: it is no folder. Move it away.")
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
    _discard(aside, target)
    if _is_own(target):
        target.replace(aside)
    elif os.path.lexists(target):
        # Not a checkpoint, so it is the user's: it makes room, and stays.
        target.replace(find_free_name(target))
    written.replace(target)
    with suppress(OSError):  # some network file systems keep what another process has open
        written.parent.rmdir()
    _sync(target.parent)
    _discard(aside, target)


def recover_checkpoints(folder: Path) -> None:
    """Finish or undo what a killed run was doing in a folder of checkpoints."""
    new = folder / NEW_FOLDER
    for _, path in list_checkpoints(new) if new.is_dir() else []:
        # Whole, and killed between the seal and the rename: the work of its steps is not lost.
        if not (folder / path.name).exists() and _find_problem(path) is None:
            path.replace(folder / path.name)
    if new.is_dir() and not new.is_symlink():
        shutil.rmtree(new, ignore_errors=True)
    else:
        new.unlink(missing_ok=True)
    for aside in folder.glob(".checkpoint-*.old"):
        target = folder / aside.name.removeprefix(".").removesuffix(".old")
        if not aside.is_dir() or target.exists() or _find_problem(aside):
            _discard(aside, target)
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
        return bool(read_checkpoint_facts(path).get("planned"))
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
    numbered = list_checkpoints(folder)
    remaining = [path for number, path in numbered if number <= step and _is_own(path)]
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
    return (
        None if facts.get("resumable") else "it holds the model only (trainer.args.save_only_model)"
    )


def _aside(target: Path) -> Path:
    """Return where a checkpoint lies while it is replaced or removed."""
    return target.with_name(f".{target.name}.old")


def _remove(path: Path) -> None:
    """Remove a checkpoint so that none that is half removed has its name."""
    aside = _aside(path)
    _discard(aside, path)
    path.replace(aside)
    _discard(aside, path)


def _discard(aside: Path, target: Path) -> None:
    """Remove the checkpoint that lies aside; files of others in it stay, at the target's place."""
    if aside.is_symlink() or not aside.is_dir():
        aside.unlink(missing_ok=True)
        return
    seal, broken_seal = aside / MANIFEST, aside / _BROKEN_SEAL
    with suppress(OSError):  # some network file systems keep what another process has open
        # Without its seal it is none, should the process end in between; its list is needed still.
        if seal.is_file():
            seal.replace(broken_seal)
        if broken_seal.is_file():
            remove_listed_files(aside, broken_seal)
        else:  # an earlier version was killed while it removed this
            shutil.rmtree(aside)
    if any(not Path(name).name.startswith(".nfs") for name in list_remaining_files(aside)):
        aside.replace(find_free_name(target))


def _is_own(path: Path) -> bool:
    """Tell a checkpoint, also a damaged one, from a file, a link or a folder of the user's."""
    is_folder = path.is_dir() and not path.is_symlink()
    return is_folder and any((path / name).is_file() for name in (MANIFEST, "trainer_state.json"))


def _sync(path: Path) -> None:
    """Have the system put a file, or the names in a folder, on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# The logs of a run, which its checkpoints hold as well: what was lost or changed is put back.


class MetricsRow(BaseModel):
    """A line of `metrics.jsonl`: the measures of a step, by their names."""

    model_config = ConfigDict(extra="allow")

    step: int
    epoch: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    reward: float | None = None
    eval_reward: float | None = None


class _LineCounts(BaseModel):
    """What a checkpoint without copies of the logs says of them."""

    model_config = ConfigDict(extra="allow")

    lines: dict[str, int]


def read_step_log(path: Path) -> list[dict[str, Any]]:
    """Return the rows of `metrics.jsonl`, oldest first; none where it is missing.

    The last line of a process that was killed may be half a line, and is left out. Raises UserError
    for any other line that is damaged.
    """
    return load_json_lines(path, MetricsRow, _log_advice(path))


def copy_logs(run: Path, checkpoint: Path) -> None:
    """Copy the logs of a run into a checkpoint that is being written."""
    for name in (START_FILE, *STEP_LOGS):
        if (run / name).is_file():
            write_text(checkpoint / LOGS_FOLDER / name, (run / name).read_text(encoding="utf-8"))


def restore_logs(run: Path, checkpoint: Path) -> list[str]:
    """Set the logs of a run back to what they were at a whole checkpoint: later lines come again.

    Returns a sentence for each file that was not what the training left there. Raises UserError
    where a file is damaged and the checkpoint, of an older luthier, has no copy of it.
    """
    copies = checkpoint / LOGS_FOLDER
    if not copies.is_dir():
        _truncate_logs(run, checkpoint)
        return []
    sentences = []
    for name in (START_FILE, *STEP_LOGS):
        copy = copies / name
        text = copy.read_text(encoding="utf-8") if copy.is_file() else None
        problem = restore_log(run / name, text)
        sentences += [f"{problem} and has been restored from {checkpoint.name}"] if problem else []
    return sentences


def restore_log(path: Path, text: str | None) -> str | None:
    """Set a log back to `text`, with which it began once; None removes it.

    Returns what was wrong with the file where it did not begin so any more.
    """
    is_there = path.exists() or path.is_symlink()
    if is_there and not path.is_file() and not path.is_symlink():
        raise DamagedFileError(f"{path}: this is no file. Move it away and resume.")
    if text is None:
        path.unlink(missing_ok=True)
        return None
    try:
        content = path.read_bytes()
    except OSError:
        content = None
    written = text.encode()
    if content != written:
        write_text(path, text)
    if content is not None and content.startswith(written):
        return None
    return f"{path} was {'damaged' if is_there else 'missing'}"


def _truncate_logs(run: Path, checkpoint: Path) -> None:
    """Cut the logs to as many lines as they had at a checkpoint that only counted them."""
    file = checkpoint / COUNTERS_FILE.format(rank=0)
    counts: dict[str, int] = load_json(file, _LineCounts)["lines"]
    for name, count in counts.items():
        path = run / name
        schema = MetricsRow if name == METRICS_FILE else dict[str, Any]
        complete = len(load_json_lines(path, schema, _log_advice(path)))
        if complete < count:
            raise DamagedFileError(
                f"{path}: it has {complete} lines, but had {count} at {checkpoint.name}.\n"
                f"{_log_advice(path)}"
            )
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(path, "".join(lines[:count]))
    if not (run / START_FILE).is_file():
        raise DamagedFileError(
            f"{run / START_FILE}: missing, and with it what was measured before training."
            f"\n{_log_advice(run / START_FILE)}"
        )


def _log_advice(path: Path) -> str:
    return (
        f"Restore {path.name} from a copy. If the run is not finished, you can also remove the "
        "file: resuming takes it from the newest checkpoint."
    )
