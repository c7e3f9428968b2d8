"""Datasets of the Hugging Face hub, read through `datasets`; every failure in words.

Whether the hub can be reached is known before `datasets` is imported, which takes seconds.
"""

import difflib
import os
import re
import socket
from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from luthier.data.rows import BadRow, Row
from luthier.data.sources.arrow import read_batch_rows
from luthier.data.sources.options import FormatOptions, is_file_name
from luthier.data.sources.source import HashedRows, changed_file_error, hash_file, join_hashes
from luthier.data.sources.streams import LocalFile, read_errors_as_user_errors
from luthier.errors import UserError

if TYPE_CHECKING:
    from luthier.config.schema import SourceConfig


_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_TIMEOUT_SECONDS = 3.0
"""Seconds to wait for the hub to answer at all."""


def check_hub_access(path: str, streaming: bool = False) -> None:
    """Fail early where a hub dataset cannot be had."""
    if not _HUB_NAME.fullmatch(path):
        raise UserError(
            f"dataset: {path!r} is neither a file here (looked at {Path(path).absolute()}) nor a "
            "hub name, which is written owner/name."
        )
    # Without a network datasets 5.2.0 tries six times, for half a minute, before it gives up.
    if (streaming or not _is_cached(path)) and (is_offline() or not _is_reachable()):
        raise UserError(describe_no_network(path))


def is_offline() -> bool:
    """Return whether the user forbids the network."""
    flags = (os.environ.get("HF_HUB_OFFLINE", ""), os.environ.get("HF_DATASETS_OFFLINE", ""))
    return any(flag.upper() in ("1", "ON", "YES", "TRUE") for flag in flags)


def describe_no_network(path: str) -> str:
    """Return the text for a hub that does not answer."""
    why = "HF_HUB_OFFLINE is set" if is_offline() else f"{_endpoint()} does not answer"
    files = [entry.name for entry in Path().iterdir() if is_file_name(entry.name)]
    if near := difflib.get_close_matches(path, files, n=1, cutoff=0.8):
        return (
            f"dataset: there is no file {path}. Did you mean {near[0]}? As a hub dataset it is "
            f"not on this machine either, and {why}."
        )
    return (
        f"dataset: {path} is a hub dataset that is not on this machine, and {why}. Either "
        'load it once where there is a network (python -c "import datasets; '
        f"datasets.load_dataset('{path}')\"), copy its cache (HF_HOME) here and set "
        "HF_HUB_OFFLINE=1, or set dataset.path to a local file, such as ./my.jsonl."
    )


