"""What every source does: peeks, stops, hashes; and what opening one must not import."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.data.sources import streams
from luthier.errors import UserError

ROWS = [{"n": number, "text": "x" * 40} for number in range(2000)]


@pytest.mark.parametrize(("max_rows", "count"), [(None, 2000), (1, 1), (1500, 1500), (9999, 2000)])
def test_max_rows_takes_the_first(write, read, max_rows, count):
    found = read(write("a.jsonl", ROWS), max_rows=max_rows)
    assert [row.fields for row in found] == ROWS[:count]


@pytest.mark.parametrize("max_rows", [None, 3, 2000])
@pytest.mark.parametrize("count", [1, 3, 1999, 2000, 2001, 5000])
def test_peeking_changes_nothing(write, opened, max_rows, count):
    source = opened(write("a.jsonl", ROWS), max_rows=max_rows)
    wanted = ROWS[:max_rows]
    assert [row.fields for row in source.peek(count)] == wanted[:count]
    assert [row.fields for row in source.rows()] == wanted
    assert [row.fields for row in source.peek(2)] == wanted[:2]
    assert [row.fields for row in source.peek(2500)] == wanted
    assert [row.fields for row in source.rows()] == wanted


def test_what_was_peeked_is_not_read_again(write, opened, monkeypatch):
    source = opened(write("a.jsonl", ROWS[:10]))
    first = source.peek()
    Path("a.jsonl").unlink()
    assert source.peek(5) == first[:5]
    assert list(source.rows()) == first


def test_a_peek_reads_no_more_than_it_must(write, opened, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_BYTES", 1000)
    content = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS) + b"\xff"
    source = opened(write("a.jsonl", content))
    assert len(source.peek(20)) == 20
    with pytest.raises(UserError, match="0xff"):
        list(source.rows())


def test_an_empty_source_is_an_error_already_when_peeked(write, opened):
    with pytest.raises(UserError, match="is empty"):
        opened(write("a.jsonl", "")).peek()


@pytest.fixture
def digest(opened):
    def digest(path, **settings):
        return opened(path, **settings).digest()

    return digest


def test_the_hash_is_of_the_content_alone(write, digest, tmp_path):
    for name in ("1.jsonl", "2.jsonl", "other/1.jsonl", "other/2.jsonl"):
        write(name, ROWS[:2] if "1" in name else ROWS[2:3])
    first = digest("*.jsonl")
    assert first == digest("other") == digest(["other/1.jsonl", "2.jsonl"])
    os.utime("1.jsonl", (0, 0))
    assert digest("*.jsonl") == first
    changed = {
        "order": digest(["2.jsonl", "1.jsonl"]),
        "fewer": digest("1.jsonl"),
        "one-file": digest(write("all.jsonl", ROWS[:3])),
        "content": digest(["1.jsonl", write("3.jsonl", ROWS[3:4])]),
    }
    assert len({first, *changed.values()}) == 5


def test_the_hash_is_known_by_heart(write, digest):
    """The SHA-256 of the file's own SHA-256, so that caches hold across versions."""
    from hashlib import sha256

    content = b'{"a": 1}\n'
    assert digest(write("a.jsonl", content)) == sha256(sha256(content).digest()).hexdigest()


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"options": {"encoding": "UTF8"}}, True),
        ({"options": {"delimiter": ","}}, True),
        ({"format": "csv"}, True),
        ({"columns": {"prompt": "a"}}, True),
        ({"options": {"storage": {"anon": True}}}, True),
        ({"options": {"encoding": "latin-1"}}, False),
        ({"options": {"delimiter": ";"}}, False),
        ({"options": {"quotechar": None}}, False),
        ({"options": {"header": ["x"]}}, False),
        ({"format": "text"}, False),
        ({"max_rows": 1}, False),
    ],
)
def test_settings_say_what_decides_the_rows(write, opened, settings, same):
    name = write("a.csv", "a,b\n1,2\n")
    plain = opened(name).settings()
    assert json.loads(json.dumps(plain)) == plain
    assert (opened(name, **settings).settings() == plain) is same


def test_settings_name_no_path(write, opened):
    assert opened(write("a.jsonl", ROWS)).settings() == opened(write("b.jsonl", ROWS)).settings()


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt", "jsonl.gz"])
def test_opening_and_reading_imports_nothing_heavy(write, suffix):
    content = b'{"a": "1"}\n{"a": "2"}\n'
    name = write(f"a.{suffix}", gzip.compress(content) if suffix.endswith("gz") else content)
    code = (
        "import sys\nfrom luthier.data.sources import open_source\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pyarrow', 'fsspec', 'pandas'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from luthier.config.schema import SourceConfig\n"
        "source = open_source(SourceConfig(path=sys.argv[1]))\n"
        "print(len(source.peek()), len(source.digest()), heavy & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name], check=True, capture_output=True, text=True
    )
    assert done.stdout.split()[1:] == ["64", "set()"]


MEMORY = """
import sys
from luthier.config.schema import SourceConfig
from luthier.data.sources import open_source
for path in sys.argv[1:]:
    count = sum(1 for _ in open_source(SourceConfig(path=path)).rows())
    status = dict(line.split(":") for line in open("/proc/self/status"))
    print(count, int(status["VmHWM"].split()[0]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure")
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    """Ten times the rows, 50 MB, must take no more than a quarter of that besides."""
    paths = [str(tmp_path / f"{count}.{suffix}") for count in (10_000, 100_000)]
    write_many(paths[0], suffix, 10_000)
    write_many(paths[1], suffix, 100_000)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *paths], check=True, capture_output=True, text=True
    )
    small, large = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    assert (small[0], large[0]) == (10_000, 100_000)
    assert large[1] - small[1] < 12, (small, large)


def write_many(path, suffix, count):
    text = "x" * 500
    if suffix in ("parquet", "arrow"):
        import pyarrow as pa
        import pyarrow.parquet

        table = pa.table({"a": [f"{number}{text}" for number in range(count)]})
        if suffix == "parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=5_000)
            return
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, 1_000)
        return
    start, line, between, end = {
        "jsonl": ("", '{"a": "%d%s"}', "\n", ""),
        "json": ("[", '{"a": "%d%s"}', ",\n", "]"),
        "csv": ("a\n", "%d%s", "\n", ""),
    }[suffix]
    with Path(path).open("w") as file:
        file.write(start)
        for number in range(count):
            file.write((between if number else "") + line % (number, text))
        file.write(end)


def test_every_file_of_the_assets_is_read(read):
    assets = os.environ.get("LUTHIER_ASSETS")
    if not assets:
        pytest.skip("needs LUTHIER_ASSETS")
    files = sorted(file for file in Path(assets, "datasets").rglob("*") if file.is_file())
    assert len(files) > 20
    for file in files:
        found = read(str(file))
        assert found and all(type(entry).__name__ == "Row" for entry in found), file
