"""One run of a template over a whole row tells what it writes for the row's first messages.

The template sees its messages, `loop` and `namespace` through objects that tell a `PrefixTracker`
all that it asks of them. As long as nothing of that would have been answered differently for the
first k messages alone, a run over those k does the same. It parts from the whole run where its loop
over the messages ends; from there on both write what stands behind the loop. So the text of every
prefix is known from one run, by proof; where the proof fails for a k, `prefix` says None and that
prefix is rendered for itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jinja2.runtime import LoopContext

RunPosition = tuple[int, int, int]
"""(pieces written, values set, time), at one moment of a run."""


class LoopExit(NamedTuple):
    """The way of a shorter run: out of the loop at `left`, and on at the whole run's `loop_end`."""

    left: RunPosition
    loop_end: RunPosition


class PrefixTracker:
    """Follows one run of a template over `count` messages."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.pieces: list[str] = []
        """What the template has written so far."""
        self.peeks = 0
        """How many looks ahead of `loop` are under way: they ask for a message, but do not step."""
        self._active_loop: object | None = None
        # Runs over k messages, for k from `_low` on, have done the same as the whole run so far;
        # of the shorter ones each waits for its loop's end, has left it, or is not known.
        self._low = 1
        self._waiting: dict[int, RunPosition] = {}
        self._exits: dict[int, LoopExit] = {}
        self._failed = {0}
        # The values of each namespace's attribute with the time of each; a namespace is held so
        # that no other one gets its id.
        self._values: dict[tuple[int, str], list[tuple[int, Any]]] = {}
        self._namespaces: list[object] = []
        self._writes = 0
        self._time = 0

    def prefix(self, k: int) -> tuple[int, int] | None:
        """Return which pieces the run over the first k messages writes: (up to, and again from).

        None where that is not known.
        """
        if k == self.count:
            return len(self.pieces), len(self.pieces)
        if k in self._failed or k in self._waiting:
            return None
        loop_exit = self._exits.get(k)
        if loop_exit is None:
            return (len(self.pieces), len(self.pieces)) if k >= self._low else None
        return loop_exit.left[0], loop_exit.loop_end[0]

    def saw_message(self, index: int) -> None:
        """The template learns that message `index` is there: up to k = index it would not be."""
        for k in range(self._low, min(index, self.count - 1) + 1):
            self._fail(k)
        self._low = max(self._low, index + 1)
        for k in self._after_a_loop() if self._exits else ():
            if k <= index:
                self._fail(k)

    def saw_count(self) -> None:
        """The template learns how many messages there are."""
        self.saw_message(self.count - 1)

    def begin_loop(self, loop: object) -> bool:
        """A loop over the messages begins; False when it runs inside another one."""
        if self._active_loop is not None:
            return False
        self._active_loop = loop
        return True

    def next_message(self, index: int) -> None:
        """The loop asks for message `index`: for k up to `index` it would end here."""
        if self.peeks:
            self.saw_message(index)
            return
        self._time += 1
        now = len(self.pieces), self._writes, self._time
        if index >= self._low:
            if index == self._low < self.count:
                if index not in self._failed:
                    self._waiting[index] = now
            else:
                self._wait(self._low, index, now)
            self._low = index + 1
        if self._exits:
            self._waiting.update((k, now) for k in self._after_a_loop() if k <= index)

    def _wait(self, low: int, high: int, now: RunPosition) -> None:
        """The runs over so many messages, from low to high, would leave the loop now."""
        for k in range(low, min(high, self.count - 1) + 1):
            if k not in self._failed:
                self._waiting[k] = now

    def end_loop(self, loop: object) -> None:
        """The loop has come to its end."""
        if loop is not self._active_loop:
            return
        self._active_loop = None
        now = self._now()
        for k, left in self._waiting.items():
            if left[:2] == now[:2]:
                # Nothing was written or set for the messages that k does not have.
                if k not in self._exits:
                    self._low = min(self._low, k)
            elif k in self._exits:
                self._fail(k)
            else:
                self._exits[k] = LoopExit(left, now)
        self._waiting.clear()

    def wrote_attribute(self, namespace: object, name: str, old: Any, new: Any) -> None:
        """The template sets an attribute of a namespace."""
        self._writes += 1
        self._time += 1
        key = (id(namespace), name)
        if key not in self._values:
            self._values[key] = [(-1, old)]
            self._namespaces.append(namespace)
        self._values[key].append((self._time, new))

    def read_attribute(self, namespace: object, name: str) -> None:
        """The template reads an attribute of a namespace."""
        values = self._values.get((id(namespace), name))
        if values is None or not self._exits:
            return
        time, value = values[-1]
        for k in self._after_a_loop():
            loop_exit = self._exits[k]
            if time <= loop_exit.loop_end[2] and not _is_same(
                _value_at(values, loop_exit.left[2]), value
            ):
                self._fail(k)

    def _after_a_loop(self) -> list[int]:
        """Return the shorter runs that have left a loop and go the whole run's way again."""
        return [k for k in self._exits if k not in self._waiting]

    def _fail(self, k: int) -> None:
        self._failed.add(k)
        self._exits.pop(k, None)

    def _now(self) -> RunPosition:
        self._time += 1
        return len(self.pieces), self._writes, self._time


