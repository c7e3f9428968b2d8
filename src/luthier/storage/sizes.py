"""Bytes of folders, and in words."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from luthier.errors import UserError


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder and below it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def format_bytes(count: int) -> str:
    """A number of bytes with its unit."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


# What is in a safetensors file, without its weights.


class SafetensorsHeader(NamedTuple):
    """The beginning of a safetensors file."""

    tensors: dict[str, dict[str, Any]]
    """By name, in the order of their bytes: `dtype`, `shape` and `data_offsets`."""
    start: int
    """Where in the file the bytes begin that the offsets count from."""


def read_safetensors_header(file: Path) -> SafetensorsHeader:
    """Read the head of a file (https://github.com/huggingface/safetensors#format).

    Raises UserError for a damaged file, or another one.
    """
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            # A damaged file may name any size, which would be as much memory.
            if size > file.stat().st_size - 8:
                raise ValueError(f"its header would take {size:,} bytes, more than there are")
            head: dict[str, Any] = json.loads(stream.read(size))
        if not isinstance(head, dict):
            raise ValueError("its header is no mapping of tensors")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged, or no safetensors file: {error}") from error
    head.pop("__metadata__", None)
    return SafetensorsHeader(head, 8 + size)
