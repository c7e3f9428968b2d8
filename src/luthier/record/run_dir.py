"""A run's directory: who may write there, and what it holds.

config.yaml     the whole resolved config
overrides.yaml  what was typed
run.json        status, versions, git, hardware, launch, seeds, data, results
code/           what differed from the commits that run.json names
metrics.jsonl   every logged metric, a step a line
replies.jsonl   held-out rows answered before and after training
evaluations.jsonl  held-out rows answered at each evaluation, where that is asked for
loss.png        the loss over the steps
model/          the adapter or model, tokenizer, chat template and chat settings
checkpoints/    the trainer's checkpoints
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from luthier.config.renamed_settings import read_recorded_config
from luthier.errors import UserError, nearest_option
from luthier.record import checkpoints
from luthier.record.config_diff import ConfigChange, compare_configs
from luthier.record.record import RECORD_FORMAT, RunRecord, read_record
from luthier.record.secrets import redact_override, redact_secrets
from luthier.storage import lock
from luthier.storage.atomic import write_text

RUNS = Path("runs")
"""The folder that holds every run whose config names no other `output_dir`."""

RunState = Literal["new", "unfinished", "finished"]

_FILES = (
    *("config.yaml", "overrides.yaml", "run.json", "metrics.jsonl", "replies.jsonl"),
    *("evaluations.jsonl", "before.json", "loss.png", "data.png", "dropped.jsonl"),
)
_FOLDERS = ("model", "checkpoints", "tensorboard", "code")
_REPLACEABLE = ("failed", "stopped")
"""Statuses of a run that another config may replace, if the run made no progress."""


@dataclass(frozen=True)
class RunDir:
    """A run's directory as it was found for one config."""

    folder: Path
    state: RunState
    changes: list[ConfigChange] = field(default_factory=list)
    """What the config changes of the run that the folder holds; none of it matters to the result
    of a run that goes on."""
    extended_from: int | None = None
    """The optimizer step from which a run that becomes longer or shorter goes on; None for a run
    that keeps its length or has no checkpoint yet."""


