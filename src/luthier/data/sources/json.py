"""The rows of JSON and JSONL files: one object per line, an array of objects, or objects alone.

Files are read strictly: a key that stands twice, NaN and half of a character are bad rows, because
Python would lose something of them without a word. An array is read through a `JsonWindow`, so that
it is never held as one text.
"""

import json
import re
from collections.abc import Iterator
from itertools import chain
from math import isinf
from typing import Any

from luthier.data.rows import BadRow, Row, RowError, describe_type, excerpt
from luthier.data.sources.options import JsonOptions, LineOptions
from luthier.data.sources.streams import DataFile
from luthier.data.sources.text import read_text_blocks, refuse_long_row, split_lines
from luthier.errors import UserError, format_override

LENIENT_DECODER = json.JSONDecoder()
"""Reads what the strict one refuses, to find where it ends."""


def parse_row(line: str, where: str) -> Row | BadRow:
    """Return the row that one line holds, or what is wrong with it."""
    try:
        value = check_surrogates(STRICT_DECODER.decode(line), line)
    except json.JSONDecodeError as error:
        problem = f"this is not JSON: {error.msg} (column {error.colno})"
        return BadRow(where, problem, excerpt(line))
    # Python 3.11 raises a plain ValueError for an integer of more than 4,300 digits.
    except (ValueError, RecursionError, RowError) as error:
        return BadRow(where, f"this is not JSON: {error}", excerpt(line))
    return row_of_value(value, where)


def row_of_value(value: Any, where: str) -> Row | BadRow:
    """Return the row that a JSON value is, if it is an object."""
    if isinstance(value, dict):
        return Row(value, where)
    return BadRow(where, f"this is {describe_type(value)}, not a JSON object", excerpt(value))


