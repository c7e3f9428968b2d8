"""Rows and their shapes."""

import pytest

from luthier.config.schema import SourceConfig
from luthier.data.formats import find_shape
from luthier.data.rows import Row


@pytest.fixture
def shape():
    """The shape of a source with these rows, where each is a dict."""

    def shape(*fields, **settings):
        rows = [Row(row, f"x.jsonl:{line}") for line, row in enumerate(fields, start=1)]
        return find_shape(SourceConfig(path="x.jsonl", **settings), rows, "x.jsonl")

    return shape


@pytest.fixture
def read(shape):
    """The example of one row."""

    def read(fields, **settings):
        return shape(fields, **settings).read(Row(fields, "x.jsonl:1"))

    return read
