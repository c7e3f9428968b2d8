"""Rows and their formats."""

import pytest

from luthier.config.schema import SourceConfig
from luthier.data.formats import detect_format
from luthier.data.rows import Row


@pytest.fixture
def detect():
    """The row format of a source with these rows, where each is a dict."""

    def detect(*fields, **settings):
        rows = [Row(row, f"x.jsonl:{line}") for line, row in enumerate(fields, start=1)]
        return detect_format(SourceConfig(path="x.jsonl", **settings), rows, "x.jsonl")

    return detect


@pytest.fixture
def read(detect):
    """The example of one row."""

    def read(fields, **settings):
        return detect(fields, **settings).read(Row(fields, "x.jsonl:1"))

    return read