def _value_at(values: list[tuple[int, Any]], time: int) -> Any:
    """Return the value that was set last before a time."""
    return next(value for moment, value in reversed(values) if moment <= time)


def _is_same(first: Any, second: Any) -> bool:
    plain = type(first) in (bool, int, str, type(None))
    return first is second or (plain and type(first) is type(second) and first == second)


class RenderState(threading.local):
    """What is known of the run that is under way in this thread."""

    tracker: PrefixTracker | None = None


class TrackedMessages(Sequence):
    """The messages as a template sees them: a list that tells its tracker what is asked of it."""

    def __init__(
        self,
        messages: list[dict[str, Any]],
        tracker: PrefixTracker,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self._messages = messages
        self._tracker = tracker
        self._start = start
        self._stop = stop

    def _end(self) -> int:
        return len(self._messages) if self._stop is None else min(self._stop, len(self._messages))

    def __len__(self) -> int:
        length = max(self._end() - self._start, 0)
        if self._stop is None or self._stop > len(self._messages):
            self._tracker.saw_count()
        elif length:
            self._tracker.saw_message(self._stop - 1)
        return length

    def __bool__(self) -> bool:
        there = self._end() > self._start
        if there:
            self._tracker.saw_message(self._start)
        return there

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return self._slice(key)
        index = key.__index__() if isinstance(key, int) else _refuse_index(key)
        if index < 0:
            self._tracker.saw_count()
            return self._messages[self._start : self._end()][index]
        index += self._start
        if index >= self._end():
            raise IndexError("list index out of range")
        self._tracker.saw_message(index)
        return self._messages[index]

    def _slice(self, key: slice) -> Any:
        start, stop = key.start or 0, key.stop
        simple = key.step in (None, 1) and start >= 0 and (stop is None or stop >= 0)
        if not simple:
            self._tracker.saw_count()
            return self._messages[self._start : self._end()][key]
        ends = [end for end in (self._stop, None if stop is None else self._start + stop) if end]
        if stop == 0:
            return []
        return TrackedMessages(
            self._messages, self._tracker, self._start + start, min(ends) if ends else None
        )

    def __iter__(self) -> Iterator[Any]:
        for index in range(self._start, self._end()):
            self._tracker.saw_message(index)
            yield self._messages[index]
        self._learn_end()

    def _learn_end(self) -> None:
        if self._stop is None or self._stop > len(self._messages):
            self._tracker.saw_count()

    def _list(self) -> list[Any]:
        self._tracker.saw_count()
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
        """Return a plain list."""
        return self._list()

    def loop(self) -> MessageLoop:
        """Return the messages for a `for` of the template, whose every step is followed."""
        return MessageLoop(self)


def _refuse_index(key: Any) -> int:
    raise TypeError(f"list indices must be integers or slices, not {type(key).__name__}")


class MessageLoop:
    """One `for` over the messages, at the top of the template."""

    def __init__(self, messages: TrackedMessages) -> None:
        self.messages = messages

    def __len__(self) -> int:
        return len(self.messages)

    def __iter__(self) -> Iterator[Any]:
        messages, tracker = self.messages, self.messages._tracker
        if not tracker.begin_loop(self):
            yield from messages
            return
        step, rows = tracker.next_message, messages._messages
        for index in range(messages._start, messages._end()):
            step(index)
            yield rows[index]
        if not tracker.peeks:
            self.end()

    def end(self) -> None:
        """The loop has come to its end."""
        self.messages._tracker.end_loop(self)


def tracked_loop_context(state: RenderState) -> type[LoopContext]:
    """Jinja's `loop`, telling the tracker when it looks ahead."""

    class TrackedLoopContext(LoopContext):
        def _peek_next(self) -> Any:
            tracker = state.tracker
            if tracker is None:
                return super()._peek_next()
            tracker.peeks += 1
            try:
                return super()._peek_next()
            finally:
                tracker.peeks -= 1

        @property
        def length(self) -> int:
            tracker = state.tracker
            if tracker is None:
                return super().length
            tracker.peeks += 1
            try:
                return super().length
            finally:
                tracker.peeks -= 1

        def __next__(self) -> tuple[Any, LoopContext]:
            try:
                return super().__next__()
            except StopIteration:
                if isinstance(self._iterable, MessageLoop):
                    self._iterable.end()
                raise

    return TrackedLoopContext


def tracked_namespace(base: type, state: RenderState) -> type:
    """Return the template's `namespace`, telling the tracker what is set and read."""

    class TrackedNamespace(base):
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if state.tracker is not None and name[:1] != "_":
                state.tracker.read_attribute(self, name)
            return value

        def __setitem__(self, name: str, value: Any) -> None:
            if state.tracker is not None:
                try:
                    old = super().__getattribute__(name)
                except AttributeError:
                    old = None
                state.tracker.wrote_attribute(self, name, old, value)
            super().__setitem__(name, value)

    return TrackedNamespace
