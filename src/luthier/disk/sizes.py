"""Bytes of folders, and in words."""

from pathlib import Path


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder and below it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def in_words(count: int) -> str:
    """A number of bytes with its unit."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
