"""Every path trained in processes of its own, and each held against the reference."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import yaml

import luthier
from luthier.config.schema import ModelConfig
from luthier.doctor.path_worker import PathJob, WorkerJob
from luthier.doctor.training_paths import EXACT, Reference, TrainingPath
from luthier.model.device import choose_machine
from luthier.redaction import redact_message

PathState = Literal["right", "wrong", "not here"]
START_SECONDS, PATH_SECONDS = 60, 60
"""How long a process may take to import everything, and then for a path, before it is ended."""
_REFERENCE_NAME = "reference {}"
_LAUNCHER_VARIABLES = (
    *("ACCELERATE_", "FSDP_", "TORCHELASTIC_"),
    *("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
_WORKER = ("-m", "luthier.doctor.path_worker")


@dataclass(frozen=True)
class PathResult:
    """What became of one path."""

    path: TrainingPath
    state: PathState
    reason: str | None = None
    """Why it is wrong or not here."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """Losses, differences, tokens per second and bytes, by name."""


def run_path_tests(
    paths: list[TrainingPath], on_result: Callable[[PathResult], None]
) -> list[PathResult]:
    """Train the paths that this machine has, and return what became of each, in their order.

    `on_result` is called with each as soon as it is known. Nothing is left on the disk.
    """
    results = {p.name: PathResult(p, "not here", p.missing) for p in paths if p.missing}
    for result in results.values():
        on_result(result)
    here = [path for path in paths if not path.missing]
    with TemporaryDirectory(prefix="luthier-doctor-") as folder:
        for result in _train_paths(here, Path(folder)):
            results[result.path.name] = result
            on_result(result)
    return [results[path.name] for path in paths]


def result_as_values(result: PathResult) -> dict[str, Any]:
    """Return a result as values that JSON can hold; differences are shares of the reference."""
    path = result.path
    return {
        "name": path.name,
        "state": result.state,
        "reason": result.reason,
        "advice": path.advice if result.state == "wrong" else None,
        "tolerance": asdict(path.tolerance),
        **result.numbers,
    }


def _train_paths(paths: list[TrainingPath], folder: Path) -> Iterator[PathResult]:
    """Yield the result of each path, in the order in which they end."""
    references: list[Reference] = sorted({path.reference for path in paths})
    first = [_reference_job(name, folder) for name in references]
    by_name = {path.name: path for path in paths}
    single = [_path_job(path, folder) for path in paths if path.processes == 1]
    # In a process that has computed on the CPU, accelerate finds no GPU any more.
    groups = [[*first, *single]] if _is_on_cpu() else [first, single]
    launched = [path for path in paths if path.processes > 1]
    lines = [_run_jobs(group, folder) for group in groups]
    lines += [_run_jobs([_path_job(path, folder)], folder, path.launch) for path in launched]
    failures: dict[str, str] = {}
    for line in chain.from_iterable(lines):
        if line["name"] not in by_name:
            failures |= {line["name"]: line["problem"]} if "problem" in line else {}
            continue
        path = by_name[line["name"]]
        failure = failures.get(_REFERENCE_NAME.format(path.reference))
        if failure is not None:
            line["problem"] = f"its reference on the CPU failed: {failure}"
        yield judge_path(path, line)


def _is_on_cpu() -> bool:
    """Return whether runs on this machine choose the CPU."""
    return choose_machine(ModelConfig(path="")).device_type == "cpu"


def _reference_job(name: Reference, folder: Path) -> PathJob:
    """Return the job that makes a reference."""
    settings = ("model.dtype=float32", "model.device=cpu", "model.attention=eager")
    path = TrainingPath(_REFERENCE_NAME.format(name), settings, EXACT, "", name)
    return _path_job(path, folder, is_reference=True)


def _path_job(path: TrainingPath, folder: Path, is_reference: bool = False) -> PathJob:
    """Return a path as the worker takes it."""
    return PathJob(
        name=path.name,
        overrides=path.overrides(str(folder), str(folder / "cache")),
        reference=path.reference,
        is_reference=is_reference,
    )


def judge_path(path: TrainingPath, line: dict[str, Any]) -> PathResult:
    """Return whether a path's numbers are within its tolerance."""
    numbers = {key: value for key, value in line.items() if key not in ("name", "problem")}
    if "problem" in line:
        return PathResult(path, "wrong", line["problem"], numbers)
    allowed = asdict(path.tolerance)
    # A NaN is not within any bound.
    over = [
        f"its {name} differs by {numbers[f'{name}_difference']:.1e}, and {bound:.0e} is allowed"
        for name, bound in allowed.items()
        if not numbers[f"{name}_difference"] <= bound
    ]
    return PathResult(path, "wrong" if over else "right", "; ".join(over) or None, numbers)


def _run_jobs(
    jobs: list[PathJob], folder: Path, launch: dict[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the line of each job; where a process dies in one, another takes those behind it."""
    while jobs:
        begun, ended = None, "it was ended"
        for line in _run_worker(jobs, folder, launch):
            if "ended" in line:
                ended = line["ended"]
                continue
            if "begins" in line:
                begun = line["begins"]
                continue
            jobs = [job for job in jobs if job["name"] != line["name"]]
            yield line
            begun = None
        if not jobs:
            return
        # It ended or hung in this one, or before the first.
        dead = begun or jobs[0]["name"]
        jobs = [job for job in jobs if job["name"] != dead]
        yield {"name": dead, "problem": _describe_end(ended, folder / _LOG)}


_LOG = "worker.log"


def _run_worker(
    jobs: list[PathJob], folder: Path, launch: dict[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """Start a process for the jobs and yield its lines as they come; the last says how it ended."""
    results = folder / "results.jsonl"
    results.write_text("", encoding="utf-8")
    job = WorkerJob(folder=str(folder), results=str(results), paths=jobs)
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, *_WORKER, str(folder / "job.json")]
    if launch is not None:
        (folder / "launch.yaml").write_text(yaml.safe_dump(launch), encoding="utf-8")
        flags = ("-q", "--config_file", str(folder / "launch.yaml"))
        command[1:1] = ["-m", "accelerate.commands.launch", *flags]
    with (folder / _LOG).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=_worker_environment(is_launched=launch is not None),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS + PATH_SECONDS
        with results.open(encoding="utf-8") as stream:
            while True:
                is_over = process.poll() is not None
                for line in _whole_lines(stream):
                    deadline = time.monotonic() + PATH_SECONDS
                    yield json.loads(line)
                if is_over:
                    yield {"ended": _describe_exit_code(process.returncode)}
                    return
                if time.monotonic() > deadline:
                    yield {"ended": f"it took longer than {PATH_SECONDS} seconds"}
                    return
                time.sleep(0.05)
    finally:
        _end_process(process)


def _whole_lines(stream: Any) -> Iterator[str]:
    """Yield the lines that are complete; half a line is read again later."""
    while True:
        at = stream.tell()
        line = stream.readline()
        if not line.endswith("\n"):
            stream.seek(at)
            return
        yield line


def _worker_environment(is_launched: bool) -> dict[str, str]:
    """Return the environment of a worker: no network, no tracker, one GPU for one process."""
    folder = str(Path(luthier.__file__).parents[1])
    paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
    # What another launcher left would make this process one of several.
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(_LAUNCHER_VARIABLES)}
    environment = inherited | {
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    if not is_launched:
        # Without a launcher, transformers would split each batch over all GPUs that it sees.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[0]
    return environment


def _end_process(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _describe_exit_code(code: int) -> str:
    """Return how a process ended: a negative code is a signal."""
    name = signal.Signals(-code).name if code < 0 else f"code {code}"
    return f"its process ended with {name}"


def _describe_end(ended: str, log: Path) -> str:
    """Return how a process ended, with the last line that it wrote."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    written = [line.strip() for line in lines if line.strip()]
    return redact_message(f"{ended}: {written[-1][:300]}" if written else ended)
