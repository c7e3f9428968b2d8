"""Every file in launch/: accelerate takes it, each key is explained, the script quotes well."""

import os
import subprocess
from pathlib import Path

import pytest

from luthier.train.launch.request import find_unknown_keys, parse_launch_command

LAUNCH = Path(__file__).parents[3] / "launch"
CONFIGS = sorted(LAUNCH.glob("*.yaml"))

ASKED = {
    "cpu": (1, "none", "no", True),
    "cpu_ddp": (2, "ddp", "no", True),
    "single_gpu": (1, "none", "bf16", False),
    "ddp": (8, "ddp", "bf16", False),
    "fsdp2": (8, "fsdp", "bf16", False),
    "zero2": (8, "deepspeed", "bf16", False),
    "zero3": (8, "deepspeed", "bf16", False),
}


def test_every_config_is_here():
    assert {path.stem for path in CONFIGS} == set(ASKED)
    readme = (LAUNCH / "README.md").read_text()
    assert all(f"`{path.name}`" in readme for path in [*CONFIGS, LAUNCH / "slurm.sh"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_opens_with_what_needs_and_command(path):
    what, needs, command, *_ = path.read_text().splitlines()
    assert what.startswith("# ")
    assert needs.startswith("# Needs: ")
    assert command.startswith(f"# Command: accelerate launch --config_file launch/{path.name} ")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_is_explained(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    groups = ("fsdp_config:", "deepspeed_config:")
    assert [line for line in lines if " # " not in line and line not in groups] == []
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_it_as_we_read_it(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    load_config_from_file(str(path))  # refuses unknown keys at the top
    assert find_unknown_keys(path) == []
    words = ["--config_file", str(path)]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "train.py"]))
    launch_request = parse_launch_command(words, LAUNCH, {})
    count, distributed, precision, cpu = ASKED[path.stem]
    assert (launch_request.num_processes, args.num_processes) == (count, count)
    assert (launch_request.mixed_precision, args.mixed_precision) == (precision, precision)
    assert (launch_request.use_cpu, args.use_cpu) == (cpu, cpu)
    assert launch_request.distributed == distributed
    assert args.use_fsdp == (distributed == "fsdp")
    assert args.use_deepspeed == (distributed == "deepspeed")
    assert args.multi_gpu == (distributed == "ddp")


def test_fsdp2_reaches_the_plugin(monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", str(LAUNCH / "fsdp2.yaml"), "train.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"


@pytest.fixture
def cluster(tmp_path):
    """A folder with stand-ins for SLURM's commands and a virtual environment, and its variables."""
    commands = {
        "scontrol": "printf 'node1\\nnode2\\n'",
        # Starts the task as srun does on its second machine.
        "srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=1 exec "$@"',
        "accelerate": 'trap -p USR1; printf "[%s]\\n" "$@"',
    }
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    for name, body in commands.items():
        script = tmp_path / name
        script.write_text(f"#!/usr/bin/env bash\n{body}\n")
        script.chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "40001",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_GPUS_ON_NODE": "4",
    }


def sbatch(arguments: list[str], variables: dict[str, str]):
    command = ["bash", str(LAUNCH / "slurm.sh"), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def test_slurm_script_starts_each_machine(cluster):
    from accelerate.commands.launch import launch_command_parser

    arguments = ["recipe=x", 'dataset.system=You\'re "kind" & $brief', ""]
    done = sbatch(arguments, cluster)
    assert done.returncode == 0, done.stderr
    signal, subcommand, *words = done.stdout.splitlines()
    assert subcommand == "[launch]"
    assert signal == "trap -- '' SIGUSR1", "the launcher must outlive the warning signal"
    args = launch_command_parser().parse_args([word[1:-1] for word in words])
    assert (args.num_machines, args.machine_rank, args.num_processes) == (2, 1, 8)
    assert (args.main_process_ip, args.main_process_port) == ("node1", 20001)
    assert args.config_file == "launch/fsdp2.yaml"
    assert args.training_script == "train.py"
    assert args.training_script_args == arguments


ENDS = [
    ("stopped by a signal", 75, 1, 0, "scontrol requeue 40001"),
    ("a mistake", 2, 1, 1, ""),
    ("finished", 0, 0, 0, ""),
]


@pytest.mark.parametrize(
    ("left", "launcher", "code", "asked"), [e[1:] for e in ENDS], ids=[e[0] for e in ENDS]
)
def test_slurm_puts_a_stopped_job_back_into_the_queue(
    cluster, tmp_path, left, launcher, code, asked
):
    (tmp_path / "accelerate").write_text(
        f'#!/usr/bin/env bash\necho {left} > "$LUTHIER_EXIT_FILE"\nexit {launcher}\n'
    )
    (tmp_path / "scontrol").write_text(
        '#!/usr/bin/env bash\n[[ $1 == requeue ]] && echo "scontrol $*" >&2\nprintf "node1\\n"\n'
    )
    done = sbatch(["recipe=x"], cluster)
    assert done.returncode == code
    assert done.stderr.strip() == asked
    assert not list(tmp_path.glob(".luthier-*"))


@pytest.mark.parametrize(
    ("arguments", "without", "message"),
    [
        pytest.param([], "", "usage: sbatch", id="no-recipe"),
        pytest.param(["recipe=x"], "SLURM_GPUS_ON_NODE", "ask for GPUs", id="no-gpus"),
        pytest.param(["recipe=x"], "SLURM_SUBMIT_DIR", "with sbatch", id="not-sbatch"),
    ],
)
def test_slurm_script_says_what_is_missing(cluster, arguments, without, message):
    cluster.pop(without, None)
    done = sbatch(arguments, cluster)
    assert done.returncode != 0
    assert message in done.stderr


def test_slurm_starts_one_launcher_a_machine_and_warns_it():
    directives = [
        line.removeprefix("#SBATCH ")
        for line in (LAUNCH / "slurm.sh").read_text().splitlines()
        if line.startswith("#SBATCH ")
    ]
    assert "--ntasks-per-node=1" in directives
    assert "--signal=USR1@120" in directives
