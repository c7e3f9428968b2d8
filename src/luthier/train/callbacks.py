"""What a run does between the steps: stop on a signal, show and write its metrics."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import SaveStrategy

from luthier.train.signals import agree_on_signal


class StopCallback(TrainerCallback):
    """Ends the training behind the step in which a signal came, with a checkpoint.

    Where `save_strategy` is `best`, an evaluation decides whether there is a checkpoint, and would
    take back what is decided here; the run then stops behind the next step that is not evaluated.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Agree with the other processes whether to stop here."""
        if args.save_strategy == SaveStrategy.BEST and control.should_evaluate:
            return
        self._stop_on_signal(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Agree behind an evaluation, too, which may take as long as many steps."""
        if self._trainer.is_in_train and args.save_strategy != SaveStrategy.BEST:
            self._stop_on_signal(control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What comes next is again as the settings say."""
        self._trainer.is_scheduled_save = True

    def _stop_on_signal(self, control: Any) -> None:
        """Agree with the other processes on a signal, and end the training where there is one."""
        # Asked again, it would take the checkpoint of the signal for one of the schedule.
        if self._trainer.stop_signal:
            return
        self._trainer.stop_signal = agree_on_signal(self._trainer.accelerator)
        if self._trainer.stop_signal:
            self._trainer.is_scheduled_save = control.should_save
            control.should_save = control.should_training_stop = True


class RestoreCountersCallback(TrainerCallback):
    """Counts on from the checkpoint that a training resumes."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load what was counted since the last line of metrics."""
        self._trainer.restore_counters()


# The values of a log that a person sees, in this order; metrics.jsonl has all of them.
PROGRESS_FORMATS = {
    "reward": "reward {:.4f}",
    "eval_reward": "held-out reward {:.4f}",
    "tools/call_frequency": "calls {:.2f}",
    "loss": "loss {:.4f}",
    "eval_loss": "eval_loss {:.4f}",
    "mean_token_accuracy": "accuracy {:.3f}",
    "eval_mean_token_accuracy": "held-out accuracy {:.3f}",
    "eval_accuracy": "held-out accuracy {:.3f}",
    "eval_macro_f1": "macro F1 {:.3f}",
    "eval_entity_f1": "entity F1 {:.3f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad {:.2f}",
}


class ProgressLineCallback(ProgressCallback):
    """transformers' progress bars, with each log as one line that a person can read."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the line above the bar."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        formats = PROGRESS_FORMATS.items()
        texts = [text.format(logs[name]) for name, text in formats if name in logs]
        if texts:
            self.training_bar.write(f"step {state.global_step:>5}  " + "  ".join(texts))


class MetricsFileCallback(TrainerCallback):
    """Appends every logged row to `metrics.jsonl`, on the first rank, as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append the row with its step and epoch."""
        if state.is_world_process_zero and logs:
            row = {"step": state.global_step, "epoch": state.epoch, **logs}
            # Opened for each row, so that what was logged is in the file if the process is killed.
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