@contextmanager
def open_run(
    folder: Path, resolved: dict[str, Any], overrides: list[str], overwrite: bool = False
) -> Iterator[RunDir]:
    """Hold a run's directory for this process, ready to train in for as long as the block runs.

    `resolved` is the whole config and `overrides` is what was typed; both are written, unless the
    folder holds this very run finished. What an earlier, replaced run left is removed first.
    Raises UserError where `inspect_run` does, where another process has the folder, and where a
    finished run is to become longer and has no checkpoint.
    """
    _refuse_foreign_folder(folder)
    # Behind the refusal, since taking the lock writes a file into the folder.
    with lock.hold_lock(folder):
        run = inspect_run(folder, resolved, overwrite)
        if run.state == "new":
            _remove_run_files(folder)
        else:
            # What a killed run was just writing; nobody else writes, as the folder is held.
            for path in folder.glob(".*.tmp"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if any(change.effect == "length" for change in run.changes):
            run = replace(run, extended_from=_note_extension(run))
        if run.state != "finished":
            write_text(folder / "config.yaml", to_yaml(resolved))
            typed = [redact_override(override) for override in overrides]
            write_text(folder / "overrides.yaml", yaml.safe_dump(typed, allow_unicode=True))
        yield run


def inspect_run(folder: Path, resolved: dict[str, Any], overwrite: bool = False) -> RunDir:
    """Return whether `folder` is new, or holds this very run unfinished or finished.

    A run whose config differs in what does not change the training is the same run, and so is one
    that is to become longer: a finished one is then unfinished. Nothing is written. Raises
    UserError where another config has used the folder, with the keys that differ, or where another
    version of luthier or another program has.
    """
    _refuse_foreign_folder(folder)
    if overwrite or not (folder / "config.yaml").is_file():
        return RunDir(folder, "new")
    changes, record = _config_changes(folder, resolved), read_record(folder)
    effects = {change.effect for change in changes}
    if "matters" in effects:
        # A config that failed before its first step is mended and tried again under the same name.
        if record.get("status") in _REPLACEABLE and not has_training_progress(folder):
            return RunDir(folder, "new")
        raise UserError(_other_config_message(folder, changes))
    if record.get("status") == "finished":
        return RunDir(folder, "unfinished" if "length" in effects else "finished", changes)
    if record.get("format", 1) < RECORD_FORMAT and has_training_progress(folder):
        raise UserError(_older_format_message(folder, record))
    return RunDir(folder, "unfinished", changes)


def is_run_finished(folder: Path, resolved: dict[str, Any]) -> bool:
    """Return whether `folder` holds a run that came to its end and keeps its length.

    This is for the processes that do not hold the folder, while the one that does may be writing.
    """
    # The config before the record: the holder notes a new length in the record first, so a new
    # config here means that the record does not say "finished" any more.
    changes = _config_changes(folder, resolved)
    is_longer = any(change.effect == "length" for change in changes)
    return read_record(folder).get("status") == "finished" and not is_longer


def has_training_progress(folder: Path) -> bool:
    """Return whether a run in `folder` took a step, or left a checkpoint or a model."""
    if checkpoints.list_checkpoints(folder / "checkpoints") or (folder / "model").exists():
        return True
    return any(row["step"] > 0 for row in checkpoints.read_step_log(folder / "metrics.jsonl"))


def to_yaml(resolved: dict[str, Any]) -> str:
    """Return a resolved config as YAML, in its own order, without the values of secrets."""
    return yaml.safe_dump(redact_secrets(resolved), sort_keys=False, allow_unicode=True)


def find_run(typed: str) -> Path:
    """Return the folder of a run from its path or from its name below `runs`.

    Raises UserError, with the nearest name, where there is no such run.
    """
    for folder in (Path(typed).expanduser(), RUNS / typed):
        if (folder / "run.json").is_file():
            return folder
    runs = sorted(str(path.parent) for path in RUNS.glob("*/*/run.json"))
    same_name = [run for run in runs if Path(run).name == typed]
    near = nearest_option(str(RUNS / typed), runs) or (same_name[0] if same_name else None)
    if near:
        hint = f" Did you mean {near}?"
    else:
        hint = (
            f" There are: {', '.join(runs[:8])}{' ...' if len(runs) > 8 else ''}." if runs else ""
        )
    raise UserError(f"{typed}: there is no run (a folder with run.json).{hint}")


def _refuse_foreign_folder(folder: Path) -> None:
    """Raise UserError where `folder` is a file, or holds files that are no run."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file, not a folder. Choose another output_dir.")
    is_run = (folder / "config.yaml").is_file() or (folder / "run.json").is_file()
    if folder.is_dir() and any(p.name != lock.LOCK_FILE for p in folder.iterdir()) and not is_run:
        raise UserError(
            f"output_dir: {folder} holds files that are no run of luthier. "
            "Choose an empty folder, so that nothing of yours is overwritten."
        )


def _config_changes(folder: Path, resolved: dict[str, Any]) -> list[ConfigChange]:
    """Return what differs between the config in `folder` and this one; nothing if it has none."""
    path = folder / "config.yaml"
    if not path.is_file():
        return []
    return compare_configs(read_recorded_config(path), resolved)


def _remove_run_files(folder: Path) -> None:
    """Remove what an earlier run left in `folder`; only files that luthier itself writes."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def _note_extension(run: RunDir) -> int | None:
    """Note in the record that the steps so far were taken on the way to another end.

    Returns the step of the newest whole checkpoint; None where there is none yet. Raises UserError
    for a finished run without one.
    """
    longer = [str(change) for change in run.changes if change.effect == "length"]
    record = RunRecord(run.folder)
    is_finished = record.entries.get("status") == "finished"
    last = checkpoints.find_newest_checkpoint(run.folder / "checkpoints").path
    if last is None and is_finished:
        raise UserError(
            f"output_dir: {run.folder} holds this run, finished without a checkpoint, so it cannot "
            f"become longer ({longer[0]}).\nChoose another output_dir=..., or overwrite=true, which"
            " trains it anew."
        )
    if last is None:
        return None
    step = checkpoints.checkpoint_step(last)
    extended = [*record.entries.get("extended", []), {"at_step": step, "changes": longer}]
    # A finished run is finished no more from here on: were it killed before its first step, or
    # read by another process, its new config and its old status would say that all is done.
    status = {"status": "stopped"} if is_finished else {}
    record.update(extended=extended, **status)
    return step


def _other_config_message(folder: Path, changes: list[ConfigChange]) -> str:
    """Return the refusal of a folder whose run has a config that matters to the result."""
    lines = [str(change) for change in changes if change.effect == "matters"]
    harmless = [change.key for change in changes if change.effect != "matters"]
    differences = "\n".join(f"  {line}" for line in lines[:10])
    more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
    fine = f"\nThese would not stand in the way: {', '.join(harmless)}." if harmless else ""
    return (
        f"output_dir: {folder} holds a run with another config:\n{differences}{more}{fine}\n"
        "Choose another output_dir=..., or overwrite=true to replace that run."
    )


def _older_format_message(folder: Path, record: dict[str, Any]) -> str:
    """Return the refusal to go on from checkpoints that an older version left without a seal."""
    wrote = record.get("versions", {}).get("luthier", "an older version")
    return (
        f"output_dir: {folder} holds an unfinished run of luthier {wrote} in an older form (format "
        f"{record.get('format', 1)}; this version writes {RECORD_FORMAT}): its checkpoints carry "
        "no seal, so nobody can say whether they are whole.\n"
        "Go on with that version, choose another output_dir=..., or overwrite=true to begin anew."
    )
