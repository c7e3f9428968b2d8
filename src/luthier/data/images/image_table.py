"""The images of a source's encoded rows: their table in the store, and their bytes given back.

The table has one row for each different image: `sha256`, `width`, `height`, `source` (the path or
address as a row has it), `folder` (the number of the data file that a relative path is beside, or
-1), `size` and `mtime_ns` of its file, and `data`: its bytes, empty where a file holds them.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np

from luthier.data.images.decode import StoredBytes
from luthier.data.images.reader import (
    EMBEDDED,
    FileStamp,
    ImageRef,
    ReadImage,
    fetch_image,
    find_image,
    is_web_address,
    read_image_file,
)
from luthier.data.rows import RowError
from luthier.data.store import EntryWriter, Ragged, TokenTable
from luthier.errors import UserError
from luthier.redaction import redact_message

DIGEST_BYTES = 32
"""Bytes of a SHA-256: encoders name the images of a sequence by these, one behind the other."""
_MOST_WAITING = 500
_MOST_WAITING_BYTES = 4 * 2**20
_NO_STAMP = FileStamp(0, 0)
MISSING = "missing"
"""What stands for the hash of an image whose file is not there any more."""


class ImageTableWriter:
    """Writes the table of images while the rows that have them are read, each image once."""

    def __init__(self, writer: EntryWriter) -> None:
        self._table = writer.table("images")
        self._numbers: dict[bytes, int] = {}
        self._waiting: list[ReadImage] = []
        self._waiting_bytes = 0

    def keep(self, image: ReadImage) -> None:
        """Add an image that was read, unless it is there already."""
        digest = bytes.fromhex(image.ref["sha256"])
        if digest in self._numbers:
            return
        self._numbers[digest] = len(self._numbers)
        self._waiting.append(image)
        self._waiting_bytes += len(image.data)
        if len(self._waiting) == _MOST_WAITING or self._waiting_bytes > _MOST_WAITING_BYTES:
            self.flush()

    def number(self, digests: Sequence[bytes]) -> Ragged:
        """Return the images of each sequence by their numbers in the table.

        `digests`: the SHA-256 of each image of a sequence, one behind the other; b"" for none.
        """
        rows = [
            [self._numbers[row[at : at + DIGEST_BYTES]] for at in range(0, len(row), DIGEST_BYTES)]
            for row in digests
        ]
        numbers = np.array([number for row in rows for number in row], np.int32)
        return Ragged(numbers, np.cumsum([0, *map(len, rows)]))

    def flush(self) -> None:
        """Write the images that wait."""
        images, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if not images:
            return
        stamps = [image.stamp or _NO_STAMP for image in images]
        self._table.append(
            {
                "sha256": [image.ref["sha256"] for image in images],
                "width": np.array([image.ref["width"] for image in images], np.int32),
                "height": np.array([image.ref["height"] for image in images], np.int32),
                "source": [image.ref["source"] for image in images],
                "folder": np.array([image.folder for image in images], np.int32),
                "size": np.array([stamp.size for stamp in stamps], np.int64),
                "mtime_ns": np.array([stamp.mtime_ns for stamp in stamps], np.int64),
                "data": [image.data for image in images],
            }
        )


class StoredImages:
    """The images of a source's encoded rows; it pickles as the path of their table."""

    def __init__(self, table: TokenTable, names: Sequence[str]) -> None:
        """`names`: those that the source's data files have now, in the order of their rows."""
        self.table = table
        self._names = tuple(names)

    def __len__(self) -> int:
        return len(self.table)

    def read(self, number: int) -> StoredBytes:
        """Return the bytes of an image, which are those that were encoded.

        Raises UserError where its file is gone or has other content now.
        """
        row = self.table.row(number)
        source: str = row["source"]
        data = StoredBytes(row["data"] or self._read_file_of(row))
        data.source = source if source != EMBEDDED else ""
        return data

    def _read_file_of(self, row: Mapping[str, Any]) -> bytes:
        """Return the bytes of the file that an entry of the table names."""
        source: str = row["source"]
        try:
            data = self._read_file(source, row["folder"])[1]
        except RowError as error:
            raise UserError(
                f"dataset: an image was removed after it was encoded: {error}."
            ) from None
        if sha256(data).hexdigest() != row["sha256"]:
            raise UserError(
                f"dataset: the image {redact_message(source)} changed after it was encoded. Run "
                "the same command again, which encodes its rows again. If the file has the size "
                "and the time that it had before, `touch` it first."
            )
        return data

    def read_reference(self, ref: ImageRef) -> bytes:
        """Return the bytes of the image that an example of the source refers to.

        Raises UserError as `read` does, and KeyError for an image of another source.
        """
        return self.read(self._number_of[ref["sha256"]])

    def reference(self, number: int) -> ImageRef:
        """Return an image as an example of the source refers to it."""
        row = self.table.row(number)
        return {
            "sha256": row["sha256"], "width": int(row["width"]), "height": int(row["height"]),
            "source": row["source"],
        }  # fmt: skip

    def find_changes(self) -> dict[str, str]:
        """Return the images whose files have another content than was encoded: source -> SHA-256.

        Only files with another size or time than before are read; one that is gone is `missing`.
        Addresses that the cache has no more are fetched again.
        """
        if not len(self):
            return {}
        sizes, times, folders = map(self.table.column, ("size", "mtime_ns", "folder"))
        changes = {}
        # Embedded images have no file, and a file without bytes is no image.
        for number in np.flatnonzero(sizes).tolist():
            (source,) = self.table.values("source", [number])
            stamp = FileStamp(int(sizes[number]), int(times[number]))
            digest = self._digest_if_changed(source, int(folders[number]), stamp)
            if digest and digest != self.table.values("sha256", [number])[0]:
                changes[f"{folders[number]}:{source}"] = digest
        return changes

    def _digest_if_changed(self, source: str, folder: int, stamp: FileStamp) -> str:
        """Return the hash of a file that does not look as before; an empty text for one that
        does."""
        try:
            if is_web_address(source):
                fetch_image(source)
            stat = find_image(source, self._data_file(folder)).stat()
            if FileStamp(stat.st_size, stat.st_mtime_ns) == stamp:
                return ""
            return sha256(self._read_file(source, folder)[1]).hexdigest()
        except (RowError, OSError):
            return MISSING

    def _read_file(self, source: str, folder: int) -> tuple[FileStamp, bytes]:
        return read_image_file(find_image(source, self._data_file(folder)), source)

    def _data_file(self, folder: int) -> str | None:
        return self._names[folder] if folder >= 0 else None

    @cached_property
    def _number_of(self) -> dict[str, int]:
        """The number of each image by its hash."""
        hashes: Iterable[Any] = self.table.values("sha256", range(len(self)))
        return {digest: number for number, digest in enumerate(hashes)}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.table, self._names)