def _endpoint() -> str:
    """Return the hub's address."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


# A config may name several hub datasets, and each test of a dead network takes seconds.
@lru_cache(maxsize=1)
def _is_reachable() -> bool:
    """Return whether the hub answers at all; behind a proxy only the proxy could say."""
    from urllib.request import getproxies

    url = urlsplit(_endpoint())
    if url.scheme in getproxies():
        return True
    try:
        address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
        socket.create_connection(address, timeout=HUB_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True


def _is_cached(name: str) -> bool:
    """Return whether the cache from which `datasets` reads without a network holds the dataset."""
    # The rules of `datasets.config` are written out here, because importing it takes seconds.
    environ = os.environ
    base = Path(environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    home = Path(environ.get("HF_HOME", base))
    cache = Path(environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
    folder_name = _normalise_name(name.replace("/", "___"))
    return cache.is_dir() and any(
        _normalise_name(entry.name) == folder_name for entry in cache.iterdir()
    )


def _normalise_name(name: str) -> str:
    """Return a name as `datasets` and the hub both have it: the cache writes CamelCase as
    camel_case."""
    return name.replace("_", "").lower()


_ROWS_AT_A_TIME = 1000
"""Rows that are taken from `datasets` at once."""


class HubContent:
    """The rows of one split of a hub dataset; loaded when they are first asked for."""

    advice = ""

    def __init__(self, config: "SourceConfig", options: FormatOptions, streaming: bool) -> None:
        self._config, self._options, self._streaming = config, options, streaming
        self._label = f"{config.path}[{config.split}]"
        self._hashed_rows = HashedRows(self._label, self._rows, config.max_rows)
        self._file_hashes: dict[str, bytes] = {}

    def items(self, hashed: bool = False) -> Iterator[Row | BadRow]:
        """Return the rows, numbered from 0 as the dataset's own."""
        # Files are hashed as such: `datasets` maps them into memory.
        return self._hashed_rows.items(hashed and not self._files)

    def _rows(self) -> Iterator[Row | BadRow]:
        """Yield the rows of the split."""
        row = None
        with read_errors_as_user_errors(self._label, is_remote=self._streaming):
            # As Arrow, so that rows are made like those of tables: `datasets` itself would decode
            # images and audio, which takes further packages.
            tables = self._dataset.with_format("arrow").iter(_ROWS_AT_A_TIME)
            batches = chain.from_iterable(table.to_batches() for table in tables)
            for row in read_batch_rows(batches, self._label):
                yield row
        if row is None:
            split = self._config.split
            raise UserError(f"dataset: the split {split!r} of {self._config.path} has no rows.")

    def digest(self) -> str:
        """Return the hash of the Arrow files in the cache, or of the rows where there are none."""
        if not self._files:
            return self._hashed_rows.digest()
        self._file_hashes = {str(file): hash_file(LocalFile(file)) for file in self._files}
        return join_hashes(self._file_hashes.values())

    def digest_as_read(self) -> str | None:
        """Return the hash of the rows that were read last; None where files are hashed."""
        return None if self._files else self._hashed_rows.digest_as_read()

    def check_unchanged(self) -> None:
        """Raise UserError where files or rows are others than `digest` has hashed."""
        if not self._files:
            self._hashed_rows.check_unchanged()
        for file, before in self._file_hashes.items():
            if hash_file(LocalFile(Path(file))) != before:
                raise changed_file_error(file)

    @property
    def _files(self) -> list[Path]:
        """The Arrow files of the cache; none for a stream."""
        files = [] if self._streaming else self._dataset.cache_files
        return [Path(file["filename"]) for file in files]

    def settings(self) -> dict[str, Any]:
        """Return the split: `train[:10%]` lies in the same files as `train`."""
        return {"format": "hub", "split": self._config.split}

    def size(self) -> int | None:
        """Return how many rows the split has; unknown for a stream."""
        return None if self._streaming else len(self._dataset)

    @cached_property
    def _dataset(self) -> Any:
        """The `datasets.Dataset`, or `IterableDataset` of a stream."""
        return _load_hub_dataset(self._config, self._options, self._streaming)


def _load_hub_dataset(config: "SourceConfig", options: FormatOptions, streaming: bool) -> Any:
    """Return the dataset, or what went wrong in words."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from httpx import HTTPError

    path = str(config.path)
    try:
        return load_dataset(
            path,
            config.name,
            split=config.split,
            revision=config.revision,
            streaming=streaming,
            **options.model_dump(exclude_none=True),
        )
    except DatasetNotFoundError as error:
        raise UserError(_describe_not_found(path, config.revision, str(error))) from error
    # A ConnectionError is an OSError, so it stands before those.
    except ConnectionError as error:
        raise UserError(describe_no_network(path)) from error
    except (ValueError, RuntimeError, DatasetsError, OSError, HTTPError) as error:
        raise UserError(_describe_load_error(config, str(error))) from error


def _describe_not_found(path: str, revision: str | None, reason: str) -> str:
    """Return the text for a dataset that the hub does not give out."""
    page = f"https://huggingface.co/datasets/{path}"
    if "gated" in reason:
        return (
            f"dataset: {path} is gated. Accept its terms on {page}, then log in: "
            "hf auth login (or set HF_TOKEN)."
        )
    if "Revision" in reason:
        return f"dataset: {path} has no revision {revision!r}: see {page}/commits."
    return (
        f"dataset: the hub has no dataset {path}, or it is private. Check the name on "
        f"{page}; for a private one log in: hf auth login. A file of your own needs its suffix: "
        "path=./my.jsonl."
    )


def _describe_load_error(config: "SourceConfig", reason: str) -> str:
    """Return the text for a wrong split, a wrong configuration, or whatever else `datasets`
    says."""
    # datasets 5.2.0 raises ValueError for all of these, so only its words tell them apart.
    choices = re.findall(r"\[.*\]", reason)
    available = f" It has: {choices[-1]}." if choices else ""
    if "Unknown split" in reason or "Bad split" in reason:
        return f"dataset: {config.path} has no split {config.split!r}.{available}"
    if "Config name is missing" in reason or "multiple" in reason:
        return f"dataset: {config.path} needs dataset.name, its configuration.{available}"
    if "BuilderConfig" in reason or "for config" in reason:
        return f"dataset: {config.path} has no configuration {config.name!r}.{available}"
    return f"dataset: {config.path} (split {config.split!r}) cannot be loaded: {reason}"
