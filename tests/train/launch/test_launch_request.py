"""What the launcher was asked for is read as accelerate reads it."""

import pytest

from luthier.train.launch.request import (
    extract_launcher_flags,
    find_unknown_keys,
    parse_launch_command,
    parse_launch_environment,
    read_launch_request,
)

DDP = "distributed_type: MULTI_GPU\nnum_processes: 4\nmixed_precision: bf16\n"
FSDP = "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 2}\n"
ZERO = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {zero_stage: 3}\n"
MULTI_CPU = "distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n"
NO = "distributed_type: 'NO'\nmixed_precision: 'no'\n"
JSON = '{"distributed_type": "FSDP", "num_processes": 3, "mixed_precision": "fp16"}'


def as_accelerate_reads_it(words: list[str]) -> dict:
    """Parse a command with accelerate's own parser, loader and rules."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    args, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args([*words, "train.py"])
    )
    modes = {"use_deepspeed": "deepspeed", "use_fsdp": "fsdp", "multi_gpu": "ddp"}
    kind = next((name for flag, name in modes.items() if getattr(args, flag)), None)
    return {
        "num_processes": args.num_processes,
        "distributed": kind,
        "mixed_precision": args.mixed_precision,
        "use_cpu": bool(args.cpu or args.use_cpu),
        "zero_stage": args.zero_stage,
        "file": defaults is not None,
    }


@pytest.mark.parametrize("default", [False, True], ids=["given", "default"])
@pytest.mark.parametrize(
    ("flags", "file"),
    [
        pytest.param(["--num_processes", "1"], None, id="one"),
        pytest.param(["--num-processes=1", "--cpu"], None, id="hyphens"),
        pytest.param(["--multi_gpu", "--num_processes", "2"], None, id="multi-gpu"),
        pytest.param(["--use_fsdp", "--num_processes", "2"], None, id="use-fsdp"),
        pytest.param(["--main_process_port", "0", "--num_processes", "2"], DDP, id="flag-wins"),
        pytest.param([], DDP, id="ddp"),
        pytest.param(["-q"], FSDP, id="fsdp"),
        pytest.param(["--multi_gpu"], FSDP, id="flag-drops-fsdp"),
        pytest.param([], ZERO, id="zero"),
        pytest.param(["--zero_stage", "2"], ZERO, id="other-stage"),
        pytest.param(["--mixed_precision=no"], DDP, id="other-precision"),
        pytest.param([], MULTI_CPU, id="multi-cpu"),
        pytest.param(["--cpu"], FSDP, id="cpu-and-fsdp"),
        pytest.param([], NO, id="no"),
        pytest.param([], JSON, id="json-text"),
    ],
)
def test_agrees_with_accelerate(flags, file, default, tmp_path, monkeypatch):
    from accelerate.commands import launch
    from accelerate.commands.config import config_args

    path = tmp_path / "accelerate" / "default_config.yaml"
    for module in (launch, config_args):
        # accelerate settles this path when it is imported.
        monkeypatch.setattr(module, "default_config_file", str(path))
    if file is not None:
        path.parent.mkdir()
        path.write_text(file)
    words = list(flags) if default or file is None else [*flags, "--config_file", str(path)]
    launch_request = parse_launch_command(words, tmp_path, {"HF_HOME": str(tmp_path)})
    theirs = as_accelerate_reads_it(words)
    assert (launch_request.config_file is not None) == theirs["file"]
    assert (launch_request.num_processes or theirs["num_processes"]) == theirs["num_processes"]
    assert (None if launch_request.distributed == "none" else launch_request.distributed) in (
        theirs["distributed"],
        # accelerate knows no type for processes on CPUs: that is the trap.
        "ddp" if file == MULTI_CPU else theirs["distributed"],
    )
    assert (launch_request.mixed_precision or "no") == theirs["mixed_precision"]
    assert launch_request.use_cpu == theirs["use_cpu"]
    assert launch_request.zero_stage == theirs["zero_stage"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], {"num_processes": "`num_processes: 4` in my.yaml"}),
        (["--num_processes", "2"], {"num_processes": "`--num_processes 2`"}),
        ([], {"distributed": "`distributed_type: MULTI_GPU` in my.yaml"}),
        (["--use_fsdp"], {"distributed": "`--use_fsdp`"}),
        (["--cpu"], {"use_cpu": "`--cpu`"}),
        ([], {"mixed_precision": "`mixed_precision: bf16` in my.yaml"}),
    ],
    ids=lambda value: " ".join(value) or "file" if isinstance(value, list) else next(iter(value)),
)
def test_says_who_asked(flags, said, tmp_path):
    (tmp_path / "my.yaml").write_text(DDP)
    launch_request = parse_launch_command([*flags, "--config_file", "my.yaml"], tmp_path, {})
    assert {name: launch_request.set_by[name] for name in said} == said


PYTHON = "/usr/bin/python3"
CHILD = [PYTHON, "train.py", "recipe=x"]


@pytest.mark.parametrize(
    ("command", "child", "flags"),
    [
        pytest.param(
            [PYTHON, "/v/bin/accelerate", "launch", "--cpu", "train.py", "recipe=x"],
            CHILD,
            ["--cpu"],
            id="console-script",
        ),
        pytest.param(
            [PYTHON, "/v/bin/accelerate-launch", "--cpu", "train.py", "recipe=x"],
            CHILD,
            ["--cpu"],
            id="accelerate-launch",
        ),
        pytest.param(
            [PYTHON, "-m", "accelerate.commands.launch", "--cpu", "train.py", "recipe=x"],
            CHILD,
            ["--cpu"],
            id="module",
        ),
        pytest.param(
            [
                PYTHON,
                "/v/bin/accelerate",
                "launch",
                "--multi_gpu",
                "-m",
                "luthier",
                "train",
            ],
            [PYTHON, "-u", "-m", "luthier", "train"],
            ["--multi_gpu"],
            id="runs-a-module",
        ),
        pytest.param(
            [PYTHON, "/v/bin/accelerate", "launch", "train.py", "--cpu"],
            [PYTHON, "-u", "train.py", "--cpu"],
            [],
            id="the-script-has-flags",
        ),
        pytest.param([PYTHON, "/v/bin/accelerate", "env"], CHILD, None, id="not-launch"),
        pytest.param([PYTHON, "-m", "pytest", "accelerate"], CHILD, None, id="pytest"),
        pytest.param([PYTHON, "-m", "ipykernel_launcher"], CHILD, None, id="notebook"),
        pytest.param([PYTHON], CHILD, None, id="interactive"),
    ],
)
def test_finds_the_launchers_own_words(command, child, flags):
    assert extract_launcher_flags(command, child) == flags


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param({}, None, id="nobody-asked"),
        pytest.param({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, None, id="srun"),
        pytest.param({"WORLD_SIZE": "2"}, {"num_processes": 2}, id="torchrun"),
        pytest.param({"ACCELERATE_USE_FSDP": "true"}, {"distributed": "fsdp"}, id="fsdp"),
        pytest.param({"ACCELERATE_USE_DEEPSPEED": "1"}, {"distributed": "deepspeed"}, id="zero"),
        pytest.param({"ACCELERATE_USE_CPU": "True"}, {"use_cpu": True}, id="cpu"),
        pytest.param({"ACCELERATE_USE_CPU": "False"}, None, id="not-cpu"),
        pytest.param(
            {"ACCELERATE_MIXED_PRECISION": "bf16"}, {"mixed_precision": "bf16"}, id="bf16"
        ),
    ],
)
def test_reads_the_environment(environ, expected):
    launch_request = parse_launch_environment(environ)
    if expected is None:
        assert launch_request is None
    else:
        assert launch_request is not None
        assert {name: getattr(launch_request, name) for name in expected} == expected
        assert set(launch_request.set_by) == set(expected)


def test_reads_sizes_of_the_environment():
    sizes = {"PARALLELISM_CONFIG_CP_SIZE": "2", "PARALLELISM_CONFIG_TP_SIZE": "1"}
    assert parse_launch_environment(sizes) is None
    request = parse_launch_environment(sizes | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"})
    assert request is not None
    assert request.parallelism == {"cp_size": 2}
    assert request.set_by == {"cp_size": "`PARALLELISM_CONFIG_CP_SIZE=2` in the environment"}


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        pytest.param(FSDP, [], id="known"),
        pytest.param("fsdp_config: {version: 2}", [], id="prefix-left-out"),
        pytest.param("fsdp_config: {fsdp_verson: 2}", ["fsdp_verson"], id="fsdp"),
        pytest.param("deepspeed_config: {stage: 3}", ["stage"], id="deepspeed"),
        pytest.param("dynamo_config: {dynamo_backend: INDUCTOR}", [], id="dynamo"),
    ],
)
def test_finds_keys_that_accelerate_ignores(text, unknown, tmp_path):
    path = tmp_path / "asked.yaml"
    path.write_text(text)
    assert [key for _, key, _ in find_unknown_keys(path)] == unknown


def test_this_test_run_was_not_launched():
    assert read_launch_request() is None
