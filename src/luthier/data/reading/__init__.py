"""Rows from any source: files here or behind an address, saved and hub datasets, functions."""

from luthier.data.reading.opening import open_source
from luthier.data.reading.source import Source

__all__ = ["Source", "open_source"]
