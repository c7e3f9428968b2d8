"""Files for the data tests."""

import json
import sys

import pytest


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Relative paths start at the test's own folder, and encoded rows are left there."""
    monkeypatch.chdir(tmp_path)
    # Folders with code of the user's own are added to it.
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "luthier"))


@pytest.fixture
def write(tmp_path):
    """Write rows (as JSON lines), text or bytes to a file of the test's folder."""

    def write(name, content):
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        if isinstance(content, str):
            content = content.encode()
        (tmp_path / name).write_bytes(content)
        return name

    return write
