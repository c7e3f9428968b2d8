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
from pathlib import Path
from typing import Any, Literal

import yaml

from luthier.config.renamed_settings import read_recorded_config
from luthier.errors import UserError, nearest
from luthier.record import checkpoints
from luthier.record.checkpoints import read_step_log
from luthier.record.config_diff import ConfigChange, compare_configs
from luthier.record.record import RECORD_FORMAT, read_record
from luthier.record.secrets import redact_override as redacted_override
from luthier.record.secrets import redact_secrets
from luthier.storage import lock
from luthier.storage.atomic import write_text

RunState = Literal["new", "unfinished", "finished"]

_FILES = (
    *("config.yaml", "overrides.yaml", "run.json", "metrics.jsonl", "replies.jsonl"),
    *("evaluations.jsonl", "before.json", "loss.png", "data.png", "dropped.jsonl"),
)
_FOLDERS = ("model", "checkpoints", "tensorboard", "code")
_REPLACEABLE = ("failed", "stopped")


def claim(folder: Path, resolved: dict[str, Any], overwrite: bool = False) -> RunState:
    """Say whether `folder` is new, or holds this very run unfinished or finished.

    A run whose config differs in what does not change the training is the same run, and so is one
    that is to become longer: a finished one is then unfinished. Raises UserError where another
    config has used the folder, with the keys that differ, or another luthier.
    """
    refuse_foreign(folder)
    if overwrite or not (folder / "config.yaml").is_file():
        return "new"
    record, found = read_record(folder), changed(folder, resolved)
    if any(change.kind == "matters" for change in found):
        if record.get("status") in _REPLACEABLE and not has_training_progress(folder):
            return "new"
        raise UserError(_other_config_message(folder, found))
    if record.get("status") == "finished":
        return "unfinished" if any(change.kind == "length" for change in found) else "finished"
    if record.get("format", 1) < RECORD_FORMAT and has_training_progress(folder):
        raise UserError(_older_format_message(folder, record))
    return "unfinished"


def changed(folder: Path, resolved: dict[str, Any]) -> list[ConfigChange]:
    """What differs between the config that `folder` holds, if it holds one, and this one."""
    path = folder / "config.yaml"
    if not path.is_file():
        return []
    return compare_configs(read_recorded_config(path), resolved)


def is_finished(folder: Path) -> bool:
    """Whether `folder` holds a run that came to its end."""
    return read_record(folder).get("status") == "finished"


def prepare(folder: Path, resolved: dict[str, Any], overrides: list[str]) -> None:
    """Write what identifies the run: its config and what was typed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", to_yaml(resolved))
    write_text(
        folder / "overrides.yaml",
        yaml.safe_dump([redacted_override(o) for o in overrides], allow_unicode=True),
    )


def clear(folder: Path) -> None:
    """Remove what an earlier run left in `folder`; only files that luthier itself writes."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed run was just writing; the directory must be held."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def to_yaml(resolved: dict[str, Any]) -> str:
    """A resolved config as YAML, in its own order, without the values of secrets."""
    return yaml.safe_dump(redact_secrets(resolved), sort_keys=False, allow_unicode=True)


def has_training_progress(folder: Path) -> bool:
    """Whether a run in `folder` took a step, or left a checkpoint or a model."""
    if checkpoints.list_checkpoints(folder / "checkpoints") or (folder / "model").exists():
        return True
    return any(row["step"] > 0 for row in read_step_log(folder / "metrics.jsonl"))


def refuse_foreign(folder: Path) -> None:
    """Raise UserError where `folder` is a file, or holds files that are no run."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file, not a folder. Choose another output_dir.")
    ours = (folder / "config.yaml").is_file() or (folder / "run.json").is_file()
    if folder.is_dir() and any(p.name != lock.NAME for p in folder.iterdir()) and not ours:
        raise UserError(
            f"output_dir: {folder} holds files that are no run of luthier. "
            "Choose an empty folder, so that nothing of yours is overwritten."
        )


def _other_config_message(folder: Path, found: list[ConfigChange]) -> str:
    matter = [str(change) for change in found if change.kind == "matters"]
    rest = [change.key for change in found if change.kind != "matters"]
    shown = "\n".join(f"  {line}" for line in matter[:10])
    more = f"\n  and {len(matter) - 10} more" if len(matter) > 10 else ""
    fine = f"\nThese would not stand in the way: {', '.join(rest)}." if rest else ""
    return (
        f"output_dir: {folder} holds a run with another config:\n{shown}{more}{fine}\n"
        "Choose another output_dir=..., or overwrite=true to replace that run."
    )


def _older_format_message(folder: Path, record: dict[str, Any]) -> str:
    wrote = record.get("versions", {}).get("luthier", "an older version")
    return (
        f"output_dir: {folder} holds an unfinished run of luthier {wrote} in an older form (format "
        f"{record.get('format', 1)}; this version writes {RECORD_FORMAT}): its checkpoints carry "
        "no seal, so nobody can say whether they are whole.\n"
        "Go on with that version, choose another output_dir=..., or overwrite=true to begin anew."
    )


# A run by what a person types: its folder, or its name below `runs`.

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
