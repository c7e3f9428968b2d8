"""Stands between a sweep and one trial: no process of the trial outlives its sweep.

Run as a script of its own by `luthier.sweep.local`, with psutil and the standard library alone:

    python -I guard.py GRACE LAUNCHER OUT ERR COMMAND...

The first byte on standard input, or its end (the sweep is gone, even by `kill -9`), asks the trial
to stop: its training processes get SIGTERM, and nothing else does, neither a launcher, whose store
they may need for a checkpoint, nor workers that load data, whose death is an error to them. With
LAUNCHER 1 they are the command's children, which torch starts in sessions of their own; with 0
it is the command. After GRACE seconds, or at a second byte, all that the command has started is
killed. The guard ends when all of it has, with the command's exit code.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

_SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of Linux: what its parent leaves behind becomes the guard's child."""
_LEFT = 10.0
"""Seconds for what a command has left behind."""
_TICK = 0.05


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code, 128 + n where signal n ended it."""
    grace, launcher, out, err, *command = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # A handler and not SIG_IGN, which the command would inherit.
        signal.signal(number, lambda *_: None)
    with Path(out).open("ab") as stdout, Path(err).open("ab") as stderr:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, process_group=0
        )
    return Guard(child, float(grace), launcher == "1").watch()


class Guard:
    """One command and all that it starts."""

    def __init__(self, child: "subprocess.Popen[bytes]", grace: float, has_launcher: bool) -> None:
        self._child, self._grace, self._has_launcher = child, grace, has_launcher
        self._family: set[psutil.Process] = set()
        """What is to be gone before the guard is."""
        self._deadline = float("inf")
        self._is_alone = False
        """Whether the sweep is gone."""

    def watch(self) -> int:
        """Wait for the end of everything, and bring it about when the sweep asks or is gone."""
        stop_requested = left = False
        while self._child.poll() is None or self._has_live_processes():
            # The command is gone and has left processes behind: they get a short time of their own.
            if self._child.returncode is not None and not left:
                left = True
                self._deadline = min(self._deadline, time.monotonic() + _LEFT)
                self._send_signal(self._family, signal.SIGTERM)
            heard = self._read_request()
            if heard is not None and not stop_requested:
                stop_requested = True
                self._deadline = min(self._deadline, time.monotonic() + self._grace)
                self._has_live_processes()
                # Only those that train: they write the checkpoint, and the rest ends after them.
                self._send_signal(self._training_processes(), signal.SIGTERM)
            elif heard or time.monotonic() >= self._deadline:
                self._has_live_processes()
                self._send_signal(self._family, signal.SIGKILL)
        _reap_children()
        code = self._child.returncode
        return 128 - code if code < 0 else code

    def _training_processes(self) -> set[psutil.Process]:
        """Return the processes that train."""
        with contextlib.suppress(psutil.Error):
            command = psutil.Process(self._child.pid)
            return set(command.children()) if self._has_launcher else {command}
        return set()

    def _has_live_processes(self) -> bool:
        """Return whether any process lives that the command has started."""
        if self._child.returncode is not None:
            _reap_children()
        with contextlib.suppress(psutil.Error):
            # Kept from one look to the next: what loses its parent is no longer found below the
            # guard without a subreaper, as on macOS.
            self._family |= set(psutil.Process().children(recursive=True))
        self._family = {process for process in self._family if _is_alive(process)}
        return bool(self._family)

    def _send_signal(self, processes: set[psutil.Process], number: int) -> None:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def _read_request(self) -> bytes | None:
        """Return a byte from the sweep, b"" once when it is gone, None if there is nothing new."""
        # At its end standard input is always readable, and this loop would spin.
        if self._is_alone or not select.select([0], [], [], _TICK)[0]:
            time.sleep(_TICK if self._is_alone else 0)
            return None
        byte = os.read(0, 1)
        self._is_alone = byte == b""
        return byte


def _reap_children() -> None:
    """Collect what has ended of what its parents have left behind."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        # A zombie has ended, and waits only for its parent to collect it.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
