"""The order of a run: everything that can fail cheaply first, then the model, then the training."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import data, model
from luthier.config.schema import ModelConfig, RunConfig
from luthier.data.batching.settings import batching_of
from luthier.environment import set_environment
from luthier.record import run_dir
from luthier.record.record import RunRecord
from luthier.storage import lock
from luthier.train import launch_checks, trackers
from luthier.train.signals import SIGNALS, STOPPED_EXIT_CODE, StoppedBySignal, write_exit_code

if TYPE_CHECKING:
    from luthier.config import Loaded
    from luthier.train.session import AfterSave


def run(loaded: "Loaded", after_save: "AfterSave | None" = None) -> int:
    """Train what the config says; return the exit code. Raises UserError for a user's mistake.

    `after_save` is called with the folder of a finished run once its record is closed, to write
    what describes the result; it returns why it could not, or None.

    The code is `signals.STOPPED_EXIT_CODE` where a signal ended the run and the same
    command continues it.
    """
    set_environment(loaded.config)
    with SIGNALS.heard():
        try:
            code = _run(loaded, Path(loaded.config.output_dir), after_save)
        except StoppedBySignal as stopped:
            print(f"\nstopped by {stopped}; the same command begins again", file=sys.stderr)
            code = STOPPED_EXIT_CODE
    write_exit_code(code)
    return code


def _run(loaded: "Loaded", folder: Path, after_save: "AfterSave | None") -> int:
    config = loaded.config
    check_before_torch(config)
    with _held(folder, config.dry_run):
        if claim(loaded, folder) == "finished":
            from luthier.train import console

            console.print_line(
                f"{folder} holds this run, finished; overwrite=true trains it again.\n"
            )
            console.print_results(RunRecord(folder).entries, folder)
            return 0
        from luthier.train.build import build_and_fit

        return build_and_fit(loaded, folder, after_save)


def _held(folder: Path, dry_run: bool) -> AbstractContextManager[None]:
    """The run's directory to itself, on the first rank; a dry run writes nothing there."""
    if dry_run or _rank() > 0:
        return nullcontext()
    run_dir.refuse_foreign(folder)
    return lock.holding(folder)


def check_before_torch(config: RunConfig) -> None:
    """Everything that can be known to be wrong without a heavy import."""
    data.check_sources(config.dataset, config.trainer.method)
    model.check_model_path(config.model)
    if config.trainer.teacher is not None:
        model.check_model_path(ModelConfig(path=config.trainer.teacher), "trainer.teacher")
    trackers.check_trackers_installed(config)
    batching_of(config)
    launch_checks.check_launch_request()


def claim(loaded: "Loaded", folder: Path) -> run_dir.RunState:
    """Take the run's directory, on the first rank; the others only ask whether all is done."""
    config = loaded.config
    if _rank() > 0:
        is_done = not config.overwrite and run_dir.is_finished(folder)
        longer = is_done and any(
            c.kind == "length" for c in run_dir.changed(folder, loaded.resolved)
        )
        return "finished" if is_done and not longer else "unfinished"
    state = run_dir.claim(folder, loaded.resolved, config.overwrite)
    if config.dry_run:
        return state
    if state == "new":
        run_dir.clear(folder)
    else:
        run_dir.sweep(folder)
        _say_changes(folder, loaded.resolved)
    if state != "finished":
        run_dir.prepare(folder, loaded.resolved, loaded.overrides)
    return state


def _say_changes(folder: Path, resolved: dict[str, Any]) -> None:
    """Say with which other settings the run goes on."""
    if not run_dir.changed(folder, resolved):
        return
    from luthier.train.resume import describe_config_changes

    for sentence in describe_config_changes(folder, resolved):
        print(sentence)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
