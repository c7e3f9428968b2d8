"""Trackers: one run there for one run here, and none of them is needed."""

import json
import signal
import sqlite3

import pytest

from helpers.train_command import record, said, words

STEP = "luthier.train.methods.sft:TokenTrainer.training_step"


@pytest.mark.train
def test_a_run_that_goes_on_is_the_same_run_in_wandb(forks, tiny):
    line = [*words(tiny), "tracker=wandb", "tracker.wandb.mode=offline", "output_dir=wandb",
            "tracker.to=[wandb,tensorboard]"]  # fmt: skip
    run = tiny / "wandb"
    secret = "f" * 40
    environment = {"WANDB_API_KEY": secret, "WANDB_SILENT": "true"}
    signals = [(STEP, 3, signal.SIGTERM)]
    assert forks.run(tiny, *line, signals=signals, **environment) == 75
    first = record(run)["trackers"]["wandb"]["id"]
    assert forks.run(tiny, *line, **environment) == 0, said(tiny)[-2000:]
    assert record(run)["trackers"]["wandb"]["id"] == first
    files = list((run / "wandb").glob(f"offline-run-*/run-{first}.wandb"))
    assert len(files) == 2
    # The files of the run went along as an artifact.
    assert any(b"run-" + first.encode() in file.read_bytes() for file in files)
    assert len(list((run / "tensorboard").rglob("events.*"))) >= 2
    texts = [path.read_text() for path in (run / "run.json", run / "config.yaml")]
    assert not any(secret in text for text in texts)


@pytest.mark.train
def test_a_run_that_goes_on_is_the_same_run_in_mlflow(forks, tiny):
    pytest.importorskip("mlflow")
    line = [*words(tiny), "tracker=mlflow", "output_dir=mlflow"]
    run = tiny / "mlflow"
    assert forks.run(tiny, *line, signals=[(STEP, 5, signal.SIGTERM)]) == 75
    first = record(run)["trackers"]["mlflow"]["id"]
    assert forks.run(tiny, *line, "tracker.artifacts=true") == 0, said(tiny)[-3000:]
    assert record(run)["trackers"]["mlflow"]["id"] == first
    (place,) = (run / "mlflow").glob(f"*/{first}")
    steps = [int(row.split()[2]) for row in (place / "metrics" / "loss").read_text().splitlines()]
    assert steps == [3, 6]
    assert (place / "params" / "trainer.args.max_steps").read_text() == "8"
    assert {path.name for path in (place / "artifacts").iterdir()} >= {"run.json", "model"}


@pytest.mark.train
def test_a_run_that_goes_on_is_the_same_run_in_trackio(forks, tiny):
    pytest.importorskip("trackio")
    line = [*words(tiny), "tracker=trackio", "output_dir=trackio"]
    place = {"TRACKIO_DIR": str(tiny / "trackio-files")}
    assert forks.run(tiny, *line, signals=[(STEP, 5, signal.SIGTERM)], **place) == 75
    assert forks.run(tiny, *line, **place) == 0, said(tiny)[-3000:]
    (database,) = (tiny / "trackio-files").rglob("luthier.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, metrics from metrics").fetchall()
    assert {name for name, _ in rows} == {"trackio"}
    losses = [json.loads(values) for _, values in rows]
    steps = [row["train/global_step"] for row in losses if "train/loss" in row]
    assert steps == [3, 6]
