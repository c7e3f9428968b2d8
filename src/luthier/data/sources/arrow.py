"""The rows of Parquet and Arrow files, and of folders that `datasets.save_to_disk` left.

Tables are read a batch at a time, and rows lose the nulls that their table's schema filled in.
Numbers that `datasets` describes as classes in a table's metadata become the names of these.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.rows import Row, excerpt
from luthier.data.sources.json import LENIENT_DECODER
from luthier.data.sources.streams import (
    BLOCK_BYTES,
    DataFile,
    LocalFile,
    make_seekable,
    open_content,
    read_errors_as_user_errors,
)
from luthier.errors import UserError

if TYPE_CHECKING:
    import pyarrow


_STATE_FILE = "state.json"
_SPLITS_FILE = "dataset_dict.json"


def is_saved_dataset(path: str) -> bool:
    """Return whether a folder of this machine was left by `save_to_disk`."""
    folder = Path(path).expanduser()
    try:
        return (folder / _STATE_FILE).is_file() or (folder / _SPLITS_FILE).is_file()
    except OSError:  # a folder that may not be looked into, or a name that is too long
        return False


def find_saved_files(path: str, split: str, name: str) -> list[DataFile]:
    """Return the Arrow files of the dataset, or of one split of several, in order."""
    folder = Path(path).expanduser()
    if (folder / _SPLITS_FILE).is_file():
        splits = list(map(str, _read_description(folder / _SPLITS_FILE, path, "splits")))
        if split not in splits:
            raise UserError(
                f"dataset: {path} has no split {split!r}. It has: {', '.join(splits)}. Set "
                f"{name}.split."
            )
        folder, path = folder / split, f"{path.rstrip('/')}/{split}"
    elif not is_saved_dataset(path):
        raise UserError(
            f"dataset: {path} is not a folder of a saved dataset (looked for {_STATE_FILE} and "
            f"{_SPLITS_FILE} in {folder.absolute()})."
        )
    elif split != "train":
        raise UserError(
            f"{name}.split={split}: {path} was saved as one dataset without splits. Remove it."
        )
    shards = _read_description(folder / _STATE_FILE, path, "_data_files")
    names = [str(shard["filename"]) for shard in shards]
    return [
        DataFile(f"{path.rstrip('/')}/{name}", "arrow", LocalFile(folder / name)) for name in names
    ]


def _read_description(file: Path, path: str, key: str) -> list[Any]:
    """Return a list of the description that `save_to_disk` writes."""
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"dataset: {path} is a saved dataset whose {file.name} cannot be read "
            f"({type(error).__name__}: {error}). Save or copy it again."
        ) from error


# The key of the metadata under which `datasets` describes the columns.
_FEATURES_KEY = b"huggingface"


def class_names(schema: "pyarrow.Schema") -> dict[str, list[str]]:
    """Return the names of the classes by column: of a class, or of a list of them, such as tags."""
    described = (schema.metadata or {}).get(_FEATURES_KEY)
    if described is None:
        return {}
    features = json.loads(described).get("info", {}).get("features") or {}
    names_of_column = {column: _class_names(feature) for column, feature in features.items()}
    return {column: names for column, names in names_of_column.items() if names is not None}


def _class_names(feature: Any) -> list[str] | None:
    """Return the names of a column's classes; None for a column of anything else."""
    # A list of classes is described as a list whose `feature` is the class, to any depth.
    while isinstance(feature, dict) and "feature" in feature:
        feature = feature["feature"]
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names: list[str] | None = feature.get("names")
    return names


