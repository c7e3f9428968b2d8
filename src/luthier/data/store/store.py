"""The store of encoded rows: entries under a key of all that decides them.

Each is made once, whole or not at all, and shared between processes.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.data.store.table import EntryWriter, TokenTable, cache_write_errors
from luthier.storage.cache import cache_root
from luthier.storage.manifest import (
    DamagedFolderError,
    read_manifest,
    verify_manifest,
    write_manifest,
)
from luthier.storage.sizes import folder_size

WAIT_NOTICE_SECONDS = 3.0
"""How long a process waits for another before it says so."""

EntryMaker = Callable[[EntryWriter], dict[str, Any]]
"""Writes the tables of an entry and returns what is to be known of it, as JSON values."""


def data_folder(chosen: str | None = None) -> Path:
    """Where encoded rows lie: the chosen folder, else `data` in luthier's cache folder."""
    return Path(chosen).expanduser() if chosen else cache_root() / "data"


@dataclass(frozen=True)
class StoredEntry:
    """A whole entry; it pickles as its folder and manifest."""

    folder: Path
    manifest: dict[str, Any]
    """What the maker returned."""

    def digest(self, name: str) -> str:
        """The SHA-256 of a table's content, of each 64 MiB one, as the manifest has it."""
        hashes: list[str] = read_manifest(self.folder)["files"][f"{name}.arrow"]["sha256"]
        return ",".join(hashes)

    def table(self, name: str) -> TokenTable:
        """One of the entry's tables, mapped from its file."""
        return TokenTable(self.folder / f"{name}.arrow")


@dataclass(frozen=True)
class EntrySize:
    """What lies in a store under a key."""

    key: str
    size: int
    """Bytes on disk."""


