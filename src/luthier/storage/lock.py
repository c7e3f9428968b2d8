"""One run at a time in a directory: a lock that the system releases when its holder ends."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from luthier.errors import UserError

LOCK_FILE = ".lock"
PATIENCE = 5.0
"""Seconds in which a run that is just ending lets go of its directory."""


@contextmanager
def hold_lock(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Hold a run's directory, which is made if it is not there.

    The lock belongs to the process (POSIX record locks): children that it forks do not hold it,
    and it ends with the process, however that ends. Raises UserError where another run has it.
    """
    was_there = folder.is_dir()
    descriptor = _taken(folder, time.monotonic() + patience)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps(_holder()).encode())
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        os.close(descriptor)
        if not was_there and not any(folder.iterdir()):
            folder.rmdir()


def is_locked(folder: Path) -> bool:
    """Whether a run is going on in a directory."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def _taken(folder: Path, until: float) -> int:
    """An open descriptor of the locked file."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # filelock 4 cannot serve here: it locks with flock, which a forked child inherits. A
            # data worker that outlives a killed run would then keep its directory locked. A POSIX
            # record lock belongs to one process and ends with it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have removed the file between our opening and our locking it.
            if (folder / LOCK_FILE).stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(_in_use(folder)) from error
        os.close(descriptor)
        time.sleep(0.05)


def _holder() -> dict[str, object]:
    began = datetime.now(UTC).isoformat(timespec="seconds")
    return {"process": os.getpid(), "host": socket.gethostname(), "since": began}


def _in_use(folder: Path) -> str:
    try:
        holder = json.loads((folder / LOCK_FILE).read_text(encoding="utf-8"))
        who = f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError):
        who = "another process"
    return (
        f"output_dir: {folder} is in use by another run ({who}), and this one gives way.\n"
        "Wait for it, stop it, or choose another output_dir."
    )
