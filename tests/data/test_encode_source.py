"""Encoded rows on disk: made once, by any number of processes, whole or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.letter_encoder import Letters, pair, prepared, replies, shown
from luthier.errors import UserError

MANY = [pair(f"q{number}", "-" if number % 7 == 0 else f"r{number}") for number in range(2500)]
"""More rows than are encoded at once, some of which give nothing."""


class Never(Letters):
    """The same encoder, which is not to be asked."""

    def encode(self, examples):
        raise AssertionError("the rows were encoded again")


class Ended(Letters):
    """Ends its process as a machine without memory does."""

    def encode(self, examples):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def start():
    """Start processes that prepare `data.jsonl`; they print the hash of what they found."""
    running = []

    def start(encoder="Letters", **settings):
        code = (
            "import json, os, signal, sys, time; from helpers.letter_encoder import *\n"
            "class Logged(Letters):\n"
            "    def encode(self, examples):\n"
            "        print('encoded', len(examples), flush=True); time.sleep(0.2)\n"
            "        return super().encode(examples)\n"
            "class Killed(Letters):\n"
            "    def encode(self, examples):\n"
            "        if texts(examples[0])[0] != 'q0': os.kill(os.getpid(), signal.SIGKILL)\n"
            "        return super().encode(examples)\n"
            f"found = prepared(json.loads(sys.argv[1]), encoder={encoder}())\n"
            "print(found.content_hash)"
        )
        words = [sys.executable, "-c", code, json.dumps({"path": "data.jsonl", **settings})]
        environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environ)
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def entries(folder="luthier/data"):
    """What lies in the cache beside lock files."""
    return sorted(path for path in Path(folder).iterdir() if path.suffix != ".lock")


def content(entry):
    """The bytes of an entry's tables."""
    return {path.name: path.read_bytes() for path in entry.glob("*.arrow")}


def test_the_second_call_encodes_nothing(write):
    write("data.jsonl", MANY)
    write("held.jsonl", replies("x", "y"))
    settings = {"path": "data.jsonl", "eval": {"path": "held.jsonl"}}
    first, second = prepared(settings), prepared(settings, encoder=Never())
    assert shown(second.train) == shown(first.train)
    assert len(first.train) == 2500 - 358
    assert second.content_hash == first.content_hash
    assert second.reports == first.reports and len(first.reports) == 358
    assert (second.train_counts, second.eval_counts) == (first.train_counts, first.eval_counts)
    assert [*second.heldout[""]] == [*first.heldout[""]]
    assert len(entries()) == 2
    with pytest.raises(AssertionError, match="encoded again"):
        prepared(settings, encoder=Never(version=2))


