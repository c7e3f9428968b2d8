"""Rows from any source: files here or behind an address, saved and hub datasets, functions."""

from luthier.data.sources.open import open_source
from luthier.data.sources.source import Source

__all__ = ["Source", "open_source"]
