"""What a person sees while a run trains: one bar, one line a log; and the same rows as JSON."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

SHOWN = {
    "reward": "reward {:.4f}",
    "eval_reward": "held-out reward {:.4f}",
    "loss": "loss {:.4f}",
    "eval_loss": "held-out loss {:.4f}",
    "mean_token_accuracy": "accuracy {:.3f}",
    "eval_mean_token_accuracy": "held-out accuracy {:.3f}",
    "eval_accuracy": "held-out accuracy {:.3f}",
    "eval_macro_f1": "macro F1 {:.3f}",
    "eval_entity_f1": "entity F1 {:.3f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad {:.2f}",
}


class Progress(ProgressCallback):
    """transformers' progress bars, with each log as one line that a person can read."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the line above the bar."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        parts = [form.format(logs[name]) for name, form in SHOWN.items() if name in logs]
        if parts:
            self.training_bar.write(f"step {state.global_step:>5}  " + "  ".join(parts))


class MetricsFile(TrainerCallback):
    """Appends every logged row to `metrics.jsonl`, on the first rank, as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append the row with its step and epoch."""
        if state.is_world_process_zero and logs:
            row = {"step": state.global_step, "epoch": state.epoch, **logs}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
