"""Local JSON and JSONL files: every row with its file and line, every mistake in words.

Read in pure Python: the loader of `datasets` would take seconds to import, and its errors name
no line.
"""

import difflib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from luthier.data.rows import Mistakes, Row, RowError, kind
from luthier.errors import UserError

SUFFIXES = (".json", ".jsonl")
OTHER_SUFFIXES = (".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst", ".zip", ".xz")
EXPECTED = (
    "Each row is to be one JSON object, such as\n"
    '  {"messages": [{"role": "user", "content": "Hi"}, '
    '{"role": "assistant", "content": "Hello!"}]}\n'
    '  {"prompt": "Hi", "completion": "Hello!"}\n'
    "one per line (JSONL), or all of them in one array (JSON)."
)
_SPACE = re.compile(r"[ \t\r\n]*")


def is_local(path: str) -> bool:
    """Whether a dataset's path means a file of this machine, and no hub name."""
    looks_local = path.startswith(("/", "./", "../", "~", ".\\", "..\\"))
    return looks_local or path.endswith((*SUFFIXES, *OTHER_SUFFIXES)) or Path(path).exists()


def read_file(path: str) -> tuple[Row, ...]:
    """All rows of a JSON or JSONL file, in order; UserError names the file and its bad lines.

    A file that has not changed since it was last read is not read again: see `forget`.
    """
    file = _readable(path)
    stat = file.stat()
    return _read(path, str(file.resolve()), stat.st_mtime_ns, stat.st_size)


def forget() -> None:
    """Free the rows of the files that were read."""
    _read.cache_clear()


def _readable(path: str) -> Path:
    """The file of this path, if it is one that luthier reads."""
    file = Path(path).expanduser()
    if not file.exists():
        raise UserError(_missing(path, file))
    if file.is_dir():
        raise UserError(
            f"dataset: {path} is a folder here ({file.resolve()}), and a file is needed."
            f"{_neighbours(file, '')}"
        )
    if file.suffix in OTHER_SUFFIXES:
        raise UserError(
            f"dataset: {path} is a {file.suffix} file, and only JSON and JSONL are read. "
            "Convert it (unpack it, if it is compressed) and name the .json or .jsonl file."
        )
    return file


def _missing(path: str, file: Path) -> str:
    """The words for a file that is not there."""
    folder = file.absolute().parent
    text = f"dataset: there is no file {path} (looked at {file.absolute()})."
    if not folder.is_dir():
        return f"{text} The folder {folder} is missing too; relative paths start at {Path.cwd()}."
    return text + _neighbours(folder, file.name)


def _neighbours(folder: Path, name: str) -> str:
    """The data files of a folder, the most similar names first."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix in SUFFIXES)
    if not names:
        return " There are no .json or .jsonl files in that folder."
    close = difflib.get_close_matches(name, names, n=3)
    return f" In that folder: {', '.join(close or names[:5])}."


@lru_cache(maxsize=4)
def _read(path: str, resolved: str, mtime_ns: int, size: int) -> tuple[Row, ...]:
    """The rows of a file; the arguments that go unused make a changed file a new one."""
    text = _decode(path, Path(resolved))
    is_array = not resolved.endswith(".jsonl") and text.lstrip().startswith("[")
    mistakes = Mistakes()
    found = _array(path, text) if is_array else _lines(path, text)
    rows: list[Row] = []
    for where, value in found:
        if isinstance(value, dict):
            rows.append(Row(value, where))
        elif isinstance(value, _Bad):
            mistakes.add(where, value.problem, value.text)
        else:
            mistakes.add(where, f"this is {kind(value)}, not a JSON object", value)
    mistakes.raise_if_any(path, EXPECTED)
    if not rows:
        raise UserError(f"dataset: {path} is empty: it has no rows. {EXPECTED}")
    return tuple(rows)


class _Bad:
    """Text that is not JSON, and why."""

    def __init__(self, problem: str, text: str) -> None:
        self.problem, self.text = problem, text


def _decode(path: str, file: Path) -> str:
    """The file's text, which must be UTF-8; a byte order mark is skipped."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"dataset: {path} cannot be read: {error.strerror}.") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(
            f"dataset: {path} is UTF-16, and UTF-8 is needed. Convert it: "
            f"iconv -f UTF-16 -t UTF-8 {path} > utf8.jsonl"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"dataset: {path}:{line}: byte 0x{content[error.start]:02x} is not UTF-8. Convert "
            f"the file from its real encoding: iconv -f WINDOWS-1252 -t UTF-8 {path} > utf8.jsonl"
        ) from error


def _lines(path: str, text: str) -> Iterator[tuple[str, Any]]:
    """The value of every line that is not blank."""
    # Not splitlines(): JSON text may hold U+2028, which is no line end of the file.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse(line)


def _parse(line: str) -> Any:
    """The value of one line, or what is wrong with it."""
    try:
        return _sound(_DECODER.decode(line), line)
    except json.JSONDecodeError as error:
        return _Bad(f"this is not JSON: {error.msg} (column {error.colno})", line)
    except (ValueError, RecursionError, RowError) as error:
        return _Bad(f"this is not JSON: {error}", line)


def _array(path: str, text: str) -> Iterator[tuple[str, Any]]:
    """The values of one array that spans the file, each with the line on which it starts."""
    position, line, last = _skip(text, text.index("[") + 1), 1, 0
    while position < len(text) and text[position] != "]":
        line, last = line + text.count("\n", last, position), position
        where = f"{path}:{line}"
        try:
            value, end = _DECODER.raw_decode(text, position)
            _sound(value, text[position:end])
        except (ValueError, RecursionError, RowError) as error:
            yield where, _Bad(f"this is not JSON: {_array_problem(error)}", _start(text, position))
            return
        yield where, value
        position = _skip(text, end)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            break
    yield from _after_array(path, text, position)


def _after_array(path: str, text: str, position: int) -> Iterator[tuple[str, Any]]:
    """A bad row if the array has no end, or more text behind it."""
    closed = text[position : position + 1] == "]"
    if closed and not text[position + 1 :].strip():
        return
    problem = "there is text behind the array's end" if closed else "expected ',' or ']' here"
    where = f"{path}:{text.count(chr(10), 0, position) + 1}"
    yield where, _Bad(problem, _start(text, position) or "the file ends")


def _array_problem(error: Exception) -> str:
    """What is wrong, with the line of the file."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (line {error.lineno}, column {error.colno})"
    return str(error)


def _start(text: str, position: int) -> str:
    """The text from here on, as much as an error shows."""
    return text[position : position + 200]


def _skip(text: str, position: int) -> int:
    """The position of the next text that is not white space."""
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _sound(value: Any, text: str) -> Any:
    """The value, unless an escape such as \\ud83d stands for half a character."""
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RowError("a \\u escape is half of a character (a lone surrogate)") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys all differ; the last of equal keys would win without a word."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RowError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return result


def _constant(name: str) -> None:
    """Refuse NaN and infinities, which Python reads and JSON does not have."""
    raise RowError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
