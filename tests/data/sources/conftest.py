"""Files, and what is read of them, for the tests of reading."""

import json

import pytest

from luthier.config.schema import SourceConfig
from luthier.data.rows import BadRow, Row
from luthier.data.sources import open_source


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Relative paths start at the test's own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write(tmp_path):
    """Write rows (as JSON lines), text or bytes to a file of the test's folder; return its name."""

    def write(name, content):
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        if isinstance(content, str):
            content = content.encode()
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
        return name

    return write


@pytest.fixture
def opened():
    """The source of a path and other settings."""

    def opened(path, **settings):
        return open_source(SourceConfig(path=path, **settings))

    return opened


@pytest.fixture
def read(opened):
    """All that a source gives, good and bad."""

    def read(path, **settings):
        return list(opened(path, **settings).rows())

    return read


@pytest.fixture
def fields(read):
    """The fields of all rows, which must be good."""

    def fields(path, **settings):
        found = read(path, **settings)
        assert [entry for entry in found if isinstance(entry, BadRow)] == []
        assert all(isinstance(entry, Row) for entry in found)
        return [entry.fields for entry in found]

    return fields
