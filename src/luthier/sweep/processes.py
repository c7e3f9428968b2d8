"""Trials as processes of this machine, each behind a guard that outlives neither."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from luthier.sweep import guard
from luthier.sweep.launching import Launch
from luthier.sweep.slots import Slot
from luthier.sweep.trials import Folder, Trial


class Job(Protocol):
    """A trial that was started."""

    def code(self) -> int | None:
        """Its exit code, or None while it runs."""

    def stop(self) -> None:
        """Ask it to write a checkpoint and end; a second time, end it at once."""


def guarded(
    command: list[str], has_launcher: bool, logs: tuple[Path, Path], grace: float
) -> list[str]:
    """The command that runs another one behind a guard, with its output in files."""
    words = [sys.executable, "-I", str(Path(guard.__file__)), str(grace), str(int(has_launcher))]
    return [*words, *(str(log.absolute()) for log in logs), *command]


class Process:
    """A trial with its guard, which ends all of its processes when this one is gone."""

    def __init__(self, command: list[str], environ: Mapping[str, str], lock: int) -> None:
        """Start a guarded command. `lock`: an open file that the guard holds while it lives."""
        self._guard = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            env=dict(environ),
            start_new_session=True,
            pass_fds=(lock,),
        )

    def code(self) -> int | None:
        """Its exit code, or None while one of its processes runs."""
        return self._guard.poll()

    def stop(self) -> None:
        """Ask it to end; a second time, kill it."""
        assert self._guard.stdin is not None
        try:
            os.write(self._guard.stdin.fileno(), b"x")
        except BrokenPipeError:
            return


class Machine:
    """This machine, as a place for trials."""

    def __init__(
        self, launch: Launch, slots: list[Slot], folder: Folder, grace: float, lock: int
    ) -> None:
        self.slots = [slot.name for slot in slots]
        self._launch, self._room, self._folder = launch, slots, folder
        self._grace, self._lock = grace, lock

    def start(self, trial: Trial, overrides: list[str], slot: int) -> Job:
        """Start a trial in a slot, with the GPUs of that slot and no others."""
        room = self._room[slot]
        logs = self._folder.logs(trial)
        logs[0].parent.mkdir(parents=True, exist_ok=True)
        command = self._launch.command(overrides, bool(room.gpus))
        words = guarded(command, self._launch.has_launcher, logs, self._grace)
        return Process(words, {**self._launch.environ, **room.environment()}, self._lock)

    def again(self, trial: Trial) -> Job | None:
        """Never: its guard has ended it together with the sweep that started it."""
        return None
