"""The words for a disk that is full or a folder that cannot be written to."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import UserError
from luthier.storage.sizes import in_words, size_of

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing_to(cache: Path, entry: Path | None = None) -> Iterator[None]:
    """Turn an OSError of writing to the cache folder into a UserError that says what to do.

    `entry` is the folder of what was being written, whose size is told when the disk is full.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _FULL:
            raise UserError(_full(cache, entry, reason)) from error
        raise UserError(
            f"dataset: the cache folder {cache} cannot be written to: {reason}.\n"
            "Name another folder: dataset.cache=FOLDER, or the environment variable LUTHIER_CACHE."
        ) from error


def _full(cache: Path, entry: Path | None, reason: str) -> str:
    written = in_words(size_of(entry)) if entry is not None and entry.is_dir() else "none"
    return (
        f"dataset: the cache folder {cache} is full ({reason}): {written} of this dataset's "
        f"encoded rows were written and {in_words(shutil.disk_usage(cache).free)} are free.\n"
        "What was written is removed. Free some space there, or name another folder: "
        "dataset.cache=FOLDER, or the environment variable LUTHIER_CACHE."
    )
