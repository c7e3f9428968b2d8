"""Checkpoints of a trainer that are complete or absent, and what a full disk does to them.

`luthier.train.trainers.base.TrainerMixin` calls these functions where transformers' Trainer writes
a checkpoint; `luthier.record.checkpoints` knows the folders.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.errors import UserError
from luthier.model.device import preserve_random_state
from luthier.model.load import is_weights_damage
from luthier.model.model_files import list_indexed_files
from luthier.record import checkpoints
from luthier.storage.disk_space import free_bytes, is_disk_full
from luthier.storage.sizes import format_bytes, read_safetensors_header


@contextmanager
def report_full_disk(folder: Path, reason: str | None = None) -> Iterator[None]:
    """Turn the error of a full disk into a UserError, and remove the half-written checkpoint.

    `folder` holds the run's checkpoints. `reason` says in the message when the disk was full; None
    says how much of it is free.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_disk_full(error, folder):
            raise
        shutil.rmtree(folder / checkpoints.NEW_FOLDER, ignore_errors=True)
        reason = reason or f"{format_bytes(free_bytes(folder))} are free"
        raise UserError(_disk_full_message(folder, reason)) from error


@contextmanager
def report_unreadable_checkpoint(checkpoint: str | None) -> Iterator[None]:
    """Turn the error of a file of a sealed checkpoint that torch refuses into a UserError.

    The seal says that the file is as it was sealed, and not that luthier sealed it. torch reads
    with `weights_only`, so no pickle in it runs.
    """
    try:
        yield
    except Exception as error:
        if checkpoint is None or not is_weights_damage(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{checkpoint}: its optimizer or random state cannot be read: {reason}\nRemove this "
            "checkpoint and run the same command again: it resumes from the one before."
        ) from error


# Weights of a whole model. transformers 5.23 saves a model under the names that checkpoints of its
# kind have on the hub (`experts.0.gate_proj`, `language_model.model.layers`), and Trainer looks for
# the model's own names in them: it would go on with the base's weights, without a word.


def has_other_names(model: Any, folder: Path) -> bool:
    """Return whether the weight files of a whole model bear names that `model` does not have."""
    files = list_indexed_files(folder) or [folder / "model.safetensors"]
    if not all(file.is_file() for file in files):
        return False
    own_names = set(model.state_dict())
    return any(
        name not in own_names for file in files for name in read_safetensors_header(file).tensors
    )


def load_named_weights(model: Any, folder: Path) -> None:
    """Load a whole model's weights from its folder, under whichever names its files have them.

    Takes the memory of the model once more. Raises UserError where a weight is missing.
    """
    weights, missing = read_named_weights(type(model), model, folder)
    if missing is not None:
        raise UserError(
            f"{folder}: its weights are of another class than {type(model).__name__}: there is no "
            f"{missing}.\nAn older luthier may have loaded the model as its "
            "text part alone. Begin anew with overwrite=true, or choose another output_dir=..."
        )
    model.load_state_dict(weights)


def read_named_weights(
    model_class: Any, model: Any, folder: Path
) -> tuple[dict[str, Any], str | None]:
    """Return the weights of a folder under the names of `model`, and one that is not there.

    transformers turns the names of the files back as it loads a model of `model_class`. The weights
    have the format of the model's, and no random number is drawn.
    """
    with preserve_random_state():
        saved, loading = model_class.from_pretrained(
            folder,
            config=model.config,
            dtype=next(model.parameters()).dtype,
            local_files_only=True,
            output_loading_info=True,
        )
    return saved.state_dict(), min(loading["missing_keys"], default=None)


