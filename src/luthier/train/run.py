"""The order of a run: everything that can fail cheaply first, then the model, then the training.

Imports stand where they are needed: those that read files of data, models and runs take as long as
all that is needed to answer a mistake in a setting.
"""

import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.chat import ChatError
from luthier.chat.template_file import read_template
from luthier.config.code_settings import describe_code
from luthier.config.recipes import check_recipe_files
from luthier.config.schema import ModelConfig, RunConfig
from luthier.environment import set_environment
from luthier.errors import UserError
from luthier.model.device import check_requirements
from luthier.storage.write_errors import explain_write_errors
from luthier.train.signals import SIGNALS, STOPPED_EXIT_CODE, StoppedBySignal, write_exit_code

if TYPE_CHECKING:
    from luthier.config import LoadedConfig
    from luthier.data import DatasetSources
    from luthier.record.run_dir import RunDir
    from luthier.train.loop import AfterSave


def run(loaded: "LoadedConfig", after_save: "AfterSave | None" = None) -> int:
    """Train what the config says; return the exit code. Raises UserError for a user's mistake.

    `after_save` is called with the folder of a finished run once its record is closed, to write
    what describes the result; it returns why it could not, or None.

    The code is `signals.STOPPED_EXIT_CODE` where a signal ended the run and the same command
    continues it.
    """
    began = time.monotonic() if loaded.began is None else loaded.began
    # First, because libraries read some variables when they are imported.
    set_environment(loaded.config)
    folder = Path(loaded.config.output_dir)
    _print_on_first_rank(_describe_start(loaded.config, folder))
    with SIGNALS.listening(), explain_write_errors(folder, "output_dir"):
        try:
            code = _check_and_train(loaded, folder, after_save, began)
        except StoppedBySignal as stopped:
            print(f"\n{_describe_early_stop(stopped, folder)}", file=sys.stderr)
            code = STOPPED_EXIT_CODE
        except Exception as error:
            write_exit_code(error.exit_code if isinstance(error, UserError) else 1)
            raise
    write_exit_code(code)
    return code


def _describe_early_stop(stopped: StoppedBySignal, folder: Path) -> str:
    """Return what to do after a signal that came where no step was being taken."""
    from luthier.record.checkpoints import list_checkpoints

    newest = list_checkpoints(folder / "checkpoints")[-1:]
    if newest:
        _, path = newest[0]
        return f"Stopped by {stopped}. Run the same command to resume from {path}."
    return f"Stopped by {stopped} before the first step: nothing was saved."


def check_before_torch(config: RunConfig) -> "DatasetSources":
    """Raise UserError for everything that can be known to be wrong without a heavy import.

    Returns the sources of the dataset, of which local files have been opened.
    """
    # First what needs no file of a dataset or model, nor the imports that read them.
    check_requirements(config.model, config.trainer.args)
    _check_template(config, read_template)
    check_recipe_files(config)
    # A folder of weights names their layers sooner than rows are read, unlike the hub or GGUF.
    # pathlib (3.11) raises an error for a name that is too long.
    is_model_here = os.path.isdir(config.model.path)  # noqa: PTH112
    if is_model_here:
        _check_model_files(config)
    from luthier import data

    sources = data.check_sources(config.dataset, config.trainer.method)
    if not is_model_here:
        _check_model_files(config)
    from luthier.chat.template import check_template_syntax
    from luthier.data.batching.settings import read_batching_settings
    from luthier.model.source import check_model_path
    from luthier.train import reward_checks, trackers
    from luthier.train.launch.checks import check_launch_request
    from luthier.train.launch.fsdp import check_fsdp_launch

    _check_template(config, check_template_syntax)
    if config.trainer.teacher is not None:
        check_model_path(ModelConfig(path=config.trainer.teacher), "trainer.teacher")
    reward_checks.check_reward_sources(config.trainer.rewards)
    trackers.check_trackers_installed(config)
    read_batching_settings(config)
    # Last, as it is about the command and all before it is about the config.
    check_launch_request(config.trainer.args)
    check_fsdp_launch(config)
    return sources


def _check_model_files(config: RunConfig) -> None:
    """Raise UserError for a model that is not there, and settings that do not fit its files."""
    from luthier.model.adapter_targets import check_names_in_files
    from luthier.model.packing_support import check_packing_support
    from luthier.model.positions import check_max_length
    from luthier.model.source import check_model_path

    check_model_path(config.model)
    check_max_length(config)
    check_packing_support(config)
    check_names_in_files(config)


