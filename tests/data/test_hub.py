"""Hub datasets: rows without Arrow's nulls, the cache without a network, and errors in words."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from luthier.config.schema import DatasetConfig
from luthier.data.check import check_files
from luthier.data.hub import rows_of
from luthier.errors import UserError


def test_nulls_that_arrow_filled_in_go_and_json_text_stays():
    from datasets import Dataset

    def call(**arguments):
        return {"function": {"name": "f", "arguments": arguments}}

    rows = [
        {"messages": [{"role": "user", "content": "a"}], "tools": None},
        {
            "messages": [
                {"role": "assistant", "tool_calls": [call(x=1), call(y=[{"z": 2}, {"w": 3}])]}
            ],
            "tools": '[{"default": null}]',
        },
    ]
    found = rows_of(Dataset.from_list(rows), "owner/name[train]")
    assert [row.fields for row in found] == [{"messages": rows[0]["messages"]}, rows[1]]
    assert [row.where for row in found] == ["owner/name[train] row 0", "owner/name[train] row 1"]


def test_nulls_of_a_json_column_are_its_own():
    from datasets import Dataset, Features, Json

    rows = [{"messages": [{"role": "user", "a": None}]}]
    dataset = Dataset.from_list(rows, features=Features({"messages": Json()}))
    assert rows_of(dataset, "x")[0].fields == rows[0]


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


def test_offline_without_the_dataset_says_what_to_do(no_cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="not on this machine, and HF_HUB_OFFLINE is set") as error:
        check_files(DatasetConfig(path="owner/name"))
    for part in ("load_dataset('owner/name')", "HF_HOME", "dataset.path to a local .jsonl file"):
        assert part in str(error.value)


def test_no_network_is_seen_in_under_a_second(no_cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 does not answer"):
        check_files(DatasetConfig(path="owner/other"))
    assert time.monotonic() - start < 1


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


READ = (
    "import json, sys; from luthier.data.sources import read_rows\n"
    "from luthier.config.schema import DatasetConfig; from luthier.errors import UserError\n"
    "for settings in json.loads(sys.argv[1]):\n"
    "    try: print(json.dumps([row.fields for row in read_rows(DatasetConfig(**settings))]))\n"
    "    except UserError as error: print(str(error).replace(chr(10), ' '))\n"
)


def read_in_another_process(settings, **environ):
    """The rows or the error text for each setting; the hub's address is fixed at import."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE", "HF_HUB_CACHE")
    inherited = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(settings)],
        check=True, capture_output=True, text=True, env={**inherited, **environ},
    )  # fmt: skip
    return done.stdout.splitlines()


def test_gated_and_unknown_datasets_in_words(endpoint, tmp_path):
    gated, unknown = read_in_another_process(
        [{"path": "owner/gated"}, {"path": "owner/nothing"}],
        HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "hf"),
    )  # fmt: skip
    assert "owner/gated is gated" in gated
    assert "hf auth login" in gated
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
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    source = tmp_path / "source" / "name"
    source.mkdir(parents=True)
    (source / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fill_cache(source, tmp_path / "hf")
    read, first, split, name = read_in_another_process(
        [
            {"path": "owner/name"},
            {"path": "owner/name", "max_rows": 1},
            {"path": "owner/name", "split": "test"},
            {"path": "owner/name", "name": "other"},
        ],
        HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert json.loads(read) == rows
    assert json.loads(first) == rows[:1]
    assert split == "dataset: owner/name has no split 'test'. It has: ['train']."
    assert "owner/name has no configuration 'other'" in name
