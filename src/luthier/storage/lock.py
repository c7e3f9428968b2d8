"""One run at a time in a directory: a lock that the system releases when its holder ends."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from luthier.errors import UserError
from luthier.storage.write_errors import explain_write_errors

LOCK_FILE = ".lock"
PATIENCE = 5.0
"""Seconds in which a run that is just ending lets go of its directory."""
_HELD = (errno.EAGAIN, errno.EACCES)
"""What the system says where another process holds the lock."""


@contextmanager
def hold_lock(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Hold a run's directory, which is made if it is not there.

    The lock belongs to the process (POSIX record locks): children that it forks do not hold it,
    and it ends with the process, however that ends. Folders that were made for it and are empty
    when it ends are removed. Raises UserError where another run has it, and where the directory
    cannot be made, written or locked.
    """
    missing = _missing_folders(folder)
    try:
        with explain_write_errors(folder, "output_dir"):
            descriptor = _open_locked_file(folder, time.monotonic() + patience)
        try:
            with explain_write_errors(folder, "output_dir"):
                _write_holder(folder / LOCK_FILE, descriptor)
            yield
        finally:
            # What cannot be removed, on a disk that has become read-only, is no lock either.
            with suppress(OSError):
                (folder / LOCK_FILE).unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        for path in missing:
            with suppress(OSError):  # not empty, or not made
                path.rmdir()


def is_locked(folder: Path) -> bool:
    """Whether a run is going on in a directory."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW)
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


def _missing_folders(folder: Path) -> list[Path]:
    """Return the folder and those around it that are not there yet, the innermost first."""
    missing = []
    for path in (folder, *folder.parents):
        if os.path.lexists(path):
            break
        missing.append(path)
    return missing


def _open_locked_file(folder: Path, until: float) -> int:
    """An open descriptor of the locked file."""
    path = folder / LOCK_FILE
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Not through a link, and no folder: what stands there instead of a lock is the user's.
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise UserError(_not_a_lock(path))
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            # The last holder removes the folder, if it is empty, between our two steps.
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
            continue
        try:
            if _lock_file(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() > until:
            raise UserError(_in_use(folder))
        time.sleep(0.05)


def _lock_file(path: Path, descriptor: int) -> bool:
    """Lock the open file; return whether it is ours now.

    Raises UserError for a file that is no lock of luthier, and OSError where the system cannot
    lock it.
    """
    try:
        # filelock 4 cannot serve here: it locks with flock, which a forked child inherits. A data
        # worker that outlives a killed run would then keep its directory locked. A POSIX record
        # lock belongs to one process and ends with it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The last holder may have removed the file between our opening and our locking it.
        if path.stat().st_ino != os.fstat(descriptor).st_ino:
            return False
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise OSError(error.errno, error.strerror, str(path)) from error
    content = os.read(descriptor, 64)
    # A power cut may leave zeros of what was written last.
    if not content.startswith(b'{"process"') and content.strip(b"\0"):
        raise UserError(_not_a_lock(path))
    return True


def _write_holder(path: Path, descriptor: int) -> None:
    """Write into the locked file who holds it."""
    began = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": began}
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _in_use(folder: Path) -> str:
    try:
        holder = json.loads((folder / LOCK_FILE).read_text(encoding="utf-8"))
        who = f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return (
        f"output_dir: {folder} is in use by another run ({who}), so this one stops.\n"
        "Wait for it, stop it, or choose another output_dir."
    )


def _not_a_lock(path: Path) -> str:
    return (
        f"output_dir: {path} is not a lock file of luthier, which needs this name for one.\n"
        "Move it away, or choose another output_dir=..."
    )
