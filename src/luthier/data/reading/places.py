"""Where the bytes of a file lie: on this machine, behind fsspec, on the web."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.request import Request, urlopen

PATIENCE = 30.0
"""Seconds to wait for a web server's next answer."""


class Place(Protocol):
    """Something whose bytes can be read, from the start, any number of times."""

    @property
    def is_remote(self) -> bool:
        """Whether reading it takes a network."""

    @property
    def key(self) -> str:
        """What two names of the same place have in common."""

    def open(self) -> io.BufferedReader:
        """The bytes as they are stored."""


@dataclass(frozen=True)
class Local:
    """A file of this machine."""

    path: Path
    is_remote = False

    @property
    def key(self) -> str:
        """The path without links."""
        return str(self.path.resolve())

    def open(self) -> io.BufferedReader:
        """The bytes as they are stored."""
        return self.path.open("rb")


@dataclass(frozen=True)
class Remote:
    """A file of an fsspec file system."""

    filesystem: Any
    path: str
    is_remote = True

    @property
    def key(self) -> str:
        """The path with its protocol."""
        return str(self.filesystem.unstrip_protocol(self.path))

    def open(self) -> io.BufferedReader:
        """The bytes as they are stored."""
        return io.BufferedReader(self.filesystem.open(self.path, "rb"))


@dataclass(frozen=True)
class Web:
    """A file that a web server gives out; needs no package, unlike fsspec's own reader."""

    url: str
    headers: tuple[tuple[str, str], ...] = ()
    is_remote = True

    @property
    def key(self) -> str:
        """The address."""
        return self.url

    def open(self) -> io.BufferedReader:
        """The bytes as the server sends them; they can be read once, front to back."""
        request = Request(self.url, headers=dict(self.headers))
        return io.BufferedReader(_Answer(urlopen(request, timeout=PATIENCE)))


class _Answer(io.RawIOBase):
    """A server's answer that fails where the connection ends early: urllib takes it for the end."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self._response.readinto(buffer))
        if not count and self._response.length:
            raise EOFError(f"the connection ended {self._response.length:,} bytes too early")
        return count

    def close(self) -> None:
        self._response.close()
        super().close()


@dataclass(frozen=True)
class File:
    """A data file: what the user calls it, its format, and its place."""

    label: str
    format: str
    place: Place
    member: str = ""
    """The file's name inside a zip archive."""
