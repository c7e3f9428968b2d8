"""Hashes of content: equal where the rows are equal, whatever a file is called and when written."""

import json
from collections.abc import Iterable
from hashlib import sha256

from luthier.data.reading.places import Place
from luthier.data.reading.streams import stored_blocks
from luthier.data.rows import BadRow, Row


def of_places(places: Iterable[Place]) -> str:
    """The SHA-256 of the hashes of all files as they are stored; their order counts."""
    total = sha256()
    for place in places:
        one = sha256()
        for block in stored_blocks(place):
            one.update(block)
        total.update(one.digest())
    return total.hexdigest()


def of_rows(rows: Iterable[Row | BadRow]) -> str:
    """The SHA-256 of the rows themselves, for what has no bytes but those it makes."""
    total = sha256()
    for row in rows:
        value = row.fields if isinstance(row, Row) else [row.problem, row.text]
        total.update(json.dumps(value, ensure_ascii=False, default=repr).encode(errors="replace"))
        total.update(b"\n")
    return total.hexdigest()
