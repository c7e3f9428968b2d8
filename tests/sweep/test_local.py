"""Where trials run and how they are started: slots, GPUs, the launcher's flags."""

import sys

import pytest

from luthier.errors import UserError
from luthier.sweep import local
from luthier.sweep.local import LaunchCommand
from luthier.sweep.settings import LocalSettings

FOUR = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}


def rooms(environ, processes=1, on_cpu=False, **settings):
    made = local.make_slots(LocalSettings(kind="basic", **settings), processes, on_cpu, environ)
    return [slot.environment().get("CUDA_VISIBLE_DEVICES") for slot in made]


SLOTS = {
    "a GPU each": (FOUR, {}, ["0", "1", "2", "3"]),
    "as many as asked for": (FOUR, {"slots": 2}, ["0", "1"]),
    "a GPU for each process": (FOUR, {"processes": 2}, ["0,1", "2,3"]),
    "two for one process": (FOUR, {"gpus_per_trial": 2}, ["0,1", "2,3"]),
    "one is left over": (FOUR, {"processes": 3}, ["0,1,2"]),
    "two share one": (FOUR, {"gpus_per_trial": 0.5, "gpus": [2, 3]}, ["2", "3", "2", "3"]),
    "GPUs by name": ({"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"}, {}, ["GPU-a", "GPU-b"]),
    "hidden GPUs": ({"CUDA_VISIBLE_DEVICES": "-1"}, {}, [None]),
    "the CPU was asked for": (FOUR, {"on_cpu": True, "slots": 3}, [None, None, None]),
}


@pytest.mark.parametrize("environ, settings, wanted", SLOTS.values(), ids=SLOTS)
def test_slots(environ, settings, wanted):
    assert rooms(environ, **settings) == wanted


NONE = {
    "a trial needs more than there are": (FOUR, {"gpus_per_trial": 8}, "not one fits"),
    "more processes than GPUs": (FOUR, {"processes": 8}, "not one fits"),
    "more slots than GPUs": (FOUR, {"slots": 5}, "Ask for 4"),
    "GPUs where there are none": (
        {"CUDA_VISIBLE_DEVICES": ""},
        {"gpus_per_trial": 1},
        "shows none",
    ),
    "GPUs for the CPU": (FOUR, {"gpus_per_trial": 1, "on_cpu": True}, "the CPU was asked for"),
    "one and a half": (FOUR, {"gpus_per_trial": 1.5}, "no whole number"),
}


@pytest.mark.parametrize("environ, settings, said", NONE.values(), ids=NONE)
def test_no_slots(environ, settings, said):
    with pytest.raises(UserError, match=said):
        rooms(environ, **settings)


def test_trials_that_share_a_cpu_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    two = local.make_slots(LocalSettings(kind="basic", slots=2), 2, True, {})
    assert [slot.environment() for slot in two] == [{"OMP_NUM_THREADS": "2"}] * 2
    assert local.make_slots(LocalSettings(kind="basic"), 1, True, {})[0].environment() == {}
    own = {"OMP_NUM_THREADS": "3"}
    assert (
        local.make_slots(LocalSettings(kind="basic", slots=2), 1, True, own)[0].environment() == {}
    )


def test_plain_python_is_enough_for_one_process():
    command = LaunchCommand(("train.py",)).command(["recipe=x"], has_gpus=True)
    assert command == [sys.executable, "train.py", "recipe=x"]


def test_a_launch_keeps_its_flags_and_gets_a_port_and_the_slots_gpus():
    launch = LaunchCommand(("-m", "luthier", "train"), ("--config_file", "launch/ddp.yaml"), 2)
    assert launch.command(["recipe=x"], has_gpus=True)[1:] == [
        "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "launch/ddp.yaml",
        "--gpu_ids", "all", "--main_process_port", "0", "--quiet",
        "-m", "luthier", "train", "recipe=x",
    ]  # fmt: skip
    own = LaunchCommand(("train.py",), ("-q", "--main-process-port=29501"), 1)
    assert own.command([], has_gpus=False)[3:] == [
        "launch", "-q", "--main-process-port=29501", "train.py",
    ]  # fmt: skip


def test_flags_of_the_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.yaml").write_text("num_processes: 2\nuse_cpu: true\n")
    found = local.find_launch_command(
        LocalSettings(kind="basic", accelerate="--config_file two.yaml"), {}
    )
    assert (found.flags, found.processes, found.on_cpu) == (("--config_file", "two.yaml"), 2, True)
    none = local.find_launch_command(
        LocalSettings(kind="basic", accelerate="--mixed_precision bf16"), {"HF_HOME": "x"}
    )
    assert none.flags == ("--mixed_precision", "bf16", "--num_processes", "1")


def test_several_machines_are_refused(tmp_path):
    with pytest.raises(UserError, match="2 machines"):
        local.find_launch_command(
            LocalSettings(kind="basic", accelerate="--num_machines 2 --num_processes 4"), {}
        )


def test_a_sweep_under_torchrun_starts_trials_with_it():
    rank = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0",
            "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "KEPT": "1"}  # fmt: skip
    found = local.find_launch_command(LocalSettings(kind="basic"), rank)
    assert found.environ == {"KEPT": "1"}
    assert found.command(["recipe=x"], has_gpus=False)[1:6] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
    ]  # fmt: skip
