"""Trials as processes of this machine: the command, the slots with their GPUs, the guards."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from luthier.errors import UserError
from luthier.sweep import guard
from luthier.sweep.settings import LauncherSettings, LocalSettings
from luthier.sweep.trials import Trial, TrialFolder
from luthier.train.launch.request import find_launcher_command, is_on, parse_launch_command

_OF_A_RANK = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)
"""Variables that make a process one of several; a trial is none of those that started a sweep."""


# The command of a trial, and the environment that the sweep was typed in.


@dataclass(frozen=True)
class LaunchCommand:
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
        """Return whether a trial's first process is a launcher, and not the training itself."""
        return self.torchrun or self.flags is not None

    def command(self, overrides: list[str], has_gpus: bool) -> list[str]:
        """Return the command of a trial; a GPU of its slot wins over the launcher's `gpu_ids`."""
        script = [*self.script, *overrides]
        if self.torchrun:
            # --standalone takes a free port, so that trials on one machine do not meet.
            run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            if script[0] == "-m":
                script = ["--module", *script[1:]]
            return [sys.executable, *run, str(self.processes), *script]
        if self.flags is None:
            return [sys.executable, *script]
        # accelerate 1.15.0 writes gpu_ids of its config file over CUDA_VISIBLE_DEVICES, unless they
        # are "all".
        flags = [*self.flags, *(["--gpu_ids", "all"] if has_gpus else [])]
        # Two trials on one machine must not meet at one port.
        flags += [] if _has_flag(flags, "main_process_port") else ["--main_process_port", "0"]
        flags += [] if _has_flag(flags, "quiet") or "-q" in flags else ["--quiet"]
        run = ["-m", "accelerate.commands.accelerate_cli", "launch"]
        return [sys.executable, *run, *flags, *script]


