"""The store: made once, whole or not at all, shared by processes, mended when damaged."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luthier.data.store import Store, data_folder
from luthier.errors import UserError

KEY = "ab" * 32
OTHER = "cd" * 32
ROWS = [[number, number + 1] for number in range(1000)]


def make(writer):
    writer.table("train").append({"input_ids": ROWS})
    writer.table("eval")
    return {"rows": 1000}


def never(writer):
    raise AssertionError("it was made again")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


def names(store):
    """What lies in the store beside lock files."""
    return sorted(path.name for path in store.folder.iterdir() if path.suffix != ".lock")


def test_an_entry_is_made_once(store):
    made = store.open_or_make(KEY, make)
    assert store.open(KEY) == made == store.open_or_make(KEY, never)
    assert made.manifest == {"rows": 1000}
    assert made.table("train").row(7)["input_ids"].tolist() == [7, 8]
    assert len(made.table("eval")) == 0
    assert names(store) == [KEY]
    assert names(Store(store.folder / KEY)) == ["eval.arrow", "manifest.json", "train.arrow"]


def test_the_manifest_is_the_same_when_it_is_read_again(store):
    made = store.open_or_make(KEY, lambda writer: {"a": (1, 2), "b": {3: None}})
    assert made.manifest == {"a": [1, 2], "b": {"3": None}} == store.open(KEY).manifest


def test_another_key_is_another_entry(store):
    assert store.open(KEY) is None
    store.open_or_make(KEY, make)
    assert store.open(OTHER) is None
    store.open_or_make(OTHER, lambda writer: {"rows": 0})
    assert [entry.key for entry in store.entries()] == [KEY, OTHER]
    assert store.entries()[0].size > 8000
    store.remove(KEY)
    assert store.open(KEY) is None
    assert [entry.key for entry in store.entries()] == [OTHER]


def test_a_store_that_is_not_there_is_empty(store):
    assert store.entries() == []
    assert store.open(KEY) is None


def test_an_error_of_the_maker_leaves_nothing(store):
    def broken(writer):
        make(writer)
        raise FileNotFoundError("my.jsonl")

    with pytest.raises(FileNotFoundError, match=r"my\.jsonl"):
        store.open_or_make(KEY, broken)
    assert names(store) == []
    assert store.open_or_make(KEY, make).manifest == {"rows": 1000}


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    assert data_folder() == tmp_path / "data"
    assert data_folder("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("LUTHIER_CACHE")
    assert data_folder() == Path.home() / ".cache" / "luthier" / "data"
    assert data_folder("~/mine") == Path.home() / "mine"


# Damage


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    os.truncate(file, file.stat().st_size - 8)


DAMAGE = {
    "a-flipped-bit": (lambda e: flip(e / "train.arrow"), "the content of train.arrow has changed"),
    "a-lost-end": (lambda e: truncate(e / "train.arrow"), "train.arrow has .* bytes instead of"),
    "a-lost-file": (lambda e: (e / "eval.arrow").unlink(), "eval.arrow is missing"),
    "no-manifest": (lambda e: (e / "manifest.json").unlink(), "manifest.json is missing"),
    "half-a-manifest": (lambda e: truncate(e / "manifest.json"), "manifest.json cannot be read"),
    "another-count": (
        lambda e: (e / "manifest.json").write_text(
            (e / "manifest.json").read_text().replace('"rows": 1000', '"rows": 1001')
        ),
        "the content of manifest.json has changed",
    ),
    "another-list": (lambda e: (e / "manifest.json").write_text("[]"), "manifest.json cannot be"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_made_anew(store, capfd, damage, words):
    store.open_or_make(KEY, make)
    damage(store.folder / KEY)
    assert store.open(KEY) is None
    assert capfd.readouterr().err == ""
    assert store.open_or_make(KEY, make).table("train").row(999)["input_ids"].tolist() == [
        999,
        1000,
    ]
    said = capfd.readouterr().err
    assert f"The encoded rows in {store.folder / KEY} are damaged: " in said
    assert re.search(words, said)
    assert store.open_or_make(KEY, never).manifest == {"rows": 1000}
    assert names(store) == [KEY]


def test_a_changed_block_of_a_large_file_is_found(store, monkeypatch):
    monkeypatch.setattr("luthier.storage.manifest.BLOCK", 1024)
    monkeypatch.setattr("luthier.storage.manifest._CHUNK", 256)
    store.open_or_make(KEY, make)
    manifest = json.loads((store.folder / KEY / "manifest.json").read_text())
    assert len(manifest["files"]["train.arrow"]["sha256"]) > 8
    assert store.open(KEY) is not None
    file = store.folder / KEY / "train.arrow"
    for place in (0, 1023, 1024, file.stat().st_size - 1):
        content = file.read_bytes()
        changed = content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]
        file.write_bytes(changed)
        assert store.open(KEY) is None
        file.write_bytes(content)
    assert store.open(KEY) is not None


# Disk and folder

PROCESS = """
import os, signal, sys, time
from pathlib import Path
from luthier.data.store import Store, store as module
from luthier.errors import UserError
module.SECONDS_TO_SPEAK = 0.2
KEY, OTHER = "ab" * 32, "cd" * 32
ROWS = [[number, number + 1] for number in range(1000)]
store = Store(Path("cache"))

