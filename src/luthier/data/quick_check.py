"""The cheap check of a dataset, before anything heavy is imported."""

from pathlib import Path

from luthier.config.methods import check_example_type
from luthier.config.schema import DatasetConfig, SourceConfig
from luthier.data.examples import (
    PEEKED_ROWS,
    BadRows,
    OpenedSource,
    eval_sources,
    format_key,
    open_examples,
    path_key,
    train_sources,
)
from luthier.data.filter import compile_filter
from luthier.data.sources import Source, open_source
from luthier.errors import UserError


def check_sources(config: DatasetConfig, method: str | None = None) -> None:
    """Raise UserError for sources that are not there, of no known format, or bad from the start.

    With `method`, that of the trainer, also for rows of a kind that it does not train on. Of each
    local source the first 1,000 rows are read, with no heavy import unless its format needs one;
    the others are read when they are encoded, before the model is loaded.
    """
    sources = train_sources(config)
    keys = {name: f"dataset.sources.{name}" if config.sources else name for name in sources}
    named = {keys[name]: source for name, source in sources.items()} | eval_sources(config)
    for key, source in named.items():
        _check(source, key, config, method)


def _check(config: SourceConfig, key: str, dataset: DatasetConfig, method: str | None) -> None:
    if config.path is None:
        raise UserError(f"{key}.path is missing: say where the rows are.")
    if config.filter is not None:
        compile_filter(config.filter, f"{key}.filter")
    source = open_source(config, path_key(key), dataset.streaming)
    if not _is_here(source):
        return
    opened = open_examples(config, key)
    if method is not None:
        check_example_type(method, opened.row_format.example_type, key, format_key(key))
    if dataset.on_bad_row == "error":
        _check_rows(opened)


def _is_here(source: Source) -> bool:
    """Whether the rows are files of this machine: what is elsewhere takes time to read."""
    return bool(source.files) and all(Path(file).expanduser().exists() for file in source.files)


def _check_rows(opened: OpenedSource) -> None:
    """Raise UserError for bad ones among the first rows."""
    bad = BadRows()
    for _ in opened.examples(bad, opened.source.peek(PEEKED_ROWS)):
        pass
    bad.raise_if_any(opened)
