"""Opens the source that a config describes: files, a saved dataset, a hub dataset or a function.

What the path means decides which settings fit it; a setting of another type of source is refused.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from luthier.config.code_settings import read_code_entries
from luthier.data.rows import BadRow, Row
from luthier.data.sources.arrow import (
    count_table_rows,
    find_saved_files,
    is_saved_dataset,
    read_arrow_rows,
    read_parquet_rows,
)
from luthier.data.sources.csv import read_csv_rows
from luthier.data.sources.files import FileSettings, find_files, is_address, is_local
from luthier.data.sources.hub import HubContent, check_hub_access
from luthier.data.sources.json import read_json_rows, read_jsonl_rows
from luthier.data.sources.map_function import MappedContent
from luthier.data.sources.options import TABLE_FORMATS, FormatOptions, read_options
from luthier.data.sources.python_function import FunctionContent
from luthier.data.sources.source import Source, changed_file_error, hash_file, join_hashes
from luthier.data.sources.streams import DataFile, HashedFile, WebFile
from luthier.data.sources.text import read_text_rows
from luthier.errors import UserError
from luthier.python_code import PYTHON_FORMS, is_python_path
from luthier.redaction import HIDDEN, REFERENCE, redact_message

if TYPE_CHECKING:
    from luthier.config.schema import SourceConfig


_READERS: dict[str, Callable[[DataFile, Any], Iterator[Row | BadRow]]] = {
    "jsonl": read_jsonl_rows,
    "json": read_json_rows,
    "csv": read_csv_rows,
    "tsv": read_csv_rows,
    "text": read_text_rows,
    "parquet": lambda file, options: read_parquet_rows(file),
    "arrow": lambda file, options: read_arrow_rows(file),
}
_JSON_ADVICE = (
    "Each row must be one JSON object, such as\n"
    '  {"messages": [{"role": "user", "content": "Hi"}, '
    '{"role": "assistant", "content": "Hello!"}]}\n'
    '  {"prompt": "Hi", "completion": "Hello!"}\n'
    "one per line (JSONL), or all of them in one array (JSON)."
)
_CSV_ADVICE = (
    "Each record must have one cell for each column of the header. A cell that contains the "
    "delimiter, a quote or a line break must be in quotes, with quotes inside it doubled. "
    "If quotes are plain characters in this file, set {key}.quotechar=null."
)
_ADVICE = {"jsonl": _JSON_ADVICE, "json": _JSON_ADVICE, "csv": _CSV_ADVICE, "tsv": _CSV_ADVICE}


class FileContent:
    """The rows of files, each of a format and its options."""

    def __init__(
        self,
        files: Sequence[DataFile],
        options: Mapping[str, FormatOptions],
        find_again: Callable[[], Sequence[DataFile]] | None = None,
    ) -> None:
        self._files, self._options, self._find_again = files, options, find_again
        advice = _ADVICE.get(files[0].format, "")
        self.advice = advice.replace("{key}", files[0].options_key)
        self._hashes: dict[str, bytes] = {}
        """The hash of each place, by its key, that `digest` has told."""
        self._as_read: dict[str, bytes] = {}
        """The hash of each place that was read whole, from front to back."""

    def items(self, hashed: bool = False) -> Iterator[Row | BadRow]:
        """Yield the rows of all files.

        One without rows is a bad row, or an error if it is alone.
        """
        if hashed:
            self._as_read = {}
        for file in self._files:
            hashed_file = HashedFile(file.location)
            if hashed and _is_read_in_order(file):
                file = replace(file, location=hashed_file)
            # `item` stays None only where the reader yields nothing: readers do not know their
            # count.
            item = None
            for item in _READERS[file.format](file, self._options[file.format]):
                yield item
            if item is None:
                yield self._empty(file)
            if (digest := hashed_file.digest()) is not None:
                self._as_read[file.location.key] = digest

    def _empty(self, file: DataFile) -> BadRow:
        """Return what stands for a file without rows."""
        if len(self._files) > 1:
            return BadRow(file.label, "the file is empty: it has no rows", "")
        raise UserError(f"dataset: {file.label} is empty: it has no rows. {self.advice}".rstrip())

    def digest(self) -> str:
        """Return the hash of the files as they are stored."""
        self._hashes = {file.location.key: hash_file(file.location) for file in self._places()}
        return join_hashes(self._hashes.values())

    def digest_as_read(self) -> str | None:
        """Return the hash of the files as they were read; None if one was not read in order."""
        if any(file.location.key not in self._as_read for file in self._places()):
            return None
        self._hashes = {
            file.location.key: self._as_read[file.location.key] for file in self._places()
        }
        return join_hashes(self._hashes.values())

    def check_unchanged(self) -> None:
        """Raise UserError for a file whose bytes were not those that `digest` has hashed.

        What was not read from front to back, such as a table, is hashed again.
        """
        for file in self._places():
            key = file.location.key
            if (self._as_read.get(key) or hash_file(file.location)) != self._hashes[key]:
                raise changed_file_error(file.label)
        self._check_names()

    def _check_names(self) -> None:
        """Raise UserError where a folder or a glob means other files than when it was opened."""
        if self._find_again is None or any(file.location.is_remote for file in self._files):
            return
        before = {file.label for file in self._files}
        now = {file.label for file in self._find_again()}
        if added := sorted(now - before):
            raise changed_file_error(f"{added[0]} was not there when reading began: the folder")
        if gone := sorted(before - now):
            raise changed_file_error(f"{gone[0]} is gone: the folder")

    def _places(self) -> list[DataFile]:
        """Return the files, but of an archive only the first: it is one place, whatever is read of
        it."""
        places: dict[str, DataFile] = {}
        for file in self._files:
            places.setdefault(file.location.key, file)
        return list(places.values())

    def settings(self) -> dict[str, Any]:
        """Return the formats, in the order of the files where they differ, and their options."""
        formats = [file.format for file in self._files]
        unique_formats = sorted(set(formats))
        options = {name: self._options[name].model_dump() for name in unique_formats}
        return {
            "format": unique_formats[0] if len(unique_formats) == 1 else formats,
            "options": options,
        }

    def size(self) -> int | None:
        """Return how many rows there are, where the files themselves say it."""
        # A text tells its rows only by being read, and a table elsewhere would be fetched for the
        # count.
        if any(file.format not in TABLE_FORMATS or file.location.is_remote for file in self._files):
            return None
        return sum(map(count_table_rows, self._files))


def _is_read_in_order(file: DataFile) -> bool:
    """Return whether a file's bytes are read once, from front to back."""
    # Tables and archives are read back and forth; of a web server they are copied first.
    back_and_forth = file.format in TABLE_FORMATS or bool(file.member)
    return not back_and_forth or isinstance(file.location, WebFile)