class Store:
    """A folder of entries, one folder each, named by their keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open_or_make(self, key: str, make: EntryMaker) -> StoredEntry:
        """The entry of this key, made by `make` if it is missing or a byte of it has changed.

        Of several processes one makes it; the others wait, however long it takes, and open the
        same files. Raises UserError where the folder cannot be written to or is full.
        """
        with cache_write_errors(self.folder):
            self._sweep()
        while True:
            with cache_write_errors(self.folder):
                before = self._state(key)
                stored, problem = self._look(key)
            if stored is not None:
                return stored
            with self._alone(key):
                # Another process may have made it meanwhile; its hashes are compared unlocked.
                if self._state(key) == before:
                    return self._make(key, make, problem)

    def open(self, key: str) -> StoredEntry | None:
        """The entry of this key if it is there and whole."""
        return self._look(key)[0]

    def entries(self) -> list[EntrySize]:
        """All entries, whole or not, in the order of their keys."""
        # Other folders may stand beside them, where dataset.cache names one that is not luthier's.
        keys = [name for name in self._names() if re.fullmatch("[0-9a-f]{64}", name)]
        return [EntrySize(key, folder_size(self.folder / key)) for key in keys]

    def remove(self, key: str) -> None:
        """Remove an entry; processes that have mapped its files keep them until they end."""
        with self._alone(key), cache_write_errors(self.folder):
            shutil.rmtree(self.folder / key)

    def _names(self) -> list[str]:
        """What lies in the folder, if it is there, sorted."""
        folders = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path.name for path in folders)

    def _look(self, key: str) -> tuple[StoredEntry | None, str | None]:
        """The entry, or what is wrong with it; neither if there is none."""
        try:
            return StoredEntry(self.folder / key, verify_manifest(self.folder / key)), None
        except FileNotFoundError:
            return None, None
        except DamagedFolderError as damage:
            return None, str(damage)

    def _state(self, key: str) -> tuple[int, int] | None:
        """What changes when an entry is made or removed; None where there is none."""
        # Listing the folder has a network file system look at it anew.
        if key not in self._names():
            return None
        with suppress(FileNotFoundError):
            stat = (self.folder / key).stat()
            return stat.st_ino, stat.st_mtime_ns
        return None

    def _make(self, key: str, make: EntryMaker, problem: str | None) -> StoredEntry:
        """Make the entry in a folder beside its own, which then takes the name at once."""
        if problem is not None:
            _say(f"The encoded rows in {self.folder / key} are damaged: {problem}. Encoding again.")
        self._remove_leftovers(key)
        new = self.folder / f"{key}.new-{os.getpid()}-{secrets.token_hex(4)}@{socket.gethostname()}"
        try:
            self._fill(new, make)
            with cache_write_errors(self.folder):
                shutil.rmtree(self.folder / key, ignore_errors=True)
                new.rename(self.folder / key)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return StoredEntry(self.folder / key, read_manifest(self.folder / key)["made"])

    def _fill(self, new: Path, make: EntryMaker) -> None:
        with cache_write_errors(self.folder):
            new.mkdir()
        writer = EntryWriter(new)
        try:
            facts = make(writer)
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        with cache_write_errors(self.folder, new):
            write_manifest(new, facts)

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Hold the entry's lock, which the system releases when the holder ends in any way."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / f"{key}.lock")
        with cache_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=WAIT_NOTICE_SECONDS)
            except Timeout:
                if os.environ.get("RANK", "0") in ("0", "1"):  # one of them waits; two are enough
                    _say(self._waiting(key))
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _waiting(self, key: str) -> str:
        """Who is waited for."""
        names = [path.name for path in self.folder.glob(f"{key}.new-*")]
        match = re.search(r"\.new-(\d+)-\w+@(.*)", names[0]) if names else None
        who = f"process {match[1]} on {match[2]}" if match else "another process"
        return f"Waiting for {who}, which encodes the same rows into {self.folder / key}."

    def _sweep(self) -> None:
        """Remove what writers of any entry left behind when they were killed."""
        from filelock import FileLock, Timeout

        for name in self._names():
            # In a folder of the user's a name that only looks alike is the user's.
            left = re.fullmatch(r"([0-9a-f]{64})\.new-\d+-[0-9a-f]+@.*", name)
            if left is None:
                continue
            key = left[1]
            # A writer holds the lock as long as it lives. What cannot be removed does no harm.
            with suppress(OSError, Timeout), FileLock(self.folder / f"{key}.lock", blocking=False):
                self._remove_leftovers(key)

    def _remove_leftovers(self, key: str) -> None:
        """Remove the folders of dead writers of this entry, whose lock is held."""
        for leftover in self.folder.glob(f"{key}.new-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


ENCODING_VERSION = 2
"""Raise it when the same sources, settings and tokenizer give other rows than before."""


def cache_key(parts: Mapping[str, Any]) -> str:
    """64 hex digits: the SHA-256 of these JSON values and luthier's encoding version.

    The order of keys does not count; TypeError or ValueError for what is not JSON.
    """
    values = {"encoding_version": ENCODING_VERSION, "parts": parts}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """A SHA-256 of what decides a fast tokenizer's ids: the same wherever its files lie.

    Takes in the whole backend (vocabulary, merges, added tokens, normalizer, pre-tokenizer,
    post-processor), the special tokens that a template may write, and whether they are parsed in
    text; not the template, names, lengths, or the truncation and padding of the last call.
    """
    digest = hashlib.sha256()
    for text in _without_last_call(tokenizer.backend_tokenizer.to_str()):
        digest.update(text.encode())
    facts = {
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "split_special_tokens": tokenizer.split_special_tokens,
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def _without_last_call(backend: str) -> tuple[str, str]:
    """The backend's JSON without `truncation` and `padding`, which every call of it may change.

    They stand in front, before the tokens; only that part is parsed, as the rest has megabytes.
    """
    head, mark, tokens = backend.partition(',"added_tokens":')
    facts = json.loads(head + "}")
    return json.dumps({k: v for k, v in facts.items() if k not in ("truncation", "padding")}), (
        mark + tokens
    )
