"""What a run does between the steps: stop on a signal, show and write its metrics."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, has_length

from luthier.record.machine_info import peak_memory_gib
from luthier.terminal import ProgressReport, format_duration, format_number, pluralize
from luthier.train.console import print_line
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


class LastLogCallback(TrainerCallback):
    """Logs the last step, however many steps lie between two lines of the log."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a log of the last step, unless nothing is to be logged."""
        if state.global_step >= state.max_steps and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True


STEP_MEASURES: Mapping[str, Callable[[float], str]] = {
    "reward": lambda reward: f"reward {format_number(reward)}",
    "tools/call_frequency": lambda calls: f"calls {calls:.2f}",
    "loss": lambda loss: f"loss {format_number(loss)}",
    # A warm-up that begins at zero does take its first step with a rate of 0.
    "learning_rate": lambda rate: f"lr {rate:.1e}" if rate else "lr 0",
    "tokens_per_second": lambda speed: f"{speed:,.0f} tokens/s",
}
"""What a line shows of the log of some steps, in this order; metrics.jsonl has all of it."""
EVAL_MEASURES = ("loss", "reward", "mean_token_accuracy")
"""What a line shows of an evaluation, besides the measures of the method and of the replies."""


class ProgressLineCallback(ProgressCallback):
    """A line for each log, and on a terminal transformers' progress bars below them.

    transformers 5.23 prints logs as raw dicts, and where a run is resumed its bar takes all earlier
    steps for steps of the first second.
    """

    def __init__(
        self,
        rows_per_step: str = "",
        eval_measures: Iterable[str] = (),
        shows_bars: bool = False,
    ) -> None:
        """`rows_per_step` is such as `8 rows`; `eval_measures` join `EVAL_MEASURES`."""
        super().__init__()
        self._rows_per_step = rows_per_step
        self._eval_endings = tuple(f"_{name}" for name in (*EVAL_MEASURES, *eval_measures))
        self._shows_bars = shows_bars
        self._start: tuple[float, int] | None = None
        """The time and the number of steps when the first step of this session began."""
        self._report: ProgressReport | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the first step: with sharded weights the start is measured before it."""
        self._start = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the bar and the clock with the first step, from the step that a run resumes."""
        if self._start is not None:
            return
        self._start = time.monotonic(), state.global_step
        self.current_step = state.global_step
        if state.is_world_process_zero:
            steps = pluralize(state.max_steps - state.global_step, "step")
            print_line(f"training  {steps} of {self._rows_per_step}")
        if self._shows_bars and state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                leave=False,
                dynamic_ncols=True,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar; after the first step print what is known of all of them by then."""
        is_first = self._start is not None and state.global_step == self._start[1] + 1
        if is_first and state.is_world_process_zero:
            # A line of the log says it below.
            times = [] if control.should_log else self._format_time_left(state)
            left = "".join(f"about {text}, " for text in times)
            peak = ", ".join(f"{gib} GiB of {where}" for where, gib in peak_memory_gib().items())
            self._write(f"{_format_step(state)}  {left}{peak} memory at the peak so far")
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Report how far an evaluation is."""
        if self._report is None:
            total = len(eval_dataloader) if has_length(eval_dataloader) else None
            is_silent = not state.is_world_process_zero
            self._report = ProgressReport(total, "evaluation", "batches", is_silent)
        self._report.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the report of the evaluation."""
        if self._report is not None:
            self._report.close()
        self._report = None

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the report of the prediction."""
        self.on_evaluate(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the line, above the bar where there is one."""
        if not state.is_world_process_zero or not logs:
            return
        measures = self._format_measures(logs)
        # What is measured before the first step or after the last one is in the table of results.
        if not measures or self._start is None:
            return
        if "loss" in logs:
            measures += self._format_time_left(state)
        self._write("  ".join([_format_step(state), *measures]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the bar."""
        self._start = None
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def _write(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print_line(line)

    def _format_measures(self, logs: Mapping[str, Any]) -> list[str]:
        texts = [describe(logs[name]) for name, describe in STEP_MEASURES.items() if name in logs]
        # `eval_code_loss` is the loss of the evaluation set `code`.
        return texts + [
            f"{name} {format_number(value)}"
            for name, value in logs.items()
            if name.startswith("eval_") and name.endswith(self._eval_endings)
        ]

    def _format_time_left(self, state: Any) -> list[str]:
        """Return how long the steps that are left take at the pace of this session."""
        assert self._start is not None
        began, first_step = self._start
        # The bar has it, and counts on between two lines.
        if self.training_bar is not None:
            return []
        steps = state.global_step - first_step
        left = state.max_steps - state.global_step
        if not steps or not left:
            return []
        return [f"{format_duration((time.monotonic() - began) / steps * left)} left"]


def _format_step(state: Any) -> str:
    """Return which step it is of how many, as wide for the first as for the last."""
    total = f"{state.max_steps:,}"
    return f"step {state.global_step:>{len(total)},}/{total}"


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
