"""Real launches of a script that checks, as a training run does, what it was asked for."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROBE = str(Path(__file__).parents[1] / "helpers" / "launch_probe.py")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

MULTI_CPU = "distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n"
FSDP = "distributed_type: FSDP\nnum_processes: 1\nmain_process_port: 0\n"
FSDP += "fsdp_config: {fsdp_version: 2}\n"


def start(command: list[str], config: str | None, folder: Path, **variables: str):
    """Run a launch without GPUs and without the machine's own accelerate config."""
    if config is not None:
        (folder / "asked.yaml").write_text(config)
    environ = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("ACCELERATE_") and key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    environ |= {"PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    environ |= {"CUDA_VISIBLE_DEVICES": "-1"} | variables
    command = [*command, PROBE]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)


def config(name: str) -> list[str]:
    return ["--config_file", str(ROOT / "launch" / name)]


ONE = {"processes": 1, "sharding": "none", "precision": "no", "device": "cpu", "sum": 1}
TWO = {"processes": 2, "sharding": "ddp", "precision": "no", "device": "cpu", "sum": 3}


@pytest.mark.parametrize(
    ("command", "variables", "facts"),
    [
        pytest.param([sys.executable], {}, ONE, id="plain-python"),
        pytest.param([*ACCELERATE, *config("cpu.yaml")], {}, ONE, id="cpu.yaml"),
        pytest.param([*ACCELERATE, *config("cpu_ddp.yaml")], {}, TWO, id="cpu_ddp.yaml"),
        pytest.param(TORCHRUN, {"ACCELERATE_USE_CPU": "true"}, TWO, id="torchrun"),
    ],
)
def test_what_was_asked_for_runs(command, variables, facts, tmp_path):
    done = start(command, None, tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in re.findall(r"PROBE (\{.*\})", done.stdout)]
    backend = "gloo" if facts["processes"] > 1 else None
    assert lines == [facts | {"backend": backend, "gpus": 0}] * facts["processes"]


@pytest.mark.parametrize(
    ("flags", "asked", "message", "code"),
    [
        pytest.param([], MULTI_CPU, "2 processes were asked for", 2, id="multi-cpu"),
        pytest.param([], FSDP, "there is no GPU here", 2, id="fsdp-without-gpu"),
        pytest.param(
            ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
            None,
            "each would train alone",
            2,
            id="two-without-gpu-that-train-alone",
        ),
    ],
)
def test_stops_in_words(flags, asked, message, code, tmp_path):
    if asked is not None:
        flags = ["--config_file", "asked.yaml", *flags]
    done = start([*ACCELERATE, *flags], asked, tmp_path)
    assert "PROBE" not in done.stdout
    assert message in done.stderr
    assert "Instead:" in done.stderr
    # accelerate itself ends with 1 and names the code of the training process.
    assert done.returncode == 1
    assert f"exit status {code}" in done.stderr or f"exitcode  : {code}" in done.stderr
    assert "luthier/train/launch/checks.py" not in done.stderr, "a traceback of luthier's own"


def test_two_processes_say_it_once_and_last(tmp_path):
    flags = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    done = start([*ACCELERATE, *flags], None, tmp_path)
    before, report = done.stderr.split("ChildFailedError", 1)
    assert before.count("each would train alone") == 1
    assert "each would train alone" in report.split("Root Cause")[1]


def test_quiet_leaves_out_the_traceback_of_one_process(tmp_path):
    done = start([*ACCELERATE, "-q", "--config_file", "asked.yaml"], MULTI_CPU, tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("2 processes were asked for")
    assert "Traceback" not in done.stderr
