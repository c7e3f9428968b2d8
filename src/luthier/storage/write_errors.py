"""Files and folders that cannot be made or written: what the system says, with advice."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import UserError, report_error, report_unexpected
from luthier.storage.disk_space import is_disk_full

_FREE_SPACE = "Free some space there"
_REASONS = {
    errno.ENOSPC: ("the disk is full", _FREE_SPACE),
    errno.EDQUOT: ("your quota on this disk is used up", _FREE_SPACE),
    errno.EFBIG: ("a file may not grow that large here", "Raise the limit (ulimit -f)"),
    errno.EROFS: ("the file system is read-only", ""),
    errno.EACCES: ("permission is missing", "Ask for permission"),
    errno.EPERM: ("permission is missing", "Ask for permission"),
    errno.ENAMETOOLONG: ("a name in this path is too long", ""),
    errno.ENOTDIR: ("there is a file where a folder is needed", "Move that file away"),
    errno.EEXIST: ("something of this name is in the way", "Move it away"),
    errno.ENOTEMPTY: ("something of this name is in the way", "Move it away"),
    errno.EISDIR: ("there is a folder where a file is needed", "Move that folder away"),
    errno.ELOOP: ("a link is in the way, or links lead in a circle", "Remove the link"),
    errno.ENOENT: ("there is no such file or folder, or it was removed meanwhile", ""),
    errno.EIO: ("the disk does not answer", "Check the disk"),
    errno.ESTALE: ("the network file system does not answer", "Check the mount"),
    errno.ENOLCK: ("this file system takes no locks", ""),
    errno.EOPNOTSUPP: ("this file system cannot do that", ""),
    errno.EMFILE: ("this process has too many open files", "Raise the limit (ulimit -n)"),
}
"""The number of an error -> what it means, and what mends it besides another place."""
_NAMELESS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that are told also where the system names no file."""


def report_machine_error(error: Exception) -> int:
    """Print what a file, a disk or the memory refused, and return the exit code; raise any other.

    For the entry points, which print a UserError with `report_error`.
    """
    mistake = describe_write_error(error, None, "")
    return report_error(mistake) if mistake else report_unexpected(error)


@contextmanager
def explain_write_errors(path: Path, option: str) -> Iterator[None]:
    """Turn what the system says to a write below `path` into a UserError with advice.

    `option` is what the user typed the path with, such as `output_dir` or `--out`. An error that
    is not about a file, and every UserError, passes as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        mistake = describe_write_error(error, path, option)
        if mistake is None:
            raise
        raise mistake from error


def describe_write_error(error: Exception, path: Path | None, option: str) -> UserError | None:
    """Return the error of a file or folder in words; None where it is about something else.

    `path` is where the command writes, None where that is unknown; `option` as in
    `explain_write_errors`.
    """
    if not isinstance(error, OSError):
        # safetensors and torch have errors of their own for a full disk.
        if path is None or not is_disk_full(error, path):
            return None
        return _write_mistake(errno.ENOSPC, path, option)
    # Libraries derive errors of networks and hubs from OSError: these have no number of a file's.
    number, name = error.errno, error.filename
    if isinstance(name, str | bytes | os.PathLike):
        place = Path(os.fsdecode(name))
    elif path is not None and number in _NAMELESS:
        place = path
    else:
        return None
    if number not in _REASONS:
        return None
    return _write_mistake(number, place, option if _is_below(place, path) else "")


def _write_mistake(number: int, place: Path, option: str) -> UserError:
    """Return the sentence of what is wrong with `place`, and the one of what to do."""
    reason, mend = _REASONS[number]
    if option and number == errno.ENOENT:  # what is written needs no file, but a folder
        reason, mend = "its folder is not there", "Make the folder"
    choose = f"choose another place ({option})" if option else "choose another place"
    advice = f"{mend}, or {choose}" if mend else choose[0].upper() + choose[1:]
    verb = "written" if option else "read or written"
    return UserError(
        f"{f'{option}: ' if option else ''}{place} cannot be {verb}: {reason} "
        f"({os.strerror(number)}).\n{advice}, and run the same command again."
    )


def _is_below(place: Path, path: Path | None) -> bool:
    """Return whether a place lies in a folder, is it, or is one of the folders around it.

    What luthier writes before it takes the folder's name, `.NAME.new`, belongs to it.
    """
    if path is None:
        return False
    # Not resolved: to follow links may be what fails.
    place, path = place.absolute(), path.absolute()
    is_new = str(place).startswith(str(path.with_name(f".{path.name}.")))
    return is_new or place.is_relative_to(path) or path.is_relative_to(place)
