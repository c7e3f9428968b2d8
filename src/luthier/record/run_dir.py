"""A run's directory: who may write there, and what it holds.

config.yaml     the whole resolved config
overrides.yaml  what was typed
run.json        status, versions, git, hardware, launch, seeds, data, results
code/           what differed from the commits that run.json names
metrics.jsonl   every logged metric, a step a line
replies.jsonl   held-out rows answered before and after training
evaluations.jsonl  held-out rows answered at each evaluation, where that is asked for
rollouts.jsonl  completions of GRPO and RLOO with their rewards, where that is asked for
report.html     the run as a page: results, curves, data, replies, how to repeat it
data.json       lengths and some rows as tokens, for the report
loss.png        the loss over the steps
profile/        the trace and the table of `trainer.profile`
model/          the adapter or model, tokenizer, chat template and chat settings
checkpoints/    the trainer's checkpoints
.luthier.json   that this is a run, and which files in it are luthier's; written first
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from luthier import __version__
from luthier.config.renamed_settings import read_recorded_config
from luthier.errors import UserError, nearest_option
from luthier.record import checkpoints
from luthier.record.config_diff import (
    ConfigChange,
    compare_configs,
    find_environment_changes,
)
from luthier.record.record import RECORD_FORMAT, RunRecord, read_record
from luthier.redaction import redact, redact_override
from luthier.storage import lock
from luthier.storage.atomic import write_json, write_text
from luthier.storage.manifest import MANIFEST, DamagedFolderError, verify_manifest, verify_sizes
from luthier.storage.output_folder import (
    MARKER,
    WrittenFiles,
    list_remaining_files,
    move_back,
    move_written,
    name_some,
    remove_written,
)
from luthier.storage.typed_files import has_entry

RUNS = Path("runs")
"""The folder that holds every run whose config names no other `output_dir`."""

RunState = Literal["new", "unfinished", "finished"]

_FILES = (
    *("config.yaml", "overrides.yaml", "run.json", "metrics.jsonl", "replies.jsonl"),
    *("evaluations.jsonl", "rollouts.jsonl", "before.json", "loss.png", "data.png"),
    *("dropped.jsonl", "data.json", "report.html"),
)
WRITTEN_FILES = WrittenFiles(
    files=(
        *_FILES,
        *(f".{name}.*.tmp" for name in (*_FILES, MARKER)),
        *("code/*.diff", "code/.*.diff.*.tmp", "checkpoints/README.md"),
        *("profile/trace.json.gz", "profile/operations.txt", "profile/.trace.json.gz"),
        "profile/.operations.txt.*.tmp",
        *("tensorboard/events.out.tfevents.*", "tensorboard/*/events.out.tfevents.*"),
    ),
    folders=("model", ".model.old", "checkpoints/checkpoint-*"),
    temporary=(".model.tmp", "checkpoints/.new", "checkpoints/.checkpoint-*.old"),
)
"""What luthier writes into a run's directory. Trackers' own stores hold several runs, and merged
models are another command's: both stay where a run is replaced."""
TRACKER_STORES = ("wandb", "mlflow")
"""Folders that trackers make; they go with a start that ends before its first step, if it made
them."""
REPLACED = ".replaced"
"""The folder of a run's directory with the run that is replaced, until the new one has begun."""
_COMPLETE = ".complete"
"""The file in it that says that all of that run is there."""
_STATUSES = ("running", "finished", "stopped", "failed", "interrupted")
_CONFIG_KEYS = {"model", "dataset", "trainer", "output_dir", "seed"}
_HASHED_BYTES = 2**31
"""A finished model of up to so many bytes is compared by its hashes, a larger one by its sizes."""
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
    foreign: list[str] = field(default_factory=list)
    """The files that stay where an earlier run was removed, as luthier did not write them."""


