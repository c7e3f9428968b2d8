"""Signals stop a run behind the step in which they come; the same command ends it exactly."""

import json
import os
import signal
import time

import pytest

from helpers.train_command import (
    LORA,
    ONE,
    PACKED,
    TWO,
    WAY,
    end,
    metrics,
    record,
    said,
    start,
    until,
    weights,
    words,
)

pytestmark = pytest.mark.train

STEP = "luthier.train.methods.sft:TokenTrainer.training_step"
WAYS = {
    "packed rows, full weights": PACKED,
    "rows of like length, over epochs": ("trainer.args.train_sampling_strategy=group_by_length",
                                         "trainer.args.per_device_train_batch_size=8", *LORA),
}  # fmt: skip


def check_stopped(run, step, name):
    """The state of a run behind a signal: one checkpoint more, and a record that says so."""
    now = record(run)
    assert now["status"] == "stopped"
    assert now["sessions"][-1]["signal"] == name
    assert now["sessions"][-1]["to_step"] == step
    assert (run / "checkpoints" / f"checkpoint-{step}" / "manifest.json").is_file()
    assert not (run / "model").exists()
    assert not any("train_loss" in row for row in metrics(run))


def test_a_stopped_run_goes_on_exactly_where_no_checkpoints_are_asked_for(forks, tiny, whole):
    line, run = [*words(tiny, save_strategy="no"), *WAY, "output_dir=stopped"], tiny / "stopped"
    # In the middle of accumulation, and in a step that writes no line of metrics.
    assert forks.run(tiny, *line, signals=[(STEP, 9, signal.SIGTERM)]) == 75
    check_stopped(run, 5, "SIGTERM")
    assert "Run the same command to resume." in said(tiny)
    # A second time, in the last step: its weights are measured by the next start.
    assert forks.run(tiny, *line, signals=[(STEP, 6, signal.SIGINT)]) == 75
    check_stopped(run, 8, "SIGINT")
    assert forks.run(tiny, *line) == 0
    assert weights(run) == weights(whole)
    assert metrics(run) == metrics(whole)


@pytest.mark.parametrize("way", WAYS)
def test_every_order_of_rows_goes_on_exactly(forks, tiny, way):
    line = [*words(tiny, save_strategy="no"), *WAYS[way]]
    names = [f"{way.split()[0]}-{part}" for part in ("whole", "stopped")]
    assert forks.run(tiny, *line, f"output_dir={names[0]}") == 0, said(tiny)[-2000:]
    usr1 = [(STEP, 7, signal.SIGUSR1)]
    assert forks.run(tiny, *line, f"output_dir={names[1]}", signals=usr1) == 75
    assert forks.run(tiny, *line, f"output_dir={names[1]}") == 0
    assert weights(tiny / names[0]) == weights(tiny / names[1])
    assert metrics(tiny / names[0]) == metrics(tiny / names[1])


def test_a_signal_to_one_of_two_ranks_stops_both_at_one_step(forks, tiny):
    line = [*words(tiny, save_strategy="no", max_steps=4), *LORA]

    def launched(port, name, signals=None):
        pids = forks.together(tiny, port, *line, f"output_dir={name}", signals=signals)
        return [forks.wait(pid) for pid in pids]

    assert launched(29731, "two") == [0, 0], said(tiny)[-3000:]
    assert launched(29732, "one-rank", {1: [(STEP, 2, signal.SIGTERM)]}) == [75, 75]
    check_stopped(tiny / "one-rank", 2, "SIGTERM")
    assert launched(29733, "one-rank") == [0, 0]
    assert weights(tiny / "two") == weights(tiny / "one-rank")
    assert metrics(tiny / "two") == metrics(tiny / "one-rank")


@pytest.mark.parametrize("launcher", [TWO, ONE], ids=["of two processes", "of one process"])
def test_a_launcher_that_is_asked_to_stop_leaves_a_checkpoint_and_no_process(
    tiny, tmp_path, launcher
):
    """accelerate ends with 1, whatever its processes say: the file says 75.

    Of one process it is not even the parent that passes the signal on: it is gone at once.
    """
    line = [*words(tiny, max_steps=2000, eval_strategy="no", save_strategy="no", logging_steps=1),
            "dataset.eval.count=null", f"output_dir={tmp_path / 'run'}"]  # fmt: skip
    code = tmp_path / "code"
    process = start(tmp_path, *line, launcher=launcher, LUTHIER_EXIT_FILE=str(code))
    try:
        until(lambda: (tmp_path / "run" / "metrics.jsonl").is_file(), patience=120)
        os.kill(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
        until(code.is_file)
    finally:
        end(process)
    assert code.read_text() == "75\n"
    step = record(tmp_path / "run")["sessions"][-1]["to_step"]
    check_stopped(tmp_path / "run", step, "SIGTERM")


def test_a_run_that_waits_for_its_first_step_ends_at_once(forks, tiny):
    """Nothing is lost before it: the evaluation before training is not waited for."""
    signals = [("luthier.train.methods.sft:TokenTrainer.prediction_step", 1, signal.SIGTERM)]
    began = time.monotonic()
    assert forks.run(tiny, *words(tiny), "output_dir=early", signals=signals) == 75
    assert time.monotonic() - began < 60
    assert not (tiny / "early").exists()


def test_two_runs_at_once_in_one_directory(forks, tiny):
    line = [*words(tiny, max_steps=4000, eval_strategy="no", save_strategy="no"), "output_dir=both"]
    first = forks.start(tiny, *line)
    try:
        until(lambda: (tiny / "both" / "run.json").is_file())
        assert forks.run(tiny, *line) == 2
        assert f"both is in use by another run (process {first} on" in said(tiny)
    finally:
        os.kill(first, signal.SIGKILL)
        forks.wait(first)
    # The lock died with its holder.
    assert forks.run(tiny, *line, "trainer.args.max_steps=1", "dry_run=true") == 0
    assert json.loads((tiny / "both" / "run.json").read_text())["status"] == "running"
    assert forks.run(tiny, *words(tiny, max_steps=1), "overwrite=true", "output_dir=both") == 0
