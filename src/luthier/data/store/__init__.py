"""Encoded rows on disk, as Arrow files under a key of all that decides them; see docs/cache.md."""

from luthier.data.store.store import (
    ENCODING_VERSION,
    Entry,
    Store,
    Stored,
    cache_key,
    data_folder,
    tokenizer_digest,
)
from luthier.data.store.table import Ragged, Table, TableWriter, Writer

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
