"""`luthier reproduce RUN` trains a run again from its record, and says if it is the same."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from luthier.cli import diff
from luthier.cli.arguments import TRUST, CommandLine
from luthier.cli.rerun import load_run_config
from luthier.config.renamed_settings import read_recorded_config
from luthier.config.trust import TRUST_FLAG, Trust, trust_of
from luthier.errors import UserError
from luthier.record.record import read_metrics, read_record
from luthier.record.run_dir import find_run, inspect_run, open_run
from luthier.storage.manifest import hash_file
from luthier.train.signals import STOPPED_EXIT_CODE

COMMAND_LINE = CommandLine(
    "reproduce",
    "luthier reproduce RUN [--trust]\n\n"
    "Trains a finished run again in a folder beside it (RUN.again), from its record alone: with\n"
    "its config, whatever the recipe says today, and as many processes. Then compares every line\n"
    "of metrics and the final weights, bit by bit. Ends with 0 where all are identical; else it\n"
    "ends with 1, and names the first step that differs and what differs in the environment.",
    (TRUST,),
    "  luthier reproduce runs/quickstart/default\n",
)
AGAIN = ".again"
# These need no config file of accelerate: the number of processes says all.
_SHARDED = ("none", "ddp")
_LAUNCHES = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")
"""Ways of a launch (`distributed_type`) that are repeated."""
_LAUNCH_SETTINGS = (
    *("distributed_type", "mixed_precision", "use_cpu", "gpu_ids", "downcast_bf16", "debug"),
    *("fsdp_config", "deepspeed_config", "parallelism_config", "dynamo_config", "fp8_config"),
    *("main_process_port", "rdzv_backend", "same_network", "enable_cpu_affinity"),
)
"""Settings of a launch that are taken from a record."""


def run(arguments: list[str]) -> int:
    """Repeat a run; raises UserError where its record does not say how."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    parsed = COMMAND_LINE.parse(arguments)
    typed, trust = parsed.overrides, trust_of(parsed.switches)
    if len(typed) != 1:
        raise UserError("`luthier reproduce` needs one run: luthier reproduce runs/RECIPE/NAME")
    # Resolved, because the training starts in the folder in which the run was started.
    old = find_run(typed[0]).resolve()
    record = read_record(old)
    check_reproducible(old, record)
    # Checked here, where it can be said before a folder is made and processes are started.
    load_run_config(old, trust)
    new = old.with_name(f"{old.name}{AGAIN}")
    prepare_folder(old, new)
    code = train_again(record, new, trust)
    if code:
        print(f"the repetition in {new} did not come to its end (exit code {code})")
        return code
    return report_differences(old, new)


def check_reproducible(folder: Path, record: dict[str, Any]) -> None:
    """Raise UserError where a run cannot be repeated from its record."""
    if record.get("status") != "finished":
        raise UserError(
            f"{folder}: the run is not finished (status: {record.get('status', 'unknown')}), so "
            "there is no end to compare with.\nFinish it first, with the command that began it."
        )
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: there is no config.yaml, from which the run could be repeated.")
    sharding = (record.get("launch") or {}).get("sharding", "none")
    if sharding not in _SHARDED and not _launcher(record).get("config"):
        raise UserError(
            f"{folder}: the run was launched with {sharding}, and its record does not say by which "
            "config file of accelerate.\nLaunch it by hand into another output_dir, and compare "
            "the two with luthier diff."
        )
    if (_launcher(record).get("config") or {}).get("num_machines", 1) > 1:
        raise UserError(
            f"{folder}: the run was launched on several machines, which cannot be done from here.\n"
            "Launch it as before with another output_dir, and compare the two with luthier diff."
        )


def prepare_folder(old: Path, new: Path) -> None:
    """Make the folder of the repetition, with the config of the run but for its trackers."""
    config = read_recorded_config(old / "config.yaml")
    resolved = config | {
        "output_dir": str(new), "tracker": {"to": []}, "overwrite": False, "dry_run": False,
    }  # fmt: skip
    # An earlier repetition that ended is replaced; one that was interrupted goes on.
    is_finished = inspect_run(new, resolved).state == "finished"
    # The process that trains takes the folder for itself: here it is only filled.
    with open_run(new, resolved, [], overwrite=is_finished):
        pass


