"""Rows of about one length side by side."""

from collections.abc import Sequence

TOKENS = 2048
"""Tokens that go through the model at once, padding and all; at least one row."""


def by_length(lengths: Sequence[int]) -> list[list[int]]:
    """The numbers of rows in batches, the longest first, each of about as many tokens."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    batches, start = [], 0
    while start < len(order):
        size = max(1, TOKENS // max(1, lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches
