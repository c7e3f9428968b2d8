"""The rows of plain text: a line, a paragraph or a whole file each, as `{"text": ...}`."""

from collections.abc import Iterator

from luthier.data.reading.options import TextOptions
from luthier.data.reading.places import File
from luthier.data.reading.texts import lines, texts
from luthier.data.rows import BadRow, Row


def text_rows(file: File, options: TextOptions) -> Iterator[Row | BadRow]:
    """The rows of a text file; blank lines are none and part paragraphs."""
    text = texts(file, options.encoding)
    if options.by == "file":
        return _whole(file.label, text)
    found = _numbered(text)
    return _by_line(file.label, found) if options.by == "line" else _paragraphs(file.label, found)


def _whole(label: str, text: Iterator[str]) -> Iterator[Row]:
    """One row, unless the file is blank."""
    whole = "".join(text)
    if whole.strip():
        yield Row({"text": whole}, label)


def _numbered(text: Iterator[str]) -> Iterator[tuple[int, str]]:
    """The lines without their ends, counted from 1."""
    return ((number, line.removesuffix("\r")) for number, line in enumerate(lines(text), start=1))


def _by_line(label: str, found: Iterator[tuple[int, str]]) -> Iterator[Row]:
    """A row for each line that is not blank."""
    return (Row({"text": line}, f"{label}:{number}") for number, line in found if line.strip())


def _paragraphs(label: str, found: Iterator[tuple[int, str]]) -> Iterator[Row]:
    """A row for each stretch of lines between blank ones, with the line on which it starts."""
    start, taken = 0, list[str]()
    for number, line in found:
        if line.strip():
            start = start if taken else number
            taken.append(line)
        elif taken:
            yield Row({"text": "\n".join(taken)}, f"{label}:{start}")
            taken = []
    if taken:
        yield Row({"text": "\n".join(taken)}, f"{label}:{start}")
