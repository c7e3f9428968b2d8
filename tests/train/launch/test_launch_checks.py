"""Each way in which accelerate gives way in silence, and what luthier says instead."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from luthier.errors import UserError, report_error
from luthier.train.launch import checks
from luthier.train.launch.request import parse_launch_command, parse_launch_environment

FILE = ["--config_file", "asked.yaml"]
RANK = {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}
VARIABLES = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", *checks._MPI_SIZES)
MULTI_CPU = "distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n"
MPI = MULTI_CPU + "mpirun_config: {mpirun_hostfile: hosts}\n"
CPU_DDP = "distributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: true\n"
FSDP = "distributed_type: FSDP\nnum_processes: 2\n"
HYBRID = "parallelism_config: {parallelism_config_dp_shard_size: 2}\n"
MACHINES = "distributed_type: MULTI_GPU\nnum_processes: 5\nnum_machines: 2\n"


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """Have the launcher asked by these words, with this config file and environment."""

    def give(words: list[str], file: str | None = None, **environ: str) -> None:
        for name in (*VARIABLES, "ACCELERATE_USE_CPU", "TORCHELASTIC_ERROR_FILE"):
            # Set first, so that what check_launch_request sets is undone too.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        if file is not None:
            (tmp_path / "asked.yaml").write_text(file)
        launch_request = parse_launch_command(
            words, tmp_path, {"HF_HOME": str(tmp_path), **environ}
        )
        monkeypatch.setattr(checks, "read_launch_request", lambda: launch_request)

    return give


@pytest.mark.parametrize(
    ("words", "file", "environ"),
    [
        pytest.param([], None, {}, id="nothing-asked"),
        pytest.param(["--num_processes", "1"], None, {}, id="one"),
        pytest.param(["--multi_gpu", "--num_processes", "2"], None, RANK, id="two"),
        pytest.param(["--multi_gpu"], None, RANK, id="as-many-as-there-are"),
        pytest.param(FILE, CPU_DDP, RANK, id="two-on-cpu"),
        pytest.param(FILE, MPI, {"OMPI_COMM_WORLD_SIZE": "2"}, id="mpirun"),
        pytest.param(FILE, FSDP + HYBRID, RANK, id="copies-of-slices"),
        pytest.param(["--num_processes", "1"], None, {"SLURM_NTASKS": "4"}, id="slurm"),
    ],
)
def test_no_false_alarm(ask, words, file, environ):
    ask(words, file, **environ)
    checks.check_launch_request()


@pytest.mark.parametrize(
    ("words", "file", "environ", "parts"),
    [
        pytest.param(
            FILE,
            MULTI_CPU,
            {},
            ["2 processes were asked for (`num_processes: 2` in asked.yaml)", "1 would", "mpirun"],
            id="multi-cpu",
        ),
        pytest.param(
            ["--num_processes", "2"],
            None,
            {},
            ["`--num_processes 2`", "only for --multi_gpu"],
            id="num-processes-alone",
        ),
        pytest.param(
            ["--cpu", "--num_processes", "2"], None, {}, ["`--cpu` starts one process"], id="cpu"
        ),
        pytest.param(
            FILE,
            MACHINES,
            {"LOCAL_RANK": "0", "WORLD_SIZE": "4"},
            ["5 processes were", "4 would", "evenly over 2 machines"],
            id="machines",
        ),
        pytest.param(
            ["--num_processes", "1"],
            None,
            RANK,
            ["1 process was", "WORLD_SIZE=2 by another launcher"],
            id="launcher-within-a-launcher",
        ),
        pytest.param(
            [], None, {"WORLD_SIZE": "2"}, ["without LOCAL_RANK", "trains alone"], id="world-size"
        ),
        pytest.param(
            [*FILE, "--cpu"],
            FSDP,
            {},
            ["FSDP (`distributed_type: FSDP` in asked.yaml) and the CPU (`--cpu`)"],
            id="fsdp-on-cpu",
        ),
        pytest.param(
            FILE,
            "distributed_type: DEEPSPEED\nnum_processes: 2\nuse_cpu: true\n",
            RANK,
            ["DeepSpeed (", "`use_cpu: true` in asked.yaml"],
            id="zero-on-cpu",
        ),
        pytest.param(
            FILE,
            FSDP + "fsdp_config: {fsdp_verson: 2}\n",
            RANK,
            ["fsdp_config.fsdp_verson (did you mean fsdp_version?)"],
            id="misspelt-key",
        ),
        *(
            pytest.param(
                FILE,
                FSDP + f"parallelism_config: {{parallelism_config_{key}: 2}}\n",
                RANK,
                [
                    f"{kind} parallelism was asked for (`parallelism_config_{key}: 2` in asked",
                    "Instead: luthier launch --config fsdp2",
                ],
                id=key,
            )
            for key, kind in (
                ("tp_size", "Tensor"),
                ("cp_size", "Context"),
                ("sp_size", "Sequence"),
            )
        ),
        pytest.param(
            [*FILE, "--parallelism_config_cp_size", "4"],
            FSDP,
            RANK,
            ["Context parallelism was asked for (`--parallelism_config_cp_size 4`)"],
            id="cp-by-flag",
        ),
        pytest.param(
            FILE,
            "distributed_type: MEGATRON_LM\nnum_processes: 2\n",
            RANK,
            ["Megatron-LM was asked for (`distributed_type: MEGATRON_LM` in asked.yaml)"],
            id="megatron",
        ),
    ],
)
def test_stops_before_torch(ask, words, file, environ, parts):
    ask(words, file, **environ)
    with pytest.raises(UserError) as stopped:
        checks.check_launch_request()
    for part in parts:
        assert part in str(stopped.value)


def test_use_cpu_is_passed_on(ask):
    ask(FILE, CPU_DDP, **RANK)
    checks.check_launch_request()
    assert checks.os.environ["ACCELERATE_USE_CPU"] == "true"


def state(device: str, processes: int) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), num_processes=processes)


@pytest.mark.parametrize(
    ("words", "environ", "state", "part"),
    [
        pytest.param([], {}, state("cpu", 1), None, id="plain"),
        pytest.param([], RANK, state("cpu", 2), None, id="two-on-cpu"),
        pytest.param([], RANK, state("cpu", 1), "each would train alone", id="alone"),
        pytest.param(["--use_fsdp"], RANK, state("mps", 1), "no GPU here", id="fsdp-mps"),
        pytest.param(["--use_deepspeed"], RANK, state("cpu", 2), "DeepSpeed was", id="zero-cpu"),
        pytest.param(["--cpu"], {}, state("mps", 1), "but mps is used", id="cpu-on-mps"),
        pytest.param(
            [],
            RANK | {"LOCAL_WORLD_SIZE": str(torch.cuda.device_count() + 1)},
            state("cuda", 2),
            "would put several on one",
            id="too-few-gpus",
        ),
    ],
)
def test_devices(ask, words, environ, state, part):
    ask(words, None, **environ)
    if part is None:
        checks.check_devices(state)
    else:
        with pytest.raises(UserError, match=part):
            checks.check_devices(state)


def facts(sharding: str = "none", precision: str = "no", device: str = "cuda"):
    return checks.LaunchFacts(processes=2, sharding=sharding, precision=precision, device=device)


@pytest.mark.parametrize(
    ("words", "file", "facts", "part"),
    [
        pytest.param([], None, facts(), None, id="nothing-asked"),
        pytest.param(["--use_fsdp"], None, facts("fsdp2"), None, id="fsdp"),
        pytest.param(["--use_fsdp"], None, facts("ddp"), "ddp runs", id="fsdp-lost"),
        pytest.param(["--use_deepspeed"], None, facts("zero2"), None, id="zero-any"),
        pytest.param(["--use_deepspeed"], None, facts("ddp"), "ddp runs", id="zero-lost"),
        pytest.param(
            ["--use_deepspeed", "--zero_stage", "3"],
            None,
            facts("zero2"),
            r"zero3 was asked for \(`--zero_stage 3`\), but zero2 runs",
            id="other-stage",
        ),
        pytest.param(["--mixed_precision", "bf16"], None, facts(precision="bf16"), None, id="bf16"),
        pytest.param(["--mixed_precision", "no"], None, facts(precision="bf16"), None, id="recipe"),
        pytest.param(
            ["--mixed_precision", "bf16"], None, facts(), "but no runs", id="precision-lost"
        ),
        pytest.param(
            ["--mixed_precision", "fp8"], None, facts(precision="fp16"), "but fp16 runs", id="fp8"
        ),
        pytest.param(
            ["--mixed_precision", "fp16"],
            None,
            facts(precision="fp16", device="cpu"),
            "train in float32",
            id="fp16-on-cpu",
        ),
    ],
)
def test_running(ask, words, file, facts, part):
    ask(words, file)
    stops = pytest.raises(UserError, match=part) if part is not None else nullcontext()
    with stops:
        checks._refuse_other_sharding(checks.read_launch_request(), facts)
        checks._refuse_other_precision(checks.read_launch_request(), facts)


def test_splitting_a_batch_over_gpus_stops():
    checks._refuse_data_parallel(SimpleNamespace(n_gpu=1))
    with pytest.raises(UserError, match="the 4 GPUs that it sees"):
        checks._refuse_data_parallel(SimpleNamespace(n_gpu=4))


def test_a_mistake_is_left_for_the_launcher(ask, tmp_path, capsys):
    ask([], None, TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"), RANK="0")
    assert report_error(UserError("two lines\nof words")) == 2
    assert capsys.readouterr().err == "two lines\nof words\n"
    note = json.loads((tmp_path / "error.json").read_text())["message"]
    assert note["message"] == "two lines\nof words"
    assert note["extraInfo"]["timestamp"].isdigit()


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("launch", "environ", "message"),
    [
        pytest.param({"processes": 1, "sharding": "none"}, {}, None, id="as-before"),
        pytest.param({"processes": 2, "sharding": "fsdp2"}, RANK | FSDP2, None, id="fsdp-again"),
        pytest.param({"processes": 2, "sharding": "fsdp2"}, {}, "processes 2", id="one-of-two"),
        pytest.param({"processes": 2, "sharding": "fsdp2"}, RANK, "with ddp", id="ddp-after-fsdp"),
        pytest.param({"processes": 2, "sharding": "ddp"}, RANK | FSDP2, "ddp", id="fsdp-after-ddp"),
        pytest.param({}, {}, None, id="older-record"),
    ],
)
def test_another_launch_of_a_run_is_told_before_torch(
    launch, environ, message, ask, tmp_path, monkeypatch
):
    ask([], None, **environ)
    request = parse_launch_environment(environ)
    monkeypatch.setattr(checks, "read_launch_request", lambda: request)
    content = {"status": "stopped", "launch": launch}
    (tmp_path / "run.json").write_text(json.dumps(content))
    checks.refuse_changed_launch(tmp_path)
    (tmp_path / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        checks.refuse_changed_launch(tmp_path)
