"""What a template sees as its messages, `loop` and `namespace`: all that it asks is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jinja2.runtime import LoopContext

# What a template's text up to message k may depend on: watched, so that one render serves all.
#
# A run over a whole conversation is followed step by step. As long as nothing that the template
# asks about its messages would have been answered differently for the first k of them alone, a
# run over those k does the same. It parts from the whole run where its loop over the messages
# ends; from there on both write what stands behind the loop. So the text of every prefix is
# known from one run, by proof; where the proof fails for a k, `prefix` says None and that
# prefix is rendered for itself.

RunPosition = tuple[int, int, int]
"""(pieces written, values set, time), at a place of a run."""


class LoopExit(NamedTuple):
    """A shorter run's way: out of the loop at `left`, and on behind the loop's end."""

    left: RunPosition
    end: RunPosition


class PrefixTracker:
    """Follows one run of a template over `count` messages."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.pieces: list[str] = []
        self.peeking = 0
        self.session: object | None = None
        self._low = 1
        self._waiting: dict[int, RunPosition] = {}
        self._finished: dict[int, LoopExit] = {}
        self._failed = {0}
        self._values: dict[tuple[int, str], list[tuple[int, Any]]] = {}
        self._kept: list[object] = []
        self._writes = 0
        self._time = 0

    def prefix(self, k: int) -> tuple[int, int] | None:
        """The run over the first k messages, as (pieces before, pieces from here on) of this one.

        None where it is not known to be made of these.
        """
        if k == self.count:
            return len(self.pieces), len(self.pieces)
        if k in self._failed or k in self._waiting:
            return None
        finish = self._finished.get(k)
        if finish is None:
            return (len(self.pieces), len(self.pieces)) if k >= self._low else None
        return finish.left[0], finish.end[0]

    def exists(self, place: int) -> None:
        """The template learns that message `place` is there: up to k = place it would not be."""
        for k in range(self._low, min(place, self.count - 1) + 1):
            self._fail(k)
        self._low = max(self._low, place + 1)
        for k in self._after_a_loop() if self._finished else ():
            if k <= place:
                self._fail(k)

    def counted(self) -> None:
        """The template learns how many messages there are."""
        self.exists(self.count - 1)

    def begin(self, session: object) -> bool:
        """A loop over the messages begins; False when it runs inside another one."""
        if self.session is not None:
            return False
        self.session = session
        return True

    def next(self, place: int) -> None:
        """The loop asks for message `place`: for k up to `place` it would end here."""
        if self.peeking:
            self.exists(place)
            return
        self._time += 1
        now = len(self.pieces), self._writes, self._time
        if place >= self._low:
            if place == self._low < self.count:
                if place not in self._failed:
                    self._waiting[place] = now
            else:
                self._wait(self._low, place, now)
            self._low = place + 1
        if self._finished:
            self._waiting.update((k, now) for k in self._after_a_loop() if k <= place)

    def _wait(self, low: int, high: int, now: RunPosition) -> None:
        """The runs over so many messages, from low to high, would leave the loop now."""
        for k in range(low, min(high, self.count - 1) + 1):
            if k not in self._failed:
                self._waiting[k] = now

    def end(self, session: object) -> None:
        """The loop has come to its end."""
        if session is not self.session:
            return
        self.session = None
        now = self._now()
        for k, left in self._waiting.items():
            if left[:2] == now[:2]:
                # Nothing was written or set for the messages that k does not have.
                if k not in self._finished:
                    self._low = min(self._low, k)
            elif k in self._finished:
                self._fail(k)
            else:
                self._finished[k] = LoopExit(left, now)
        self._waiting.clear()

    def wrote(self, namespace: object, name: str, old: Any, new: Any) -> None:
        """The template sets an attribute of a namespace."""
        self._writes += 1
        self._time += 1
        key = (id(namespace), name)
        if key not in self._values:
            self._values[key] = [(-1, old)]
            self._kept.append(namespace)
        self._values[key].append((self._time, new))

    def read(self, namespace: object, name: str) -> None:
        """The template reads an attribute of a namespace."""
        values = self._values.get((id(namespace), name))
        if values is None or not self._finished:
            return
        time, value = values[-1]
        for k in self._after_a_loop():
            finish = self._finished[k]
            if time <= finish.end[2] and not _is_same(_value_at(values, finish.left[2]), value):
                self._fail(k)

    def _after_a_loop(self) -> list[int]:
        """The shorter runs that have left a loop and go the whole run's way again."""
        return [k for k in self._finished if k not in self._waiting]

    def _fail(self, k: int) -> None:
        self._failed.add(k)
        self._finished.pop(k, None)

    def _now(self) -> RunPosition:
        self._time += 1
        return len(self.pieces), self._writes, self._time


def _value_at(values: list[tuple[int, Any]], time: int) -> Any:
    """The value that was set last before a time."""
    return next(value for moment, value in reversed(values) if moment <= time)


def _is_same(first: Any, second: Any) -> bool:
    plain = type(first) in (bool, int, str, type(None))
    return first is second or (plain and type(first) is type(second) and first == second)


class RenderState(threading.local):
    """The watch of the run that is under way in this thread."""

    current: PrefixTracker | None = None
    steps = 0
    """Steps that the run's loops have taken."""


class TrackedMessages(Sequence):
    """The messages as a template sees them: a list that tells its watch what is asked of it."""

    def __init__(
        self,
        messages: list[dict[str, Any]],
        watch: PrefixTracker,
        start: int = 0,
        stop: int | None = None,
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
        place = key.__index__() if isinstance(key, int) else _refuse_index(key)
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
        return TrackedMessages(
            self._messages, self._watch, self._start + start, min(ends) if ends else None
        )

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
        return self._list() + (other._list() if isinstance(other, TrackedMessages) else other)

    def __radd__(self, other: Any) -> list[Any]:
        return other + self._list()

    def __mul__(self, count: Any) -> list[Any]:
        return self._list() * count

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return self._list() == (other._list() if isinstance(other, TrackedMessages) else other)

    # As a list, which templates take it for; typeshed lets only `object` have a hash of None.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._list())

    def copy(self) -> list[Any]:
        """A plain list."""
        return self._list()

    def loop(self) -> MessageLoop:
        """The messages for a `for` of the template, whose every step is followed."""
        return MessageLoop(self)


def _refuse_index(key: Any) -> int:
    raise TypeError(f"list indices must be integers or slices, not {type(key).__name__}")


class MessageLoop:
    """One `for` over the messages, at the top of the template."""

    def __init__(self, turns: TrackedMessages) -> None:
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


def tracked_loop_context(watches: RenderState) -> type[LoopContext]:
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
                if isinstance(self._iterable, MessageLoop):
                    self._iterable.end()
                raise

    return WatchedLoop


def tracked_namespace(base: type, watches: RenderState) -> type:
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
