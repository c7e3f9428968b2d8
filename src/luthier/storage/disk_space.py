"""Whether a disk is full: as the system says it, and as the libraries that write to it do."""

import errno
import shutil
from pathlib import Path

_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and torch raise errors of their own, in whose text the system's error stands.
_DISK_FULL_TEXTS = ("No space left", "os error 28", "Disk quota", "File too large", "os error 27")
# torch 2.13 says with these that it could not write, and not why.
_UNCLEAR_WRITE_ERRORS = ("PytorchStreamWriter", "iostream error", "inline_container.cc")
# So few free bytes mean that it was the disk: what was half written still takes the rest.
_ALMOST_NO_BYTES = 2**24


def is_disk_full(error: BaseException | None, folder: Path) -> bool:
    """Return whether an error of writing to `folder`, or what it came from, is of a full disk."""
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) and error.errno in _DISK_FULL_ERRNOS:
            return True
        if any(phrase in text for phrase in _DISK_FULL_TEXTS):
            return True
        is_unclear = any(phrase in text for phrase in _UNCLEAR_WRITE_ERRORS)
        if is_unclear and free_bytes(folder) < _ALMOST_NO_BYTES:
            return True
        error = error.__cause__ or error.__context__
    return False


def free_bytes(folder: Path) -> int:
    """Return how many bytes are free on the disk of a folder, which need not exist yet."""
    # A folder that cannot be looked into has parents that can: the root, at last.
    for place in (folder.absolute(), *folder.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return 0