def _check_template(config: RunConfig, check: Callable[[str], object]) -> None:
    """Raise UserError, naming the setting, where a check of the chat template raises an error."""
    if config.chat.template is not None:
        try:
            check(config.chat.template)
        except ChatError as error:
            raise UserError(f"chat.template: {error}") from error


def _print_on_first_rank(text: str) -> None:
    """Print at once, and once, however many processes there are."""
    # From the environment, as torch is not imported yet.
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def _describe_start(config: RunConfig, folder: Path) -> str:
    """Return what runs, and into which folder."""
    name = config.recipe or f"{config.trainer.method} of {config.model.path}"
    return f"{name} -> {'nothing is written (dry run)' if config.dry_run else folder}"


def _check_and_train(
    loaded: "LoadedConfig", folder: Path, after_save: "AfterSave | None", began: float
) -> int:
    """Check the config, take the run's directory and train; return the exit code.

    `began` is when the command did, by `time.monotonic`.
    """
    code = describe_code(loaded.resolved)
    if code is not None:
        _print_on_first_rank(code)
    sources = check_before_torch(loaded.config)
    from luthier.record.checkpoints import list_checkpoints
    from luthier.record.config_diff import describe_config_changes
    from luthier.storage.output_folder import name_some
    from luthier.train.launch.checks import refuse_changed_launch

    with _open_run_dir(loaded, folder) as run_dir:
        # The others wait for the first process, which alone has the folder.
        if run_dir.state != "finished" and os.environ.get("RANK", "0") == "0":
            refuse_changed_launch(folder)
        if run_dir.state != "new" and os.environ.get("RANK", "0") == "0":
            _compare_code(loaded, folder, is_finished=run_dir.state == "finished")
        if not loaded.config.dry_run:
            changes, step = run_dir.changes, run_dir.extended_from
            for sentence in describe_config_changes(changes, loaded.resolved, step):
                print(sentence)
            if run_dir.foreign:
                print(
                    f"stays     in {folder}, not luthier's, and left: {name_some(run_dir.foreign)}"
                )
        # torch comes with these two, and each of them is needed in one of the cases only.
        if run_dir.state == "finished":
            from luthier.record.record import read_record
            from luthier.record.run_dir import refuse_damaged_model
            from luthier.train import console

            refuse_damaged_model(folder)

            if os.environ.get("RANK", "0") == "0":
                console.print_line("This run is finished already. overwrite=true trains it again.")
                console.print_results(read_record(folder), folder, loaded.config)
            return 0
        checkpoints = list_checkpoints(folder / "checkpoints")
        if run_dir.state == "unfinished" and checkpoints:
            _print_on_first_rank(f"resuming at step {checkpoints[-1][0]:,}")
        if "torch" not in sys.modules:
            _print_on_first_rank("loading   torch and transformers")
        from luthier.train.build import build_and_fit

        return build_and_fit(loaded, folder, sources, after_save, began)


def _compare_code(loaded: "LoadedConfig", folder: Path, is_finished: bool) -> None:
    """Say which functions and classes are others than those that a run began with.

    Raises UserError where the run cannot go on with them.
    """
    from luthier.record.checkpoints import list_checkpoints
    from luthier.record.config_diff import find_code_changes
    from luthier.record.record import read_record

    changes = find_code_changes(read_record(folder), loaded.resolved)
    if is_finished:
        for change in changes:
            print(f"{change}, since this run was trained")
        return
    refused = [change for change in changes if change.effect == "matters"]
    if refused and list_checkpoints(folder / "checkpoints"):
        lines = "\n".join(f"  {change}" for change in refused)
        raise UserError(
            f"{folder} holds a run that began with other code, so it cannot go on as the run that "
            f"it was:\n{lines}\nPut back what there was, choose another output_dir=..., or "
            "overwrite=true to begin anew."
        )
    for change in changes:
        if change not in refused:
            print(f"{change}, which changes nothing of the training by itself")


def _open_run_dir(loaded: "LoadedConfig", folder: Path) -> "AbstractContextManager[RunDir]":
    """Take the run's directory on the first rank; the others only look whether all is done.

    A dry run writes nothing, so it takes nothing either.
    """
    from luthier.record.run_dir import RunDir, inspect_run, is_run_finished, open_run

    config = loaded.config
    # From the environment, as torch is not imported yet.
    if int(os.environ.get("RANK", "0")) > 0:
        is_done = not config.overwrite and is_run_finished(folder, loaded.recorded)
        return nullcontext(RunDir(folder, "finished" if is_done else "unfinished"))
    if config.dry_run:
        return nullcontext(inspect_run(folder, loaded.recorded, config.overwrite))
    return open_run(folder, loaded.recorded, loaded.overrides, config.overwrite)
