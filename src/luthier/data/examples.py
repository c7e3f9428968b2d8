"""The rows of a source as examples, one after the other, and the account of those that are bad."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from luthier.config.schema import DatasetConfig, SourceConfig
from luthier.data.filter import SearchTimeoutError, compile_filter
from luthier.data.formats import Example, RowFormat, detect_format
from luthier.data.rows import BadRow, BadRowReport, Row, RowError, excerpt
from luthier.data.sources import Source, open_source
from luthier.errors import UserError

# The sources that a dataset's config names, for training and for evaluation.

MAIN_SOURCE = "dataset"
"""The name of the only source of a dataset that names no sources."""
_PATH, _SPLIT = "dataset.eval.path", "dataset.eval.split"


def train_sources(config: DatasetConfig) -> dict[str, SourceConfig]:
    """The sources to train on, by name; UserError where there is none, or two ways to name one."""
    own = SourceConfig(**{name: getattr(config, name) for name in SourceConfig.model_fields})
    if not config.sources:
        if config.path is None:
            raise UserError(
                "dataset names no rows. Set dataset.path to a file, a folder or a hub dataset, or "
                "name several under dataset.sources."
            )
        return {MAIN_SOURCE: own}
    given = [name for name in SourceConfig.model_fields if name in _said(config, own)]
    if given:
        raise UserError(
            f"dataset.{given[0]} is for a dataset of one source, and dataset.sources names "
            f"{', '.join(config.sources)}. Set it for each source it is for, such as "
            f"dataset.sources.{next(iter(config.sources))}.{given[0]}, or remove dataset.sources."
        )
    return dict(config.sources)


def _said(config: DatasetConfig, own: SourceConfig) -> Iterator[str]:
    """The settings of a single source that are not what they are by default."""
    default = SourceConfig()
    for name in SourceConfig.model_fields:
        if getattr(own, name) != getattr(default, name):
            yield name


def eval_sources(config: DatasetConfig) -> dict[str, SourceConfig]:
    """The evaluation sets that have rows of their own, by the config key that describes each.

    `dataset.eval.path` and `dataset.eval.split` are read as the training rows are. Raises UserError
    for more than one way to hold rows out, and for settings that say nothing of such a set.
    """
    _check_one_way(config)
    found: dict[str, SourceConfig] = {}
    if config.eval.path is not None:
        own = _like_training(config)
        # The split is one of the training data; a file of its own has none, a folder its own.
        found[_PATH] = own.model_copy(
            update={"path": config.eval.path, "split": "train", "name": None, "revision": None}
        )
    if config.eval.split is not None:
        if config.path is None:
            raise UserError(
                "dataset.eval.split is a split of dataset.path, which is not set. For sources of "
                "their own name evaluation sets: dataset.eval.sets.NAME.path=..."
            )
        found[_SPLIT] = _like_training(config).model_copy(update={"split": config.eval.split})
    for name, source in config.eval.sets.items():
        key = f"dataset.eval.sets.{name}"
        if source.path is None:
            raise UserError(f"{key} has no path: say where its rows are.")
        if source.weight is not None or source.repeats != 1:
            raise UserError(
                f"{key}: weight and repeats mix training rows, and an evaluation set is seen "
                "whole, once. Remove them; max_rows takes the first rows only."
            )
        found[key] = source
    return found


def _check_one_way(config: DatasetConfig) -> None:
    """Refuse more than one way to hold rows out."""
    ways = [key for key in ("path", "split", "share", "count") if getattr(config.eval, key)]
    if len(ways) > 1:
        names = " and ".join(f"dataset.eval.{way}" for way in ways)
        raise UserError(
            f"{names} are set: rows are held out in one way only. "
            "Keep one and set the others to null."
        )


def _like_training(config: DatasetConfig) -> SourceConfig:
    """How the training rows are read, less what chooses among them."""
    own = {name: getattr(config, name) for name in SourceConfig.model_fields}
    return SourceConfig(**own | {"max_rows": None, "filter": None, "weight": None, "repeats": 1})


def path_key(key: str) -> str:
    """The config key that a source's path and split stand under, for messages."""
    return {_PATH: MAIN_SOURCE, _SPLIT: "dataset.eval"}.get(key, key)


