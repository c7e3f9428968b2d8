"""How a trial is started: the command, and the environment that the sweep was typed in."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from luthier.errors import UserError
from luthier.sweep.settings import Launcher
from luthier.train import launch_request

_OF_A_RANK = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)
"""Variables that make a process one of several; a trial is none of those that started a sweep."""


@dataclass(frozen=True)
class Launch:
    """How every trial of a sweep is started."""

    script: tuple[str, ...]
    """`train.py`, or `--module luthier train`."""
    flags: tuple[str, ...] | None = None
    """Of `accelerate launch`; None where plain Python is enough."""
    processes: int = 1
    on_cpu: bool = False
    """Whether the launcher was told to use the CPU."""
    torchrun: bool = False
    """Whether torchrun starts the processes in place of accelerate."""
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_launcher(self) -> bool:
        """Whether a trial's first process is a launcher, and not the training itself."""
        return self.torchrun or self.flags is not None

    def command(self, overrides: list[str], has_gpus: bool) -> list[str]:
        """The words that start a trial; a GPU of its slot wins over the launcher's `gpu_ids`."""
        script = [*self.script, *overrides]
        if self.torchrun:
            run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            if script[0] == "-m":
                script = ["--module", *script[1:]]
            return [sys.executable, *run, str(self.processes), *script]
        if self.flags is None:
            return [sys.executable, *script]
        flags = [*self.flags, *(["--gpu_ids", "all"] if has_gpus else [])]
        # Two trials on one machine must not meet at one port.
        flags += [] if _has(flags, "main_process_port") else ["--main_process_port", "0"]
        flags += [] if _has(flags, "quiet") or "-q" in flags else ["--quiet"]
        run = ["-m", "accelerate.commands.accelerate_cli", "launch"]
        return [sys.executable, *run, *flags, *script]


def find(launcher: Launcher, environ: Mapping[str, str]) -> Launch:
    """How the trials of this sweep are to be started: as the settings say, or as it was itself.

    Raises UserError for a launch over several machines, which one sweep cannot share out.
    """
    words, folder, above = launcher.launch_words(), Path.cwd(), dict(environ)
    started = launch_request.launcher_command()
    if words is None and started is not None:
        words, folder = started
    if started is not None:
        above = _environment_above() or above
    above = without_rank(above)
    script = _script()
    if words is None and int(environ.get("WORLD_SIZE", "1")) > 1:
        _refuse_machines(int(environ["WORLD_SIZE"]) // int(environ.get("LOCAL_WORLD_SIZE", "1")))
        count = int(environ["WORLD_SIZE"])
        return Launch(
            script, None, count, launch_request.is_on(environ, "ACCELERATE_USE_CPU"), True, above
        )
    if words is None:
        return Launch(script, environ=above)
    wish = launch_request.read_command(words, folder, above)
    _refuse_machines(wish.num_machines)
    if wish.num_processes is None:
        count = int(environ.get("WORLD_SIZE", "1")) if launcher.accelerate is None else 1
        words = [*words, "--num_processes", str(count)]
    else:
        count = wish.num_processes
    return Launch(script, tuple(words), count, wish.use_cpu, environ=above)


def without_rank(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment without what makes a process one of several."""
    return {
        name: text
        for name, text in environ.items()
        if name not in _OF_A_RANK and not name.startswith("TORCHELASTIC_")
    }


def _refuse_machines(machines: int) -> None:
    if machines > 1:
        raise UserError(
            f"The launch is for {machines} machines, and a trial of a sweep runs on one.\n"
            "Instead: start the sweep on one machine, or with hydra/launcher=submitit_slurm."
        )


def _script() -> tuple[str, ...]:
    """The script that this sweep was started with, or the `luthier` command."""
    script = Path(sys.argv[0])
    if script.suffix == ".py" and script.is_file():
        return (str(script.resolve()),)
    return ("-m", "luthier", "train")


def _environment_above() -> dict[str, str] | None:
    """The environment in which the launcher of this process was typed, before it added its own."""
    try:
        for process in psutil.Process().parents():
            command = process.cmdline()
            if command and Path(command[0]).name.lower().startswith("python"):
                return process.environ()
    except (psutil.Error, OSError):
        return None
    return None


def _has(flags: list[str], name: str) -> bool:
    spellings = (f"--{name}", f"--{name.replace('_', '-')}")
    return any(flag.partition("=")[0] in spellings for flag in flags)


def is_first_rank() -> bool:
    """Whether this process steers the sweep; the others of a launch have nothing to do."""
    return os.environ.get("RANK", "0") == "0"
