"""Addresses: fsspec's memory, a web server of the test's own, and packages that are missing."""

import gzip
import http.server
import importlib.util
import io
import threading

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from luthier.errors import UserError

ROWS = [{"a": number} for number in range(200)]
LINES = "".join(f'{{"a": {number}}}\n' for number in range(200)).encode()


def as_parquet():
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


@pytest.fixture
def memory():
    """Files of fsspec's memory."""
    filesystem = fsspec.filesystem("memory")
    contents = {
        "/set/b.jsonl": LINES,
        "/set/a.jsonl.gz": gzip.compress(LINES),
        "/set/README.md": b"read me",
        "/tables/a.parquet": as_parquet(),
        "/cut/a.jsonl.gz": gzip.compress(LINES)[:-20],
    }
    for path, content in contents.items():
        filesystem.pipe_file(path, content)
    yield filesystem
    filesystem.rm("/", recursive=True)


@pytest.mark.parametrize(
    ("path", "files"),
    [
        ("memory://set/b.jsonl", ["memory://set/b.jsonl"]),
        ("memory://set/*.jsonl*", ["memory:///set/a.jsonl.gz", "memory:///set/b.jsonl"]),
        ("memory://set", ["memory:///set/a.jsonl.gz", "memory:///set/b.jsonl"]),
        ("memory://tables/*.parquet", ["memory:///tables/a.parquet"]),
    ],
    ids=["file", "glob", "folder", "table"],
)
def test_files_behind_fsspec(memory, opened, path, files):
    source = opened(path)
    assert source.files == tuple(files)
    assert [row.fields for row in source.rows()] == ROWS * len(files)


def test_the_hash_is_that_of_the_same_files_here(memory, opened, write):
    write("b.jsonl", LINES)
    assert opened("memory://set/b.jsonl").digest() == opened("b.jsonl").digest()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("memory://set/c.jsonl", r"there are no files at memory://set/c\.jsonl"),
        ("memory://set/*.csv", r"there are no files at memory://set/\*\.csv"),
        ("nothing://a/b.jsonl", "nothing://a/b.jsonl cannot be opened: Protocol not known"),
        ("memory://cut/a.jsonl.gz", "is broken, perhaps cut short"),
        ("hf://datasets/owner/name/a.jsonl", "needs the network, and HF_HUB_OFFLINE is set"),
    ],
    ids=["file", "glob", "protocol", "cut", "offline"],
)
def test_what_is_not_there_in_words(memory, read, path, words):
    with pytest.raises(UserError, match=words):
        read(path)


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(read, protocol, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(UserError, match=f"pip install {package}"):
        read(f"{protocol}://bucket/a.jsonl")


def test_any_failure_of_a_file_system_is_words(memory, opened, monkeypatch):
    """s3fs and others raise classes of their own; here one that fails as theirs do."""
    source = opened("memory://set/b.jsonl")

    class NoCredentialsError(Exception):
        pass

    def fail(*args, **kwargs):
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(type(memory), "open", fail)
    with pytest.raises(UserError, match=r"NoCredentialsError: Unable to locate.*options\.storage"):
        list(source.rows())


class Files(http.server.BaseHTTPRequestHandler):
    """A server of a few files; one wants a header, one breaks off, one comes in chunks."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        contents = {"a.jsonl": LINES, "a.jsonl.gz": gzip.compress(LINES), "a.parquet": as_parquet(),
                    "cut.jsonl": LINES, "chunks.jsonl": LINES, "secret.jsonl": LINES}  # fmt: skip
        if name == "secret.jsonl" and self.headers.get("Authorization") != "Bearer me":
            return self.answer(403, b"")
        if name not in contents:
            return self.answer(404, b"")
        if name == "cut.jsonl":
            self.close_connection = True
            return self.answer(200, LINES[:-30], len(LINES))
        if name == "chunks.jsonl":
            return self.answer_in_chunks()
        return self.answer(200, contents[name])

    def answer(self, status, content, length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def answer_in_chunks(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(LINES), 100):
            part = LINES[start : start + 100]
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def web():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "chunks.jsonl"])
def test_files_of_a_web_server(web, fields, name):
    assert fields(f"{web}/{name}") == ROWS


def test_a_header_can_be_given(web, fields):
    storage = {"headers": {"Authorization": "Bearer me"}}
    assert fields(f"{web}/secret.jsonl", options={"storage": storage}) == ROWS


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("b.jsonl", {}, r"the server answers 404"),
        ("secret.jsonl", {}, r"the server answers 403"),
        ("cut.jsonl", {}, r"the connection ended 30 bytes too early"),
        ("a.jsonl", {"storage": {"anon": True}}, r"dataset\.options\.storage\.anon: http takes"),
    ],
    ids=["missing", "forbidden", "cut", "option"],
)
def test_a_web_server_that_does_not_give_the_file(web, read, name, options, words):
    with pytest.raises(UserError, match=words):
        read(f"{web}/{name}", options=options)


def test_a_server_that_is_not_there(read):
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/a\.jsonl cannot be reached"):
        read("http://127.0.0.1:9/a.jsonl")