@pytest.mark.parametrize(
    "settings",
    [
        {"deduplicate": "exact"},
        {"deduplicate": "normalised"},
        {"eval": {"share": 0.1}},
        {"eval": {"share": 0.1, "by": "hash"}},
        {"repeats": 2},
        {"on_bad_row": "drop"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_choosing_other_rows_encodes_nothing(write, settings):
    write("data.jsonl", replies("a", "B", "b", "c", "c", *map(str, range(40))))
    prepared({"path": "data.jsonl"})
    assert len(prepared({"path": "data.jsonl", **settings}, encoder=Never()).train)


def test_normalised_fingerprints_are_made_once(write):
    write("data.jsonl", [pair(f"q{number % 1200}", "R") for number in range(2500)])
    settings = {"path": "data.jsonl", "deduplicate": "normalised"}
    first = prepared(settings)
    assert len(entries()) == 2
    times = [entry.stat().st_mtime_ns for entry in entries()]
    assert shown(prepared(settings, encoder=Never()).train) == shown(first.train)
    assert len(first.train) == 1200
    assert [entry.stat().st_mtime_ns for entry in entries()] == times


def test_rows_that_have_moved_are_found_and_called_by_their_new_names(write, tmp_path):
    write("a.jsonl", "\n".join([json.dumps(pair("q", "-")), "{", json.dumps(pair("q", "a"))]))
    write("b.jsonl", replies("-", "b"))
    settings = {"path": ["a.jsonl", "b.jsonl"], "on_bad_row": "drop"}
    places = [row["where"] for row in prepared(settings).reports]
    assert places == ["a.jsonl:2", "a.jsonl:1", "b.jsonl:1"]
    (tmp_path / "a.jsonl").rename("c.jsonl")
    shutil.copy("b.jsonl", "a.jsonl")
    os.utime("a.jsonl", (1, 1))
    moved = prepared(settings | {"path": ["c.jsonl", "a.jsonl"]}, encoder=Never())
    assert [row["where"] for row in moved.reports] == ["c.jsonl:2", "c.jsonl:1", "a.jsonl:1"]
    with pytest.raises(UserError, match=r"c\.jsonl:2: this is not JSON"):
        prepared({"path": ["c.jsonl", "a.jsonl"]}, encoder=Never())


def test_an_entry_without_rows(write):
    write("data.jsonl", replies("a", "b"))
    settings = {"path": "data.jsonl", "filter": "prompt == 'x'"}
    for encoder in (Letters(), Never()):
        with pytest.raises(UserError, match="the filter leaves out all of 2"):
            prepared(settings, encoder=encoder)
    found = prepared({"path": "data.jsonl", "eval": {"sets": {"x": {"path": "data.jsonl",
                      "filter": "completion == 'a'"}}}})  # fmt: skip
    assert shown(found.train) == ["q>b"]


# Processes


def test_two_workers_write_the_same_bytes_as_one(write):
    write("data.jsonl", MANY)
    for workers in (1, 2):
        prepared({"path": "data.jsonl", "cache": f"cache{workers}", "workers": workers})
    (one,), (two,) = entries("cache1"), entries("cache2")
    assert one.name == two.name
    assert content(one) == content(two)
    assert [*content(one)] and len(content(one)["tokens.arrow"]) > 50_000


def test_a_row_that_a_worker_refuses_is_named(write):
    write("data.jsonl", [*MANY[:2100], pair("q", "!")])
    with pytest.raises(UserError, match=r"^data\.jsonl:2101: message 1: no loud replies$"):
        prepared({"path": "data.jsonl", "workers": 2})
    assert entries() == []


def test_a_worker_that_is_killed_in_words(write):
    write("data.jsonl", MANY)
    with pytest.raises(UserError, match=r"dataset\.workers: a process that encodes .* was killed"):
        prepared({"path": "data.jsonl", "workers": 2}, encoder=Ended())
    assert entries() == []


def test_of_two_processes_one_encodes_and_both_find_the_same(write, start):
    write("data.jsonl", MANY)
    processes = [start("Logged") for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split("\n") for process in processes]
    lines = [line for lines in said for line in lines if line.startswith("encoded")]
    assert lines == ["encoded 1000", "encoded 1000", "encoded 500"]
    hashes = {lines[-2] for lines in said}
    assert hashes == {prepared({"path": "data.jsonl"}, encoder=Never()).content_hash}


def test_a_kill_leaves_nothing_and_the_next_call_makes_it(write, start):
    write("data.jsonl", MANY)
    assert start("Killed").wait(timeout=60) == -signal.SIGKILL
    (left,) = entries()
    assert ".new-" in left.name
    found = prepared({"path": "data.jsonl"})
    (entry,) = entries()
    assert entry.name == left.name.partition(".new-")[0]
    prepared({"path": "data.jsonl", "cache": "elsewhere"})
    assert content(entry) == content(entries("elsewhere")[0])
    assert len(found.train) == 2500 - 358


def test_an_interrupt_leaves_nothing(write):
    class Interrupted(Letters):
        def encode(self, examples):
            raise KeyboardInterrupt

    write("data.jsonl", MANY)
    with pytest.raises(KeyboardInterrupt):
        prepared({"path": "data.jsonl"}, encoder=Interrupted())
    assert entries() == []


# Damage


@pytest.mark.parametrize("name", ["tokens.arrow", "rows.arrow", "hashes.arrow", "manifest.json"])
def test_a_corrupt_file_is_made_anew(write, capfd, name):
    write("data.jsonl", MANY)
    first = prepared({"path": "data.jsonl"})
    (entry,) = entries()
    before = content(entry)
    damaged = bytearray((entry / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (entry / name).unlink()  # it is mapped
    (entry / name).write_bytes(damaged)
    second = prepared({"path": "data.jsonl"})
    assert f"{name} " in capfd.readouterr().err.replace("\n", " ")
    assert second.content_hash == first.content_hash
    assert content(entry) == before


def test_reading_is_a_matter_of_moments(write):
    write("data.jsonl", MANY * 8)
    prepared({"path": "data.jsonl"})
    begun = time.monotonic()
    prepared({"path": "data.jsonl"}, encoder=Never())
    assert time.monotonic() - begun < 2
