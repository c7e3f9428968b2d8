"""What things are called in front of others: no path of this machine, no credentials."""

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from luthier.model import source

_PATH = re.compile(r"(?<![\w:/.])(?:~|\.{1,2}|[A-Za-z]:)?[/\\][^\s,'\"\]\[{}()=]+")
"""A path from the root, from home, from here, or of Windows; not the middle of a hub name."""
_CACHED = re.compile(r"(?:^|[/\\])models--([^/\\]+?)--([^/\\]+)(?=[/\\]|$)")
"""The folder in which the hub's client keeps a repository."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"\]]+")


def hub_name(path: str) -> str | None:
    """The hub name that `model.path` is, or that a folder of the hub's cache stands for."""
    cached = _CACHED.search(path)
    if cached:
        return "/".join(cached.groups())
    return path if source.needs_hub(path) else None


def public(text: str) -> str:
    """A text with each path of this machine cut to its last part, and addresses to the bare ones.

    An address loses its user, password and query, which is where its keys are.
    """
    kept = text
    for address in _URL.findall(text):
        kept = kept.replace(address, _bare(address))
    return "".join(
        part if _URL.fullmatch(part) else _PATH.sub(lambda found: last(found.group()), part)
        for part in re.split(f"({_URL.pattern})", kept)
    )


def last(path: str) -> str:
    """The last part of a path of any system."""
    name = PureWindowsPath(PurePosixPath(path).name).name
    return name or "a folder"


def public_values(value: Any) -> Any:
    """A copy of plain values in which every text is public."""
    if isinstance(value, dict):
        return {public(str(key)): public_values(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [public_values(part) for part in value]
    return public(value) if isinstance(value, str) else value


def _bare(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme == "file":
        return last(parts.path)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"
