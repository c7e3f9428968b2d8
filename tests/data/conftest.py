"""Files and configs for the data tests."""

import json

import pytest

from luthier.config.schema import DatasetConfig
from luthier.data.files import forget


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Relative paths start at the test's own folder, and no test sees another's rows."""
    monkeypatch.chdir(tmp_path)
    forget()


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


@pytest.fixture
def config(write):
    """The config of a dataset with these rows."""

    def config(rows, **settings):
        return DatasetConfig.model_validate({"path": write("data.jsonl", rows), **settings})

    return config
