"""What a template sees as its messages, `loop` and `namespace`: all that it asks is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jinja2.runtime import LoopContext

from luthier.chat.watch import Watch, Watches


class Turns(Sequence):
    """The messages as a template sees them: a list that tells its watch what is asked of it."""

    def __init__(
        self, messages: list[dict[str, Any]], watch: Watch, start: int = 0, stop: int | None = None
    ) -> None:
        self._messages = messages
        self._watch = watch
        self._start = start
        self._stop = stop

    def _end(self) -> int:
        return len(self._messages) if self._stop is None else min(self._stop, len(self._messages))

    def __len__(self) -> int:
        length = max(self._end() - self._start, 0)
        if self._stop is None or self._stop > len(self._messages):
            self._watch.counted()
        elif length:
            self._watch.exists(self._stop - 1)
        return length

    def __bool__(self) -> bool:
        there = self._end() > self._start
        if there:
            self._watch.exists(self._start)
        return there

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return self._slice(key)
        place = key.__index__() if isinstance(key, int) else _not_an_index(key)
        if place < 0:
            self._watch.counted()
            return self._messages[self._start : self._end()][place]
        place += self._start
        if place >= self._end():
            raise IndexError("list index out of range")
        self._watch.exists(place)
        return self._messages[place]

    def _slice(self, key: slice) -> Any:
        start, stop = key.start or 0, key.stop
        simple = key.step in (None, 1) and start >= 0 and (stop is None or stop >= 0)
        if not simple:
            self._watch.counted()
            return self._messages[self._start : self._end()][key]
        ends = [end for end in (self._stop, None if stop is None else self._start + stop) if end]
        if stop == 0:
            return []
        return Turns(self._messages, self._watch, self._start + start, min(ends) if ends else None)

    def __iter__(self) -> Iterator[Any]:
        for place in range(self._start, self._end()):
            self._watch.exists(place)
            yield self._messages[place]
        self._learn_end()

    def _learn_end(self) -> None:
        if self._stop is None or self._stop > len(self._messages):
            self._watch.counted()

    def _list(self) -> list[Any]:
        self._watch.counted()
        return self._messages[self._start : self._end()]

    def __add__(self, other: Any) -> list[Any]:
        return self._list() + (other._list() if isinstance(other, Turns) else other)

    def __radd__(self, other: Any) -> list[Any]:
        return other + self._list()

    def __mul__(self, count: Any) -> list[Any]:
        return self._list() * count

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return self._list() == (other._list() if isinstance(other, Turns) else other)

    # As a list, which templates take it for; typeshed lets only `object` have a hash of None.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._list())

    def copy(self) -> list[Any]:
        """A plain list."""
        return self._list()

    def loop(self) -> Loop:
        """The messages for a `for` of the template, whose every step is followed."""
        return Loop(self)


def _not_an_index(key: Any) -> int:
    raise TypeError(f"list indices must be integers or slices, not {type(key).__name__}")


class Loop:
    """One `for` over the messages, at the top of the template."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def __len__(self) -> int:
        return len(self.turns)

    def __iter__(self) -> Iterator[Any]:
        turns, watch = self.turns, self.turns._watch
        if not watch.begin(self):
            yield from turns
            return
        step, messages = watch.next, turns._messages
        for place in range(turns._start, turns._end()):
            step(place)
            yield messages[place]
        if not watch.peeking:
            self.end()

    def end(self) -> None:
        """The loop has come to its end."""
        self.turns._watch.end(self)


def watched_loop(watches: Watches) -> type[LoopContext]:
    """Jinja's `loop`, telling the watch when it looks ahead."""

    class WatchedLoop(LoopContext):
        def _peek_next(self) -> Any:
            watch = watches.current
            if watch is None:
                return super()._peek_next()
            watch.peeking += 1
            try:
                return super()._peek_next()
            finally:
                watch.peeking -= 1

        @property
        def length(self) -> int:
            watch = watches.current
            if watch is None:
                return super().length
            watch.peeking += 1
            try:
                return super().length
            finally:
                watch.peeking -= 1

        def __next__(self) -> tuple[Any, LoopContext]:
            try:
                return super().__next__()
            except StopIteration:
                if isinstance(self._iterable, Loop):
                    self._iterable.end()
                raise

    return WatchedLoop


def watched_namespace(base: type, watches: Watches) -> type:
    """The template's `namespace`, telling the watch what is set and read."""

    class WatchedNamespace(base):
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if watches.current is not None and name[:1] != "_":
                watches.current.read(self, name)
            return value

        def __setitem__(self, name: str, value: Any) -> None:
            if watches.current is not None:
                try:
                    old = super().__getattribute__(name)
                except AttributeError:
                    old = None
                watches.current.wrote(self, name, old, value)
            super().__setitem__(name, value)

    return WatchedNamespace
