"""The text of a file, a block or a line at a time, and the rows of files of plain text.

A byte that the encoding does not have is a `UserError` with its line and what to set.
"""

import codecs
import shlex
from collections.abc import Iterator
from itertools import chain

from luthier.data.rows import BadRow, Row
from luthier.data.sources.options import COMPRESSION_SUFFIXES, TextOptions, describe_other_file
from luthier.data.sources.streams import DataFile, read_blocks
from luthier.errors import UserError, format_override


def read_text_blocks(file: DataFile, encoding: str) -> Iterator[str]:
    """Yield the file's text in blocks, without a byte order mark."""
    # A block may end within a character, of which an incremental decoder keeps the beginning.
    # utf-8-sig leaves out the byte order mark that programs for Windows write; the decoder of
    # UTF-16 reads its mark itself.
    decoder = codecs.getincrementaldecoder("utf-8-sig" if encoding == "utf-8" else encoding)()
    line = 1
    try:
        for number, block in enumerate(read_blocks(file)):
            if number == 0 and encoding == "utf-8":
                _refuse_other_file(file, block)
                _refuse_utf16(file, block)
            text = decoder.decode(block)
            yield text
            line += text.count("\n")
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(_describe_wrong_encoding(file, error, line, encoding)) from error


MAX_ROW_CHARS = 2**30
"""Characters of the longest line, value or text that is held as one row: a few megabytes of a
compressed file can be a line without an end."""


def refuse_long_row(chars: int, where: str) -> None:
    """Raise UserError, with `where` a row begins, for one of more characters than are held."""
    if chars > MAX_ROW_CHARS:
        raise UserError(
            f"dataset: {where}: the row that begins here is longer than {MAX_ROW_CHARS:,} "
            "characters, the most that a row may have.\nIf this is the file that you want to train "
            "on, cut it into rows first."
        )


def split_lines(text: Iterator[str], label: str) -> Iterator[str]:
    """Return the lines of a text without their line feeds; a carriage return stays.

    `label` names the file in the UserError for a line that is too long. Only a line feed ends a
    line: JSON text may hold U+2028, and `splitlines` would cut there.
    """
    return chain.from_iterable(_lines_of_each_block(text, label))


def _lines_of_each_block(text: Iterator[str], label: str) -> Iterator[list[str]]:
    """Yield the lines that end in each block, then the rest."""
    open_line: list[str] = []
    open_chars, number = 0, 1
    for block in text:
        # A line may span many blocks: its pieces are joined once, at its end, since adding each of
        # them would copy the line anew.
        pieces = block.split("\n")
        open_line.append(pieces[0])
        open_chars += len(pieces[0])
        refuse_long_row(open_chars, f"{label}:{number}")
        if len(pieces) > 1:
            pieces[0] = "".join(open_line)
            open_line = [pieces.pop()]
            open_chars, number = len(open_line[0]), number + len(pieces)
            yield pieces
    if rest := "".join(open_line):
        yield [rest]


_FIRST_BYTES = {
    b"\xd0\xcf\x11\xe0": ".xls",
    b"%PDF-": ".pdf",
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
}
"""First bytes of files that are named as text and are none -> their usual suffix."""


def _refuse_other_file(file: DataFile, block: bytes) -> None:
    """Stop at a spreadsheet, a document, an image or a table that is named as text."""
    for first, suffix in _FIRST_BYTES.items():
        if block.startswith(first):
            other = describe_other_file(f"file{suffix}")
            raise UserError(f"dataset: {file.label} is, by its first bytes, {other}")
    if block.startswith(b"PAR1"):
        key = file.options_key.removesuffix("options")
        raise UserError(
            f"dataset: {file.label} is, by its first bytes, Parquet. Set {key}format=parquet."
        )


def _refuse_utf16(file: DataFile, block: bytes) -> None:
    """Stop at a text whose characters have two or four bytes each."""
    # Western text in UTF-16 or UTF-32 has a zero byte among its first four, also without a mark.
    if block.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in block[:4]:
        raise UserError(
            f"dataset: {file.label} is UTF-16, and UTF-8 is needed. "
            f"{_encoding_advice(file, 'utf-16')}"
        )


def _describe_wrong_encoding(
    file: DataFile, error: UnicodeDecodeError, line: int, encoding: str
) -> str:
    """Return the text for a byte that the encoding does not have."""
    # The error's object is the block with what the decoder had left over; the lines before it are
    # counted already.
    line += error.object.count(b"\n", 0, error.start)
    byte = f"dataset: {file.label}:{line}: byte 0x{error.object[error.start]:02x} is not"
    if encoding != "utf-8":
        key = f"{file.options_key}.encoding"
        return f"{byte} {encoding}, which {key} says the file is. Correct it."
    advice = _encoding_advice(file, "windows-1252")
    return f"{byte} UTF-8. Its real encoding may be windows-1252. {advice}"


def _encoding_advice(file: DataFile, encoding: str) -> str:
    """Return what to do about a file in another encoding."""
    setting = f"et {format_override(f'{file.options_key}.encoding', encoding)}."
    if file.location.is_remote or file.label.lower().endswith(COMPRESSION_SUFFIXES):
        return f"S{setting}"
    command = f"iconv -f {encoding.upper()} -t UTF-8 {shlex.quote(file.label)} > utf8.{file.format}"
    return f"Convert it: {command}, or s{setting}"


def read_text_rows(file: DataFile, options: TextOptions) -> Iterator[Row | BadRow]:
    """Return the rows of a text file; blank lines are none and part paragraphs."""
    text = read_text_blocks(file, options.encoding)
    if options.by == "file":
        return _row_of_file(file.label, text)
    numbered_lines = _number_lines(text, file.label)
    return (
        _rows_of_lines(file.label, numbered_lines)
        if options.by == "line"
        else _rows_of_paragraphs(file.label, numbered_lines)
    )


def _row_of_file(label: str, text: Iterator[str]) -> Iterator[Row]:
    """Yield one row, unless the file is blank."""
    blocks, chars = [], 0
    for block in text:
        blocks.append(block)
        chars += len(block)
        refuse_long_row(chars, label)
    content = "".join(blocks)
    if content.strip():
        yield Row({"text": content}, label)


def _number_lines(text: Iterator[str], label: str) -> Iterator[tuple[int, str]]:
    """Return the lines without their ends, counted from 1."""
    lines = enumerate(split_lines(text, label), start=1)
    return ((number, line.removesuffix("\r")) for number, line in lines)


def _rows_of_lines(label: str, numbered_lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    """Return a row for each line that is not blank."""
    return (
        Row({"text": line}, f"{label}:{number}") for number, line in numbered_lines if line.strip()
    )


def _rows_of_paragraphs(label: str, numbered_lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    """Yield a row for each stretch of lines between blank ones, with the line on which it
    starts."""
    start, paragraph, chars = 0, list[str](), 0
    for number, line in numbered_lines:
        if line.strip():
            start, chars = (start, chars) if paragraph else (number, 0)
            paragraph.append(line)
            chars += len(line)
            refuse_long_row(chars, f"{label}:{start}")
        elif paragraph:
            yield Row({"text": "\n".join(paragraph)}, f"{label}:{start}")
            paragraph = []
    if paragraph:
        yield Row({"text": "\n".join(paragraph)}, f"{label}:{start}")
