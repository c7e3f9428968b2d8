"""Whole sweeps, their trials real processes that act: stopped, killed, failed, pruned."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from helpers.sweep_processes import alive, here, record, start, states, stop, until
from luthier.cli import sweep as show
from luthier.config import load_config
from luthier.sweep.local import LocalMachine

Q = "recipe=quickstart"
SIX = (Q, "lora.r=4,8,16", "trainer.args.learning_rate=1e-3,1e-4", "hydra.launcher.slots=2",
       "output_dir=o")  # fmt: skip


@pytest.fixture
def sweep_here(monkeypatch, capsys, tmp_path):
    return lambda *words, **how: here(monkeypatch, capsys, tmp_path, *words, **how)


def test_six_trials_one_fails_killed_in_the_middle_and_continued(tmp_path, sweep_here, capsys):
    """The trials: 0 and 1 with rank 4, 2 and 3 with rank 8, which fails, 4 and 5 with rank 16."""
    folder = tmp_path / "o"
    act = {"fail": [8], "seconds": 0.15, "steps": 6}
    sweep = start(tmp_path, *SIX, act=act)
    until(lambda: record(folder, 4).get("status") == "running" and "data" in record(folder, 4))
    sweep.kill()
    sweep.wait()
    until(lambda: not alive(tmp_path))
    ended = [n for n, state in enumerate(states(folder)) if state in ("finished", "failed")]
    assert set(ended) >= {0, 1, 2}
    killed = {number: record(folder, number) for number in range(6)}
    assert [killed[n]["status"] for n in (0, 1, 2, 3)] == ["finished"] * 2 + ["failed"] * 2
    assert killed[4]["status"] in ("stopped", "running")  # as far as its end was noted
    out = sweep_here(*SIX, act=act, code=1)
    assert states(folder) == ["finished", "finished", "failed", "failed", "finished", "finished"]
    for number in ended:  # nothing that had ended ran again
        assert record(folder, number) == killed[number]
    lines = (folder / "trials" / "004" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]  # went on
    assert "rank 8 is big" in out
    assert "no room" in out
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == ["004", "005", "000", "001", "002", "003"]
    assert float(rows[0]["eval_loss"]) == pytest.approx(0.1)
    assert rows[0]["lora.r"] == "16"
    assert "rank 8 is big" in rows[4]["error"]
    page = (folder / "sweep.html").read_text()
    assert page.count("<svg") == 3
    assert "rank 8 is big" in page
    assert 'src="http' not in page
    best_is_the_trial(folder, 4)
    assert "4 finished, 2 failed" in shown(folder, capsys)


def test_a_trial_that_ends_while_it_is_being_started_is_finished(tmp_path, sweep_here, monkeypatch):
    """As on a busy machine, where the sweep goes on later than its trial ends."""
    begin = LocalMachine.start

    def start_late(machine, *args):
        job = begin(machine, *args)
        until(lambda: job.code() is not None)
        return job

    monkeypatch.setattr(LocalMachine, "start", start_late)
    sweep_here(Q, "lora.r=4,8", "output_dir=o", act={"steps": 2})
    assert states(tmp_path / "o") == ["finished", "finished"]


def best_is_the_trial(folder, number):
    """The recipe of the best trial stands for the configuration of the trial."""
    import yaml

    os.environ["LUTHIER_RECIPES"] = str(folder / "recipes")
    try:
        best = load_config(["recipe=quickstart_best"]).resolved
    finally:
        del os.environ["LUTHIER_RECIPES"]
    words = record(folder, number)["words"]
    trial = load_config([word for word in words if not word.startswith("output_dir")]).resolved
    for resolved in (best, trial):
        resolved.pop("recipe"), resolved.pop("output_dir")
    assert best == trial
    text = (folder / "recipes" / "quickstart_best.yaml").read_text()
    assert yaml.safe_load(text)["lora"] == {"r": 16}
    assert "r: 16  # searched" in text


def shown(folder, capsys):
    """What `luthier sweep` prints."""
    capsys.readouterr()
    assert show.run([str(folder)]) == 0
    return capsys.readouterr().out


def test_a_stopped_sweep_leaves_no_process_and_goes_on(tmp_path, sweep_here, capsys):
    folder, words = tmp_path / "o", (Q, "lora.r=8,16", "hydra.launcher.slots=2", "output_dir=o")
    sweep = start(tmp_path, *words, act={"seconds": 0.1, "steps": 600, "orphan": True})
    until(lambda: all((folder / f"trials/{n:03d}/metrics.jsonl").is_file() for n in (0, 1)))
    orphans = [int((folder / f"trials/{n:03d}/orphan").read_text()) for n in (0, 1)]
    code, out = stop(sweep, signal.SIGINT)
    assert code == 75
    assert "Run the same command to resume" in out
    assert alive(tmp_path) == []
    assert not any(psutil.pid_exists(pid) for pid in orphans)
    assert states(folder) == ["interrupted", "interrupted"]
    assert "To resume: luthier train -m recipe=quickstart" in shown(folder, capsys)
    sweep_here(*words, act={"steps": 8})
    assert states(folder) == ["finished", "finished"]


def test_a_trial_that_ignores_the_end_is_killed_after_its_grace(tmp_path, sweep_here):
    words = (Q, "lora.r=8,16", "hydra.launcher.grace=0.5", "output_dir=o")
    sweep = start(tmp_path, *words, act={"seconds": 0.1, "steps": 600, "stubborn": True})
    until(lambda: (tmp_path / "o/trials/000/metrics.jsonl").is_file())
    second = sweep_here(*words, code=2)
    assert f"is being swept by process {sweep.pid}" in second
    code, _ = stop(sweep)
    assert code == 75
    assert alive(tmp_path) == []


def test_optuna_goes_on_with_new_points_and_ends_bad_trials(tmp_path, sweep_here):
    words = (
        Q, "hydra/sweeper=optuna", "trainer.args.learning_rate=tag(log,interval(1e-6,1e-2))",
        "hydra.sweeper.pruner={name: median, n_startup_trials: 2}", "output_dir=o",
        "hydra.launcher.restarts=1",
    )  # fmt: skip
    folder, act = tmp_path / "o", {"steps": 4, "seconds": 0.25, "stop_at": 2}
    sweep_here(*words, "hydra.sweeper.n_trials=3", act=act)
    first = [json.loads(file.read_text()) for file in sorted((folder / "state").glob("*"))]
    out = sweep_here(*words, "hydra.sweeper.n_trials=6", act=act)
    both = [json.loads(file.read_text()) for file in sorted((folder / "state").glob("*"))]
    assert both[:3] == first
    assert len({trial["params"]["trainer.args.learning_rate"] for trial in both}) == 6
    ends = {trial["state"] for trial in both}
    assert ends == {"finished", "pruned"}
    # By itself each stops once at step 2, as one does whose time is over, and goes on.
    assert all(trial["attempts"] == 2 for trial in both if trial["state"] == "finished")
    pruned = [trial for trial in both if trial["state"] == "pruned"]
    assert all(trial["step"] < 4 for trial in pruned)
    assert "pruned" in out


def test_an_objective_that_no_run_logs_stops_after_the_first_trial(tmp_path, sweep_here):
    words = (Q, "lora.r=8,16", "output_dir=o", "trainer.evaluation.metrics=[exact_match,token_f1]")
    err = sweep_here(*words, "hydra.sweeper.objective=token_f1", code=2)
    assert "trial 000 is finished, and its run has not logged 'token_f1'" in err
    assert "exact_match" in err
    assert states(tmp_path / "o") == ["finished"]
    sweep_here(*words, "hydra.sweeper.objective=exact_match")
    assert states(tmp_path / "o") == ["finished", "finished"]
    changed = sweep_here(*words, "seed=1", "hydra.sweeper.objective=exact_match", code=2)
    assert "o holds another sweep" in changed
    assert "seed=1" in changed


def test_a_failure_can_stop_the_rest_and_be_tried_again(tmp_path, sweep_here):
    words = (Q, "lora.r=8,16", "output_dir=o", "hydra.sweeper.on_failure=stop")
    sweep_here(*words, act={"fail": [8]}, code=1)
    assert states(tmp_path / "o") == ["failed"]
    sweep_here(*words, "hydra.sweeper.retry_failed=true")
    assert states(tmp_path / "o") == ["finished", "finished"]


def test_a_grid_needs_no_optuna_and_says_what_it_leaves_out(tmp_path, sweep_here, monkeypatch):
    words = (Q, "lora.r=8,16", "trainer.args.learning_rate=1e-3,1e-4", "output_dir=o")
    monkeypatch.setitem(sys.modules, "optuna", None)
    out = sweep_here(*words)
    assert "left out  importance.png needs optuna. Install it: pip install 'luthier[sweep]'" in out
    folder = tmp_path / "o"
    assert {path.stem for path in folder.glob("*.png")} == {"parameters", "parallel"}
    ended = [record(folder, number) for number in range(4)]
    monkeypatch.delitem(sys.modules, "optuna")
    assert "left out" not in sweep_here(*words)
    assert (folder / "importance.png").is_file()
    assert [record(folder, number) for number in range(4)] == ended  # nothing ran again


def test_each_slot_has_its_gpu_and_the_first_trial_encodes_for_all(tmp_path, sweep_here):
    words = (Q, "lora.r=8,16,32", "output_dir=o")
    out = sweep_here(*words, act={"seconds": 0.3}, CUDA_VISIBLE_DEVICES="4,5")
    assert "2 side by side" in out
    seen = [record(tmp_path / "o", n)["seen"]["CUDA_VISIBLE_DEVICES"] for n in range(3)]
    assert set(seen) == {"4", "5"}


def _has_cluster():
    return shutil.which("sinfo") and subprocess.run(["sinfo"], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "cluster",
    [
        "local",
        pytest.param("slurm", marks=pytest.mark.skipif(not _has_cluster(), reason="no SLURM")),
    ],
)
def test_jobs_of_submitit(tmp_path, cluster):
    pytest.importorskip("submitit")
    words = (Q, "lora.r=8,16", f"hydra/launcher=submitit_{cluster}", "hydra.launcher.slots=2",
             "hydra.launcher.parameters.cpus_per_task=1", "model.device=cpu",
             "output_dir=o")  # fmt: skip
    sweep = start(tmp_path, *words, act={"seconds": 0.1, "steps": 600})
    until(lambda: all((tmp_path / f"o/trials/{n:03d}/metrics.jsonl").is_file() for n in (0, 1)))
    code, _ = stop(sweep)
    assert code == 75
    until(lambda: alive(tmp_path) == [], 15)
    assert [record(tmp_path / "o", n)["status"] for n in (0, 1)] == ["stopped"] * 2
    # In a process of its own, too: submitit within pytest's once left its capture file closed.
    assert start(tmp_path, *words, act={"steps": 3}).wait(120) == 0
    assert states(tmp_path / "o") == ["finished", "finished"]