def name_classes(value: Any, names: list[str]) -> Any:
    """Return a class, or each of a list, by its name; -1, which means that there is none, stays."""
    if isinstance(value, list):
        return [name_classes(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


_ROWS_AT_A_TIME = 1000
"""Rows that are turned into Python values at once."""
_BYTES_AT_A_TIME = 32 * 2**20
"""Bytes of a table that are, where its rows are large: those with images are."""
_FILE_MAGIC = b"ARROW1"


def read_parquet_rows(file: DataFile) -> Iterator[Row]:
    """Yield the rows of a Parquet file, numbered from 0 as everything that reads Parquet does."""
    with _open_arrow_source(file) as source:
        yield from read_batch_rows(
            _open_parquet(source).iter_batches(batch_size=_ROWS_AT_A_TIME), file.label
        )


def read_arrow_rows(file: DataFile) -> Iterator[Row]:
    """Yield the rows of an Arrow IPC file or stream, numbered from 0."""
    with _open_arrow_source(file) as source:
        yield from read_batch_rows(_read_batches(source), file.label)


def count_table_rows(file: DataFile) -> int:
    """Return how many rows a Parquet or Arrow file says it has."""
    with _open_arrow_source(file) as source:
        if file.format == "parquet":
            return int(_open_parquet(source).metadata.num_rows)
        return sum(batch.num_rows for batch in _read_batches(source))


def read_batch_rows(batches: "Iterable[pyarrow.RecordBatch]", label: str) -> Iterator[Row]:
    """Yield the rows of record batches, without their nulls.

    Arrow gives every struct of a column the keys of all of them, null where a row had none. Such
    a null cannot be told from one that was meant, so both go; JSON kept as text keeps its own.
    Numbers that `datasets` says are classes become the names of these.
    """
    number = 0
    for batch in batches:
        # A batch may have millions of rows, which take many times its memory as Python objects.
        rows = _rows_at_a_time(batch)
        for start in range(0, batch.num_rows, rows):
            piece = _validate_batch(batch.slice(start, rows), label)
            names = _column_names(piece, label)
            classes = class_names(piece.schema)
            columns = [
                name_classes(cells, classes[name]) if name in classes else cells
                for name, cells in zip(names, map(_column_values, piece.columns), strict=True)
            ]
            for cells in zip(*columns, strict=True):
                fields = {
                    name: cell for name, cell in zip(names, cells, strict=True) if cell is not None
                }
                yield Row(fields, f"{label} row {number}")
                number += 1


def _rows_at_a_time(batch: "pyarrow.RecordBatch") -> int:
    """Return how many rows of a batch are turned into Python values at once."""
    row_bytes = batch.nbytes // max(batch.num_rows, 1)
    return max(min(_ROWS_AT_A_TIME, _BYTES_AT_A_TIME // max(row_bytes, 1)), 1)


def _validate_batch(batch: "pyarrow.RecordBatch", label: str) -> "pyarrow.RecordBatch":
    """Return the batch, if what it says about itself holds: Arrow trusts a broken one, and may
    crash."""
    from pyarrow import ArrowInvalid

    try:
        batch.validate(full=True)
    except ArrowInvalid as error:
        raise UserError(
            f"dataset: {label} is broken: {error}. Copy or download it again."
        ) from error
    return batch


def _column_names(batch: "pyarrow.RecordBatch", label: str) -> list[str]:
    """Return the columns' names, which must differ."""
    names = list(batch.schema.names)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"dataset: {label} has two columns named {twice!r}. Rename one.")
    return names


def _column_values(column: "pyarrow.Array") -> list[Any]:
    """Return a column as Python values; times as text, which JSON has."""
    from pyarrow import string, types

    # JSON has no times, and an example must be JSON: they become ISO 8601 text.
    if any(is_one(column.type) for is_one in (types.is_timestamp, types.is_date, types.is_time)):
        column = column.cast(string())
    values = column.to_pylist()
    return [_clean_value(v, column.type) for v in values] if _needs_cleaning(column) else values


def _needs_cleaning(column: "pyarrow.Array") -> bool:
    """Return whether a column has nulls that were filled in, or JSON, by Arrow's own counts."""
    from pyarrow import JsonType, types

    arrow_type = column.type
    if types.is_struct(arrow_type):
        children = [column.field(number) for number in range(arrow_type.num_fields)]
        return any(child.null_count or _needs_cleaning(child) for child in children)
    if _is_list(arrow_type):
        return _needs_cleaning(column.values)
    return isinstance(arrow_type, JsonType) or types.is_map(arrow_type)


def _clean_value(value: Any, arrow_type: Any) -> Any:
    """Return a value without the nulls of its structs, and JSON as the value that it stands for."""
    from pyarrow import JsonType, types

    if value is None:
        return None
    if types.is_struct(arrow_type):
        present_fields = ((key, entry) for key, entry in value.items() if entry is not None)
        return {
            key: _clean_value(entry, arrow_type.field(key).type) for key, entry in present_fields
        }
    if _is_list(arrow_type):
        return [_clean_value(entry, arrow_type.value_type) for entry in value]
    if types.is_map(arrow_type):
        return {
            key: _clean_value(entry, arrow_type.item_type)
            for key, entry in _map_of_pairs(value).items()
        }
    return LENIENT_DECODER.decode(value) if isinstance(arrow_type, JsonType) else value


def _map_of_pairs(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return a map, which Arrow gives as pairs: six times faster than as a dict."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise UserError(f"dataset: a map of the table holds a key twice: {excerpt(pairs)}")
    return mapping


def _is_list(arrow_type: Any) -> bool:
    """Return whether a type is one of Arrow's lists."""
    from pyarrow import types

    return (
        types.is_list(arrow_type)
        or types.is_large_list(arrow_type)
        or types.is_fixed_size_list(arrow_type)
    )


def _open_parquet(source: Any) -> Any:
    """Return the Parquet file, read in pieces: a row group can be larger than the memory."""
    from pyarrow.parquet import ParquetFile

    # With a `buffer_size` pyarrow reads a column in pieces; without one it reads a whole chunk at
    # once.
    return ParquetFile(source, pre_buffer=False, buffer_size=BLOCK_BYTES)


def _read_batches(source: Any) -> "Iterator[pyarrow.RecordBatch]":
    """Yield the batches of either form of Arrow file."""
    from pyarrow import ipc

    # `datasets` writes streams and Feather is a file, both under the suffix .arrow, so the first
    # bytes decide.
    magic = source.read(len(_FILE_MAGIC))
    source.seek(0)
    if magic != _FILE_MAGIC:
        yield from ipc.open_stream(source)
        return
    reader = ipc.open_file(source)
    yield from (reader.get_batch(number) for number in range(reader.num_record_batches))


@contextmanager
def _open_arrow_source(file: DataFile) -> Iterator[Any]:
    """Yield the file as Arrow reads it at will; UserError for what Arrow cannot read."""
    from pyarrow import ArrowException, OSFile

    with read_errors_as_user_errors(file.label, file.location.is_remote), ExitStack() as stack:
        stream = stack.enter_context(open_content(file))
        # Arrow calls a file without bytes broken, which would send the user the wrong way.
        if not stream.peek(1):
            raise UserError(f"dataset: {file.label} is empty: it has no bytes.")
        if isinstance(file.location, LocalFile) and isinstance(stream.raw, FileIO):
            # Read by Arrow itself, without a call to Python for each piece.
            source = stack.enter_context(OSFile(str(file.location.path)))
        else:
            source = make_seekable(stack, stream)
        try:
            yield source
        except (ArrowException, OSError, ValueError) as error:
            name = {"parquet": "a Parquet"}.get(file.format, "an Arrow")
            raise UserError(
                f"dataset: {file.label} cannot be read as {name} file: {error}. Is it complete? If "
                "its name is misleading, set format to what it is."
            ) from error
