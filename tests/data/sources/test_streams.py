"""Compressed files: unpacked by what their first bytes say; cut ones in words."""

import bz2
import gzip
import io
import json
import lzma
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from luthier.errors import UserError

ROWS = [{"prompt": f"question {number}", "completion": "x" * number} for number in range(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstandard(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def zipped(content, *names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names or ("rows.jsonl",):
            archive.writestr(name, content)
    return buffer.getvalue()


PACKED = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard,
    "zip": zipped,
}


@pytest.mark.parametrize("suffix", PACKED)
class TestEach:
    def test_its_rows_are_read(self, write, read, suffix):
        found = read(write(f"a.jsonl.{suffix}", PACKED[suffix](LINES)))
        assert [row.fields for row in found] == ROWS
        inside = "/rows.jsonl" if suffix == "zip" else ""
        assert found[6].where == f"a.jsonl.{suffix}{inside}:7"

    def test_a_name_that_does_not_say_so_is_no_matter(self, write, fields, suffix):
        assert fields(write("a.jsonl", PACKED[suffix](LINES))) == ROWS

    def test_a_table_inside_is_read(self, write, fields, suffix):
        table = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
        name = write(f"a.parquet.{suffix}", PACKED[suffix](table.getvalue()))
        assert fields(name, format="parquet") == ROWS

    def test_a_cut_file_is_broken(self, write, read, suffix):
        name = write(f"a.jsonl.{suffix}", PACKED[suffix](LINES)[:-40])
        with pytest.raises(UserError, match=rf"a\.jsonl\.{suffix}.* is broken, perhaps cut short"):
            read(name)

    def test_a_wrong_byte_is_found(self, write, read, suffix):
        content = bytearray(PACKED[suffix](LINES))
        content[len(content) // 2] ^= 0xFF
        with pytest.raises(UserError):
            read(write(f"a.jsonl.{suffix}", bytes(content)))


def test_a_name_that_lies_the_other_way_is_no_matter(write, fields):
    assert fields(write("a.jsonl.gz", LINES)) == ROWS


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_streams_one_behind_another(write, fields, suffix):
    """What `cat` and the parallel tools (pigz, pbzip2, pixz, pzstd) leave."""
    pack = PACKED[suffix]
    assert fields(write(f"a.jsonl.{suffix}", pack(LINES) + pack(LINES))) == ROWS + ROWS


def test_packed_twice(write, fields):
    assert fields(write("a.jsonl.gz.xz", lzma.compress(gzip.compress(LINES)))) == ROWS


def test_an_empty_packed_file_is_empty(write, read):
    with pytest.raises(UserError, match=r"a\.jsonl\.gz is empty"):
        read(write("a.jsonl.gz", gzip.compress(b"")))


OTHER_FILES = {
    "spreadsheet": ("a.xlsx", b"PK", "a.xlsx is a spreadsheet. Open it and save it as CSV"),
    "old spreadsheet": ("a.xls", b"", "a.xls is a spreadsheet."),
    "document": ("a.pdf", b"", "a.pdf is a document. Save its text as .txt"),
    "image": ("a.png", b"", "a.png is an image. Rows name their images by path"),
    "config": ("a.yaml", b"a: 1", "`luthier convert`"),
    "model": ("a.safetensors", b"", "A model is named by model.path."),
    "spreadsheet named as CSV": (
        "a.csv",
        zipped(b"x", "[Content_Types].xml", "xl/workbook.xml"),
        "a.csv is, by its content, a spreadsheet. Open it and save it as CSV",
    ),
    "old spreadsheet named as CSV": (
        "a.csv",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "a.csv is, by its first bytes, a spreadsheet.",
    ),
    "document named as text": ("a.txt", b"%PDF-1.7", "by its first bytes, a document."),
    "image named as JSONL": ("a.jsonl", b"\x89PNG\r\n", "by its first bytes, an image."),
    "Parquet named as CSV": ("a.csv", b"PAR1\x15", "Parquet. Set dataset.format=parquet."),
}


@pytest.mark.parametrize("name, content, words", OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_that_holds_no_rows_is_named_by_what_it_is(write, read, name, content, words):
    with pytest.raises(UserError) as error:
        read(write(name, content))
    assert words in str(error.value)


def test_a_text_that_begins_like_bzip2_is_text(write, fields):
    assert fields(write("a.txt", "BZh is no header")) == [{"text": "BZh is no header"}]


def test_the_data_files_of_an_archive_are_read_in_the_order_of_their_names(write, opened):
    line = b'{"a": 1}\n'
    names = ("b/2.jsonl", "b/1.jsonl", "README.md", "__MACOSX/b/._1.jsonl", ".hidden.jsonl")
    source = opened(write("a.zip", zipped(line, *names)))
    assert source.files == ("a.zip/b/1.jsonl", "a.zip/b/2.jsonl")
    assert source.label == "a.zip (2 files)"
    assert [row.where for row in source.rows()] == ["a.zip/b/1.jsonl:1", "a.zip/b/2.jsonl:1"]


@pytest.mark.parametrize(
    ("name", "content", "settings", "words"),
    [
        ("a.zip", zipped(b"", "a.jsonl", "b.csv"), {}, "several formats"),
        ("a.zip", zipped(b"x", "a.bin", "b.bin"), {}, "holds no data files"),
        ("a.zip", zipped(b"x", "a.bin"), {}, "has none of the suffixes"),
        ("a.jsonl", zipped(LINES, "a.jsonl", "b.jsonl"), {}, "a zip archive of 2 files"),
        ("a.zip", LINES, {}, "is broken"),
        ("a.gz", gzip.compress(LINES), {}, r"has none of the suffixes \.jsonl"),
    ],
    ids=["formats", "nothing-known", "one-unknown", "hidden-archive", "no-archive", "no-format"],
)
def test_archives_that_say_too_little(write, read, name, content, settings, words):
    with pytest.raises(UserError, match=words):
        read(write(name, content), **settings)


def test_a_password_is_said(write, read):
    packed = bytearray(zipped(LINES))
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        packed[packed.index(magic) + offset] |= 1
    with pytest.raises(UserError, match=r"cannot be unpacked: .*password"):
        read(write("a.zip", bytes(packed)))


def test_a_format_can_be_named_where_the_name_says_none(write, fields):
    assert fields(write("a.gz", gzip.compress(LINES)), format="jsonl") == ROWS
    assert fields(write("a.zip", zipped(LINES, "rows")), format="jsonl") == ROWS


def test_a_full_disk_says_what_to_do(write, read, monkeypatch):
    """A real file system without room for the copy that a packed table takes."""
    monkeypatch.setattr("luthier.data.sources.streams.tempfile.TemporaryFile", FullDisk)
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    with pytest.raises(UserError, match=r"temporary copy in .*No space left.*Set TMPDIR"):
        read(write("a.parquet.gz", gzip.compress(table.getvalue())))


class FullDisk(io.FileIO):
    """What a temporary file is on a full disk."""

    def __init__(self):
        super().__init__("/dev/full", "wb")
