"""A disk that is full while a run writes to it: said in words, with the last good checkpoint."""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.errors import UserError
from luthier.record import checkpoints
from luthier.storage.sizes import in_words

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TOLD = ("No space left", "os error 28", "Disk quota", "File too large", "os error 27")
"""How safetensors and torch pass it on, which raise errors of their own."""
_UNTOLD = ("PytorchStreamWriter", "iostream error", "inline_container.cc")
"""How torch says that it could not write, without saying why."""
_NEARLY_NONE = 2**24
"""Bytes free when it is the disk: what was half written still takes the rest."""


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into a UserError, and remove what was half written.

    `folder`: the run's checkpoints.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error, folder):
            raise
        shutil.rmtree(folder / checkpoints.NEW, ignore_errors=True)
        raise UserError(disk_full_message(folder, f"{in_words(_free(folder))} are free")) from error


def refuse_together(accelerator: Any, missing: Callable[[], str | None], folder: Path) -> None:
    """Raise UserError in all processes where the first one sees that there is no room."""
    from accelerate.utils import broadcast_object_list

    why = [missing() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(why)
    if why[0] is not None:
        raise UserError(disk_full_message(folder, f"the next checkpoint does not fit: {why[0]}"))


def is_disk_full(error: BaseException | None, folder: Path) -> bool:
    """Whether an error, or what it came from, is that of a full disk."""
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(told in text for told in _TOLD):
            return True
        if any(untold in text for untold in _UNTOLD) and _free(folder) < _NEARLY_NONE:
            return True
        error = error.__cause__ or error.__context__
    return False


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder if folder.is_dir() else folder.parent).free


def disk_full_message(folder: Path, why: str) -> str:
    """Say that the disk is full, and from where the run can go on."""
    last = checkpoints.newest(folder).path
    left = f"The last good one is {last}" if last else "There is no good one yet"
    return (
        f"The disk of {folder} is full ({why}), so the run stops.\n"
        f"{left}. Free some space, or keep fewer checkpoints (trainer.args.save_total_limit, "
        "trainer.checkpoints.budget), and the same command goes on."
    )