@contextmanager
def open_run(
    folder: Path, resolved: dict[str, Any], overrides: list[str], overwrite: bool = False
) -> Iterator[RunDir]:
    """Hold a run's directory for this process, ready to train in for as long as the block runs.

    `resolved` is the whole config and `overrides` is what was typed; both are written, unless the
    folder holds this very run finished. What others put there stays. A new run that ends before
    its first step, by an error or by a signal, leaves nothing, and an earlier run that it would
    have replaced is back in its place. Raises UserError where `inspect_run` does, where another
    process has the folder, where it cannot be written, and where a finished run is to become longer
    and has no checkpoint.
    """
    _refuse_foreign_folder(folder)
    # Behind the refusal, since taking the lock writes a file into the folder.
    with lock.hold_lock(folder):
        _settle_replaced_run(folder)
        run = inspect_run(folder, resolved, overwrite)
        if run.state == "new":
            run = replace(run, foreign=_set_earlier_run_aside(folder))
        new_stores = [name for name in TRACKER_STORES if not os.path.lexists(folder / name)]
        try:
            yield _prepare_folder(run, resolved, overrides)
        except BaseException:
            # Signals are no Exceptions, and leave no more behind than an error does.
            if run.state == "new" and not (folder / checkpoints.START_FILE).exists():
                with suppress(OSError):  # on a full or forbidden disk this may fail, too
                    remove_written(folder, WrittenFiles((), temporary=tuple(new_stores)))
                    _remove_failed_start(folder)
            raise
        discard_replaced_run(folder)


def discard_replaced_run(folder: Path) -> None:
    """Remove the run that a new one has replaced, once the new one has begun."""
    if (folder / REPLACED).is_dir() and not (folder / REPLACED).is_symlink():
        shutil.rmtree(folder / REPLACED)


def _prepare_folder(run: RunDir, resolved: dict[str, Any], overrides: list[str]) -> RunDir:
    """Make the locked directory of a run ready, and return what is known of it then."""
    folder = run.folder
    if run.state != "new":
        # What a killed run was just writing; nobody else writes, as the folder is held.
        unfinished = [name for name in WRITTEN_FILES.files if name.endswith(".tmp")]
        remove_written(folder, WrittenFiles(tuple(unfinished), temporary=(".model.tmp",)))
    if any(change.effect == "length" for change in run.changes):
        run = replace(run, extended_from=_note_extension(run))
    if run.state != "finished":
        _write_marker(folder, list(resolved))
        write_text(folder / "config.yaml", to_yaml(resolved))
        typed = [redact_override(override) for override in overrides]
        write_text(folder / "overrides.yaml", yaml.safe_dump(typed, allow_unicode=True))
    return run


def inspect_run(folder: Path, resolved: dict[str, Any], overwrite: bool = False) -> RunDir:
    """Return whether `folder` is new, or holds this very run unfinished or finished.

    A run whose config differs in what does not change the training is the same run, and so is one
    that is to become longer: a finished one is then unfinished. Nothing is written. Raises
    UserError where another config has used the folder, with the keys that differ, or where another
    version of luthier or another program has.
    """
    _refuse_foreign_folder(folder)
    if overwrite:
        return RunDir(folder, "new")
    if not (folder / "config.yaml").is_file():
        if has_training_progress(folder):
            raise UserError(
                f"output_dir: {folder} holds a run whose config.yaml is gone, so nobody can say "
                "whether it is this one.\nPut the file back, choose another output_dir=..., or "
                "overwrite=true to replace that run."
            )
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


def describe_model_damage(folder: Path) -> str | None:
    """Return what is wrong with the saved model of a finished run; None where it is as it was.

    Its files are compared with its manifest: their sizes, and their hashes where they are not
    large. Of a run of a version that kept none, the model has to be there.
    """
    model = folder / "model"
    if not model.is_dir():
        return f"{model} is gone"
    if not (model / MANIFEST).exists():
        has_weights = any(model.glob("*.safetensors")) or any(model.glob("*.bin"))
        return None if has_weights else f"{model} holds no weights"
    try:
        sizes = [file["size"] for file in verify_sizes(model)["files"].values()]
        if sum(sizes) <= _HASHED_BYTES:
            verify_manifest(model)
    except DamagedFolderError as damage:
        return f"{model} is damaged: {damage}"
    return None


