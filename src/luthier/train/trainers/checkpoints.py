"""A trainer whose checkpoints are whole, and that goes on from one as if it had never stopped."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import UserError
from luthier.record import checkpoints
from luthier.record.checkpoints import CheckpointLimits
from luthier.storage.atomic import read_json, write_json
from luthier.storage.disk_space import free_bytes, is_disk_full
from luthier.storage.sizes import format_bytes


@contextmanager
def report_full_disk(folder: Path, why: str | None = None) -> Iterator[None]:
    """Turn the error of a full disk into a UserError, and remove what was half written.

    `folder` holds the run's checkpoints. `why` says in the message when the disk was full; None
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
        why = why or f"{format_bytes(free_bytes(folder))} are free"
        raise UserError(_disk_full_message(folder, why)) from error


def refuse_full_disk(accelerator: Any, missing: Callable[[], str | None], folder: Path) -> None:
    """Raise UserError in all processes where the first one sees that there is no room."""
    from accelerate.utils import broadcast_object_list

    why = [missing() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(why)
    if why[0] is not None:
        raise UserError(_disk_full_message(folder, f"the next checkpoint does not fit: {why[0]}"))


def _disk_full_message(folder: Path, why: str) -> str:
    """Say that the disk is full, and from where the run can go on."""
    last = checkpoints.find_newest_checkpoint(folder).path
    left = f"The last good one is {last}" if last else "There is no good one yet"
    return (
        f"The disk of {folder} is full ({why}), so the run stops.\n"
        f"{left}. Free some space, or keep fewer checkpoints (trainer.args.save_total_limit, "
        "trainer.checkpoints.budget), and the same command goes on."
    )


if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object

COUNTERS_FILE = "counted_{rank}.json"
"""What a process has counted since the last line of metrics, in a checkpoint."""


class CheckpointMixin(Base):
    """Stands before a trainer of transformers or TRL."""

    checkpoint_limits = CheckpointLimits()
    """How many checkpoints are kept."""
    is_scheduled_save = True
    """Whether the checkpoint that is being written is one that the settings ask for."""
    stop_signal = 0
    """The signal for which the training ended; 0 if it came to its own end."""
    log_files: tuple[Path, ...] = ()
    """Files to which lines are added during the training."""
    _has_said = False
    _writing: Path | None = None
    _resumed: Path | None = None

    def counter_state(self) -> dict[str, Any]:
        """What this process has counted since the last line of metrics, for JSON."""
        return {
            "loss": self._tr_loss.item(),
            "losses": self._total_loss_scalar,
            "logged": self._globalstep_last_logged,
            "callbacks": {type(c).__name__: c.state()["attributes"] for c in _stateful(self)},
        }

    def load_counter_state(self, counted: dict[str, Any]) -> None:
        """Go on counting from there."""
        self._tr_loss += counted["loss"]
        self._total_loss_scalar = counted["losses"]
        self._globalstep_last_logged = counted["logged"]
        for callback in _stateful(self):
            vars(callback).update(counted["callbacks"].get(type(callback).__name__, {}))

    def restore_counters(self) -> None:
        """Take up what the checkpoint has that the training goes on from; call it as it begins."""
        if self._resumed is None:
            return
        file = self._resumed / COUNTERS_FILE.format(rank=self.args.process_index)
        counted = read_json(file)
        self.load_counter_state(counted)
        # The checkpoint has the intervals of its time, by which Trainer would go on.
        self.state.compute_steps(self.args, self.state.max_steps)
        self._point_to_best(self._resumed.parent)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint if one is given."""
        self._resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, unless the checkpoint was taken behind the last step.

        Trainer would take one more, as it looks at the number of steps behind each only.
        """
        if self.state.global_step >= self.state.max_steps or any(map(_is_over, _stateful(self))):
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; the mean loss at the end is that of all steps, also before the run went on."""
        if "train_loss" in logs and self.stop_signal:
            return
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._writing is None else str(self._writing)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save as Trainer does, without its pickle of the arguments, which nothing reads."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save what this process has counted beside its random state."""
        super()._save_rng_state(output_dir)
        lines = {path.name: _lines(path) for path in self.log_files}
        counted = self.counter_state() | {"lines": lines}
        write_json(Path(output_dir) / COUNTERS_FILE.format(rank=self.args.process_index), counted)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, whole or not at all; all processes take part.

        Raises UserError where the disk is full; the last good one is then untouched.
        """
        folder, name = Path(super()._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        refuse_full_disk(
            self.accelerator, lambda: checkpoints.describe_missing_space(folder), folder
        )
        best, resumable = self.state.best_model_checkpoint, not self.args.save_only_model
        self.args.save_only_model = not resumable and self.is_scheduled_save
        self._writing = folder / checkpoints.NEW_FOLDER
        try:
            with report_full_disk(folder):
                super()._save_checkpoint(model, trial)
        finally:
            self._writing, self.args.save_only_model = None, not resumable
        self.state.best_model_checkpoint = best
        self.accelerator.wait_for_everyone()
        self._point_to_best(folder, self.is_scheduled_save)
        if self.args.should_save:
            made = {
                "step": self.state.global_step,
                "planned": self.is_scheduled_save,
                "resumable": resumable or not self.is_scheduled_save,
                "processes": self.args.world_size,
            }
            with report_full_disk(folder):
                self._publish(folder, name, made)
        self.accelerator.wait_for_everyone()

    def _publish(self, folder: Path, name: str, made: dict[str, Any]) -> None:
        written = folder / checkpoints.NEW_FOLDER / name
        self.state.save_to_json(str(written / "trainer_state.json"))
        checkpoints.publish_checkpoint(written, folder / name, made)
        best = self.state.best_model_checkpoint
        kept = Path(best) if best else None
        for sentence in checkpoints.prune_checkpoints(
            folder, self.state.global_step, kept, self.checkpoint_limits
        ):
            self.too_large(sentence)

    def too_large(self, sentence: str) -> None:
        """Say, once, that what has to be kept is more than the budget."""
        if not self._has_said:
            from luthier.train import console

            console.print_line(sentence)
            self._has_said = True

    def _point_to_best(self, folder: Path, this_one: bool = False) -> None:
        """Name the best checkpoint where it lies now: the folder may have been moved.

        One that was taken for a signal is none of those that the settings ask for.
        """
        step = self.state.best_global_step
        path = folder / f"checkpoint-{step}"
        if step and ((this_one and step == self.state.global_step) or checkpoints.is_planned(path)):
            self.state.best_model_checkpoint = str(path)


def _stateful(trainer: Any) -> list[Any]:
    """The callbacks that have a state of their own, such as early stopping."""
    from transformers.trainer_callback import ExportableState

    return [c for c in trainer.callback_handler.callbacks if isinstance(c, ExportableState)]


def _is_over(callback: Any) -> bool:
    """Whether early stopping had ended the training when the checkpoint was taken."""
    from transformers import EarlyStoppingCallback

    return (
        isinstance(callback, EarlyStoppingCallback)
        and callback.early_stopping_patience_counter >= callback.early_stopping_patience
    )


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
