"""Many texts encoded in few calls: a call of the backend has a cost of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

_GROUP = 2000


def grouped_texts(texts: list[str]) -> Iterator[list[str]]:
    """The texts in groups of a size that one call of the backend handles well."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size > _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def parted_ids(
    groups: list[list[str]], token: str, index: int, encode: Callable[[list[str]], list[list[int]]]
) -> list[list[int]]:
    """The ids of each text, from those of each group joined by a token of the given index."""
    found = []
    for group, ids in zip(groups, encode(list(map(token.join, groups))), strict=True):
        start = 0
        for _ in group[1:]:
            stop = ids.index(index, start)
            found.append(ids[start:stop])
            start = stop + 1
        found.append(ids[start:])
    return found
