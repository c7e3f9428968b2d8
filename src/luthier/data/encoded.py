"""The rows of one source as token rows on disk: made once, found again under a key."""

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from unicodedata import unidata_version

import numpy as np
from numpy.typing import NDArray

from luthier.data.compose.prints import Prints, as_prints, normalised
from luthier.data.encoders import RowEncoder
from luthier.data.examples import BadRows, Opened
from luthier.data.making import CHUNK, LAYOUT, halves, make_rows, prints_of
from luthier.data.rows import BadRow
from luthier.data.store import Store, Stored, Table, Writer, cache_key

Array = NDArray[Any]


class Encoded:
    """A source's rows, encoded: what each makes, and its token rows."""

    def __init__(self, opened: Opened, stored: Stored) -> None:
        self.opened = opened
        self.stored = stored
        self.rows: Table = stored.table("rows")
        """One a row: `print_0`, `print_1`, `where`, `example`, `sequences`, `state`, `problem`,
        `reason`, `cut`; and where the encoder keeps them, `columns`."""
        self.tokens: Table = stored.table("tokens")
        """One a sequence: `input_ids`, `labels`, `trained`."""
        self._hashes: Table = stored.table("hashes")
        self._names = dict(zip(stored.manifest["names"], opened.names, strict=True))
        self.filtered: int = stored.manifest["filtered"]
        """Rows that the filter left out."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bad(self) -> list[BadRow]:
        """The rows that could not be read."""
        found = (BadRow(*row) for row in self.stored.manifest["bad"])
        return [replace(row, where=self._place(row.where)) for row in found]

    @property
    def prints(self) -> Prints:
        """The fingerprint of each row, `S16`."""
        return prints_of(self.rows, "print")

    @property
    def normalised_prints(self) -> Prints:
        """The fingerprint of each row's normalised text, `S16`: made once, kept in the store."""
        rows = self.stored.folder
        key = cache_key({"normalised": rows.name, "unicode": unidata_version})
        stored = Store(rows.parent).open_or_make(key, self._normalise)
        return prints_of(stored.table("prints"), "print")

    def _normalise(self, writer: Writer) -> dict[str, Any]:
        table = writer.table("prints")
        for start in range(0, len(self), CHUNK):
            examples = self.examples(range(start, min(start + CHUNK, len(self))))
            table.append(halves("print", as_prints(map(normalised, examples))))
        return {}

    @property
    def hashes(self) -> Prints:
        """The hash of each sequence's token ids and labels, `S16`."""
        return prints_of(self._hashes, "hash")

    @property
    def sequences(self) -> Array:
        """How many sequences each row makes."""
        return self.rows.column("sequences")

    def sequences_of(self, rows: Array) -> Array:
        """The numbers of the sequences that these rows make, in the order of the rows."""
        counts = self.sequences.astype(np.int64)
        starts = np.cumsum(counts) - counts
        chosen = counts[rows]
        inside = np.arange(chosen.sum()) - np.repeat(np.cumsum(chosen) - chosen, chosen)
        return np.repeat(starts[rows], chosen) + inside

    def examples(self, rows: Iterable[int]) -> list[Any]:
        """The examples of these rows."""
        return [json.loads(text) for text in self.rows.values("example", rows)]

    def columns(self, rows: Iterable[int]) -> list[dict[str, Any]]:
        """The columns of these rows as their source has them; none where they are not kept."""
        if "columns" not in self.rows.columns:
            return [{} for _ in rows]
        return [json.loads(text) for text in self.rows.values("columns", rows)]

    def places(self, rows: Iterable[int]) -> list[str]:
        """Where these rows stand, such as `data.jsonl:7`."""
        return [self._place(where) for where in self.rows.values("where", rows)]

    def _place(self, where: str) -> str:
        """A place in a file that may have had another name when its rows were encoded."""
        before = max(filter(where.startswith, self._names), key=len)
        return self._names[before] + where.removeprefix(before)


def encode_source(
    opened: Opened, encoder: RowEncoder, store: Store, tokenizer: str, workers: int, drop: bool
) -> Encoded:
    """The source's encoded rows, from the store or made now.

    `tokenizer`: its digest. `drop`: leave bad rows out; else they raise UserError, as do rows that
    the encoder neither keeps nor drops.
    """
    key = key_of(opened, encoder, tokenizer)

    def make(writer: Writer) -> dict[str, Any]:
        return make_rows(opened, encoder, writer, workers, drop)

    found = Encoded(opened, store.open_or_make(key, make))
    if not drop:
        bad = BadRows(found.bad)
        bad.raise_if_any(opened)
    return found


def key_of(opened: Opened, encoder: RowEncoder, tokenizer: str) -> str:
    """The key of a source's token rows: of all that decides them, and nothing else."""
    return cache_key(
        {
            "content": opened.source.digest(),
            **opened.settings(),
            "encoder": encoder.settings(),
            "tokenizer": tokenizer,
            "layout": LAYOUT,
        }
    )
