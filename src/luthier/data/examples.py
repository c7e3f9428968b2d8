"""The sources that a dataset's config names, each opened once, and their rows as examples."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from luthier.config.methods import check_example_type
from luthier.config.schema import MAIN_SOURCE, DatasetConfig, SourceConfig
from luthier.data.filter import SearchTimeoutError, compile_filter
from luthier.data.formats import Example, RowFormat, detect_format
from luthier.data.formats.image_parts import IMAGES, image_parts
from luthier.data.images.reader import ImageReader, ReadImage, is_web_address
from luthier.data.rows import BadRow, Row, RowError, bad_rows_error, excerpt, shorten_bytes
from luthier.data.sources import Source, open_source
from luthier.errors import UserError

PEEKED_ROWS = 1000
"""Rows that are looked at to find the format, and that the quick check reads."""
_CSV = {"csv", "tsv"}
_PATH, _SPLIT = "dataset.eval.path", "dataset.eval.split"


KeepImage = Callable[[ReadImage], None]
"""Takes each image of an example that is read, with its bytes where no file holds them."""


class LocatedExample(NamedTuple):
    """An example, the place of its row such as `data.jsonl:7`, and all columns of the row.

    Of a row with images the columns have no bytes of them.
    """

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
        """The names that the places of its rows begin with."""
        return self.source.files or (self.source.label,)

    @cached_property
    def images(self) -> ImageReader:
        """What reads the images of its rows."""
        return ImageReader(self.names)

    def settings(self) -> dict[str, Any]:
        """Return all that decides the examples besides the content, as JSON values."""
        return {
            "source": self.source.settings(),
            "images": ImageReader.settings(),
            # This key decides the names of entries in the cache: it keeps its old name.
            "shape": self.row_format.settings(),
            "filter": self.config.filter,
        }

    def examples(
        self,
        bad: "BadRows",
        rows: Iterable[Row | BadRow] | None = None,
        keep_image: KeepImage = lambda image: None,
        fetch: bool = True,
    ) -> Iterator[LocatedExample]:
        """Yield the examples of the rows that pass the filter, and note the others in `bad`.

        `rows` are some of the source's rows; None reads all. `keep_image` gets each image before
        the example that has it. Without `fetch`, images of web addresses are not looked at. Raises
        UserError where a search of the filter takes too long.
        """
        passes = _row_filter(self.config, self.key)
        for row in self.source.rows() if rows is None else rows:
            if isinstance(row, BadRow):
                bad.add_unreadable(row)
                continue
            try:
                if not passes(row.fields):
                    bad.filtered += 1
                    continue
                example, columns = self.row_format.read(row), row.fields
                if IMAGES in example:
                    example = self._with_images(example, row.where, keep_image, fetch)
                    columns = shorten_bytes(columns)
                yield LocatedExample(example, row.where, columns)
            except RowError as error:
                bad.add(row.where, str(error), excerpt(row.fields))
            except SearchTimeoutError as error:
                raise UserError(f"{row.where}: {error}") from None

    def _with_images(
        self, example: Example, where: str, keep_image: KeepImage, fetch: bool
    ) -> Example:
        """Return the example with a reference in each part of an image; RowError names the part."""
        images = []
        for part in image_parts(example):
            unread = part["image"]
            if not fetch and is_web_address(unread.value):
                continue
            try:
                images.append(self.images.read(unread.value, where))
            except RowError as error:
                raise RowError(f"{unread.label}: {error}") from None
            except UserError as error:
                raise UserError(f"{where}: {unread.label}: {error}") from None
            part["image"] = {**images[-1].ref}
        # Only once all of them are whole: a bad row leaves nothing behind.
        for image in images:
            keep_image(image)
        return {name: value for name, value in example.items() if name != IMAGES}


@dataclass
class BadRows:
    """The rows of a source that could not be read, and how many rows the filter left out."""

    rows: list[BadRow] = field(default_factory=list)
    filtered: int = 0
    unreadable: int = 0
    """How many are not even rows of the file: a line that is no JSON, say."""

    def add(self, where: str, problem: str, text: str) -> None:
        """Note a row that cannot be used; `text` is its beginning."""
        self.rows.append(BadRow(where, problem, text))

    def add_unreadable(self, row: BadRow) -> None:
        """Note a place of the file that its reader could make no row of."""
        self.unreadable += 1
        self.rows.append(row)

    def raise_if_any(self, opened: OpenedSource) -> None:
        """Raise UserError with the first bad rows, the count of all, and what to do."""
        if self.rows:
            advice = opened.source.advice if self.unreadable else ""
            advice += f"{chr(10) if advice else ''}To leave bad rows out: dataset.on_bad_row=drop."
            raise bad_rows_error(self.rows, opened.source.label, advice)


class DatasetSources:
    """The sources of a dataset: each is opened when it is first needed, and only once.

    The quick check opens those that are files of this machine; what encodes the rows goes on with
    these and opens the others.
    """

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config
        self.train = train_sources(config)
        """The settings of each training source, by its name."""
        self.eval = eval_sources(config)
        """The settings of each evaluation set with rows of its own, by its config key."""
        self._sources: dict[str, Source] = {}
        self._opened: dict[str, tuple[OpenedSource, _FileStamps]] = {}

    @property
    def by_key(self) -> dict[str, SourceConfig]:
        """The settings of all sources by config key, those for training first."""
        return {source_key(name, self.train): self.train[name] for name in self.train} | self.eval

    def source(self, key: str) -> Source:
        """Return the source under this config key, of which no row has to be read.

        Raises UserError for a source that is not there.
        """
        if key not in self._sources:
            # Evaluation sets are encoded whole even where the training rows are a stream.
            streaming = self.config.streaming and key not in self.eval
            self._sources[key] = open_source(self.by_key[key], path_key(key), streaming)
        return self._sources[key]

    def open(self, key: str) -> OpenedSource:
        """Return the source under this config key with the format of its rows.

        A file that has changed since it was opened is opened anew. Raises UserError for a source
        that is not there and for rows of no known format.
        """
        if key in self._opened:
            opened, stamps = self._opened[key]
            # The first rows are kept; with another content they would be stored under its hash.
            if stamps == _stamp_files(opened.source):
                return opened
            del self._sources[key]
        source = self.source(key)
        # Before the first row is read: a write in between must count as a change.
        stamps = _stamp_files(source)
        opened = _find_format(source, self.by_key[key], key)
        self._opened[key] = opened, stamps
        return opened

    def open_train(self) -> dict[str, OpenedSource]:
        """Return the training sources by name."""
        return {name: self.open(source_key(name, self.train)) for name in self.train}

    def open_eval(self) -> dict[str, OpenedSource]:
        """Return the evaluation sets with rows of their own by config key."""
        return {key: self.open(key) for key in self.eval}


def check_sources(config: DatasetConfig, method: str | None = None) -> DatasetSources:
    """Find mistakes in a dataset before anything heavy is imported; return its sources.

    Of each local source the first 1,000 rows are read, with no heavy import unless its format needs
    one; the others are read when they are encoded, before the model is loaded. With `method`, that
    of the trainer, rows that it does not train on are a mistake, too. Raises UserError for sources
    that are not there, of no known format, or bad from the start.
    """
    sources = DatasetSources(config)
    for key, source_config in sources.by_key.items():
        if source_config.path is None:
            raise UserError(f"{key}.path is missing: set it to where the rows are.")
        if source_config.filter is not None:
            compile_filter(source_config.filter, f"{key}.filter")
        # A download or a function of the user's may take minutes; those wait for the encoding.
        if not is_on_this_machine(sources.source(key)):
            continue
        opened = sources.open(key)
        if method is not None:
            check_example_type(method, opened.row_format.example_type, key, format_key(key))
        if config.on_bad_row == "error":
            bad = BadRows()
            for _ in opened.examples(bad, opened.source.peek(PEEKED_ROWS), fetch=False):
                pass
            bad.raise_if_any(opened)
    return sources


def open_examples(config: SourceConfig, key: str, streaming: bool = False) -> OpenedSource:
    """Open the source under a config key and find the format of its rows.

    Raises UserError where either cannot be done.
    """
    return _find_format(open_source(config, path_key(key), streaming), config, key)


def _find_format(source: Source, config: SourceConfig, key: str) -> OpenedSource:
    """Return the source with the format that its first rows have; UserError if all are bad."""
    first = source.peek(PEEKED_ROWS)
    rows = [row for row in first if isinstance(row, Row)]
    bad = [row for row in first if isinstance(row, BadRow)]
    if bad and not rows:
        raise bad_rows_error(bad, source.label, source.advice)
    row_format = detect_format(config, rows, source.label, format_key(key), _has_text_cells(source))
    return OpenedSource(key, config, source, row_format)


def _has_text_cells(source: Source) -> bool:
    """Return whether every value of a source is text: a file of CSV has no other type."""
    formats = source.settings()["format"]
    return {formats} <= _CSV if isinstance(formats, str) else {*formats} <= _CSV


def train_sources(config: DatasetConfig) -> dict[str, SourceConfig]:
    """Return the sources to train on by name, the only one of a dataset as `dataset`.

    Raises UserError where there is none, and for settings of a single source beside several.
    """
    if not config.sources and config.path is None:
        raise UserError(
            "dataset names no rows. Set dataset.path to a file, a folder or a hub dataset, or "
            "name several under dataset.sources."
        )
    changed = config.changed_source_settings() if config.sources else []
    if changed:
        raise UserError(
            f"dataset.{changed[0]} is for a dataset of one source, and dataset.sources names "
            f"{', '.join(config.sources)}. Set it for each source it is for, such as "
            f"dataset.sources.{next(iter(config.sources))}.{changed[0]}, or remove dataset.sources."
        )
    return config.sources_by_name()


def eval_sources(config: DatasetConfig) -> dict[str, SourceConfig]:
    """Return the evaluation sets that have rows of their own, by the config key of each.

    `dataset.eval.path` and `dataset.eval.split` are read as the training rows are. Raises UserError
    for more than one way to hold rows out, and for settings that say nothing of such a set.
    """
    _check_one_way(config)
    # What chooses among the training rows does not choose among those held out.
    like_training = {"max_rows": None, "filter": None, "weight": None, "repeats": 1}
    sources: dict[str, SourceConfig] = {}
    if config.eval.path is not None:
        # The split is one of the training data; a file of its own has none, a folder its own.
        file_settings = {"path": config.eval.path, "split": "train", "name": None, "revision": None}
        sources[_PATH] = config.model_copy(update=like_training | file_settings)
    if config.eval.split is not None:
        if config.path is None:
            raise UserError(
                "dataset.eval.split is a split of dataset.path, which is not set. For sources of "
                "their own name evaluation sets: dataset.eval.sets.NAME.path=..."
            )
        sources[_SPLIT] = config.model_copy(update=like_training | {"split": config.eval.split})
    for name, source in config.eval.sets.items():
        key = f"dataset.eval.sets.{name}"
        if source.path is None:
            raise UserError(f"{key} has no path: set it to where its rows are.")
        if source.weight is not None or source.repeats != 1:
            raise UserError(
                f"{key}: weight and repeats mix training rows, and an evaluation set is always "
                "used whole, once. Remove them; max_rows keeps the first rows only."
            )
        sources[key] = source
    return sources


def source_key(name: str, sources: Mapping[str, SourceConfig]) -> str:
    """Return the config key of a training source: `dataset` itself for the only one."""
    return MAIN_SOURCE if [*sources] == [MAIN_SOURCE] else f"dataset.sources.{name}"


def path_key(key: str) -> str:
    """Return the config key that a source's path and split stand under, for messages."""
    return {_PATH: MAIN_SOURCE, _SPLIT: "dataset.eval"}.get(key, key)


