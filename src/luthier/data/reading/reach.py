"""Whether the Hugging Face hub can be had, known before `datasets` is imported."""

import os
import re
import socket
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from luthier.errors import UserError

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
PATIENCE = 3.0
"""Seconds to wait for the hub to answer at all."""


def check_hub(path: str, streaming: bool = False) -> None:
    """Fail early where a hub dataset cannot be had.

    Without a network `datasets` tries six times, for half a minute, before it gives up.
    """
    if not _NAME.fullmatch(path):
        raise UserError(
            f"dataset: {path!r} is neither a file here (looked at {Path(path).absolute()}) nor a "
            "hub name, which is written owner/name."
        )
    if (streaming or not _is_cached(path)) and (offline() or not _reachable()):
        raise UserError(no_network(path))


def offline() -> bool:
    """Whether the user forbids the network."""
    flags = (os.environ.get("HF_HUB_OFFLINE", ""), os.environ.get("HF_DATASETS_OFFLINE", ""))
    return any(flag.upper() in ("1", "ON", "YES", "TRUE") for flag in flags)


def no_network(path: str) -> str:
    """The words for a hub that does not answer."""
    why = "HF_HUB_OFFLINE is set" if offline() else f"{_endpoint()} does not answer"
    return (
        f"dataset: {path} is a hub dataset that is not on this machine, and {why}. Either "
        'load it once where there is a network (python -c "import datasets; '
        f"datasets.load_dataset('{path}')\"), copy its cache (HF_HOME) here and set "
        "HF_HUB_OFFLINE=1, or set dataset.path to a local file, such as ./my.jsonl."
    )


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