def open_source(config: "SourceConfig", name: str = "dataset", streaming: bool = False) -> Source:
    """Return the source that a config describes; UserError if it is not there or the settings do
    not fit.

    Cheap: nothing is read but the names of files, and no library is imported that a local file
    does not need. `name` is the config's key, for messages. With `streaming` a hub dataset is not
    downloaded but read from the network; all others are streamed anyway.
    """
    if not config.path:
        raise UserError(f"{name}.path is not set: name a file, a folder or a hub dataset.")
    if config.map is None:
        return _open_path(config, name, streaming)
    # The first rows are those of the source, whatever the function makes of them.
    source = _open_path(config.model_copy(update={"max_rows": None}), name, streaming)
    entries = read_code_entries(config.map)
    if len(entries) != 1:
        raise UserError(f"{name}.map: write one function, as {PYTHON_FORMS}.")
    (entry,) = entries
    return source.map_rows(
        lambda content: MappedContent(content, entry, name, source.label, config.max_rows)
    )


def _open_path(config: "SourceConfig", name: str, streaming: bool) -> Source:
    """Return what a path means, by its type."""
    path_type = source_type(config)
    if path_type == "hub":
        return _open_hub(config, name, streaming)
    if path_type == "python":
        return _open_function(config, name)
    if path_type == "saved":
        _refuse_hub_settings(config, name, ("name", "revision"), "a saved dataset")
        options = read_options("saved", config.options, name)
        files = find_saved_files(str(config.path), config.split, name)
        return _source_of_files(config, name, files, FileContent(files, {"arrow": options}))
    return _open_files(config, name)


def source_type(config: "SourceConfig") -> str:
    """Return whether the path means files, a saved dataset, a function or a hub dataset."""
    path = config.path
    # A format that the config names wins over what the path looks like.
    if config.format in ("hub", "python", "saved"):
        if not isinstance(path, str):
            raise UserError(f"dataset.format={config.format} takes one path, not a list of them.")
        return config.format
    if not isinstance(path, str):
        return "files"
    if is_python_path(path):
        return "python"
    if config.format == "auto" and is_saved_dataset(path):
        return "saved"
    # What is neither here nor looks like a file must be the name of a hub dataset.
    is_file = is_address(path) or is_local(path) or config.format != "auto"
    return "files" if is_file else "hub"


