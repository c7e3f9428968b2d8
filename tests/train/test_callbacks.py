"""The lines of a run's steps: what they show, and what a resumed run counts."""

from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from luthier.train import callbacks
from luthier.train.callbacks import LastLogCallback, ProgressLineCallback


class Steps:
    """The events of a training, as transformers calls them."""

    def __init__(self, callback, max_steps=60, first_step=0, rank=0):
        self.callback = callback
        self.state = SimpleNamespace(
            global_step=first_step, max_steps=max_steps, is_world_process_zero=rank == 0
        )
        self.control = TrainerControl()
        self.send("on_train_begin")

    def send(self, event, **kwargs):
        getattr(self.callback, event)(None, self.state, self.control, **kwargs)

    def step(self, **logs):
        self.send("on_step_begin")
        self.state.global_step += 1
        self.control.should_log = bool(logs)
        self.send("on_step_end")
        if logs:
            self.send("on_log", logs=logs)


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand, on a machine whose memory does not change."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(callbacks, "peak_memory_gib", lambda: {"host": 3.55})
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now.seconds)
    return now


def test_steps_of_a_run_are_lines_with_the_time_that_is_left(clock, capsys):
    steps = Steps(ProgressLineCallback("8 rows", ["exact_match"]))
    clock.seconds = 10.0
    steps.send("on_step_begin")
    clock.seconds = 22.0
    steps.step()
    for _ in range(3):
        steps.step()
    clock.seconds = 70.0
    steps.step(
        loss=1.23456, grad_norm=2.0, learning_rate=2e-4, tokens_per_second=1234.4, num_tokens=9
    )
    steps.send("on_log", logs={"eval_loss": 0.5, "eval_exact_match": 0.25, "eval_runtime": 3.0})
    steps.send("on_log", logs={"train_loss": 0.7, "train_runtime": 60.0})
    assert capsys.readouterr().out.splitlines() == [
        "training  60 steps of 8 rows",
        "step  1/60  about 12 min left, 3.55 GiB of host memory at the peak so far",
        "step  5/60  loss 1.2346  lr 2.0e-04  1,234 tokens/s  11 min left",
        "step  5/60  eval_loss 0.5000  eval_exact_match 0.2500",
    ]


def test_a_resumed_run_counts_the_time_of_its_own_steps(clock, capsys):
    steps = Steps(ProgressLineCallback("8 rows"), max_steps=400, first_step=34)
    steps.step(loss=0.5, learning_rate=0.0)
    clock.seconds = 20.0
    steps.step(loss=0.5, learning_rate=1e-5)
    assert capsys.readouterr().out.splitlines() == [
        "training  366 steps of 8 rows",
        "step  35/400  3.55 GiB of host memory at the peak so far",
        "step  35/400  loss 0.5000  lr 0  0 s left",
        "step  36/400  loss 0.5000  lr 1.0e-05  61 min left",
    ]


def test_the_other_processes_print_nothing(capsys):
    steps = Steps(ProgressLineCallback("8 rows"), rank=1)
    steps.step(loss=0.5)
    steps.send("on_prediction_step", eval_dataloader=[1, 2])
    steps.send("on_evaluate")
    assert capsys.readouterr() == ("", "")


def test_the_bar_of_a_resumed_run_begins_at_its_step(capsys):
    callback = ProgressLineCallback("8 rows", shows_bars=True)
    steps = Steps(callback, max_steps=400, first_step=34)
    steps.send("on_step_begin")
    assert (callback.training_bar.initial, callback.training_bar.n) == (34, 34)
    steps.step(loss=0.5)
    assert callback.training_bar.n == 35
    steps.send("on_train_end")
    assert "step  35/400  loss 0.5000\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "step, strategy, logs", [(59, "steps", False), (60, "steps", True), (60, "no", False)]
)
def test_the_last_step_is_logged_wherever_steps_are(step, strategy, logs):
    control = TrainerControl()
    args = SimpleNamespace(logging_strategy=callbacks.IntervalStrategy(strategy))
    state = SimpleNamespace(global_step=step, max_steps=60)
    LastLogCallback().on_step_end(args, state, control)
    assert control.should_log is logs
