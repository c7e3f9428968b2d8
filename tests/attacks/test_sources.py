"""Sources under attack: files that change while they are read, and entries that are no files.

No row may be left out in silence, and no entry of the cache may hold other rows than its key says.
"""

import bz2
import csv
import gzip
import http.server
import io
import itertools
import json
import lzma
import os
import re
import shutil
import socket
import sys
import tarfile
import threading
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from helpers.letter_encoder import Letters, prepared
from luthier.config.schema import DatasetConfig, SourceConfig
from luthier.data.examples import check_sources
from luthier.data.sources import open_source
from luthier.data.sources.source import Source
from luthier.errors import UserError

OLD = [{"text": f"row {number}"} for number in range(2100)]
"""More rows than the quick check reads, so that they are read again after they were hashed."""
NEW = [{"text": f"wor {number}"} for number in range(2100)]
"""Rows that take just as many bytes."""


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "luthier"))


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_bytes(rows):
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([["text"], *([row["text"]] for row in rows)])
    return text.getvalue().encode()


def table_bytes(write):
    def pack(rows):
        file = io.BytesIO()
        write(pa.Table.from_pylist(rows), file)
        return file.getvalue()

    return pack


def zstd_bytes(rows):
    return pa.compress(json_lines(rows), codec="zstd", asbytes=True)


