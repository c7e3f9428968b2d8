"""Where two lists of tokens part, to be looked at."""

from collections.abc import Callable

_BEFORE, _AFTER = 4, 7


def parting(first: list[int], second: list[int]) -> int:
    """The place of the first token that differs."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


def stretch(ids: list[int], place: int, text_of: Callable[[int], str]) -> str:
    """The tokens around a place, a mark before each, in one line."""
    begin, end = max(place - _BEFORE, 0), place + _AFTER
    ahead, behind = "… " if begin else "", " …" if end < len(ids) else ""
    shown = "|".join(text_of(id_).replace("\n", "↵") for id_ in ids[begin:end])
    return f"{ahead}{shown}{behind}" if shown else "(ends here)"