def make(writer):
    with open("made", "a") as file:
        file.write("made\\n")
    writer.table("train").append({"input_ids": ROWS})
    during()
    return {"rows": 1000}

def during():
    pass

def wait():
    print("ready", flush=True)
    time.sleep(60)
"""


def start(code, folder):
    """A process of the test's own that runs this code."""
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS + code],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


FILL = """
import resource
ROWS = [list(range(1000))] * 1000
def more(writer):
    writer.table("train").append({"input_ids": ROWS})
    writer.table("train").append({"input_ids": ROWS})
    writer.table("train").append({"input_ids": ROWS})
    return {}
try:
    store.open_or_make(KEY, more)
except UserError as error:
    print(error)
print([path.name for path in store.folder.iterdir() if path.suffix != ".lock"])
"""
TMPFS = "mkdir -p cache && mount -t tmpfs -o size=2m tmpfs cache && exec "


@pytest.mark.parametrize("batch_bytes", [1, 2**30], ids=["in-the-middle", "at-the-end"])
def test_a_limit_on_files_in_words(tmp_path, batch_bytes):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
    batches = f"import luthier.data.store.table as w; w.BATCH_BYTES = {batch_bytes}\n"
    shown = start(limit + batches + FILL, tmp_path).communicate()[0]
    assert "dataset: the cache folder cache is full (File too large): " in shown
    assert "LUTHIER_CACHE" in shown and "dataset.cache" in shown
    assert shown.splitlines()[-1] == "[]"


def test_a_full_disk_in_words(tmp_path):
    ours = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    command = [*ours, TMPFS + '"$@"', "sh"]
    if subprocess.run([*command, "true"], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("this machine lets no one mount a small disk")
    shown = subprocess.run(
        [*command, sys.executable, "-c", PROCESS + FILL],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    ).stdout
    assert "is full (No space left on device): 2.0 MiB of this dataset's encoded rows were" in shown
    assert "and 0.0 MiB are free" in shown
    assert shown.splitlines()[-1] == "[]"


def test_a_folder_that_cannot_be_made_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"file/cache cannot be written to: Not a directory"
    ) as told:
        Store(tmp_path / "file" / "cache").open_or_make(KEY, make)
    assert "dataset.cache=FOLDER" in str(told.value) and "LUTHIER_CACHE" in str(told.value)


READ_ONLY = """
import filelock  # while the environment, which may be root's alone, can still be read
if os.geteuid() == 0:  # who may write anywhere
    os.seteuid(65534)
print(store.open_or_make(KEY, make).manifest)
for other in (store, Store(Path("closed"))):
    try:
        other.open_or_make(OTHER, make)
    except UserError as error:
        print(error)
"""


