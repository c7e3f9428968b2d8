"""Files that are whole or absent: written under a temporary name, then renamed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.errors import UserError
from luthier.storage.disk_space import free_bytes


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """The value of a JSON file, or None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def publish_folder(temporary: Path, path: Path) -> None:
    """Rename a finished folder to `path`; an older one there is moved aside first, then removed.

    Its files get the mode that new files have here: safetensors leaves weights that their owner
    alone can read, and others on a cluster are to load them.
    """
    _share_as_new(temporary)
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        path.replace(aside)
    temporary.replace(path)
    shutil.rmtree(aside, ignore_errors=True)


def _share_as_new(folder: Path) -> None:
    probe = folder / f".mode.{os.getpid()}"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


# The folder that a command writes: whole or absent.


def check_target(target: Path, overwrite: bool) -> None:
    """Raise UserError for a target that is a file, or a folder with something in it."""
    if target.exists() and not target.is_dir():
        raise UserError(f"--out {target}: this is a file. Name a folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(
            f"--out {target}: this folder is not empty. --overwrite replaces it, or name another."
        )
    if target.resolve() == Path.cwd().resolve():
        raise UserError(f"--out {target}: this is the folder that you are in. Name another.")


def check_free_space(size: int, folder: Path) -> None:
    """Raise UserError where the weights do not fit on the disk."""
    free = free_bytes(folder)
    if size > free:
        raise UserError(
            f"The model takes {size / 1e9:.2f} GB, and the disk of {folder.parent} has "
            f"{free / 1e9:.2f} GB left. Name a folder on another disk: --out."
        )


@contextmanager
def output_folder(
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
