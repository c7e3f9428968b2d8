"""Datasets of the Hugging Face hub, read through `datasets`; every failure in words."""

import os
import re
import socket
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from luthier.config.schema import DatasetConfig
from luthier.data.rows import Row
from luthier.errors import UserError

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
PATIENCE = 3.0
"""Seconds to wait for the hub to answer at all."""


def check_hub(config: DatasetConfig) -> None:
    """Fail early, before `datasets` is imported, where a hub dataset cannot be had.

    Without a network `datasets` tries six times, for half a minute, before it gives up.
    """
    if not _NAME.fullmatch(config.path):
        raise UserError(
            f"dataset: {config.path!r} is neither a file here (looked at "
            f"{Path(config.path).absolute()}) nor a hub name, which is written owner/name."
        )
    if not _is_cached(config.path) and (_offline() or not _reachable()):
        raise UserError(_no_network(config.path))


def read_hub(config: DatasetConfig, split: str, most: int | None = None) -> tuple[Row, ...]:
    """The rows of one split of the config's hub dataset: all of them, or the first `most`."""
    check_hub(config)
    dataset = _load(config, split)
    if most is not None:
        dataset = dataset.take(min(most, len(dataset)))
    rows = rows_of(dataset, f"{config.path}[{split}]")
    if not rows:
        raise UserError(f"dataset: the split {split!r} of {config.path} has no rows.")
    return rows


def rows_of(dataset: Any, source: str) -> tuple[Row, ...]:
    """The rows of a `datasets.Dataset`, without the nulls that its schema filled in."""
    features = dict(dataset.features)
    return tuple(
        Row(_without_filled(row, features), f"{source} row {number}")
        for number, row in enumerate(dataset)
    )


def _without_filled(value: Any, feature: Any) -> Any:
    """The value without the nulls of its structs.

    Arrow gives every struct of a column the keys of all of them, null where a row had none. Such
    a null cannot be told from one that was meant, so both go; JSON kept as text keeps its own.
    """
    if isinstance(feature, dict) and isinstance(value, dict):
        return {
            key: _without_filled(entry, feature[key])
            for key, entry in value.items()
            if entry is not None
        }
    if isinstance(value, list):
        return [_without_filled(entry, _item(feature)) for entry in value]
    return value


def _item(feature: Any) -> Any:
    """The feature of a list's items; none where the value is JSON, whose nulls are its own."""
    from datasets import LargeList, List

    return feature.feature if isinstance(feature, List | LargeList) else None


def _load(config: DatasetConfig, split: str) -> Any:
    """The `datasets.Dataset`, or what went wrong in words."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from httpx import HTTPError

    try:
        return load_dataset(config.path, config.name, split=split, revision=config.revision)
    except DatasetNotFoundError as error:
        raise UserError(_not_found(config, str(error))) from error
    except ConnectionError as error:
        raise UserError(_no_network(config.path)) from error
    except (ValueError, RuntimeError, DatasetsError, OSError, HTTPError) as error:
        raise UserError(_refused(config, split, str(error))) from error


def _not_found(config: DatasetConfig, reason: str) -> str:
    """The words for a dataset that the hub does not give out."""
    page = f"https://huggingface.co/datasets/{config.path}"
    if "gated" in reason:
        return (
            f"dataset: {config.path} is gated. Accept its terms on {page}, then log in: "
            "hf auth login (or set HF_TOKEN)."
        )
    if "Revision" in reason:
        return f"dataset: {config.path} has no revision {config.revision!r}: see {page}/commits."
    return (
        f"dataset: the hub has no dataset {config.path}, or it is private. Check the name on "
        f"{page}; for a private one log in: hf auth login. A file of your own needs its suffix: "
        "path=./my.jsonl."
    )


def _no_network(path: str) -> str:
    """The words for a hub that does not answer."""
    why = "HF_HUB_OFFLINE is set" if _offline() else f"{_endpoint()} does not answer"
    return (
        f"dataset: {path} is a hub dataset that is not on this machine, and {why}. Either "
        'load it once where there is a network (python -c "import datasets; '
        f"datasets.load_dataset('{path}')\"), copy its cache (HF_HOME) here and set "
        "HF_HUB_OFFLINE=1, or set dataset.path to a local .jsonl file."
    )


def _refused(config: DatasetConfig, split: str, reason: str) -> str:
    """The words for a wrong split, a wrong configuration, or whatever else `datasets` says."""
    choices = re.findall(r"\[.*\]", reason)
    known = f" It has: {choices[-1]}." if choices else ""
    if "Unknown split" in reason:
        return f"dataset: {config.path} has no split {split!r}.{known}"
    if "Config name is missing" in reason or "multiple" in reason:
        return f"dataset: {config.path} needs dataset.name, its configuration.{known}"
    if "BuilderConfig" in reason or "for config" in reason:
        return f"dataset: {config.path} has no configuration {config.name!r}.{known}"
    return f"dataset: {config.path} (split {split!r}) cannot be loaded: {reason}"


def _offline() -> bool:
    """Whether the user forbids the network."""
    flags = (os.environ.get("HF_HUB_OFFLINE", ""), os.environ.get("HF_DATASETS_OFFLINE", ""))
    return any(flag.upper() in ("1", "ON", "YES", "TRUE") for flag in flags)


def _endpoint() -> str:
    """The hub's address."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


@lru_cache(maxsize=1)
def _reachable() -> bool:
    """Whether the hub answers at all; behind a proxy only the proxy could say."""
    url = urlsplit(_endpoint())
    if url.scheme in getproxies():
        return True
    try:
        address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
        socket.create_connection(address, timeout=PATIENCE).close()
    except OSError:
        return False
    return True


def _is_cached(name: str) -> bool:
    """Whether the cache from which `datasets` reads without a network holds the dataset."""
    environ = os.environ
    base = Path(environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    home = Path(environ.get("HF_HOME", base))
    cache = Path(environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
    wanted = _plain(name.replace("/", "___"))
    return cache.is_dir() and any(_plain(entry.name) == wanted for entry in cache.iterdir())


def _plain(name: str) -> str:
    """A name as `datasets` and the hub both have it: the cache writes CamelCase as camel_case."""
    return name.replace("_", "").lower()
