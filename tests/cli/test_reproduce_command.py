"""`luthier reproduce`, `luthier show` and `luthier diff` on the records of runs."""

import json
import shutil
import sys

import pytest
import yaml

from luthier.cli import diff, reproduce, show
from luthier.errors import UserError
from luthier.record.run_dir import find_run
from luthier.storage.atomic import write_json

RUN = {
    "format": 2, "status": "finished", "versions": {"luthier": "0.1.0", "torch": "2.13.0"},
    "hardware": {"cpu": "A", "torch_threads": 1}, "launch": {"processes": 1, "device": "cpu"},
    "git": {"luthier": {"commit": "a" * 40, "branch": "main", "dirty": False, "changed_files": []}},
    "data": {"sha256": "d" * 64}, "results": {"eval_loss": {"before": 2.0, "after": 1.0}},
    "seeds": {"seed": 1, "deterministic": False},
    "seconds": 4.0, "training_seconds": 3.0, "peak_memory_gib": {"host": 1.0},
}  # fmt: skip


CONFIG = {"seed": 1, "output_dir": "a", "lora": {"r": 8}}


ROWS = [{"step": 1, "loss": 1.5, "train_runtime": 3.0}, {"step": 2, "loss": 1.25}]


def write(folder, config=CONFIG, rows=ROWS, **changed):
    write_json(folder / "run.json", RUN | changed)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


DIFFERENT = [
    ("config", {"config": CONFIG | {"lora": {"r": 16}}}, "lora.r: 8 -> 16"),
    ("data and model", {"data": {"sha256": "e" * 64}}, "sha256: " + "d" * 64 + " -> " + "e" * 64),
    ("versions", {"versions": RUN["versions"] | {"torch": "2.14.0"}}, "torch: 2.13.0 -> 2.14.0"),
    ("hardware", {"hardware": {"cpu": "B", "torch_threads": 1}}, "cpu: A -> B"),
    ("launch", {"launch": {"processes": 2, "device": "cpu"}}, "processes: 1 -> 2"),
    ("results", {"rows": [ROWS[0], {"step": 2, "loss": 1.26}]}, "at step 2: loss: 1.25 -> 1.26"),
    ("results", {"rows": ROWS[:1]}, "lines of metrics: 2 -> 1"),
]  # fmt: skip


@pytest.mark.parametrize(("group", "changed", "line"), DIFFERENT, ids=[d[0] for d in DIFFERENT])
def test_what_differs_between_two_runs_is_in_its_group(tmp_path, capsys, group, changed, line):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", **changed)
    assert diff.run([str(a), str(b)]) == 1
    text = capsys.readouterr().out
    _, _, rest = text.partition(f"\n{group}\n")
    assert line in rest.partition("\n\n")[0]
    assert group not in text.rpartition("the same: ")[2]


def test_times_and_folders_are_no_difference(tmp_path, capsys):
    a = write(tmp_path / "a")
    b = write(
        tmp_path / "b", config=CONFIG | {"output_dir": "b"},
        rows=[ROWS[0] | {"train_runtime": 9.0}, ROWS[1]], started="later",
    )  # fmt: skip
    assert diff.run([str(a), str(b)]) == 0
    assert "the same: config, data and model, versions" in capsys.readouterr().out


def test_a_run_of_an_older_luthier_is_shown_as_far_as_it_goes(tmp_path, capsys):
    write_json(tmp_path / "run.json", {"status": "finished", "versions": {"torch": "2.0"}})
    assert show.run([str(tmp_path)]) == 0
    assert "finished" in capsys.readouterr().out


def test_a_run_that_was_killed_is_shown_as_such(tmp_path, capsys):
    write_json(tmp_path / "run.json", {"status": "running"})
    show.run([str(tmp_path)])
    assert "killed: it was running" in capsys.readouterr().out


REFUSED = [
    ("a run that is not finished", {"status": "stopped"}, "not finished (status: stopped)"),
    ("shards without a config file", {"launch": {"processes": 2, "sharding": "fsdp2"}}, "fsdp2"),
    ("two machines", {"launch": {"launcher": {"config": {"num_machines": 2}}}}, "several machines"),
]


@pytest.mark.parametrize(("changed", "part"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_cannot_be_repeated_is_refused_in_words(tmp_path, changed, part):
    folder = write(tmp_path / "a", **changed)
    with pytest.raises(UserError, match=part.replace("(", r"\(").replace(")", r"\)")):
        reproduce.run([str(folder)])


def test_a_config_that_this_version_does_not_understand_is_named(tmp_path):
    from luthier.cli.rerun import load_run_config

    folder = write(tmp_path / "a", config=CONFIG | {"loraa": 1})
    with pytest.raises(UserError, match=r"written by another version(.|\n)*loraa"):
        load_run_config(folder)


def test_a_run_is_found_by_its_folder_or_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "runs" / "quickstart" / "default")
    assert find_run("quickstart/default").resolve() == folder
    assert find_run(str(folder)) == folder
    with pytest.raises(UserError, match="Did you mean runs/quickstart/default"):
        find_run("quickstart/defualt")
    with pytest.raises(UserError, match="Did you mean runs/quickstart/default"):
        find_run("quickstart")
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(UserError, match="there is no run"):
        find_run("quickstart")


def test_the_repetition_is_launched_as_the_run_was(tmp_path):
    alone = reproduce._command({"launch": {"processes": 1, "sharding": "none"}}, tmp_path)
    assert alone == [sys.executable, "-m", "luthier.cli.rerun"]
    config = {"distributed_type": "MULTI_GPU", "num_processes": 8, "mixed_precision": "bf16"}
    launch = {"processes": 2, "sharding": "ddp", "device": "cpu", "launcher": {"config": config}}
    command = reproduce._command({"launch": launch}, tmp_path)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert command[-2:] == ["-m", "luthier.cli.rerun"]
    written = yaml.safe_load((tmp_path / "launch.yaml").read_text())
    assert written == config | {
        "num_processes": 2, "num_machines": 1, "main_process_port": 0, "use_cpu": True,
        "gpu_ids": "-1,-1",
    }  # fmt: skip