def zip_bytes(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


FORMATS = {
    "a.jsonl": json_lines,
    "a.json": lambda rows: json.dumps(rows).encode(),
    "a.csv": csv_bytes,
    "a.txt": lambda rows: "".join(row["text"] + "\n" for row in rows).encode(),
    "a.parquet": table_bytes(pa.parquet.write_table),
    "a.arrow": table_bytes(pa.feather.write_feather),
    "a.jsonl.gz": lambda rows: gzip.compress(json_lines(rows)),
    "a.jsonl.bz2": lambda rows: bz2.compress(json_lines(rows)),
    "a.jsonl.xz": lambda rows: lzma.compress(json_lines(rows)),
    "a.jsonl.zst": zstd_bytes,
    "a.zip": lambda rows: zip_bytes([("a.jsonl", json_lines(rows)), ("b.jsonl", '{"text":"b"}')]),
    "a.parquet.gz": lambda rows: gzip.compress(table_bytes(pa.parquet.write_table)(rows)),
}
"""File name -> the bytes of rows in its format."""


def rewrite(path, pack):
    path.write_bytes(pack(NEW))


def rewrite_with_old_time(path, pack):
    stat = path.stat()
    path.write_bytes(pack(NEW))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def grow(path, pack):
    path.write_bytes(pack(OLD + NEW))


def append(path, pack):
    with path.open("ab") as file:
        file.write(pack(NEW))


def truncate(path, pack):
    os.truncate(path, path.stat().st_size // 2)


def replace(path, pack):
    other = path.with_name("other")
    other.write_bytes(pack(NEW))
    other.rename(path)


def remove(path, pack):
    path.unlink()


def touch(path, pack):
    os.utime(path)


def replace_by_equal(path, pack):
    shutil.copy(path, "copy")
    Path("copy").rename(path)


CHANGES = [rewrite, rewrite_with_old_time, grow, append, truncate, replace, remove]
HARMLESS = [touch, replace_by_equal]


def texts_of(rows):
    """The texts of prepared rows, of which `Letters` makes a token of each letter."""
    return ["".join(map(chr, rows.table.row(number)["input_ids"])) for number in rows.index]


def change_behind_the_hash(monkeypatch, change):
    """Have the first digest of a source followed by a change, before its rows are read."""
    digest = Source.digest

    def digest_and_change(source):
        result = digest(source)
        monkeypatch.setattr(Source, "digest", digest)
        change()
        return result

    monkeypatch.setattr(Source, "digest", digest_and_change)


class Changing(Letters):
    """Has something done before it encodes its first rows, when others are still to be read."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def encode(self, examples):
        if self.change:
            self.change()
        self.change = None
        return super().encode(examples)


def entries():
    """The entries of the cache."""
    return [path for path in Path("luthier/data").glob("*") if path.is_dir()]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_changes_behind_its_hash_is_an_error(name, change, monkeypatch):
    path, pack = Path(name), FORMATS[name]
    path.write_bytes(pack(OLD))
    change_behind_the_hash(monkeypatch, lambda: change(path, pack))
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        prepared({"path": name, "on_bad_row": "drop"})
    assert entries() == [], "an entry was made of rows that its key does not name"
    if change is not remove:
        assert "changed while it was being read" in str(caught.value)


@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_written_anew_with_equal_content_is_read(name, change, monkeypatch):
    path, pack = Path(name), FORMATS[name]
    path.write_bytes(pack(OLD))
    change_behind_the_hash(monkeypatch, lambda: change(path, pack))
    assert texts_of(prepared({"path": name}).train)[:2100] == [row["text"] for row in OLD]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_changes_while_it_is_read_gives_the_old_rows_or_an_error(name, change):
    path, pack = Path(name), FORMATS[name]
    path.write_bytes(pack(OLD))
    encoder = Changing(lambda: change(path, pack))
    try:
        rows = prepared({"path": name, "on_bad_row": "drop"}, encoder=encoder).train
    except UserError as error:
        assert name in str(error)
        assert entries() == []
    else:
        assert texts_of(rows)[:2100] == [row["text"] for row in OLD]


@pytest.mark.parametrize("rows", [20, 2100], ids=["few", "many"])
def test_only_the_first_rows_of_a_file_that_changes(rows, monkeypatch):
    Path("a.jsonl").write_bytes(json_lines(OLD))
    change_behind_the_hash(monkeypatch, lambda: append(Path("a.jsonl"), json_lines))
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was being read"):
        prepared({"path": "a.jsonl", "max_rows": rows})


@pytest.mark.parametrize("path", ["data", "data/*.jsonl"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: Path("data/c.jsonl").write_bytes(json_lines(NEW)), r"data/c\.jsonl was not there"),
        (lambda: Path("data/b.jsonl").unlink(), r"there is no file .*data/b\.jsonl"),
    ],
    ids=["added", "removed"],
)
def test_files_that_come_and_go_while_a_folder_is_read(path, change, words, monkeypatch):
    Path("data").mkdir()
    for name in ("a", "b"):
        Path(f"data/{name}.jsonl").write_bytes(json_lines(OLD))
    change_behind_the_hash(monkeypatch, change)
    with pytest.raises(UserError, match=words):
        prepared({"path": path})
    assert entries() == []


def test_a_function_that_yields_other_rows_each_time_is_an_error(monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    Path("drawn_rows.py").write_text(
        "import itertools\ncalls = itertools.count()\n"
        "def rows():\n    call = next(calls)\n"
        "    return ({'text': f'{call} {n}'} for n in range(2100))\n"
    )
    sys.modules.pop("drawn_rows", None)
    with pytest.raises(UserError, match=r"python:drawn_rows\.rows gave other rows the second time"):
        prepared({"path": "python:drawn_rows.rows"})
    assert entries() == []


def test_a_function_without_end_is_read_as_far_as_it_is_used(monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    Path("endless_rows.py").write_text(
        "import itertools\ndef rows():\n    return ({'text': str(n)} for n in itertools.count())\n"
    )
    sys.modules.pop("endless_rows", None)
    assert len(prepared({"path": "python:endless_rows.rows", "max_rows": 1500}).train) == 1500


@pytest.fixture
def changing_server():
    """A web server whose only file has other rows from the third request on."""
    requests = itertools.count()

    class Changing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = json_lines(OLD if next(requests) < 3 else NEW)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(ConnectionError):  # whoever looks at the first rows leaves early
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Changing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/a.jsonl"
        server.shutdown()


def test_a_web_server_that_gives_other_rows_each_time_is_an_error(changing_server):
    # It is opened, looked at, hashed, and then read for the rows.
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was being read"):
        prepared({"path": changing_server})
    assert entries() == []


# Entries of a folder that are no files, or not what they seem.

LINE = b'{"text": "a"}\n'


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    socket.socket(socket.AF_UNIX).bind(str(path))


def make_dangling_link(path):
    path.symlink_to("blobs/gone")


def make_link_loop(path):
    path.symlink_to(path.name)


def make_device_link(path):
    path.symlink_to("/dev/null")


def make_unreadable(path):
    path.write_bytes(LINE)
    path.chmod(0)


ODD = {
    make_pipe: "is a pipe",
    make_socket: "is a socket",
    make_dangling_link: r"is a link to blobs/gone, which is not there",
    make_link_loop: r"is a link to b\.jsonl, which is not there",
    make_device_link: "is a device",
    make_unreadable: "permission denied",
}


@pytest.fixture
def as_nobody(tmp_path):
    """Root may read everything; the tests are nobody's."""
    if os.geteuid() != 0:
        yield
        return
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder.stat().st_mode & 0o5 != 0o5:
            folder.chmod(folder.stat().st_mode | 0o5)
    tmp_path.chmod(0o777)
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.parametrize(
    "path", ["data", "data/*.jsonl", "data/b.jsonl", ["data/b.jsonl"]], ids=str
)
@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
def test_what_is_no_readable_file_is_an_error(make, path, as_nobody):
    Path("data").mkdir()
    Path("data/a.jsonl").write_bytes(LINE)
    make(Path("data/b.jsonl"))
    with pytest.raises(UserError, match=rf"data/b\.jsonl.* {ODD[make]}"):
        list(open_source(SourceConfig(path=path)).rows())


@pytest.mark.parametrize(
    "path", ["data", "data/a.jsonl", "data/*.jsonl", "data/**/*.jsonl", "*/a*"]
)
def test_a_folder_that_may_not_be_looked_into_is_an_error(path, as_nobody):
    Path("data").mkdir()
    Path("data/a.jsonl").write_bytes(LINE)
    Path("data").chmod(0)
    try:
        with pytest.raises(UserError, match=r"data.* cannot be .*ermission denied"):
            list(open_source(SourceConfig(path=path)).rows())
    finally:
        Path("data").chmod(0o755)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("more/b.jsonl", "1 folder was left out: data/more/"),
        (".b.jsonl", r"1 file was left out: data/\.b\.jsonl"),
        ("_b.jsonl", "1 file was left out: data/_b.jsonl"),
        ("b.zip", r"1 file was left out: data/b\.zip"),
        ("b.tar.gz", r"1 file was left out: data/b\.tar\.gz"),
        ("b.jsonl.part", r"1 file was left out: data/b\.jsonl\.part"),
        ("b.txt", r"1 file was left out: data/b\.txt"),
        ("README.md", None),
        (".git/config", None),
        ("_SUCCESS", None),
    ],
)
def test_what_is_left_out_of_a_folder_is_said(name, words, capsys):
    Path("data", name).parent.mkdir(parents=True)
    Path("data/a.jsonl").write_bytes(LINE)
    Path("data", name).write_bytes(LINE)
    assert len(list(open_source(SourceConfig(path="data")).rows())) == 1
    said = capsys.readouterr().err
    assert re.search(words, said) if words else said == ""