def check_disk_space(accelerator: Any, folder: Path) -> None:
    """Raise UserError in all processes where the first one sees no room for a checkpoint."""
    from accelerate.utils import broadcast_object_list

    lack = [checkpoints.describe_missing_space(folder) if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(lack)
    if lack[0] is not None:
        raise UserError(_disk_full_message(folder, f"the next checkpoint does not fit: {lack[0]}"))


def _disk_full_message(folder: Path, reason: str) -> str:
    """Say that the disk of a folder of checkpoints is full, and from where the run can go on."""
    last = checkpoints.find_newest_checkpoint(folder).path
    left = f"The last good one is {last}" if last else "There is no good one yet"
    return (
        f"The disk of {folder} is full ({reason}), so the run stops.\n"
        f"{left}. Free some space, or keep fewer checkpoints (trainer.args.save_total_limit, "
        "trainer.checkpoints.budget). Then run the same command to resume."
    )


def write_checkpoint(trainer: Any, folder: Path, write: Callable[[], None]) -> None:
    """Write a checkpoint into `folder`, so that it is complete or absent; all processes take part.

    `write` is Trainer's own way to write it, into the folder that `trainer.writing_folder` names
    meanwhile. Raises UserError where the disk is full; the last good checkpoint is then untouched.
    """
    check_disk_space(trainer.accelerator, folder)
    args, state, is_scheduled = trainer.args, trainer.state, trainer.is_scheduled_save
    best, save_only_model = state.best_model_checkpoint, args.save_only_model
    # A checkpoint for a signal is there to go on from, so it always has the optimizer's state.
    args.save_only_model = save_only_model and is_scheduled
    trainer.writing_folder = folder / checkpoints.NEW_FOLDER
    try:
        with report_full_disk(folder):
            write()
    finally:
        trainer.writing_folder, args.save_only_model = None, save_only_model
    # Trainer would name the best checkpoint by the folder in which it was written.
    state.best_model_checkpoint = best
    trainer.accelerator.wait_for_everyone()
    mark_best_checkpoint(state, folder, is_current_planned=is_scheduled)
    if args.should_save:
        with report_full_disk(folder):
            _publish(trainer, folder, is_resumable=not save_only_model or not is_scheduled)
    trainer.accelerator.wait_for_everyone()


def _publish(trainer: Any, folder: Path, is_resumable: bool) -> None:
    """Move a written checkpoint to its name, and remove those that are over the limits."""
    state, name = trainer.state, f"checkpoint-{trainer.state.global_step}"
    written = folder / checkpoints.NEW_FOLDER / name
    # A pickle of the trainer's arguments, secrets among them, that nothing reads: transformers 5.23
    # writes it, and the config of the run says the same.
    (written / "training_args.bin").unlink(missing_ok=True)
    state.save_to_json(str(written / "trainer_state.json"))
    facts = {
        "step": state.global_step,
        "planned": trainer.is_scheduled_save,
        "resumable": is_resumable,
        "processes": trainer.args.world_size,
    }
    checkpoints.publish_checkpoint(written, folder / name, facts)
    best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
    limits = trainer.checkpoint_limits
    for sentence in checkpoints.prune_checkpoints(folder, state.global_step, best, limits):
        trainer.report_over_budget(sentence)


def mark_best_checkpoint(state: Any, folder: Path, is_current_planned: bool = False) -> None:
    """Let a TrainerState name the best checkpoint where it lies now: the folder may have moved.

    A checkpoint that was taken for a signal is none of those that the settings ask for, and is not
    named. `is_current_planned` says that the settings ask for the one of the current step, which
    is not on disk yet.
    """
    step = state.best_global_step
    path = folder / f"checkpoint-{step}"
    is_current = is_current_planned and step == state.global_step
    if step and (is_current or checkpoints.is_planned(path)):
        state.best_model_checkpoint = str(path)


def stateful_callbacks(trainer: Any) -> list[Any]:
    """The callbacks of a trainer that have a state of their own, such as early stopping."""
    from transformers.trainer_callback import ExportableState

    callbacks = trainer.callback_handler.callbacks
    return [callback for callback in callbacks if isinstance(callback, ExportableState)]


def has_stopped_early(callback: Any) -> bool:
    """Whether a callback is early stopping that had ended the training at the checkpoint."""
    from transformers import EarlyStoppingCallback

    return (
        isinstance(callback, EarlyStoppingCallback)
        and callback.early_stopping_patience_counter >= callback.early_stopping_patience
    )
