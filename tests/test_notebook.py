"""Training from Python: what a run gives, what is left of it in the process, and its mistakes."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

import luthier
from helpers.notebooks import code_cells, run_cells
from luthier.errors import UserError
from luthier.notebook import Run, TrainingStopped, _as_overrides

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "first_run.ipynb"


def test_importing_luthier_imports_nothing_else():
    code = (
        "import sys, luthier; assert callable(luthier.train)\n"
        "import luthier.train; assert callable(luthier.train)\n"
        "from luthier import train; assert train is luthier.train\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "numpy", "hydra", "pydantic", "pandas", "rich", "asyncio"}
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize(
    ("setting", "overrides"),
    [
        ("lora.r=8", ["lora.r=8"]),
        ({"lora.r": 8, "trainer.args.bf16": None}, ["lora.r=8", "trainer.args.bf16=null"]),
        ({"dataset.path": Path("my rows.jsonl")}, ['dataset.path="my rows.jsonl"']),
        ({"trainer.rewards": [{"length": {"max": 3}}]}, ["trainer.rewards=[{length: {max: 3}}]"]),
        ({"dataset.filter": "a == 'x, y'"}, ["dataset.filter=\"a == 'x, y'\""]),
    ],
)
def test_settings_are_typed_or_mapped(setting, overrides):
    assert _as_overrides(setting) == overrides


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["quickstart", "lora.rank=8"], "lora.rank"),
        (["quickstrat"], "quickstart"),
        (["quickstart", "-m"], "takes settings and no flags"),
        (["quickstart", "--trust"], "trust=True"),
        (["quickstart", "hydra/sweeper=optuna"], "a setting of a sweep"),
        ([8], "got int"),
    ],
)
def test_a_mistake_is_a_user_error_in_words(settings, words):
    with pytest.raises(luthier.UserError, match=words) as mistake:
        luthier.train(*settings)
    # What IPython shows in place of a traceback.
    assert mistake.value._render_traceback_() == [str(mistake.value)]


def test_a_run_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no run"):
        Run("runs/nothing")


# Runs of a tiny model, all in this process.


def say(role, text):
    return {"role": role, "content": text}


ROWS = [{"messages": [say("user", f"say {n}"), say("assistant", f"{n}")]} for n in range(12)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The settings of a run of seconds; nothing is drawn but by the seed."""
    from helpers.preference_trainer import model, tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    model().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    args = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 2}
    args |= {"gradient_accumulation_steps": 1, "activation_checkpointing": False}
    return {
        "model": "hub", "dataset": "jsonl", "model.path": folder / "model", "model.device": "cpu",
        "dataset.path": folder / "rows.jsonl", "dataset.eval": {"count": 2, "share": None},
        "dataset.cache": folder / "cache", "lora": "none",
        **{f"trainer.args.{name}": value for name, value in args.items()},
    }  # fmt: skip


def process_state():
    import matplotlib
    import torch

    return (
        dict(os.environ), list(sys.argv), sys.stdout, sys.stderr, list(warnings.filters),
        torch.are_deterministic_algorithms_enabled(), matplotlib.get_backend(),
        signal.getsignal(signal.SIGINT),
    )  # fmt: skip


@pytest.mark.train
def test_runs_follow_one_another_and_leave_the_process_as_it_was(tiny, tmp_path):
    def train(name, *settings):
        return luthier.train(tiny, {"output_dir": tmp_path / name}, *settings)

    import matplotlib

    matplotlib.use("svg")
    state = process_state()
    first = train("first")
    # Each has its own number format, kernels and trackers; accelerate keeps the first of a process.
    half = train("half", {"model.dtype": "bfloat16", "deterministic": True, "lora": "small"})
    with pytest.raises(UserError, match=r"trainer\.args"):
        train("failed", {"trainer.args.metric_for_best_model": "nothing",
                         "trainer.args.eval_strategy": "steps"})  # fmt: skip
    again = train("again")
    assert process_state() == state
    assert [run.status for run in (first, half, again)] == ["finished"] * 3
    assert first.results == again.results != half.results
    assert half.record["command"][:2] == ["luthier train", "model=hub"]
    assert Run(tmp_path / "half").record == half.record
    losses = first.metrics["loss"].dropna()
    assert len(losses) == 4 and list(first.metrics["step"])[:1] == [0]
    assert losses.tolist() == again.metrics["loss"].dropna().tolist()
    files = [run.folder / "model" / "model.safetensors" for run in (first, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    check_what_a_run_gives(half)


def check_what_a_run_gives(run):
    assert repr(run) == f"Run('{run.folder}', finished)"
    assert "eval_loss" in run._repr_html_() and "data:image/png" in run._repr_html_()
    assert run.report.startswith(str(run.folder)) and "bfloat16" in run.report
    assert run.report.html.startswith("<!doctype html>") and "<iframe" in run.report._repr_html_()
    preview = run.preview(2, first=3)
    assert "row 3" in repr(preview) and "row 5" not in repr(preview)
    assert "<iframe srcdoc=" in preview._repr_html_() and "trained control token" in preview.html
    with pytest.raises(UserError, match="first=11, and there are 10 training rows"):
        run.preview(first=11)
    assert len(run.replies) == len(run.preview(9, held_out=True)._view.rows) == 2
    with run.llm() as llm:
        assert len(llm.generate(["say 3"], max_new_tokens=2)) == 1


@pytest.mark.train
def test_an_interrupt_is_a_checkpoint_and_the_same_call_goes_on(tiny, tmp_path):
    settings = tiny | {"output_dir": tmp_path / "run", "trainer.args.max_steps": 300}

    def interrupt():
        file = tmp_path / "run" / "metrics.jsonl"
        while not file.is_file() or file.read_text().count("\n") < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(TrainingStopped, match="Make the same call to resume") as stopped:
        luthier.train(settings)
    thread.join()
    run = stopped.value.run
    assert run.status == "stopped"
    with pytest.raises(UserError, match="no model/"):
        run.llm()
    step = run.record["sessions"][0]["to_step"]
    more = luthier.train(settings | {"trainer.args.max_steps": step + 2})
    assert more.status == "finished" and more.record["sessions"][1]["from_step"] == step


@pytest.mark.train
def test_rewards_that_are_awaited_run_below_a_notebooks_event_loop(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "async def near(completions, **columns): return [-len(str(c)) for c in completions]\n"
    Path("own_rewards.py").write_text(code)
    settings = tiny | {
        "trainer": "grpo", "output_dir": tmp_path / "run", "trainer.args.num_generations": 2,
        "trainer.args.max_completion_length": 4, "trainer.rewards": ["python:own_rewards.near"],
        "trainer.args.max_steps": 1, "trainer.args.per_device_eval_batch_size": 2,
    }  # fmt: skip

    async def cell():
        return luthier.train(settings)

    assert asyncio.run(cell()).status == "finished"


@pytest.mark.train
def test_a_dry_run_has_no_folder(tiny, tmp_path):
    run = luthier.train(tiny, {"output_dir": tmp_path / "run", "dry_run": True})
    assert run.status == "new" and not run.folder.exists()


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells) > len(code_cells(NOTEBOOK)) > 4
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.train
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    values = run_cells(NOTEBOOK)
    assert values["run"].status == values["same"] == "finished"
    assert values["run"].folder == Path("runs/first_run")
    assert "exact_match" in values["run"]._repr_html_()
    assert "<iframe" in values["preview"]._repr_html_()
    assert list(values["metrics"]["step"]) == [1, 2, 3]
    assert len(values["llm"]) == 1
    assert "lora.rank: is not a setting of peft.LoraConfig" in capsys.readouterr().out
