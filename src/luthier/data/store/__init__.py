"""Encoded rows on disk, as Arrow files under a key of all that decides them; see docs/cache.md."""

from luthier.data.store.columns import Ragged
from luthier.data.store.key import ENCODING_VERSION, cache_key, tokenizer_digest
from luthier.data.store.store import Entry, Store, Stored, data_folder
from luthier.data.store.table import Table
from luthier.data.store.writer import TableWriter, Writer

__all__ = [
    "ENCODING_VERSION",
    "Entry",
    "Ragged",
    "Store",
    "Stored",
    "Table",
    "TableWriter",
    "Writer",
    "cache_key",
    "data_folder",
    "tokenizer_digest",
]