def _open_hub(config: "SourceConfig", name: str, streaming: bool) -> Source:
    """Return a hub dataset, if it can be had."""
    path = str(config.path)
    options = read_options("hub", config.options, name)
    # Behind the options: a misspelt one shall not wait for the network.
    check_hub_access(path, streaming)
    content = HubContent(config, options, streaming)
    return Source(name, f"{path}[{config.split}]", (), content, config.max_rows)


def _open_function(config: "SourceConfig", name: str) -> Source:
    """Return a function, if it is there."""
    _refuse_hub_settings(config, name, ("name", "revision", "split"), "a Python function")
    path = str(config.path)
    content = FunctionContent(path, config.options, name, config.max_rows)
    return Source(name, path, (), content, config.max_rows)


def _open_files(config: "SourceConfig", name: str) -> Source:
    """Return files of this machine or behind an address, each with the options of its format."""
    _refuse_hub_settings(config, name, ("name", "revision", "split"), "a file")
    format_options = dict(config.options)
    # `storage` is for the file system; no format has it among its options.
    storage = format_options.pop("storage", {})
    if not isinstance(storage, dict):
        raise UserError(f"{name}.options.storage={storage!r} is not a mapping of keys to values.")
    _refuse_missing_secrets({"path": _paths(config), "options.storage": storage}, name)
    file_settings = FileSettings(config.format, storage, f"{name}.options")
    files = find_files(_paths(config), file_settings)
    formats = sorted({file.format for file in files})
    options = {each: read_options(each, format_options, name) for each in formats}
    _report_left_out(name, file_settings.left_out)
    content = FileContent(files, options, lambda: find_files(_paths(config), file_settings))
    return _source_of_files(config, name, files, content)


_MAX_LISTED = 5
"""Names of what is left out that a notice lists; the others are counted."""


def _report_left_out(name: str, left_out: Sequence[str]) -> None:
    """Say once for all processes what of a folder, a glob or an archive is not read."""
    if not left_out or os.environ.get("RANK", "0") != "0":
        return
    files = sum(not entry.endswith("/") for entry in left_out)
    counts = [
        f"{count} {noun}{'s' if count > 1 else ''}"
        for count, noun in ((files, "file"), (len(left_out) - files, "folder"))
        if count
    ]
    names = ", ".join(left_out[:_MAX_LISTED]) + (", ..." if len(left_out) > _MAX_LISTED else "")
    verb = "was" if len(left_out) == 1 else "were"
    print(
        f"{name}: {' and '.join(counts)} {verb} left out: {names}. To read more than the data "
        f"files of one folder, name them in {name}.path.",
        file=sys.stderr,
    )


def _refuse_missing_secrets(value: Any, name: str) -> None:
    """Raise UserError where a setting holds what a record has in place of a secret."""
    if isinstance(value, dict):
        for key, below in value.items():
            _refuse_missing_secrets(below, f"{name}.{key}")
    elif isinstance(value, list):
        for item in value:
            _refuse_missing_secrets(item, name)
    elif isinstance(value, str) and HIDDEN in value:
        raise UserError(
            f"{name}: the record of the run does not hold this secret. Type it as it was typed for "
            f"the run, or as a variable: {name}='${{oc.env:NAME}}'."
        )
    elif isinstance(value, str) and (reference := REFERENCE.search(value)):
        variable = reference[1]
        reason = (
            "is a secret of your environment, which a run's folder gets only with --trust"
            if variable in os.environ
            else "is not set"
        )
        raise UserError(f"{name}: it comes from the variable {variable}, which {reason}.")


def _source_of_files(
    config: "SourceConfig", name: str, files: Sequence[DataFile], content: FileContent
) -> Source:
    """Return the source of these files."""
    labels = tuple(file.label for file in files)
    label = redact_message(_label(_paths(config), labels))
    return Source(name, label, labels, content, config.max_rows)


def _paths(config: "SourceConfig") -> list[str]:
    """Return the paths as a list."""
    return [config.path] if isinstance(config.path, str) else list(config.path or ())


def _label(paths: Sequence[str], labels: Sequence[str]) -> str:
    """Return what messages call the files together."""
    if len(labels) == 1:
        return labels[0]
    return f"{paths[0] if len(paths) == 1 else f'{paths[0]}, ...'} ({len(labels)} files)"


def _refuse_hub_settings(config: "SourceConfig", name: str, keys: Sequence[str], noun: str) -> None:
    """Refuse settings of hub datasets beside what would not heed them."""
    for key in keys:
        value: Any = getattr(config, key)
        if value is not None and (key, value) != ("split", "train"):
            raise UserError(
                f"{name}.{key}={value} is for hub datasets, and {config.path} is {noun}. "
                f"Remove {name}.{key}."
            )