def test_a_file_of_data_may_be_named_like_a_document():
    Path("data").mkdir()
    for name in ("a.jsonl", "license-questions.jsonl"):
        Path("data", name).write_bytes(LINE)
    assert len(list(open_source(SourceConfig(path="data")).rows())) == 2


# Archives.


@pytest.mark.parametrize(
    "name", ["./b.jsonl", "../b.jsonl", "/b.jsonl", "c/../b.jsonl", "c//b.jsonl"]
)
def test_members_of_odd_names_are_read(name):
    Path("a.zip").write_bytes(zip_bytes([("a.jsonl", LINE), (name, LINE)]))
    assert len(list(open_source(SourceConfig(path="a.zip")).rows())) == 2


def linked_zip():
    info = zipfile.ZipInfo("b.jsonl")
    info.external_attr = 0o120777 << 16
    return zip_bytes([("a.jsonl", LINE), (info, "a.jsonl")])


def tar_bytes():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("a.jsonl")
        info.size = len(LINE)
        archive.addfile(info, io.BytesIO(LINE))
    return file.getvalue()


def with_flag(content):
    """The archive with the mark of encryption on its first member."""
    central = content.index(b"PK\x01\x02")
    return content[:6] + b"\x01" + content[7 : central + 8] + b"\x01" + content[central + 9 :]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.zip", lambda: zip_bytes([("a.jsonl", LINE)] * 2), "two files of the name"),
        ("a.zip", linked_zip, "holds a link, b.jsonl"),
        ("a.zip", lambda: with_flag(zip_bytes([("a.jsonl", LINE)])), "be unpacked: .*encrypt"),
        ("a.zip", lambda: zip_bytes([("b.zip", zip_bytes([]))]), "a.zip/b.zip has none of"),
        ("a.zip", lambda: zip_bytes([]), "holds no data files"),
        ("a.jsonl", lambda: zip_bytes([]), "zip archive of 0 files"),
        ("a.jsonl", tar_bytes, "is a tar archive"),
        ("a.jsonl.gz", lambda: gzip.compress(tar_bytes()), "is a tar archive"),
        ("a.tar", tar_bytes, r"Unpack it \(tar xf a\.tar\)"),
        ("a.tgz", lambda: gzip.compress(tar_bytes()), r"Unpack it \(tar xf a\.tgz\)"),
        ("a.tar.gz", lambda: gzip.compress(tar_bytes()), r"Unpack it \(tar xf a\.tar\.gz\)"),
        ("a.7z", lambda: b"7z\xbc\xaf\x27\x1c\x00\x04", "does not open"),
        ("a.jsonl", lambda: b"Rar!\x1a\x07\x01\x00", "is a RAR archive"),
        ("a.jsonl", lambda: b"", "is empty"),
        ("a.jsonl", lambda: b"\n \n", "is empty"),
        ("a.csv", lambda: b"", "is empty"),
        ("a.parquet", lambda: b"", "is empty"),
        ("a.jsonl.gz", lambda: b"", "is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_archives_and_empty_files_are_read_or_refused(name, content, words):
    Path(name).write_bytes(content())
    with pytest.raises(UserError, match=words):
        list(open_source(SourceConfig(path=name)).rows())


def test_a_hidden_member_is_said(capsys):
    Path("a.zip").write_bytes(
        zip_bytes([("a.jsonl", LINE), (".b.jsonl", LINE), ("__MACOSX/x", "")])
    )
    assert len(list(open_source(SourceConfig(path="a.zip")).rows())) == 1
    assert "1 file was left out: a.zip/.b.jsonl" in capsys.readouterr().err


def test_an_empty_file_among_others_is_a_bad_row():
    Path("data").mkdir()
    Path("data/a.jsonl").write_bytes(LINE)
    Path("data/b.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"data/b\.jsonl: the file is empty"):
        prepared({"path": "data"})


@pytest.mark.parametrize(
    "path", ["x" * 5000, "data/" + "x" * 300 + ".jsonl", "a\0b.jsonl", "", " "]
)
def test_paths_that_are_no_names(path):
    with pytest.raises(UserError):
        list(open_source(SourceConfig(path=path)).rows())


def test_a_small_file_that_is_written_anew_behind_the_quick_check_is_read_anew():
    Path("a.jsonl").write_bytes(json_lines(OLD[:5]))
    stat = Path("a.jsonl").stat()
    sources = check_sources(DatasetConfig(path="a.jsonl"))
    time.sleep(0.01)
    Path("a.jsonl").write_bytes(json_lines(NEW[:5]))
    os.utime("a.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    source = sources.open("dataset").source
    Path("b.jsonl").write_bytes(json_lines(NEW[:5]))
    assert source.digest() == open_source(SourceConfig(path="b.jsonl")).digest()
    assert [row.fields for row in source.rows(verify=True)] == NEW[:5]
