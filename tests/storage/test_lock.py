"""A directory belongs to one process at a time; its lock leaves nothing behind."""

import json
import os
import subprocess
import sys

import pytest

from luthier.errors import UserError
from luthier.storage.lock import LOCK_FILE, hold_lock, is_locked

HOLDER = """
import sys
from pathlib import Path
from luthier.storage.lock import hold_lock
with hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_refused_with_the_holders_number(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        assert is_locked(folder)
        with (
            pytest.raises(UserError, match=rf"in use by another run \(process {holder.pid} on"),
            hold_lock(folder, patience=0.1),
        ):
            pass
    finally:
        holder.communicate()
    assert not folder.exists()


def test_folders_that_were_made_for_it_go_when_they_are_empty(tmp_path):
    with hold_lock(tmp_path / "a" / "b" / "c"):
        assert json.loads((tmp_path / "a/b/c" / LOCK_FILE).read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []
    with hold_lock(tmp_path / "a" / "b" / "c"):
        (tmp_path / "a" / "mine").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


LEFT = (b"", b"\0" * 80, b'{"process": 1, "host": "gone"}', b'{"process"')


@pytest.mark.parametrize("content", LEFT)
def test_the_lock_of_a_dead_process_is_taken(tmp_path, content):
    (tmp_path / LOCK_FILE).write_bytes(content)
    with hold_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["process"] == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()