def check_surrogates(value: Any, text: str) -> Any:
    """Return the value, unless an escape such as \\ud83d in its text stands for half a
    character."""
    # The text was decoded from bytes, so only an escape can bring in half of a character; rows
    # without one are not encoded again for the test.
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RowError("a \\u escape is half of a character (a lone surrogate)") from error
    return value


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object whose keys all differ; the last of equal keys would win without a word."""
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise RowError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} appears twice")
    return result


def _refuse_constant(name: str) -> None:
    """Refuse NaN and infinities, which Python reads and JSON does not have."""
    raise RowError(f"{name} is not a JSON value")


def _finite_float(text: str) -> float:
    """Return a number, unless it is so large that Python reads it as infinity."""
    number = float(text)
    if isinf(number):
        raise RowError(f"{excerpt(text)} is too large a number")
    return number


STRICT_DECODER = json.JSONDecoder(
    object_pairs_hook=_object_of_unique_keys,
    parse_constant=_refuse_constant,
    parse_float=_finite_float,
)
"""Its hook is called for every object, which takes a fifth more time than no check at all."""


_SPACE = re.compile(r"[ \t\r\n]*")
_MAX_LITERAL_CHARS = 16
"""Characters that the longest word or escape of JSON stays under."""
_EXCERPT_CHARS = 200
"""Characters of which an error shows the start."""


class JsonWindow:
    """The text from the value that is read next, as far as it was needed."""

    def __init__(self, label: str, texts: Iterator[str]) -> None:
        self._label, self._texts = label, texts
        self._text, self._at = "", 0
        self._line, self._counted = 1, 0
        self._before = 0  # characters of the first line that were let go of

    @property
    def where(self) -> str:
        """The file and the line of the next character."""
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return f"{self._label}:{self._line}"

    def upcoming(self) -> str:
        """Return the next character that is no white space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def step(self) -> None:
        """Go past one character."""
        self._at += 1

    def start(self) -> str:
        """Return the text from here on, as much as an error shows."""
        while len(self._text) - self._at < _EXCERPT_CHARS and self._more():
            pass
        return excerpt(self._text[self._at : self._at + _EXCERPT_CHARS]) or "the file ends"

    def row(self) -> Row | BadRow:
        """Return the value that begins here, and go past it.

        UserError where its syntax is broken.
        """
        where = self.where
        try:
            value, end = self._decode(STRICT_DECODER)
            check_surrogates(value, self._text[self._at : end])
        except (RowError, RecursionError) as error:
            bad = BadRow(where, f"this is not JSON: {error}", self.start())
            self._at = self._end()
            return bad
        self._at = end
        return row_of_value(value, where)

    def broken(self, problem: str) -> UserError:
        """Return the error for a text that is no JSON from here on."""
        return UserError(f"dataset: {self.where}: {problem}\n  {self.start()}")

    def _end(self) -> int:
        """Return where the value ends that begins here and is sound in its syntax only."""
        try:
            return self._decode(LENIENT_DECODER)[1]
        except RecursionError as error:
            raise self.broken(f"this is not JSON: {error}") from error

    def _decode(self, decoder: json.JSONDecoder) -> tuple[Any, int]:
        """Return the value that begins here and its end, with as much more text as that takes."""
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not (self._is_cut(error) and self._more()):
                    raise self._wrong(error) from error
            except ValueError as error:
                raise self.broken(f"this is not JSON: {error}") from error
            else:
                # What a window cuts in a number is a shorter number.
                if end < len(self._text) or not self._more():
                    return value, end

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Return whether more text could mend this, so that the rest is not read for nothing."""
        near_the_end = error.pos >= len(self._text) - _MAX_LITERAL_CHARS
        return near_the_end or error.msg.startswith("Unterminated string")

    def _more(self) -> bool:
        """Let go of what was read and take as much text again; return whether there was any."""
        refuse_long_row(len(self._text) - self._at, self.where)
        # As much text again as is held: a long value is then decoded anew only as often as its
        # length doubles.
        taken, missing_chars = [], max(1, len(self._text) - self._at)
        while missing_chars > 0 and (text := next(self._texts, None)) is not None:
            taken.append(text)
            missing_chars -= len(text)
        if not any(taken):
            return False
        self._line += self._text.count("\n", self._counted, self._at)
        line_start = self._text.rfind("\n", 0, self._at) + 1
        self._before = self._at - line_start + (0 if line_start else self._before)
        self._text = self._text[self._at :] + "".join(taken)
        self._at = self._counted = 0
        return True

    def _wrong(self, error: json.JSONDecodeError) -> UserError:
        """Return the error for broken syntax, with the place in the file."""
        line = self._line + self._text.count("\n", self._counted, error.pos)
        column = error.colno + (self._before if error.lineno == 1 else 0)
        return self.broken(
            f"this is not JSON: {error.msg} (line {line}, column {column}), "
            "and what follows cannot be read"
        )


WRAPPER_KEYS = ("data", "rows", "examples", "instances", "items", "records", "samples")
"""Keys under which a file that is one object commonly holds its rows."""
_MAX_FIRST_LINE_CHARS = 1 << 24
"""Characters after which a first line is taken to be the whole file."""
_PART_KEYS = {"role", "from", "content", "value", "function", "parameters"}
"""Keys of objects that are parts of a row: messages and tools."""


def read_jsonl_rows(file: DataFile, options: LineOptions) -> Iterator[Row | BadRow]:
    """Return the row of every line that is not blank; a bad line costs itself alone.

    An array over several lines is read as one: no row begins with a bracket.
    """
    head, text = _first_line(read_text_blocks(file, options.encoding))
    # A first line that is a complete array is a bad row of JSONL, and the lines behind it may be
    # good.
    if head.startswith("[") and not _is_one_value(head):
        return _rows_of_array(file.label, text)
    return _rows_by_line(file.label, text)


def read_json_rows(file: DataFile, options: JsonOptions) -> Iterator[Row | BadRow]:
    """Return the rows of an array, of one object per line, or of objects one behind another.

    A file that is one object is held whole. UserError where the syntax of anything but a line is
    broken, because what follows cannot be read.
    """
    head, text = _first_line(read_text_blocks(file, options.encoding))
    if head.startswith("["):
        if options.rows not in (None, "auto"):
            raise _not_one_object(file, options.rows)
        return _rows_of_array(file.label, text)
    spans_lines = head.startswith("{") and not _is_one_value(head)
    rows = _rows_of_objects(file.label, text) if spans_lines else _rows_by_line(file.label, text)
    return rows if options.rows is None else _unwrap_rows(file, rows, options.rows)


def _first_line(text: Iterator[str]) -> tuple[str, Iterator[str]]:
    """Return the first line that is not blank, and the text with it."""
    head = ""
    for block in text:
        head += block
        if "\n" in head.lstrip() or len(head) > _MAX_FIRST_LINE_CHARS:
            break
    return head.lstrip().split("\n", 1)[0], chain([head], text)


def _is_one_value(text: str) -> bool:
    """Return whether the text is one JSON value."""
    try:
        LENIENT_DECODER.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _rows_by_line(label: str, text: Iterator[str]) -> Iterator[Row | BadRow]:
    """Yield one row per line."""
    for number, line in enumerate(split_lines(text, label), start=1):
        if line and not line.isspace():
            yield parse_row(line, f"{label}:{number}")


def _rows_of_objects(label: str, text: Iterator[str]) -> Iterator[Row | BadRow]:
    """Yield objects that stand one behind another, over as many lines as they take."""
    window = JsonWindow(label, text)
    while window.upcoming():
        yield window.row()


def _rows_of_array(label: str, text: Iterator[str]) -> Iterator[Row | BadRow]:
    """Yield the values of one array that spans the file, each with the line on which it starts."""
    window = JsonWindow(label, text)
    window.upcoming()
    window.step()
    while window.upcoming() != "]":
        yield window.row()
        if window.upcoming() == ",":
            window.step()
        elif window.upcoming() != "]":
            raise window.broken("expected ',' or ']' here")
    window.step()
    if window.upcoming():
        raise window.broken("there is text after the end of the array")


def _unwrap_rows(file: DataFile, rows: Iterator[Row | BadRow], key: str) -> Iterator[Row | BadRow]:
    """Yield the rows that a file of one object holds under a key; else the rows themselves."""
    # The second row tells whether the file is one object.
    first, second = next(rows, None), next(rows, None)
    head = [entry for entry in (first, second) if entry is not None]
    if isinstance(first, Row) and second is None:
        yield from _rows_of_object(file, first, key)
    elif key != "auto":
        raise _not_one_object(file, key)
    else:
        yield from chain(head, rows)


def _rows_of_object(file: DataFile, outer: Row, key: str) -> Iterator[Row | BadRow]:
    """Yield the rows of the one object of a file: those under the key, or the object itself."""
    key = _find_rows_key(file, outer.fields) if key == "auto" else key
    if not key:
        yield outer
        return
    if not isinstance(outer.fields.get(key), list):
        raise UserError(
            f"{file.options_key}.rows={key}: {file.label} holds no list under {key!r}. "
            f"It has the keys {', '.join(outer.fields)}."
        )
    for number, value in enumerate(outer.fields[key]):
        yield row_of_value(value, f"{file.label} {key}[{number}]")


def _find_rows_key(file: DataFile, fields: dict[str, Any]) -> str:
    """Return the key whose list is the file's rows; empty if the object is itself a row."""
    lists = [key for key, value in fields.items() if _could_be_rows(value)]
    others = [value for key, value in fields.items() if key not in lists]
    if not lists:
        return ""
    # Metadata beside rows is seldom a list or an object; where it is, the object may be a row.
    has_nested = any(isinstance(value, list | dict) for value in others)
    if len(lists) == 1 and lists[0] in WRAPPER_KEYS and not has_nested:
        return lists[0]
    name = f"{file.options_key}.rows"
    settings = " or ".join(format_override(name, key) for key in lists)
    sizes = ", ".join(f"{key} ({len(fields[key]):,})" for key in lists)
    raise UserError(
        f"dataset: {file.label} is one object that holds lists of objects: {sizes}. If those are "
        f"the rows, set {settings}; if the object is one row, set {name}=null."
    )


def _could_be_rows(value: Any) -> bool:
    """Return whether a value is a list with objects that are no messages and no tools."""
    objects = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    return bool(objects) and not any(_PART_KEYS & item.keys() for item in objects)


def _not_one_object(file: DataFile, key: str) -> UserError:
    """Return the error for a key to look under where there is no one object."""
    return UserError(f"{file.options_key}.rows={key}: {file.label} is not one object. Remove it.")
