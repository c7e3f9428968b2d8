"""Text that knows where each of its characters came from, through every string operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, SupportsIndex

from markupsafe import Markup
from markupsafe import escape as markupsafe_escape

# Where characters of a rendered text came from, and runs of them.


class FieldOrigin:
    """The field of a message (or of the row's tools) that a run of characters was copied from."""

    __slots__ = ("covers", "field", "is_complete", "is_json", "message", "role", "text")

    def __init__(
        self, message: int | None, role: str | None, field: str, text: str | None = None
    ) -> None:
        self.message = message
        self.role = role
        self.field = field
        self.text = text
        """The field's text; None where the field has many texts that are not told apart."""
        self.covers: tuple[FieldOrigin, ...] = ()
        """The origins that this one stands for, if it stands for several."""
        self.is_json = False
        """Whether the field is JSON already, so that it must not be encoded once more."""
        self.is_complete = False
        """Whether all of the field has been seen in a sequence of the row."""

    @classmethod
    def merge(cls, origins: list[FieldOrigin]) -> FieldOrigin:
        """One origin that stands for several: the text was made from all of them."""
        first = origins[0]
        if all(origin is first for origin in origins):
            return first
        joint = cls(first.message, first.role, first.field)
        leaves = [leaf for origin in origins for leaf in origin.covers or (origin,)]
        joint.covers = tuple({id(leaf): leaf for leaf in leaves}.values())
        return joint

    def __repr__(self) -> str:
        return f"Origin(message={self.message}, role={self.role!r}, field={self.field!r})"


OriginRun = tuple[int, FieldOrigin | None, int]
"""(length, origin, start): so many characters of one origin (None: the template wrote them).

`start` is the place of the first of them in the field; -1 when the field was transformed, so that
its characters can no longer be told apart.
"""


def slice_runs(runs: tuple[OriginRun, ...], start: int, stop: int) -> tuple[OriginRun, ...]:
    """The runs of `text[start:stop]`, for 0 <= start <= stop <= the text's length."""
    found = []
    position = 0
    for length, origin, source in runs:
        begin, end = max(start, position), min(stop, position + length)
        if begin < end:
            place = source + (begin - position) if source >= 0 else -1
            found.append((end - begin, origin, place))
        position += length
        if position >= stop:
            break
    return tuple(found)


# ruff: noqa: D102 (the methods are those of `str`)


def runs_of(value: str) -> tuple[OriginRun, ...]:
    """The runs of any string; a plain `str` was written by the template."""
    if isinstance(value, TracedStr):
        return value._runs
    return ((len(value), None, 0),) if value else ()


def with_runs(value: str, runs: tuple[OriginRun, ...]) -> TracedStr:
    """Text with the given runs, whose lengths must add up to the length of `value`."""
    text = str.__new__(TracedStr, value)
    text._runs = runs
    return text


def trace_field(origin: FieldOrigin, value: str) -> TracedStr:
    """Text that is the whole of a field."""
    text = str.__new__(TracedStr, value)
    text._runs = ((len(value), origin, 0),) if value else ()
    return text


def concat_strings(parts: Iterable[str]) -> str:
    """Concatenate strings; the result is a plain `str` when all of them are."""
    parts = tuple(parts)
    runs: list[OriginRun] = []
    traced = False
    for part in parts:
        if isinstance(part, TracedStr):
            traced = True
            runs += part._runs
        elif part:
            runs.append((len(part), None, 0))
    value = "".join(parts)
    return with_runs(value, tuple(runs)) if traced else value


def join_runs(parts: Iterable[str]) -> tuple[OriginRun, ...]:
    """The runs of strings that stand one behind the other."""
    runs: list[OriginRun] = []
    for part in parts:
        if isinstance(part, TracedStr):
            runs += part._runs
        elif part:
            runs.append((len(part), None, 0))
    return tuple(runs)


def with_merged_origin(value: str, sources: Iterable[TracedStr]) -> TracedStr:
    """Text that was made from `sources` in a way that hides which character came from which."""
    origins = [run[1] for source in sources for run in source._runs if run[1] is not None]
    if not origins or not value:
        return with_runs(value, runs_of(str(value)))
    return with_runs(value, ((len(value), FieldOrigin.merge(origins), -1),))


def iter_traced(value: Any, depth: int = 0) -> Iterator[TracedStr]:
    """Every traced text inside plain containers (and a text itself)."""
    if isinstance(value, TracedStr):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from iter_traced(key, depth + 1)
            yield from iter_traced(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from iter_traced(item, depth + 1)


def _as_plain(value: Any) -> Any:
    return str.__str__(value) if isinstance(value, str) else value


class TracedStr(str):
    """A string whose `_runs` say where its characters came from.

    The operators and methods below give what `str` gives, and keep the runs. Methods that are not
    here give plain strings; the environment sees to the ones that a template can reach.
    """

    __slots__ = ("_runs",)
    _runs: tuple[OriginRun, ...]

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        if not isinstance(other, str):
            return NotImplemented
        return concat_strings((self, other))

    def __radd__(self, other: str) -> str:
        if not isinstance(other, str):
            return NotImplemented
        return concat_strings((other, self))

    def __mul__(self, count: SupportsIndex) -> TracedStr:
        value = str.__mul__(self, count)
        return with_runs(value, self._runs * count.__index__() if value else ())

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> TracedStr:
        value = str.__getitem__(self, key)
        if not isinstance(key, slice):
            start = key.__index__() % len(self)
            return with_runs(value, slice_runs(self._runs, start, start + 1))
        start, stop, step = key.indices(len(self))
        if step != 1:
            return concat_traced(self[place] for place in range(start, stop, step))
        return with_runs(value, slice_runs(self._runs, start, start + len(value)))

    def __iter__(self) -> Iterator[str]:
        for index in range(len(self)):
            yield self[index]

    def strip(self, chars: str | None = None, /) -> TracedStr:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> TracedStr:
        value = str.lstrip(self, _as_plain(chars))
        if len(value) == len(self):
            return self
        return with_runs(value, slice_runs(self._runs, len(self) - len(value), len(self)))

    def rstrip(self, chars: str | None = None, /) -> TracedStr:
        value = str.rstrip(self, _as_plain(chars))
        if len(value) == len(self):
            return self
        return with_runs(value, slice_runs(self._runs, 0, len(value)))

    def removeprefix(self, prefix: str, /) -> TracedStr:
        return self[len(prefix) :] if prefix and self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> TracedStr:
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def _placed(self, pieces: Iterable[str]) -> list[TracedStr]:
        """The pieces, which stand in this text in this order, with their runs."""
        placed = []
        position = 0
        for piece in pieces:
            position = str.find(self, piece, position)
            placed.append(with_runs(piece, slice_runs(self._runs, position, position + len(piece))))
            position += len(piece)
        return placed

    def _separated(self, pieces: list[str], separator: str) -> list[TracedStr]:
        placed = []
        position = 0
        for piece in pieces:
            placed.append(with_runs(piece, slice_runs(self._runs, position, position + len(piece))))
            position += len(piece) + len(separator)
        return placed

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        pieces = str.split(self, _as_plain(sep), maxsplit)
        return list(self._placed(pieces) if sep is None else self._separated(pieces, sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        pieces = str.rsplit(self, _as_plain(sep), maxsplit)
        return list(self._placed(pieces) if sep is None else self._separated(pieces, sep))

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = str.splitlines(self, keepends=True)
        placed = self._separated(lines, "")
        if keepends:
            return list(placed)
        bare = str.splitlines(self)
        return [line[: len(short)] for line, short in zip(placed, bare, strict=True)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        head, middle, tail = self._separated(list(str.partition(self, _as_plain(sep))), "")
        return head, middle, tail

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        head, middle, tail = self._separated(list(str.rpartition(self, _as_plain(sep))), "")
        return head, middle, tail

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            return with_merged_origin(str.replace(self, old, new, count), [self, *iter_traced(new)])
        if str.find(self, old) < 0:
            return self
        return join_traced(new, self.split(old, count))

    def join(self, iterable: Iterable[str], /) -> str:
        return join_traced(self, iterable)

    def _same_length(self, value: str) -> TracedStr:
        if len(value) == len(self):
            return with_runs(value, self._runs)
        return with_merged_origin(value, [self])

    def upper(self) -> TracedStr:
        return self._same_length(str.upper(self))

    def lower(self) -> TracedStr:
        return self._same_length(str.lower(self))

    def title(self) -> TracedStr:
        return self._same_length(str.title(self))

    def capitalize(self) -> TracedStr:
        return self._same_length(str.capitalize(self))

    def swapcase(self) -> TracedStr:
        return self._same_length(str.swapcase(self))

    def casefold(self) -> TracedStr:
        return self._same_length(str.casefold(self))


class SafeTracedStr(TracedStr):
    """Text marked as safe: whatever is added to it is escaped, as with `markupsafe.Markup`."""

    __slots__ = ()

    def __html__(self) -> str:
        return self


def mark_safe(value: TracedStr) -> SafeTracedStr:
    """The same text, marked as safe."""
    marked = str.__new__(SafeTracedStr, value)
    marked._runs = value._runs
    return marked


def escape_html(value: str) -> str:
    """The text with `&<>'"` written as HTML writes them, unless it is marked as safe."""
    if isinstance(value, Markup | SafeTracedStr):
        return value
    parts = []
    position = 0
    for length, origin, start in runs_of(value):
        piece = str.__getitem__(value, slice(position, position + length))
        position += length
        html = str.__str__(markupsafe_escape(piece))
        parts.append(with_runs(html, ((len(html), origin, start if html == piece else -1),)))
    return concat_strings(parts)


def concat_traced(parts: Iterable[str]) -> TracedStr:
    """Concatenate strings into a traced text, also when all of them are plain."""
    whole = concat_strings(parts)
    return whole if isinstance(whole, TracedStr) else with_runs(whole, runs_of(whole))


def join_traced(separator: str, items: Iterable[str]) -> str:
    """`separator.join(items)` that keeps the runs of the separator and of every item."""
    parts: list[str] = []
    for number, item in enumerate(items):
        if not isinstance(item, str):
            kind = type(item).__name__
            raise TypeError(f"sequence item {number}: expected str instance, {kind} found")
        if number:
            parts.append(separator)
        parts.append(item)
    return concat_strings(parts)


# Methods whose result is not worth following character by character.
_UNTRACED_METHODS = ("center", "expandtabs", "ljust", "rjust", "translate", "zfill")


def _untraced_method(name: str) -> Callable[..., TracedStr]:
    plain_method = getattr(str, name)

    def method(self: TracedStr, *args: Any) -> TracedStr:
        return with_merged_origin(plain_method(self, *args), [self])

    method.__name__ = name
    return method


for _name in _UNTRACED_METHODS:
    setattr(TracedStr, _name, _untraced_method(_name))
