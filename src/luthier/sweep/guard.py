"""Stands between a sweep and one trial: no process of the trial outlives its sweep.

Run as a script of its own by `luthier.sweep.processes`, with nothing but the standard library:

    python -I guard.py GRACE OUT ERR COMMAND...

The command gets a process group of its own. The first byte on standard input, or its end (the
sweep is gone, even by `kill -9`), asks the group to stop with SIGTERM; after GRACE seconds, or at a
second byte, it is killed. The guard ends when the whole group has, with the command's exit code.
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

_SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of Linux: orphans of the group become the guard's children."""
_RESUME = 75
"""What a trial ends with that can go on; its launcher may hide it behind a code of its own."""
_TICK = 0.05


def main(words: list[str]) -> int:
    """Run the command and return its exit code, 128 + n where signal n ended it."""
    grace, out, err, *command = words
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _nothing)  # a handler, not SIG_IGN, which the command would inherit
    with Path(out).open("ab") as stdout, Path(err).open("ab") as stderr:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, process_group=0
        )
    return _watch(child, float(grace))


def _watch(child: "subprocess.Popen[bytes]", grace: float) -> int:
    """Wait for the group to end, and end it when the sweep asks or is gone."""
    asked, deadline = False, float("inf")
    while child.poll() is None or _lives(child.pid):
        _reap(child)
        if child.returncode is not None and not asked:
            asked, deadline = True, time.monotonic() + grace
            _send(child.pid, signal.SIGTERM)  # what the command left behind
        heard = _heard(listening=not asked or deadline > time.monotonic())
        if heard is not None and not asked:
            asked, deadline = True, time.monotonic() + grace
            _send(child.pid, signal.SIGTERM)
        elif heard or time.monotonic() >= deadline:
            deadline = 0.0
            _send(child.pid, signal.SIGKILL)
    code = child.returncode
    if _RESUME in _orphans:
        return _RESUME
    return 128 - code if code < 0 else code


_closed = False
_orphans: set[int] = set()
"""The exit codes of processes whose launcher ended before them."""


def _heard(listening: bool) -> bytes | None:
    """A byte from the sweep, b"" once when it is gone, None if there is nothing new."""
    global _closed
    if _closed or not listening:
        time.sleep(_TICK)
        return None
    if not select.select([0], [], [], _TICK)[0]:
        return None
    byte = os.read(0, 1)
    _closed = byte == b""
    return byte


def _reap(child: "subprocess.Popen[bytes]") -> None:
    """Collect orphans of the group that have ended, so that it can be seen to be empty."""
    if child.poll() is None:
        return
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            _orphans.add(os.waitstatus_to_exitcode(ended[1]))


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _send(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _nothing(*_: object) -> None:
    """Stand in for a signal's handler."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
