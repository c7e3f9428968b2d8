"""The rows of CSV and TSV files: every cell is text, under the name that the header gives it."""

import csv
from collections.abc import Iterator, Sequence
from typing import Any

from luthier.data.rows import BadRow, Row, excerpt
from luthier.data.sources.options import CsvOptions
from luthier.data.sources.streams import DataFile
from luthier.data.sources.text import read_text_blocks, split_lines
from luthier.errors import UserError, format_override

_MAX_CELL_CHARS = 2**31 - 1
_OTHER_DELIMITERS = (";", "\t", ",", "|")


def read_csv_rows(file: DataFile, options: CsvOptions) -> Iterator[Row | BadRow]:
    """Yield the row of every record, with the line on which it starts."""
    # Texts are longer than what the module takes for a broken file.
    csv.field_size_limit(_MAX_CELL_CHARS)
    line_reader = _LineReader(file, options)
    options = _find_delimiter(line_reader.peek(), options)
    records = _read_records(file, line_reader, options)
    header = options.header
    if header is None:
        first = next((record for _, record in records), None)
        if first is None:
            return
        if isinstance(first, BadRow):
            raise UserError(f"dataset: {first.where}: the header: {first.problem}")
        header = first
    _check_header(file, header, options)
    for where, record in records:
        yield (
            record if isinstance(record, BadRow) else _row_of_record(where, header, record, options)
        )


def _find_delimiter(header_line: str, options: CsvOptions) -> CsvOptions:
    """Return the options with the character that parts the header, where nobody named one.

    Spreadsheets of countries with a decimal comma write `;`, databases a tab or `|`. The header
    must be one cell with the delimiter of the format: then it parts nothing.
    """
    if "delimiter" in options.model_fields_set or options.header:
        return options
    if _count_cells(header_line, options) != 1:
        return options
    others = [options.model_copy(update={"delimiter": mark}) for mark in _OTHER_DELIMITERS]
    best = max(others, key=lambda other: _count_cells(header_line, other))
    return best if _count_cells(header_line, best) > 1 else options


def _count_cells(line: str, options: CsvOptions) -> int:
    """Return how many cells a line has; one where it is no whole record."""
    try:
        return len(next(_make_reader(iter([line]), options), []))
    except csv.Error:
        return 1


def _make_reader(lines: Iterator[str], options: CsvOptions) -> Any:
    """Return what reads records of lines."""
    return csv.reader(
        lines,
        delimiter=options.delimiter,
        quotechar=options.quotechar,
        quoting=csv.QUOTE_MINIMAL if options.quotechar else csv.QUOTE_NONE,
        # Without `strict` Python's reader takes text behind a closing quote, and a quote that is
        # never closed, for part of a cell.
        strict=True,
    )


def _read_records(
    file: DataFile, line_reader: "_LineReader", options: CsvOptions
) -> Iterator[tuple[str, list[str] | BadRow]]:
    """Yield the place of each record that is not blank, and its cells or what is wrong with it."""
    reader = _make_reader(line_reader, options)
    while True:
        # A record may span lines, so its place is noted before it is read.
        where = f"{file.label}:{reader.line_num + 1}"
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # An error at the end of the file is an open quote, which has swallowed the records
            # before; any other error costs its own record alone.
            if line_reader.ended:
                raise UserError(_describe_open_quote(file, where, options)) from error
            yield where, BadRow(where, f"this is not CSV: {error}", excerpt(line_reader.line))
            continue
        # A blank line is an empty record, and no row.
        if record:
            yield where, record


def _row_of_record(
    where: str, header: Sequence[str], record: list[str], options: CsvOptions
) -> Row | BadRow:
    """Return the row of one record, which has a cell for each column."""
    if len(record) == len(header):
        return Row(dict(zip(header, record, strict=True)), where)
    cells = f"{len(record)} {'cell' if len(record) == 1 else 'cells'}"
    text = excerpt(options.delimiter.join(record))
    return BadRow(where, f"{cells} for {len(header)} columns", text)


def _check_header(file: DataFile, header: list[str], options: CsvOptions) -> None:
    """Refuse a header whose names do not tell the columns apart."""
    subject = (
        f"{file.options_key}.header" if options.header else f"dataset: {file.label}, its header"
    )
    stripped_names = [name.strip() for name in header]
    if "" in stripped_names:
        number = stripped_names.index("") + 1
        raise UserError(f"{subject}: column {number} has no name: {excerpt(header)}")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise UserError(f"{subject}: the name {twice[0]!r} appears twice. Rename one column.")
    # One cell that holds another common delimiter: a wrong delimiter is likelier than a table of
    # one column.
    other = [mark for mark in _OTHER_DELIMITERS if mark in header[0]]
    if len(header) == 1 and other and not options.header:
        setting = format_override(f"{file.options_key}.delimiter", other[0])
        if other[0] == "\t":  # Hydra's grammar has no escape for a tab.
            setting = format_override("dataset.format", "tsv")
        raise UserError(
            f"{subject} is a single cell: {excerpt(header[0])}. If the file uses another "
            f"delimiter, set it: {setting}"
        )


def _describe_open_quote(file: DataFile, where: str, options: CsvOptions) -> str:
    """Return the text for a quote that swallows the rest of the file."""
    return (
        f"dataset: {where}: a cell opens with {options.quotechar} here and is not closed before "
        "the file ends. Close it, double it if it is meant as text, or, if quotes are plain "
        f"characters, set {file.options_key}.quotechar=null."
    )


class _LineReader:
    """Gives the lines of a file with their ends; `line` is the last, `ended` says it is over."""

    def __init__(self, file: DataFile, options: CsvOptions) -> None:
        self._lines = split_lines(read_text_blocks(file, options.encoding), file.label)
        self.line, self.ended = "", False
        self._peeked: list[str] = []

    def peek(self) -> str:
        """Return the first line that is not blank, which is read again afterwards."""
        for line in self._lines:
            self._peeked.append(line)
            if line.strip():
                return line
        return ""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._peeked.pop(0) if self._peeked else next(self._lines, None)
        if line is None:
            self.ended = True
            raise StopIteration
        self.line = line
        # The reader needs the line feed back, for cells in quotes that span lines.
        return f"{line}\n"