def test_a_folder_that_is_read_only(store, tmp_path):
    store.open_or_make(KEY, make)
    tmp_path.chmod(0o755)
    (tmp_path / "closed").mkdir(mode=0)
    (store.folder / f"{OTHER}.new-1-ab@here").mkdir()
    # Folders of the user's, where dataset.cache names one that is not luthier's alone.
    for name in ("thesis.new-draft", f"{OTHER}.new-draft"):
        (store.folder / name).mkdir()
    store.folder.chmod(0o555)
    try:
        shown, errors = start(READ_ONLY, tmp_path).communicate()
    finally:
        store.folder.chmod(0o755)
    assert shown.startswith("{'rows': 1000}\n"), errors
    assert "the cache folder cache cannot be written to: Permission denied." in shown
    assert "the cache folder closed cannot be written to: Permission denied." in shown


# Processes


def made(folder):
    return (folder / "made").read_text().count("made")


def test_of_four_processes_one_makes_it(tmp_path):
    code = """
def during():
    time.sleep(0.5)
table = store.open_or_make(KEY, make).table("train")
print(len(table), table.row(999)["input_ids"].tolist())
"""
    running = [start(code, tmp_path) for _ in range(4)]
    assert [process.communicate()[0] for process in running] == ["1000 [999, 1000]\n"] * 4
    assert made(tmp_path) == 1
    assert names(Store(tmp_path / "cache")) == [KEY]


MAKING = """
def during():
    wait()
store.open_or_make(KEY, make)
"""
SEALED = """
def after(*arguments, sealed=module.write_manifest):
    sealed(*arguments)
    wait()
module.write_manifest = after
store.open_or_make(KEY, make)
"""
REPLACING = """
def after(path, *arguments, remove=module.shutil.rmtree, **settings):
    remove(path, *arguments, **settings)
    wait()
module.shutil.rmtree = after
store.open_or_make(KEY, make)
"""
GOING_ON = """
def during():
    print("ready", flush=True)
    sys.stdin.readline()
print(store.open_or_make(KEY, make).manifest)
"""
WITH_CHILD = """
def during():
    if os.fork() == 0:
        os.close(1), os.close(2)
        time.sleep(5)
        os._exit(0)
    wait()
store.open_or_make(KEY, make)
"""


def killed(code, folder):
    """Start a process and kill it when it says that it is ready."""
    process = start(code, folder)
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()


@pytest.mark.parametrize(
    "code", [MAKING, SEALED, REPLACING, WITH_CHILD], ids=["rows", "sealed", "replacing", "child"]
)
def test_a_kill_leaves_no_half_entry(tmp_path, code):
    store = Store(tmp_path / "cache")
    if code is REPLACING:
        store.open_or_make(KEY, make)
        truncate(store.folder / KEY / "train.arrow")
        code = code.replace("def after", "store._remove_leftovers = lambda key: None\ndef after")
    killed(code, tmp_path)
    left = names(store)
    assert len(left) == 1 and left[0].startswith(f"{KEY}.new-")
    assert store.open(KEY) is None
    begun = time.monotonic()
    assert store.open_or_make(KEY, make).table("train").row(1)["input_ids"].tolist() == [1, 2]
    assert time.monotonic() - begun < 2
    assert names(store) == [KEY]


def test_leftovers_go_when_another_entry_is_opened(tmp_path):
    store = Store(tmp_path / "cache")
    store.open_or_make(OTHER, make)
    killed(MAKING, tmp_path)
    assert len(names(store)) == 2
    store.open_or_make(OTHER, never)
    assert names(store) == [OTHER]


def test_what_a_living_process_writes_stays(tmp_path):
    store = Store(tmp_path / "cache")
    process = start(GOING_ON, tmp_path)
    assert process.stdout.readline() == "ready\n"
    store.open_or_make(OTHER, make)
    assert len([name for name in names(store) if ".new-" in name]) == 1
    assert process.communicate("\n")[0] == "{'rows': 1000}\n"
    assert names(store) == [KEY, OTHER]


def test_who_waits_for_a_killed_process_makes_it(tmp_path):
    first = start(MAKING, tmp_path)
    assert first.stdout.readline() == "ready\n"
    second = start("print(store.open_or_make(KEY, make).manifest)", tmp_path)
    said = second.stderr.readline()
    assert said.startswith(f"Waiting for process {first.pid} on ")
    assert said.endswith(f"which encodes the same rows into cache/{KEY}.\n")
    assert second.poll() is None
    first.kill()
    first.communicate()
    assert second.communicate()[0] == "{'rows': 1000}\n"
    assert made(tmp_path) == 2
