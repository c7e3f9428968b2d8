"""Which format a file has, by its name."""

from pathlib import PurePosixPath

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".md": "text",
}
"""Suffix -> format; case does not count."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
"""Suffixes that may stand behind the format's own."""
TABLES = ("parquet", "arrow")
"""Formats that are read through Arrow and cannot be read front to back alone."""


def format_of(name: str) -> str | None:
    """The format that a file's name says, below any compression; None if it says none."""
    path = PurePosixPath(name.lower())
    while path.suffix in COMPRESSED:
        path = path.with_suffix("")
    return SUFFIXES.get(path.suffix)


def is_file_name(name: str) -> bool:
    """Whether a name ends as data files do, so that it is no hub dataset's."""
    return format_of(name) is not None or name.lower().endswith(COMPRESSED)
