"""`luthier launch` over real processes: one voice, the exit code and signals of the training."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from helpers import train_command
from helpers.train_command import end, environment, record, until, words
from luthier.cli.launch import choose_launch_file
from luthier.cli.main import main
from luthier.errors import LAUNCH_VARIABLE
from luthier.train.launch import launcher, request
from luthier.train.launch.request import find_launch_file, format_train_command

ROOT = Path(__file__).parents[3]
LUTHIER = (sys.executable, "-m", "luthier", "launch")
NOISE = ("Traceback", "ChildFailedError", "elastic", "torch.distributed", "were not passed", "W1")
"""What accelerate and torchrun print of a launch, and nobody has to read."""


def start(folder, *typed, **variables):
    """Start `luthier launch`; its output goes to files, so that no pipe fills up."""
    return subprocess.Popen(
        [*LUTHIER, *typed], cwd=folder, env=environment(**variables), stdin=subprocess.DEVNULL,
        stdout=(folder / "out").open("w"), stderr=(folder / "err").open("w"),
        start_new_session=True,
    )  # fmt: skip


def launch(folder, *typed, **variables):
    """Run it to its end; the exit code, and what was printed to both streams."""
    process = start(folder, *typed, **variables)
    try:
        code = process.wait(timeout=150)
    finally:
        end(process)
    return code, (folder / "out").read_text(), (folder / "err").read_text()


def run_fsdp_on_cpus(folder):
    """Have each process choose FSDP on a CPU, as `helpers.fsdp_cpu` says; return the variables."""
    (folder / "patch").mkdir(exist_ok=True)
    (folder / "patch" / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'RANK' in os.environ:\n"
        f"    sys.path[:0] = [{str(ROOT / 'src')!r}, {str(ROOT / 'tests')!r}]\n"
        "    from helpers.fsdp_cpu import choose_fsdp_on_cpu\n"
        "    choose_fsdp_on_cpu()\n"
    )
    # luthier's own name for it is refused without a GPU.
    (folder / "mine.yaml").write_text((ROOT / "launch" / "fsdp2.yaml").read_text())
    return {"PYTHONPATH": str(folder / "patch")}


@pytest.mark.train
def test_two_sharded_processes_stop_and_fail_in_words(tmp_path):
    train_command.make(tmp_path)
    flags = ["--config", "mine.yaml", "--num_processes", "2", "--mixed_precision", "no"]
    line = [*words(tmp_path, max_steps=2000, eval_strategy="no", save_strategy="no",
                   logging_steps=1), "dataset.eval.count=null", "output_dir=run"]  # fmt: skip
    patched, run = run_fsdp_on_cpus(tmp_path), tmp_path / "run"
    process = start(tmp_path, *flags, *line, **patched)
    try:
        until(lambda: (run / "metrics.jsonl").is_file(), patience=120)
        ranks = psutil.Process(process.pid).children()
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 75
    finally:
        end(process)
    assert len(ranks) == 2 and not any(rank.is_running() for rank in ranks)
    out, err = (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
    assert out.startswith("launch    accelerate launch --config_file mine.yaml --num_processes 2")
    assert (out.count("Stopped after step"), err.count("SIGTERM: stopping after")) == (1, 1), err
    assert not any(word in out + err for word in NOISE), err
    now = record(run)
    assert (now["status"], now["launch"]["sharding"]) == ("stopped", "fsdp2")
    assert now["launch"]["launcher"]["config_file"].endswith("mine.yaml")
    step = now["sessions"][-1]["to_step"]
    assert (run / "checkpoints" / f"checkpoint-{step}" / "manifest.json").is_file()
    # The same command resumes it; the second process then finds a mistake that it alone has.
    code, out, err = launch(tmp_path, *flags, *line, **patched, FSDP_RAISE=str(step + 1))
    assert code == 2
    assert err.count("rank 1 alone found what is wrong") == 1
    assert "(process 1 of 2)" in err and "another process" not in out + err
    assert not any(word in out + err for word in NOISE), err


@pytest.mark.train
def test_two_processes_with_copies_train_and_one_that_is_killed_is_named(tmp_path):
    train_command.make(tmp_path)
    flags = ["--config", "cpu_ddp"]
    code, out, err = launch(tmp_path, *flags, *words(tmp_path, max_steps=2), "output_dir=run")
    assert code == 0, err
    assert record(tmp_path / "run")["launch"]["processes"] == 2
    assert not any(word in out + err for word in NOISE), err
    line = [*words(tmp_path, max_steps=4000, eval_strategy="no", save_strategy="no",
                   logging_steps=1), "output_dir=killed"]  # fmt: skip
    process = start(tmp_path, *flags, *line)
    try:
        until(lambda: (tmp_path / "killed" / "metrics.jsonl").is_file(), patience=120)
        psutil.Process(process.pid).children()[1].kill()
        assert process.wait(timeout=60) == 128 + signal.SIGKILL
    finally:
        end(process)
    err = (tmp_path / "err").read_text()
    assert err.count("was ended by SIGKILL, often for want of memory") == 1
    assert not any(word in err for word in NOISE), err


FILES = {
    "a CPU": ((0, None), "cpu"),
    "two processes on a CPU": ((0, 2), "cpu_ddp"),
    "one GPU": ((1, None), "single_gpu"),
    "one process beside eight GPUs": ((8, 1), "single_gpu"),
    "eight GPUs": ((8, None), "ddp"),
    "two machines of one GPU": ((1, None, 2), "ddp"),
}


@pytest.mark.parametrize(("machine", "name"), FILES.values(), ids=FILES)
def test_the_file_fits_the_machine(machine, name):
    assert choose_launch_file(*machine) == find_launch_file(name, "--config")


MISTAKES = {
    "a setting": (["recipe=tiny_pretrain", "lora.rr=1"], "lora.rr"),
    "a file": (["--config", "fsdp", "recipe=tiny_pretrain"], "no such file. Did you mean fsdp2?"),
    "GPUs": (["--config", "zero3", "recipe=tiny_pretrain"], "this is for GPUs, and there is none"),
    "two processes of one": (
        ["--config", "cpu", "--num_processes", "2", "recipe=tiny_pretrain"], "--config cpu_ddp",
    ),
    "a flag": (["--process", "2", "recipe=tiny_pretrain"], "has no such flag"),
    "nothing": ([], "name what to train"),
    "a contradiction": (
        ["--config", "mine.yaml", "recipe=tiny_pretrain", "trainer.args.bf16=false"],
        "bf16",
    ),
    "a key of accelerate": (["--config", "odd.yaml", "recipe=tiny_pretrain"], "fsdp_versoin"),
}  # fmt: skip


@pytest.mark.parametrize(("typed", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_starts_no_process(typed, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("distributed_type: MULTI_GPU\nmixed_precision: bf16\n")
    (tmp_path / "odd.yaml").write_text("fsdp_config: {fsdp_versoin: 2}\n")
    monkeypatch.setattr(sys, "argv", ["luthier", "launch", *typed])
    # Other tests of this process may have left a server of theirs.
    others = psutil.Process().children()
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert message in err
    assert psutil.Process().children() == others


class Failure:
    """What torchrun keeps of a process that failed, in the order in which it noticed them."""

    def __init__(self, exitcode, message=None, is_lost=False):
        self.exitcode = exitcode
        data = {"message": {"message": message}, "is_lost": is_lost}
        self.error_file_data = data if message else {}


LOST = Failure(1, "another process has ended", is_lost=True)
CAUSES = {
    "a mistake of all": ({0: Failure(2, "no"), 1: Failure(2, "no")}, 0),
    "a mistake of the second": ({0: LOST, 1: Failure(2, "no")}, 1),
    "a mistake, and others that were ended": ({1: Failure(2, "no"), 0: Failure(-15)}, 1),
    "one that was killed": ({0: LOST, 1: Failure(-9)}, 1),
    "stopped, and one that was ended": ({0: Failure(75), 1: Failure(-15)}, 0),
    "stopped, but for a mistake": ({0: Failure(75), 1: Failure(2, "no")}, 1),
    "an error without a message": ({1: Failure(1), 0: Failure(-15)}, 1),
    "a process on another machine": ({0: LOST}, 0),
}


@pytest.mark.parametrize(("failures", "rank"), CAUSES.values(), ids=CAUSES)
def test_the_failure_that_is_reported_is_the_cause(failures, rank):
    assert launcher._choose_failure(failures)[0] == rank


OWN = {"process": os.getppid(), "flags": ["--config_file", "x.yaml"]}
STARTED = {
    "luthier train": (["luthier train", "a=1"], None, None, "luthier train b=2 'c=[1]'"),
    "a script": (["train.py"], None, None, "python train.py b=2 'c=[1]'"),
    "a notebook": (["/lib/ipykernel/__main__.py"], None, None, "luthier train b=2 'c=[1]'"),
    "accelerate": (
        ["train.py"], ["--multi_gpu"], None, "accelerate launch --multi_gpu train.py b=2 'c=[1]'",
    ),
    "accelerate, a module": (
        ["luthier train"], ["--cpu"], None, "accelerate launch --cpu -m luthier train b=2 'c=[1]'",
    ),
    "luthier launch": (
        ["luthier train"], None, OWN | {"typed": ["luthier", "launch", "--config", "x"]},
        "luthier launch --config x b=2 'c=[1]'",
    ),
    "a process of a rank": (
        ["luthier train"], None, {**OWN, "process": -1, "typed": ["luthier", "launch"]},
        "luthier train b=2 'c=[1]'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("argv", "flags", "own", "command"), STARTED.values(), ids=STARTED)
def test_a_command_is_printed_as_it_was_started(argv, flags, own, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv(LAUNCH_VARIABLE, json.dumps(own) if own else "")
    if flags is not None:
        monkeypatch.setattr(request, "find_launcher_command", lambda: (flags, Path()))
    assert format_train_command("b=2", "c=[1]") == command
