"""`luthier runs` lists every run below a folder, also what is damaged, and cuts no number."""

import json
import os
import pty
import shutil
import subprocess
import sys

import pytest

from luthier.cli.runs import list_runs, run
from luthier.errors import UserError
from luthier.storage.lock import hold_lock

FINISHED = {
    "format": 2, "status": "finished", "started": "2026-11-29T10:00:00+00:00", "seconds": 902.4,
    "training_seconds": 648.0, "peak_memory_gib": {"host": 3.5},
    "results": {
        "eval_loss": {"before": 3.2148, "after": 0.0313},
        "exact_match": {"before": 0.0, "after": 0.85},
    },
}  # fmt: skip
NAME = "learning_rate-0.0005-max_steps-2000-and-4-more-3f2a1c"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def make_run(folder, steps=60, **entries):
    write(folder / "run.json", FINISHED | entries)
    rows = [{"step": step, "loss": 100.0 / step} for step in range(5, steps + 1, 5)]
    write(folder / "metrics.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "model").mkdir()
    write(folder / "model" / "adapter_model.safetensors", "x" * 2_000_000)


def make_sweep(folder):
    write(folder / "sweep.json", {
        "recipe": "quickstart", "words": [], "identity": {}, "total": 3,
        "objectives": {"eval_loss": "minimize"},
    })  # fmt: skip
    for number, loss in enumerate((0.5, 0.25)):
        trial = {"number": number, "params": {"lora.r": str(number)}, "state": "finished"}
        trial |= {"values": {"eval_loss": loss}, "step": 60, "seconds": 40.0}
        write(folder / "state" / f"{number:03d}.json", trial)
        make_run(folder / "trials" / f"{number:03d}")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs/quickstart/default")
    make_run(tmp_path / "runs/quickstart" / NAME, started="2026-11-29T11:00:00+00:00", steps=2000)
    make_sweep(tmp_path / "runs/quickstart/sweeps/r-0-1-1f0e9a")
    return tmp_path / "runs"


def by_folder(folder):
    return {summary.folder.rpartition("/")[2]: summary for summary in list_runs(folder)}


def test_the_newest_run_comes_first_and_a_sweep_is_one_line(runs, capsys):
    os.utime(runs / "quickstart/sweeps/r-0-1-1f0e9a/sweep.json", (0, 0))
    assert run([]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["run", "status", "began", "steps", "result", "took", "size"]
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    result, took = "exact_match 0 -> 0.85", "15 min"
    assert [(row[0], row[1], *row[3:]) for row in cells] == [
        (f"quickstart/{NAME}", "finished", "2,000", result, took, "1.9 MiB"),
        ("quickstart/default", "finished", "60", result, took, "1.9 MiB"),
        ("quickstart/sweeps/r-0-1-1f0e9a", "interrupted", "2 trials", "best eval_loss 0.25",
         "80 s", "3.8 MiB"),
    ]  # fmt: skip


def test_json_holds_whole_numbers(runs, capsys):
    assert run(["--json", "runs"]) == 0
    entries = json.loads(capsys.readouterr().out)
    entry = next(entry for entry in entries if entry["folder"] == "runs/quickstart/default")
    assert {"kind": "run", "step": 60, "after": 0.85, "seconds": 902.4}.items() <= entry.items()


def test_a_terminal_of_80_columns_cuts_no_number(runs):
    main, side = pty.openpty()
    code = f"import sys; sys.path[:0] = {sys.path!r}; from luthier.cli.runs import run; run([])"
    environ = os.environ | {"COLUMNS": "80", "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", code], stdout=side, env=environ, check=True)
    text = os.read(main, 100_000).decode().replace("\r\n", "\n")
    assert f"quickstart/{NAME}  finished\n    2026-11-29 " in text
    assert text.count("exact_match 0 -> 0.85") == 2 and "step 2,000" in text
    assert max(map(len, text.splitlines())) <= 80


STATES = {
    "running and held": ({"status": "running"}, "running"),
    "running and not held": ({"status": "running"}, "killed"),
    "stopped": ({"status": "stopped"}, "stopped"),
    "failed": ({"status": "failed", "error": "no"}, "failed"),
}


@pytest.mark.parametrize("name", STATES)
def test_how_a_run_stands(runs, name):
    entries, status = STATES[name]
    folder = runs / "a" / "b"
    make_run(folder, **entries, results={})
    if name == "running and held":
        with hold_lock(folder):
            code = "import sys; from luthier.cli.runs import run; run(['runs/a', '--json'])"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert json.loads(done.stdout)[0]["status"] == status
        return
    summary = by_folder(runs)["b"]
    # Of what has not ended, the losses that were logged first and last.
    assert (summary.status, summary.result, summary.after) == (status, "loss", 100.0 / 60)


def test_a_finished_run_without_its_model(runs):
    shutil.rmtree(runs / "quickstart/default/model")
    assert by_folder(runs)["default"].status == "no model"


DAMAGE = {
    "a cut record": ("quickstart/default/run.json", '{"status": "fini'),
    "an empty record": ("quickstart/default/run.json", ""),
    "another type": ("quickstart/default/run.json", {"status": "finished", "results": [1]}),
    "a number as text": ("quickstart/default/run.json", FINISHED | {"seconds": "long"}),
    "a list": ("quickstart/default/run.json", "[]"),
    "a newer luthier": ("quickstart/default/run.json", FINISHED | {"format": 99}),
    "metrics that are none": ("quickstart/default/metrics.jsonl", "what\nis\nthis\n"),
    "a record of pixels": ("quickstart/default/run.json", "\x00\x01\x02"),
    "a sweep that is none": ("quickstart/sweeps/r-0-1-1f0e9a/sweep.json", "{}"),
    "a trial that is none": ("quickstart/sweeps/r-0-1-1f0e9a/state/000.json", "{"),
}


@pytest.mark.parametrize(("file", "content"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_run_is_listed_with_its_damage(runs, file, content, capsys):
    write(runs / file, content)
    assert run([]) == 0
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if line.startswith("quickstart/")]) == 3
    assert out.count("  damaged  ") == 1
    assert " is damaged: " in out


def test_a_record_that_is_a_folder_or_a_link_to_nothing(runs):
    (runs / "a").mkdir()
    (runs / "a/run.json").symlink_to("nothing")
    (runs / "b/run.json").mkdir(parents=True)
    assert by_folder(runs)["a"].status == "damaged"
    assert len(list_runs(runs)) == 4


def test_no_runs_are_said_in_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run([]) == 0
    assert "There are no runs in runs/." in capsys.readouterr().out
    assert run(["--json"]) == 0
    assert capsys.readouterr().out == "[]\n"
    with pytest.raises(UserError, match="none does not exist"):
        run(["none"])
