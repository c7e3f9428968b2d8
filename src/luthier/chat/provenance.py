"""Text that knows where each of its characters came from, through every string operation."""

from __future__ import annotations

from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Sequence,
    Set,
    ValuesView,
)
from typing import Any, SupportsIndex

from jinja2.utils import Namespace
from markupsafe import Markup
from markupsafe import escape as markupsafe_escape


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
        """Return one origin that stands for several: the text was made from all of them."""
        first = origins[0]
        if all(origin is first for origin in origins):
            return first
        joint = cls(first.message, first.role, first.field)
        leaves = [leaf for origin in origins for leaf in origin.covers or (origin,)]
        joint.covers = tuple({id(leaf): leaf for leaf in leaves}.values())
        return joint

    def __repr__(self) -> str:
        return f"FieldOrigin(message={self.message}, role={self.role!r}, field={self.field!r})"


OriginRun = tuple[int, FieldOrigin | None, int]
"""(length, origin, start): so many characters of one origin (None: the template wrote them).

`start` is the position of the first of them in the field; -1 when the field was transformed, so
that its characters can no longer be told apart.
"""


def slice_runs(runs: tuple[OriginRun, ...], start: int, stop: int) -> tuple[OriginRun, ...]:
    """Return the runs of `text[start:stop]`, for 0 <= start <= stop <= the text's length."""
    sliced = []
    position = 0
    for length, origin, field_start in runs:
        begin, end = max(start, position), min(stop, position + length)
        if begin < end:
            new_start = field_start + (begin - position) if field_start >= 0 else -1
            sliced.append((end - begin, origin, new_start))
        position += length
        if position >= stop:
            break
    return tuple(sliced)


def origin_spans(runs: Iterable[OriginRun]) -> Iterator[tuple[int, int, FieldOrigin | None]]:
    """Return where each stretch of one origin starts and ends, and its origin."""
    begin = position = 0
    current: FieldOrigin | None = None
    for length, origin, _ in runs:
        if origin is not current:
            if begin < position:
                yield begin, position, current
            begin, current = position, origin
        position += length
    if begin < position:
        yield begin, position, current


# ruff: noqa: D102 (the methods are those of `str`)


def runs_of(value: str) -> tuple[OriginRun, ...]:
    """Return the runs of any string; a plain `str` was written by the template."""
    if isinstance(value, TracedStr):
        return value._runs
    return ((len(value), None, 0),) if value else ()


def with_runs(value: str, runs: tuple[OriginRun, ...]) -> TracedStr:
    """Return text with the given runs, whose lengths must add up to the length of `value`."""
    text = str.__new__(TracedStr, value)
    text._runs = runs
    return text


def trace_field(origin: FieldOrigin, value: str) -> TracedStr:
    """Return text that is the whole of a field."""
    text = str.__new__(TracedStr, value)
    text._runs = ((len(value), origin, 0),) if value else ()
    return text


def concat_strings(parts: Iterable[str]) -> str:
    """Concatenate strings; the result is a plain `str` when all of them are."""
    texts = tuple(parts)
    joined = "".join(texts)
    is_traced = any(isinstance(text, TracedStr) for text in texts)
    return with_runs(joined, join_runs(texts)) if is_traced else joined


def join_runs(texts: Iterable[str]) -> tuple[OriginRun, ...]:
    """Return the runs of strings that stand one behind the other."""
    runs: list[OriginRun] = []
    for text in texts:
        if isinstance(text, TracedStr):
            runs += text._runs
        elif text:
            runs.append((len(text), None, 0))
    return tuple(runs)


def with_merged_origin(value: str, sources: Iterable[TracedStr]) -> TracedStr:
    """Return text that was made from `sources`, no one can say which character from which."""
    origins = [run[1] for source in sources for run in source._runs if run[1] is not None]
    if not origins or not value:
        return with_runs(value, runs_of(str(value)))
    return with_runs(value, ((len(value), FieldOrigin.merge(origins), -1),))


