"""Folders that are made once, whole or not at all, and shared between processes."""

import os
from collections.abc import Callable
from pathlib import Path

from luthier.errors import UserError


def cache_root() -> Path:
    """Where luthier keeps what it converted: `$LUTHIER_CACHE`, else `~/.cache/luthier`."""
    chosen = os.environ.get("LUTHIER_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "luthier"


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return `folder`, filled by `make(empty_folder)` if it is missing, partial or damaged.

    Of several processes one makes it and the others wait. It appears by a rename, so nobody ever
    sees half of it. Raises UserError where the cache cannot be written.
    """
    # A mistake in a config is answered before anything is locked.
    from filelock import FileLock

    if is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not is_intact(folder):
                _make(folder, make)
    except OSError as error:
        raise UserError(
            f"The cache folder {folder.parent} cannot be used: {error.strerror or error}.\n"
            "Free some space there, or set LUTHIER_CACHE to a folder that you can write to."
        ) from error
    return folder


def is_intact(folder: Path) -> bool:
    """Whether the folder is there and every byte of it is as it was sealed."""
    from luthier.storage.manifest import DamagedFolderError, verify_manifest

    try:
        verify_manifest(folder)
    except (DamagedFolderError, OSError):
        return False
    return True


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    import shutil
    import tempfile

    from luthier.storage.manifest import write_manifest

    # The lock is ours, so an older temporary folder belongs to a process that was killed.
    for stale in folder.parent.glob(f"{folder.name}.new-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.new-") as above:
        new = Path(above) / folder.name
        new.mkdir()
        make(new)
        write_manifest(new, {})
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


class KeyFolder:
    """A set of keys (names of files) that all processes see: an empty file for each.

    Nothing is kept in a folder that cannot be written, which is no error.
    """

    MOST_KEYS = 2000
    """Beyond it the oldest go."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __contains__(self, key: str) -> bool:
        return (self._folder / key).is_file()

    def add(self, key: str) -> None:
        """Add a key."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            files = sorted(self._folder.iterdir(), key=lambda file: file.stat().st_mtime)
            for file in files[: max(len(files) + 1 - self.MOST_KEYS, 0)]:
                file.unlink(missing_ok=True)
            (self._folder / key).touch()
        except OSError:
            return