def find_launch_command(
    launcher: LauncherSettings, environ: Mapping[str, str], script_flags: tuple[str, ...] = ()
) -> LaunchCommand:
    """How the trials of this sweep are to be started: as the settings say, or as it was itself.

    `script_flags` are those that each trial gets. Raises UserError for a launch over several
    machines, which one sweep cannot share out.
    """
    launch_flags, folder, above = launcher.launch_words(), Path.cwd(), dict(environ)
    started = find_launcher_command()
    if launch_flags is None and started is not None:
        launch_flags, folder = started
    if started is not None:
        # The launcher has added variables to this process's environment (ports, mixed precision)
        # that trials must not inherit.
        above = _find_launcher_environment() or above
    above = environment_without_rank(above)
    script = (*_find_script(), *script_flags)
    if launch_flags is None and int(environ.get("WORLD_SIZE", "1")) > 1:
        _refuse_machines(int(environ["WORLD_SIZE"]) // int(environ.get("LOCAL_WORLD_SIZE", "1")))
        count = int(environ["WORLD_SIZE"])
        return LaunchCommand(script, None, count, is_on(environ, "ACCELERATE_USE_CPU"), True, above)
    if launch_flags is None:
        return LaunchCommand(script, environ=above)
    request = parse_launch_command(launch_flags, folder, above)
    _refuse_machines(request.num_machines)
    if request.num_processes is None:
        count = int(environ.get("WORLD_SIZE", "1")) if launcher.accelerate is None else 1
        launch_flags = [*launch_flags, "--num_processes", str(count)]
    else:
        count = request.num_processes
    return LaunchCommand(script, tuple(launch_flags), count, request.use_cpu, environ=above)


def environment_without_rank(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what makes a process one of several."""
    return {
        name: text
        for name, text in environ.items()
        if name not in _OF_A_RANK and not name.startswith(("TORCHELASTIC_", "PET_"))
    }


def _refuse_machines(machines: int) -> None:
    if machines > 1:
        raise UserError(
            f"The launch is for {machines} machines, and a trial of a sweep runs on one.\n"
            "Instead: start the sweep on one machine, or with hydra/launcher=submitit_slurm."
        )


def _find_script() -> tuple[str, ...]:
    """Return the script that this sweep was started with, or the `luthier` command."""
    script = Path(sys.argv[0])
    if script.suffix == ".py" and script.is_file():
        return (str(script.resolve()),)
    return ("-m", "luthier", "train")


def _find_launcher_environment() -> dict[str, str] | None:
    """Return the environment that this process's launcher was typed in, before it added its own."""
    try:
        for process in psutil.Process().parents():
            command = process.cmdline()
            # The nearest Python above is the launcher. psutil shows the environment that a process
            # was started with, which for a launcher is the one it was typed in.
            if command and Path(command[0]).name.lower().startswith("python"):
                return process.environ()
    except (psutil.Error, OSError):
        return None
    return None


def _has_flag(flags: list[str], name: str) -> bool:
    spellings = (f"--{name}", f"--{name.replace('_', '-')}")
    return any(flag.partition("=")[0] in spellings for flag in flags)


def is_first_rank() -> bool:
    """Return whether this process steers the sweep; the others of a launch have nothing to do."""
    return os.environ.get("RANK", "0") == "0"


# Where trials run: slots of this machine, each with GPUs of its own, or a share of the CPU.


@dataclass(frozen=True)
class Slot:
    """Room for one trial."""

    number: int
    gpus: tuple[str, ...] = ()
    """As `CUDA_VISIBLE_DEVICES` names them; none on a CPU."""
    threads: int | None = None
    """Threads of each process, where trials share a CPU."""

    @property
    def name(self) -> str:
        """Return the slot's name as tables show it."""
        return f"GPU {','.join(self.gpus)}" if self.gpus else f"slot {self.number + 1}"

    def environment(self) -> dict[str, str]:
        """Return what a trial in this slot finds in its environment."""
        variables = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}
        return variables | ({"OMP_NUM_THREADS": str(self.threads)} if self.threads else {})


def make_slots(
    launcher: LocalSettings, processes: int, on_cpu: bool, environ: Mapping[str, str]
) -> list[Slot]:
    """Return the slots of this machine for trials of so many processes; at least one.

    Raises UserError where not one trial would fit, or fewer than were asked for.
    """
    gpus = [] if on_cpu else _find_gpus(launcher, environ)
    if not gpus:
        return _make_cpu_slots(launcher, processes, on_cpu, environ)
    each = launcher.gpus_per_trial if launcher.gpus_per_trial != "auto" else processes
    room = _share_gpus(gpus, each) if each < 1 else _split_whole_gpus(gpus, each)
    if not room:
        raise UserError(
            f"hydra.launcher.gpus_per_trial: a trial takes {each:g} GPUs, and there are "
            f"{len(gpus)} ({', '.join(gpus)}): not one fits. Ask for fewer."
        )
    slot_count = len(room) if launcher.slots == "auto" else launcher.slots
    if slot_count > len(room):
        raise UserError(
            f"hydra.launcher.slots: {slot_count} trials of {each:g} GPUs need "
            f"{slot_count * each:g}, and there are {len(gpus)}. Ask for {len(room)}, "
            "or share them: "
            "hydra.launcher.gpus_per_trial=0.5."
        )
    return [Slot(number, names) for number, names in enumerate(room[:slot_count])]


def _split_whole_gpus(gpus: list[str], each: float) -> list[tuple[str, ...]]:
    if each != int(each):
        raise UserError(
            f"hydra.launcher.gpus_per_trial: {each:g} is no whole number. Write one, or a share "
            "of a GPU below 1."
        )
    size = int(each)
    return [tuple(gpus[n : n + size]) for n in range(0, len(gpus) - size + 1, size)]


def _share_gpus(gpus: list[str], share: float) -> list[tuple[str, ...]]:
    """Give a GPU to each slot, and several slots to each GPU; neighbours are on different GPUs."""
    # The small number is for shares such as 0.3333333334, which is meant as a third.
    return [(gpu,) for _ in range(int(1 / share + 1e-9)) for gpu in gpus]


def _make_cpu_slots(
    launcher: LocalSettings, processes: int, on_cpu: bool, environ: Mapping[str, str]
) -> list[Slot]:
    if launcher.gpus_per_trial != "auto":
        why = "the CPU was asked for" if on_cpu else "this machine shows none"
        raise UserError(
            f"hydra.launcher.gpus_per_trial: {launcher.gpus_per_trial:g} GPUs for each trial, and "
            f"{why}. Leave it out to train on the CPU."
        )
    count = 1 if launcher.slots == "auto" else launcher.slots
    # torch takes all cores for each process; side by side the trials would slow each other down.
    chosen = count == 1 or "OMP_NUM_THREADS" in environ
    threads = None if chosen else max(1, (os.cpu_count() or 1) // (count * processes))
    return [Slot(number, (), threads) for number in range(count)]


def _find_gpus(launcher: LocalSettings, environ: Mapping[str, str]) -> list[str]:
    """Return the GPUs that may be used, by number or name."""
    if launcher.gpus != "auto":
        return [str(gpu) for gpu in launcher.gpus]
    if "CUDA_VISIBLE_DEVICES" in environ:
        # A negative number hides all GPUs, as CUDA reads it.
        names = [name.strip() for name in environ["CUDA_VISIBLE_DEVICES"].split(",")]
        return [name for name in names if name and not name.startswith("-")]
    return installed_gpus()


def installed_gpus() -> list[str]:
    """Return the NVIDIA GPUs of this machine by number, without importing torch."""
    try:
        # Asking torch would take seconds to import it, in a process that trains nothing.
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []


# Trials as processes, each behind a guard. The guard ends when its trial has ended, and ends the
# trial when the sweep is gone.


class GuardedJob(Protocol):
    """A trial that was started."""

    def code(self) -> int | None:
        """Return the trial's exit code, or None while it runs."""

    def stop(self) -> None:
        """Ask it to write a checkpoint and end; a second time, end it at once."""


def start_guarded(
    command: list[str], has_launcher: bool, logs: tuple[Path, Path], grace: float
) -> list[str]:
    """Return the command that runs another one behind a guard, with its output in files."""
    guard_command = [
        sys.executable,
        # Isolated: PYTHONPATH and the working directory are the trial's, and could hide psutil.
        "-I",
        str(Path(guard.__file__)),
        str(grace),
        str(int(has_launcher)),
    ]
    return [*guard_command, *(str(log.absolute()) for log in logs), *command]


class TrialProcess:
    """A trial with its guard, which ends all of its processes when this one is gone."""

    def __init__(self, command: list[str], environ: Mapping[str, str], lock: int) -> None:
        """Start a guarded command. `lock`: an open file that the guard holds while it lives."""
        # A session of its own: Ctrl-C is for the sweep, which then asks its trials one by one.
        self._guard = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            env=dict(environ),
            start_new_session=True,
            pass_fds=(lock,),
        )

    def code(self) -> int | None:
        """Return the trial's exit code, or None while one of its processes runs."""
        return self._guard.poll()

    def stop(self) -> None:
        """Ask it to end; a second time, kill it."""
        assert self._guard.stdin is not None
        try:
            os.write(self._guard.stdin.fileno(), b"x")
        except BrokenPipeError:
            return


class LocalMachine:
    """This machine, as a place for trials."""

    def __init__(
        self, launch: LaunchCommand, slots: list[Slot], folder: TrialFolder, grace: float, lock: int
    ) -> None:
        self.slots = [slot.name for slot in slots]
        self._launch, self._room, self._folder = launch, slots, folder
        self._grace, self._lock = grace, lock

    def start(self, trial: Trial, overrides: list[str], slot: int) -> GuardedJob:
        """Start a trial in a slot, with the GPUs of that slot and no others."""
        room = self._room[slot]
        logs = self._folder.logs(trial)
        logs[0].parent.mkdir(parents=True, exist_ok=True)
        command = self._launch.command(overrides, bool(room.gpus))
        guard_command = start_guarded(command, self._launch.has_launcher, logs, self._grace)
        return TrialProcess(
            guard_command, {**self._launch.environ, **room.environment()}, self._lock
        )

    def again(self, trial: Trial) -> GuardedJob | None:
        """Never: its guard has ended it together with the sweep that started it."""
        return None