_CONTAINERS = (Sequence, Set, KeysView, ItemsView, ValuesView)
_NO_TEXTS = (bytes, range)


def iter_traced(value: Any) -> Iterator[TracedStr]:
    """Return every traced text inside plain containers (and a text itself)."""
    if isinstance(value, str):
        if isinstance(value, TracedStr):
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from iter_traced(key)
            yield from iter_traced(item)
    elif isinstance(value, Namespace):
        yield from iter_traced(value._Namespace__attrs)
    elif isinstance(value, _CONTAINERS) and not isinstance(value, _NO_TEXTS):
        for item in value:
            yield from iter_traced(item)


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
        # Other steps are rare (`messages[::-1]` is of lists), and go character by character.
        if step != 1:
            return concat_traced(self[index] for index in range(start, stop, step))
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
        """Return the pieces, which stand in this text in this order, with their runs."""
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
        bare = str.splitlines(self, keepends)
        lines = str.splitlines(self, keepends=True)
        placed = self._separated(lines, "")
        if keepends:
            return list(placed)
        return [line[: len(short)] for line, short in zip(placed, bare, strict=True)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        head, middle, tail = self._separated(list(str.partition(self, _as_plain(sep))), "")
        return head, middle, tail

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        head, middle, tail = self._separated(list(str.rpartition(self, _as_plain(sep))), "")
        return head, middle, tail

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        # Replacing nothing puts `new` between all characters.
        if not old:
            return with_merged_origin(str.replace(self, old, new, count), [self, *iter_traced(new)])
        if str.find(self, old) < 0:
            return self
        return join_traced(new, self.split(old, count))

    def join(self, iterable: Iterable[str], /) -> str:
        return join_traced(self, iterable)


class SafeTracedStr(TracedStr):
    """Text marked as safe: whatever is added to it is escaped, as with `markupsafe.Markup`."""

    __slots__ = ()

    def __html__(self) -> str:
        return self


def mark_safe(value: TracedStr) -> SafeTracedStr:
    """Return the same text, marked as safe."""
    marked = str.__new__(SafeTracedStr, value)
    marked._runs = value._runs
    return marked


def escape_html(value: str) -> str:
    """Return the text with `&<>'"` written as HTML writes them, unless it is marked as safe."""
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
    text = concat_strings(parts)
    return text if isinstance(text, TracedStr) else with_runs(text, runs_of(text))


def join_traced(separator: str, items: Iterable[str]) -> str:
    """`separator.join(items)` that keeps the runs of the separator and of every item."""
    parts: list[str] = []
    for number, item in enumerate(items):
        if not isinstance(item, str):
            raise TypeError(
                f"sequence item {number}: expected str instance, {type(item).__name__} found"
            )
        if number:
            parts.append(separator)
        parts.append(item)
    return concat_strings(parts)


_CASE_METHODS = ("upper", "lower", "title", "capitalize", "swapcase", "casefold")
# Methods whose result is not worth following character by character.
_UNTRACED_METHODS = ("center", "expandtabs", "ljust", "rjust", "translate", "zfill")


def _traced_method(name: str, keeps_length: bool) -> Callable[..., TracedStr]:
    """Return the method of `str`, its result traced: character by character where the length stays.

    Some letters change their number with their case (`ß`); such a text has one merged origin.
    """
    plain_method = getattr(str, name)

    def method(self: TracedStr, *args: Any) -> TracedStr:
        value = plain_method(self, *args)
        if keeps_length and len(value) == len(self):
            return with_runs(value, self._runs)
        return with_merged_origin(value, [self, *iter_traced(args)])

    method.__name__ = name
    return method


for _name in (*_CASE_METHODS, *_UNTRACED_METHODS):
    setattr(TracedStr, _name, _traced_method(_name, _name in _CASE_METHODS))