def refuse_damaged_model(folder: Path) -> None:
    """Raise UserError where the model of a finished run is gone or damaged, with what to do."""
    damage = describe_model_damage(folder)
    if damage is None:
        return
    newest = checkpoints.list_checkpoints(folder / "checkpoints")[-1:]
    advice = "".join(
        f"\nIts newest checkpoint is {path}: generate, chat, merge and push take it in the run's "
        "place."
        for _, path in newest
    )
    raise UserError(
        f"{folder} holds this run, finished, but {damage}.{advice}\n"
        "Put the model back, choose another output_dir=..., or overwrite=true to train it again."
    )


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
    return yaml.safe_dump(redact(resolved), sort_keys=False, allow_unicode=True)


def find_run(typed: str) -> Path:
    """Return the folder of a run from its path or from its name below `runs`.

    Raises UserError, with the nearest name, where there is no such run.
    """
    for folder in (Path(typed).expanduser(), RUNS / typed):
        if has_entry(folder / "run.json"):
            return folder
    runs = sorted(str(path.parent) for path in RUNS.glob("*/*/run.json"))
    same_name = [run for run in runs if Path(run).name == typed]
    near = nearest_option(str(RUNS / typed), runs) or (same_name[0] if same_name else None)
    if near:
        hint = f" Did you mean {near}?"
    else:
        hint = (
            f" There are: {', '.join(runs[:8])}{' ...' if len(runs) > 8 else ''}."
            if runs
            else " `luthier runs FOLDER` lists the runs below a folder."
        )
    raise UserError(f"{typed}: there is no run (a folder with run.json).{hint}")