def format_key(key: str) -> str:
    """The config key that a source's type and columns stand under, for messages."""
    return MAIN_SOURCE if key in (_PATH, _SPLIT) else key


def eval_set_name(key: str) -> str:
    """What an evaluation set is called in metrics: its name; the main one has none."""
    return key.removeprefix("dataset.eval.sets.") if ".sets." in key else ""


PEEKED_ROWS = 1000
"""Rows that are looked at to detect the row format."""


class LocatedExample(NamedTuple):
    """An example, the place it came from, and all columns of its row."""

    example: Example
    where: str
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class OpenedSource:
    """A source whose rows can be read as examples."""

    key: str
    """The config key that describes it, such as `dataset` or `dataset.sources.code`."""
    config: SourceConfig
    source: Source
    row_format: RowFormat

    @property
    def names(self) -> tuple[str, ...]:
        """What the places of its rows begin with."""
        return self.source.files or (self.source.label,)

    def settings(self) -> dict[str, Any]:
        """All that decides the examples besides the content, for JSON."""
        return {
            "source": self.source.settings(),
            # This key decides the names of entries in the cache: it keeps its old name.
            "shape": self.row_format.settings(),
            "filter": self.config.filter,
        }

    def examples(
        self, bad: "BadRows", rows: Iterable[Row | BadRow] | None = None
    ) -> Iterator[LocatedExample]:
        """The rows that the filter lets through, of all or of some; bad ones are noted."""
        holds = _filter(self.config, self.key)
        for row in self.source.rows() if rows is None else rows:
            if isinstance(row, BadRow):
                bad.add(row.where, row.problem, row.text)
                continue
            try:
                if holds(row.fields):
                    yield LocatedExample(self.row_format.read(row), row.where, row.fields)
                else:
                    bad.filtered += 1
            except RowError as error:
                bad.add(row.where, str(error), excerpt(row.fields))
            except SearchTimeoutError as error:
                raise UserError(f"{row.where}: {error}") from None


@dataclass
class BadRows:
    """Rows that could not be read, and how many the filter left out."""

    rows: list[BadRow] = field(default_factory=list)
    filtered: int = 0

    def add(self, where: str, problem: str, text: str) -> None:
        """Note one."""
        self.rows.append(BadRow(where, problem, text))

    def raise_if_any(self, opened: OpenedSource) -> None:
        """Raise UserError with the first of them, the count of all, and what to do."""
        mistakes = BadRowReport()
        for row in self.rows:
            mistakes.add(row.where, row.problem, row.text)
        advice = opened.source.advice
        advice += f"{chr(10) if advice else ''}To leave bad rows out: dataset.on_bad_row=drop."
        mistakes.raise_if_any(opened.source.label, advice)


def open_examples(config: SourceConfig, key: str, streaming: bool = False) -> OpenedSource:
    """Open a source and detect its row format; UserError where either cannot be done."""
    source = open_source(config, path_key(key), streaming)
    rows = [row for row in source.peek(PEEKED_ROWS) if isinstance(row, Row)]
    if not rows:
        _no_row(source)
    return OpenedSource(
        key, config, source, detect_format(config, rows, source.label, format_key(key))
    )


def _no_row(source: Source) -> None:
    """Raise UserError for a source whose first rows are all bad."""
    mistakes = BadRowReport()
    for row in source.peek(PEEKED_ROWS):
        if isinstance(row, BadRow):
            mistakes.add(row.where, row.problem, row.text)
    mistakes.raise_if_any(source.label, source.advice)


def _filter(config: SourceConfig, key: str) -> Callable[[Mapping[str, Any]], bool]:
    """The source's filter; without one every row is let through."""
    if config.filter is None:
        return lambda fields: True
    return compile_filter(config.filter, f"{key}.filter")
