"""Hub datasets: the cache without a network, streams, and errors in words."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from luthier.data.sources.hub import _is_reachable
from luthier.errors import UserError


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    _is_reachable.cache_clear()
    return tmp_path / "hf"


def test_offline_without_the_dataset_says_what_to_do(no_cache, monkeypatch, opened):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="not on this machine, and HF_HUB_OFFLINE is set") as error:
        opened("owner/name")
    for part in ("load_dataset('owner/name')", "HF_HOME", "dataset.path to a local file"):
        assert part in str(error.value)


def test_no_network_is_seen_in_under_a_second(no_cache, monkeypatch, opened):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 does not answer"):
        opened("owner/other")
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("path", ["my data/of/rows", "a/b/c"])
def test_a_name_that_is_neither_file_nor_hub_name(opened, path):
    with pytest.raises(UserError, match="neither a file here"):
        opened(path)


def test_options_of_other_formats_are_refused(opened):
    with pytest.raises(UserError, match=r"dataset\.options\.by: hub has no such option"):
        opened("owner/name", options={"by": "line"})


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with a gated dataset and no other."""

    def do_GET(self):
        gated = "owner/gated" in self.path
        self.send_response(401 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


READ = """
import json, sys
from luthier.config.schema import SourceConfig
from luthier.data.sources import open_source
from luthier.errors import UserError
for settings in json.loads(sys.argv[1]):
    streaming = settings.pop("streaming", False)
    try:
        source = open_source(SourceConfig(**settings), streaming=streaming)
        rows = [[row.where, row.fields] for row in source.rows()]
        print(json.dumps([rows, source.size, source.digest(), source.settings(), source.label]))
    except UserError as error:
        print(str(error).replace(chr(10), " "))
"""


def read_in_another_process(settings, **environ):
    """What each setting gives, or the error's text; the hub's address is fixed at import."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE", "HF_HUB_CACHE")
    inherited = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(settings)],
        check=True, capture_output=True, text=True, env={**inherited, **environ},
    )  # fmt: skip
    return done.stdout.splitlines()


def test_gated_and_unknown_datasets_in_words(endpoint, tmp_path):
    gated, unknown, streamed = read_in_another_process(
        [{"path": "owner/gated"}, {"path": "owner/nothing"},
         {"path": "owner/gated", "streaming": True}],
        HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "hf"),
    )  # fmt: skip
    assert "owner/gated is gated" in gated
    assert "hf auth login" in gated
    assert "owner/gated is gated" in streamed
    assert "the hub has no dataset owner/nothing, or it is private" in unknown
    assert "path=./my.jsonl" in unknown


def fill_cache(source, home):
    """Leave in a cache what `load_dataset("owner/name")` leaves there where there is a network."""
    from datasets import load_dataset

    load_dataset(str(source), cache_dir=str(home / "made"))
    made = home / "made" / "name" / "default"
    (home / "datasets" / "owner___name").mkdir(parents=True)
    made.rename(home / "datasets" / "owner___name" / "default")


def test_a_cached_dataset_is_read_offline_and_its_errors_are_words(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user"}], "tools": "[null]"},
        {"messages": [], "tools": "[]"},
    ]
    source = tmp_path / "source" / "name"
    source.mkdir(parents=True)
    (source / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fill_cache(source, tmp_path / "hf")
    read, first, sliced, split, name, streamed = read_in_another_process(
        [
            {"path": "owner/name"},
            {"path": "owner/name", "max_rows": 1, "format": "hub"},
            {"path": "owner/name", "split": "train[2:]+train[:1]"},
            {"path": "owner/name", "split": "test"},
            {"path": "owner/name", "name": "other"},
            {"path": "owner/name", "streaming": True},
        ],
        HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    found, size, digest, settings, label = json.loads(read)
    places = [f"owner/name[train] row {number}" for number in range(3)]
    assert found == [list(pair) for pair in zip(places, rows, strict=True)]
    assert (size, label) == (3, "owner/name[train]")
    assert json.loads(first)[:3] == [found[:1], 1, digest]
    assert [row for _, row in json.loads(sliced)[0]] == [rows[2], rows[0]]
    assert json.loads(sliced)[3] != settings
    assert split == "dataset: owner/name has no split 'test'. It has: ['train']."
    assert "owner/name has no configuration 'other'" in name
    assert "not on this machine, and HF_HUB_OFFLINE is set" in streamed


def test_a_stream_of_datasets_gives_the_rows_of_its_tables(tmp_path, write, monkeypatch):
    """The real library's stream, over a file in place of the network."""
    from datasets import load_dataset

    from luthier.config.schema import SourceConfig
    from luthier.data.sources.hub import HubContent
    from luthier.data.sources.options import FormatOptions

    rows = [{"a": [{"b": number}] if number % 2 else [{"c": "x"}]} for number in range(2500)]
    name = write("a.jsonl", rows)
    content = HubContent(SourceConfig(path="owner/name"), FormatOptions(), streaming=True)
    stream = load_dataset("json", data_files=name, split="train", streaming=True)
    monkeypatch.setitem(vars(content), "_dataset", stream)
    found = list(content.items())
    assert [row.fields for row in found] == rows
    assert found[2400].where == "owner/name[train] row 2400"
    assert content.size() is None
    assert content.digest() == content.digest()