def _refuse_foreign_folder(folder: Path) -> None:
    """Raise UserError where `folder` is a file, or holds files that are no run."""
    if folder.is_symlink() and not folder.exists():
        target = folder.readlink()
        raise UserError(
            f"output_dir: {folder} is a link to {target}, which is not there. Make that folder, "
            "or choose another output_dir."
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file, not a folder. Choose another output_dir.")
    if not folder.is_dir() or is_run_folder(folder):
        return
    names = sorted(path.name for path in folder.iterdir() if path.name != lock.LOCK_FILE)
    if names:
        raise UserError(
            f"output_dir: {folder} holds files that are no run of luthier ({name_some(names)}). "
            "Choose an empty folder, so that nothing of yours is overwritten."
        )


def is_run_folder(folder: Path) -> bool:
    """Return whether luthier began a run in a folder, judged by what its files say.

    That is the marker; in a run of a version that wrote none, a record or a config with what was
    typed, in luthier's form. Files of these names that say something else make no run.
    """
    marker = _read_plain(folder / MARKER)
    if isinstance(marker, dict) and marker.get("kind") == "run":
        return True
    record = _read_plain(folder / "run.json")
    if isinstance(record, dict) and record.get("status") in _STATUSES:
        versions = record.get("versions")
        if isinstance(versions, dict) and "luthier" in versions:
            return True
    config, typed = _read_plain(folder / "config.yaml"), _read_plain(folder / "overrides.yaml")
    is_config = isinstance(config, dict) and config.keys() >= _CONFIG_KEYS
    return is_config and isinstance(typed, list) and all(isinstance(word, str) for word in typed)


def _read_plain(file: Path) -> Any:
    """Return the value of a JSON or YAML file; None where there is none that can be read."""
    if file.is_symlink() or not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8")
        return yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def _config_changes(folder: Path, resolved: dict[str, Any]) -> list[ConfigChange]:
    """Return what differs between the config in `folder` and this one; nothing if it has none."""
    path = folder / "config.yaml"
    if not path.is_file():
        return []
    variables = read_record(folder).get("environment") or {}
    changes = compare_configs(read_recorded_config(path), resolved)
    return changes + find_environment_changes(resolved, variables)


def _write_marker(folder: Path, config_keys: list[str]) -> None:
    """Write, before anything else, that this is a run and which files in it are luthier's.

    `config_keys` are those of its config.yaml: one that was cut lacks some.
    """
    marker = {
        "kind": "run", "luthier": __version__, "config_keys": config_keys,
        "written": asdict(WRITTEN_FILES),
    }  # fmt: skip
    write_json(folder / MARKER, marker)


def _read_written_files(folder: Path) -> WrittenFiles:
    """Return what the version that began a run writes, as its marker lists it, else this one."""
    marker = _read_plain(folder / MARKER)
    lists = marker.get("written") if isinstance(marker, dict) else None
    names = [entry.name for entry in fields(WrittenFiles)]
    if not isinstance(lists, dict) or lists.keys() != set(names):
        return WRITTEN_FILES
    values = {name: tuple(lists[name]) for name in names if isinstance(lists[name], list)}
    is_text = all(isinstance(pattern, str) for value in values.values() for pattern in value)
    return WrittenFiles(**values) if len(values) == len(names) and is_text else WRITTEN_FILES


def _set_earlier_run_aside(folder: Path) -> list[str]:
    """Move what an earlier run left into the folder `REPLACED`; return the files of others.

    Raises UserError, before anything is moved, where its checkpoints or its model lie behind a
    link: nothing outside of the folder is removed, and a new run must not go on from them.
    """
    stored = folder / "checkpoints"
    filled = (folder / "model", *stored.glob("checkpoint-*"))
    linked = [path for path in filled if path.is_symlink() and path.is_dir()]
    linked = [path for path in linked if any(path.iterdir())]
    if stored.is_symlink() and checkpoints.list_checkpoints(stored):
        linked.append(stored)
    for path in linked:
        raise UserError(
            f"output_dir: {path} is a link to {path.resolve()}, and what is there belongs to the "
            "run that would be replaced. Nothing behind a link is removed.\nEmpty that folder "
            "yourself, remove the link, or choose another output_dir=..."
        )
    try:
        move_written(folder, _read_written_files(folder), folder / REPLACED)
        last = checkpoints.find_newest_checkpoint(stored).path
        if last is not None:
            raise UserError(
                f"output_dir: {last} is not among what luthier wrote here, and a new run would go "
                "on from it. Remove it, or choose another output_dir=..."
            )
        if (folder / REPLACED).is_dir():
            (folder / REPLACED / _COMPLETE).touch()
    except BaseException:
        _restore_replaced_run(folder)
        raise
    names = list_remaining_files(folder, (lock.LOCK_FILE, MARKER))
    return [name for name in names if not name.startswith(f"{REPLACED}/")]


def _settle_replaced_run(folder: Path) -> None:
    """Put a replaced run back, or remove it, where the process that replaced it was killed."""
    is_complete = (folder / REPLACED / _COMPLETE).exists()
    if is_complete and (folder / checkpoints.START_FILE).exists():
        discard_replaced_run(folder)
    elif is_complete:
        _remove_failed_start(folder)
    else:
        _restore_replaced_run(folder)


def _restore_replaced_run(folder: Path) -> None:
    """Put a run back that was set aside, all of it or what a killed process got to."""
    if (folder / REPLACED).is_dir() and not (folder / REPLACED).is_symlink():
        (folder / REPLACED / _COMPLETE).unlink(missing_ok=True)
        move_back(folder / REPLACED, folder)


def _remove_failed_start(folder: Path) -> None:
    """Remove what a run wrote that ended before its first step, and restore the one before it."""
    remove_written(folder, WRITTEN_FILES)
    _restore_replaced_run(folder)
    # Files of others stay, and so does what makes it a run.
    if not list_remaining_files(folder, (lock.LOCK_FILE, MARKER)):
        (folder / MARKER).unlink(missing_ok=True)


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
