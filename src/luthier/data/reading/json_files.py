"""The rows of JSON and JSONL files: one object per line, an array of objects, or objects alone."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from luthier.data.reading.json_values import LENIENT, of_value, row
from luthier.data.reading.options import JsonOptions, LineOptions
from luthier.data.reading.places import File
from luthier.data.reading.texts import lines, texts
from luthier.data.reading.window import Window
from luthier.data.rows import BadRow, Row
from luthier.errors import UserError

WRAPPERS = ("data", "rows", "examples", "instances", "items", "records", "samples")
"""Keys under which a file that is one object commonly holds its rows."""
_LONG_LINE = 1 << 24
"""Characters after which a first line is taken to be the whole file."""
_PART_KEYS = {"role", "from", "content", "value", "function", "parameters"}
"""Keys of objects that are parts of a row: messages and tools."""


def jsonl_rows(file: File, options: LineOptions) -> Iterator[Row | BadRow]:
    """The row of every line that is not blank; a bad line costs itself alone.

    An array over several lines is read as one: no row begins with a bracket.
    """
    head, text = _first_line(texts(file, options.encoding))
    if head.startswith("[") and not _is_whole(head):
        return _array(file.label, text)
    return _by_line(file.label, text)


def json_rows(file: File, options: JsonOptions) -> Iterator[Row | BadRow]:
    """The rows of an array, of one object per line, or of objects one behind another.

    A file that is one object is held whole. UserError where the syntax of anything but a line is
    broken, because what follows cannot be read.
    """
    head, text = _first_line(texts(file, options.encoding))
    if head.startswith("["):
        if options.rows not in (None, "auto"):
            raise _no_object(file.label, options.rows)
        return _array(file.label, text)
    spans_lines = head.startswith("{") and not _is_whole(head)
    found = _objects(file.label, text) if spans_lines else _by_line(file.label, text)
    return found if options.rows is None else _unwrapped(file.label, found, options.rows)


def _first_line(text: Iterator[str]) -> tuple[str, Iterator[str]]:
    """The first line that is not blank, and the text with it."""
    head = ""
    for block in text:
        head += block
        if "\n" in head.lstrip() or len(head) > _LONG_LINE:
            break
    return head.lstrip().split("\n", 1)[0], chain([head], text)


def _is_whole(text: str) -> bool:
    """Whether the text is one JSON value."""
    try:
        LENIENT.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _by_line(label: str, text: Iterator[str]) -> Iterator[Row | BadRow]:
    """One row per line."""
    for number, line in enumerate(lines(text), start=1):
        if line and not line.isspace():
            yield row(line, f"{label}:{number}")


def _objects(label: str, text: Iterator[str]) -> Iterator[Row | BadRow]:
    """Objects one behind another, over as many lines as they take."""
    window = Window(label, text)
    while window.upcoming():
        yield window.row()


def _array(label: str, text: Iterator[str]) -> Iterator[Row | BadRow]:
    """The values of one array that spans the file, each with the line on which it starts."""
    window = Window(label, text)
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
        raise window.broken("there is text behind the array's end")


def _unwrapped(label: str, found: Iterator[Row | BadRow], key: str) -> Iterator[Row | BadRow]:
    """The rows that a file of one object holds under a key; else the rows themselves."""
    first, second = next(found, None), next(found, None)
    head = [entry for entry in (first, second) if entry is not None]
    if isinstance(first, Row) and second is None:
        yield from _of_object(label, first, key)
    elif key != "auto":
        raise _no_object(label, key)
    else:
        yield from chain(head, found)


def _of_object(label: str, whole: Row, key: str) -> Iterator[Row | BadRow]:
    """The rows of the one object of a file: those under the key, or the object itself."""
    key = _chosen(label, whole.fields) if key == "auto" else key
    if not key:
        yield whole
        return
    if not isinstance(whole.fields.get(key), list):
        raise UserError(
            f"dataset: options.rows={key}: {label} holds no list under {key!r}. "
            f"It has the keys {', '.join(whole.fields)}."
        )
    for number, value in enumerate(whole.fields[key]):
        yield of_value(value, f"{label} {key}[{number}]")


def _chosen(label: str, fields: dict[str, Any]) -> str:
    """The key whose list is the file's rows; empty if the object is itself a row."""
    lists = [key for key, value in fields.items() if _could_be_rows(value)]
    others = [value for key, value in fields.items() if key not in lists]
    if not lists:
        return ""
    if len(lists) == 1 and lists[0] in WRAPPERS and not any(map(_is_nested, others)):
        return lists[0]
    shown = " or ".join(f"options.rows={key}" for key in lists)
    sizes = ", ".join(f"{key} ({len(fields[key]):,})" for key in lists)
    raise UserError(
        f"dataset: {label} is one object that holds lists of objects: {sizes}. If those are the "
        f"rows, set {shown}; if the object is one row, set options.rows=null."
    )


def _could_be_rows(value: Any) -> bool:
    """Whether a value is a list with objects that are no messages and no tools."""
    objects = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    return bool(objects) and not any(_PART_KEYS & item.keys() for item in objects)


def _no_object(label: str, key: str) -> UserError:
    """The error for a key to look under where there is no one object."""
    return UserError(f"dataset: options.rows={key}: {label} is not one object. Remove it.")


def _is_nested(value: Any) -> bool:
    """Whether a value is a list or an object, which metadata beside rows seldom is."""
    return isinstance(value, list | dict)
