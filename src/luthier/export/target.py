"""The folder that a command writes: whole or absent."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import UserError
from luthier.record.files import publish_folder


def refuse_target(target: Path, overwrite: bool) -> None:
    """Raise UserError for a target that is a file, or a folder with something in it."""
    if target.exists() and not target.is_dir():
        raise UserError(f"--out {target}: this is a file. Name a folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(
            f"--out {target}: this folder is not empty. --overwrite replaces it, or name another."
        )
    if target.resolve() == Path.cwd().resolve():
        raise UserError(f"--out {target}: this is the folder that you are in. Name another.")


def refuse_full_disk(size: int, folder: Path) -> None:
    """Raise UserError where the weights do not fit on the disk."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"The model takes {size / 1e9:.2f} GB, and the disk of {folder.parent} has "
            f"{free / 1e9:.2f} GB left. Name a folder on another disk: --out."
        )


@contextmanager
def filled(
    target: Path, keep: type[BaseException] | tuple[type[BaseException], ...] = ()
) -> Iterator[Path]:
    """Give an empty folder beside the target, which takes its place when the block ends.

    After an error the folder is removed, but for errors of the kinds `keep`. Raises UserError where
    nothing can be written there.
    """
    aside = target.with_name(f".{target.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {target}: cannot be written: {error.strerror}.") from error
    try:
        yield aside
    except BaseException as error:
        if not isinstance(error, keep):
            shutil.rmtree(aside, ignore_errors=True)
        raise
    publish_folder(aside, target)
