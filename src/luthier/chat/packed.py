"""Token ids as bytes: a quarter of the memory of a list, and joined without looking at each."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

BYTES = 4
"""Bytes of one id: an int32 in the order of this machine."""


def packed(ids: Sequence[int]) -> bytes:
    """The ids as bytes."""
    return array("i", ids).tobytes()


def unpacked(ids: bytes) -> list[int]:
    """The ids of bytes."""
    return memoryview(ids).cast("i").tolist()