def format_key(key: str) -> str:
    """Return the config key that a source's row format and columns stand under, for messages."""
    return MAIN_SOURCE if key in (_PATH, _SPLIT) else key


def eval_set_name(key: str) -> str:
    """Return what metrics call an evaluation set: its name; the main one has none."""
    return key.removeprefix("dataset.eval.sets.") if ".sets." in key else ""


_FileStamps = list[tuple[int, ...]]
"""When each file was written and changed, in nanoseconds, its bytes and its number on the disk."""


def _stamp_files(source: Source) -> _FileStamps:
    """Return what changes when the files of a source do; nothing for what is elsewhere."""
    if not is_on_this_machine(source):
        return []
    stats = [Path(file).expanduser().stat() for file in source.files]
    return [(stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino) for stat in stats]


def is_on_this_machine(source: Source) -> bool:
    """Return whether the rows are files of this machine: what is elsewhere takes time to read."""
    return bool(source.files) and all(Path(file).expanduser().exists() for file in source.files)


def _check_one_way(config: DatasetConfig) -> None:
    """Raise UserError for more than one way to hold rows out."""
    ways = [key for key in ("path", "split", "share", "count") if getattr(config.eval, key)]
    if len(ways) > 1:
        names = " and ".join(f"dataset.eval.{way}" for way in ways)
        raise UserError(
            f"{names} are set: rows are held out in one way only. "
            "Keep one and set the others to null."
        )


def _row_filter(config: SourceConfig, key: str) -> Callable[[Mapping[str, Any]], bool]:
    """Return what says from a row's columns whether it is used; without a filter all are."""
    if config.filter is None:
        return lambda fields: True
    return compile_filter(config.filter, f"{key}.filter")