def train_again(record: dict[str, Any], new: Path, trust: Trust) -> int:
    """Train in processes that are launched as the run's were; returns the exit code."""
    # The number of threads decides the order in which torch adds on a CPU, and so the last bits.
    threads = str(record.get("hardware", {}).get("torch_threads", ""))
    environment = os.environ | ({"OMP_NUM_THREADS": threads} if threads else {})
    precision = (record.get("launch") or {}).get("precision", "no")
    environment |= {"ACCELERATE_MIXED_PRECISION": precision} if precision != "no" else {}
    # The record names the folder: Python must not take its own libraries from there.
    environment |= {"PYTHONSAFEPATH": "1"}
    where = Path(record.get("cwd", "."))
    # A signal that ends this process has the training stop with a checkpoint.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    flags = [TRUST_FLAG] if trust.everything else []
    # accelerate launch ends with 1 whatever its processes end with, so these write their exit code
    # into a file.
    with TemporaryDirectory() as folder:
        code = Path(folder) / "code"
        process = subprocess.Popen(
            [*_command(record, Path(folder)), str(new), *flags],
            cwd=where if where.is_dir() else None,
            env=environment | {"LUTHIER_EXIT_FILE": str(code)},
        )
        try:
            ended = process.wait()
        except KeyboardInterrupt:
            # Ctrl-C reaches the child through the terminal; a SIGTERM to this process alone does
            # not.
            process.send_signal(signal.SIGINT)
            ended = process.wait()
        exit_text = code.read_text(encoding="utf-8").strip() if code.is_file() else ""
        return STOPPED_EXIT_CODE if exit_text == str(STOPPED_EXIT_CODE) else ended


def _command(record: dict[str, Any], code_file: Path) -> list[str]:
    """Return the command of the training: plain Python, or accelerate as it was configured."""
    launch = record.get("launch") or {}
    module = ["-m", "luthier.cli.rerun"]
    if launch.get("processes", 1) == 1 and launch.get("sharding", "none") == "none":
        return [sys.executable, *module]
    config = _launch_config(record)
    # accelerate uses a GPU where there is one, unless it is told to use the CPU. It also refuses
    # several processes with fewer than two GPU ids ("Less than two GPU ids were configured").
    if launch.get("device") == "cpu":
        config = config | {"use_cpu": True, "gpu_ids": ",".join(["-1"] * launch["processes"])}
    config = config | {"num_processes": launch["processes"], "num_machines": 1}
    # Port 0 lets torch choose a free one: the port of the first run may be taken today.
    config = {"main_process_port": 0} | config
    file = code_file / "launch.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    start = ["accelerate.commands.launch", "--quiet", "--config_file", str(file)]
    return [sys.executable, "-m", *start, *module]


def _launch_config(record: dict[str, Any]) -> dict[str, Any]:
    """Return the config of accelerate that the record holds, of which nothing starts a program."""
    config = _launcher(record).get("config") or {"distributed_type": "MULTI_GPU"}
    if config.get("distributed_type") not in _LAUNCHES:
        raise UserError(
            f"run.json: the run was launched as {config.get('distributed_type')}, which is not "
            f"repeated from a record. Known are {', '.join(_LAUNCHES)}."
        )
    # Hosts, commands and files of other launchers, which accelerate would start.
    return {name: value for name, value in config.items() if name in _LAUNCH_SETTINGS}


def _launcher(record: dict[str, Any]) -> dict[str, Any]:
    launcher: dict[str, Any] = (record.get("launch") or {}).get("launcher") or {}
    return launcher


def report_differences(old: Path, new: Path) -> int:
    """Say whether two finished runs are the same to the last bit, and if not, what differs."""
    step, weights = diff.first_step(old, new), differing_weights(old, new)
    results = next(lines for name, lines in diff.compare(old, new) if name == "results")
    if not step and not weights and not results:
        rows = len(diff.steps(old))
        print(f"identical: {rows} lines of metrics, all results, and the final weights, bit by bit")
        print(f"  {old}\n  {new}")
        return 0
    print(f"not identical: {old}\n               {new}")
    for name, value, other in step or [("metrics.jsonl", "the same", "the same")]:
        print(f"  {name}: {value} -> {other}")
    for line in weights or ["the final weights are the same"]:
        print(f"  {line}")
    _print_reasons(old, new)
    return 1


def differing_weights(old: Path, new: Path) -> list[str]:
    """Return a line for each file of final weights that is not the same in both."""
    hashes = [
        {file.name: hash_file(file) for file in (run / "model").glob("*.safetensors")}
        for run in (old, new)
    ]
    return [
        f"model/{name}: SHA-256 {hashes[0].get(name, 'absent')[:16]} -> "
        f"{hashes[1].get(name, 'absent')[:16]}"
        for name in sorted(hashes[0].keys() | hashes[1].keys())
        if hashes[0].get(name) != hashes[1].get(name)
    ]


def _print_reasons(old: Path, new: Path) -> None:
    """Say what could be the reason: what differs in the environment, and what varies anyway."""
    groups = [group for group in diff.compare(old, new) if group[0] not in ("config", "results")]
    record = read_record(old)
    if any(lines for _, lines in groups):
        print("what differs in the environment:")
    for heading, lines in groups:
        for name, value, other in lines:
            print(f"  {heading}, {name}: {value} -> {other}")
    for extension in record.get("extended", []):
        print(
            f"the run was made longer at step {extension['at_step']}: "
            f"{', '.join(extension['changes'])}"
        )
    on_cpu = (record.get("launch") or {}).get("device") == "cpu"
    if not record.get("seeds", {}).get("deterministic") and not on_cpu:
        print("the run was not deterministic: with deterministic=true, GPU kernels do not vary")
    if not read_metrics(old):
        print("the run left no metrics to compare")
