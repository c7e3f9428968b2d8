"""Encoded rows on disk, as Arrow files under a key of all that decides them; see docs/cache.md."""

from luthier.data.store.store import (
    ENCODING_VERSION,
    EntrySize,
    Store,
    StoredEntry,
    cache_key,
    data_folder,
    tokenizer_digest,
)
from luthier.data.store.table import EntryWriter, Ragged, TableWriter, TokenTable

__all__ = [
    "ENCODING_VERSION",
    "EntrySize",
    "EntryWriter",
    "Ragged",
    "Store",
    "StoredEntry",
    "TableWriter",
    "TokenTable",
    "cache_key",
    "data_folder",
    "tokenizer_digest",
]
