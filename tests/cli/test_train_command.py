"""`train.py`'s command line: flags, exit codes, and that a mistake costs no time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import luthier
from luthier.cli.train import main
from luthier.config.schema import GROUPS
from luthier.errors import UserError

ROOT = Path(__file__).parents[2]
Q = "recipe=quickstart"


def never(loaded):
    raise AssertionError("the task ran")


def test_the_task_gets_the_configuration():
    seen = []
    assert main(seen.append, [Q, "lora.r=8"]) == 0
    assert seen[0].config.lora["r"] == 8
    assert seen[0].overrides == [Q, "lora.r=8"]


def test_the_exit_code_of_the_task():
    assert main(lambda loaded: 7, [Q]) == 7


def test_a_mistake_that_the_task_finds(capsys):
    def task(loaded):
        raise UserError("no such file")

    assert main(task, [Q]) == 2
    assert capsys.readouterr().err == "no such file\n"


SAYS = {
    "flag": (["--hlep"], "--hlep: there is no such flag. Did you mean --help?"),
    "flag, far off": (["--zzz"], "--zzz: there is no such flag. Flags: --help"),
    "short flag": (["-x"], "-x: there is no such flag."),
    "an empty sweep": (["-m", Q], "nothing varies, so there is nothing to search"),
    "a sweep without -m": ([Q, "lora.r=8,16"], "To try each, add -m"),
    "a sweep's setting without -m": ([Q, "hydra.sweeper.n_trials=3"], "Add -m."),
    "cfg of what": (["--cfg", "jbo"], "--cfg jbo: write --cfg job|hydra|all."),
    "cfg of nothing": ([Q, "--cfg"], "--cfg : write --cfg job|hydra|all."),
    "info of what": (["--info=x"], "--info x: write --info searchpath|"),
    "resolve alone": ([Q, "--resolve"], "--resolve is used with --cfg"),
    "info with a mistake": (["--info", "defaults-tree", "recipe=typo"], "no recipe 'typo'"),
}


@pytest.mark.parametrize("argv, said", SAYS.values(), ids=SAYS)
def test_a_wrong_command_line(argv, said, capsys):
    assert main(never, argv) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert out == ""


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(flag, capsys):
    assert main(never, [flag, "recipe=typo"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {group}=" in out for group in GROUPS)
    assert "qlora_llama" in out
    assert max(map(len, out.splitlines())) <= 100


def test_version(capsys):
    assert main(never, ["--version"]) == 0
    assert capsys.readouterr().out == f"luthier {luthier.__version__}\n"


def test_cfg_job(capsys):
    assert main(never, ["--cfg", "job", Q, "lora.r=8"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["lora"]["r"] == 8
    assert shown["dataset"]["path"].startswith("${luthier:recipes}/")
    assert shown["output_dir"].startswith("runs/quickstart/r-8-")
    assert "hydra" not in shown


def test_cfg_job_resolved_is_what_the_run_gets(capsys):
    assert main(never, [Q, "-c", "job", "--resolve"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == luthier.config.load_config([Q]).resolved


def test_cfg_of_a_part(capsys):
    assert main(never, [Q, "--cfg=job", "-p", "trainer.evaluation"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["metrics"] == ["exact_match"]


def test_cfg_hydra_writes_nothing(capsys):
    assert main(never, [Q, "--cfg", "hydra"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)["hydra"]
    assert shown["run"]["dir"] == "." and shown["output_subdir"] is None


def test_cfg_with_a_mistake_shows_both(capsys):
    assert main(never, [Q, "--cfg", "job", "seed=x"]) == 2
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["seed"] == "x"
    assert "seed: 'x' is not a whole number" in err


def test_info_searchpath(workplace, tmp_path, monkeypatch, capsys):
    workplace("conf/model/mine.yaml", "path: x")
    workplace("named/a.yaml", "# A.")
    monkeypatch.setenv("LUTHIER_RECIPES", str(tmp_path / "named"))
    assert main(never, ["--info", "searchpath"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    wanted = [tmp_path / "conf", ROOT / "conf", tmp_path / "named", ROOT / "recipes"]
    assert [line for line in lines if line.startswith("/")] == [str(path) for path in wanted]


def train(*argv, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "train.py"), *argv],
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        capture_output=True,
    )


MISTAKES = {
    "nothing": [],
    "recipe": ["recipe=typo"],
    "key": [Q, "trainer.args.lerning_rate=1"],
    "together": [Q, "lora=none"],
    "hydra": [Q, "hydra/launcher=typo"],
    "sweep": ["-m", Q],
}


@pytest.mark.parametrize("argv", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_imports_nothing_heavy_and_leaves_nothing(argv, tmp_path):
    done = train(*argv, cwd=tmp_path)
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    names = {line.split("|")[-1].strip().split(".")[0] for line in imports}
    assert done.returncode == 2
    assert not names & {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy"}
    assert said and "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [["--help"], ["--cfg", "job", Q], ["--info", "defaults-tree", Q]])
def test_a_look_imports_nothing_heavy_and_leaves_nothing(argv, tmp_path):
    done = train(*argv, cwd=tmp_path)
    names = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and done.stdout
    assert not names & {"torch", "transformers"}
    assert list(tmp_path.iterdir()) == []


def test_train_py_fits_on_a_screen():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 40


def test_an_interruption_is_said_in_words(capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    assert main(interrupted, ["recipe=quickstart"]) == 130
    assert "Run the same command to resume." in capsys.readouterr().err
