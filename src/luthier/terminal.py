"""What is printed holds no control characters and no secrets, whoever wrote the text.

Rows, templates, file names and records come from anywhere, and a terminal obeys what they hold: a
title, a cleared screen, text that runs backwards. The entry points call `guard_output`, and from
then on no `print`, warning, log or traceback can send any; the colours of rich go around it, and so
its consoles are made here.
"""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import time
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO, cast

from luthier.redaction import redact_known

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import Console
    from rich.table import Table

_SIGN = "␦"
"""What stands in the place of a character that is not printed."""
# C0 but tab and newline, DEL, C1; marks that turn the direction of text; halves of characters,
# which no encoding has.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# tqdm begins each write with a return, and moves up among several bars in writes of their own.
_BAR_WRITE = re.compile(r"\r(?!\r)|(?:\n|\x1b\[A)+\Z")


def printable(text: str) -> str:
    """Return a text with signs in place of control characters; tabs and newlines stay."""
    return _UNPRINTABLE.sub(_SIGN, text)


class PrintableStream:
    """A stream of text that writes signs in place of control characters."""

    def __init__(self, stream: TextIO) -> None:
        self.unguarded = stream
        """The stream behind this one."""

    def write(self, text: str) -> int:
        """Write the text; what the stream's encoding has not is written as an escape."""
        move = _BAR_WRITE.match(text)
        text, length = redact_known(text), len(text)
        bar_move = move[0] if move else ""
        visible = bar_move + printable(text[len(bar_move) :])
        try:
            self.unguarded.write(visible)
        except UnicodeEncodeError as error:
            data = visible.encode(error.encoding, "backslashreplace")
            self.unguarded.write(data.decode(error.encoding))
        return length

    def writelines(self, lines: Any) -> None:
        """Write each of the texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)

    def __iter__(self) -> Any:
        return iter(self.unguarded)


def guard_output() -> None:
    """Print no control characters and no secrets from now on; calling it again does nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Python has none where a process was started without.
        if stream is not None and not isinstance(stream, PrintableStream):
            setattr(sys, name, PrintableStream(stream))


@contextmanager
def unguarded_output() -> Iterator[None]:
    """Let a library find the streams behind the guarded ones, for as long as the block runs."""
    guarded = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (getattr(stream, "unguarded", stream) for stream in guarded)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = guarded


def leave_closed_pipe() -> None:
    """Let the process end in silence where the reader of its output has seen enough."""
    # Python must not complain when it flushes at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: Any) -> None:
    """Print a value as one line of JSON; characters that are not printed are escapes in it."""
    text = json.dumps(value, ensure_ascii=False)
    print(_UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def print_yaml(value: Any) -> None:
    """Print a value as YAML; characters that are not printed are escapes in it."""
    import yaml

    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    if _UNPRINTABLE.search(text):
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=False)
    print(text, end="")


def make_console(**settings: Any) -> Console:
    """Return a rich console for the output, or with `stderr=True` for errors.

    It prints no control characters but its own, and no colours for numbers and paths, which split
    what people copy. Settings are those of `rich.console.Console`.
    """
    return _console_class()(**{"highlight": False} | settings)


@cache
def _console_class() -> type[Console]:
    from collections.abc import Iterable
    from typing import IO

    # Help and a mistake in what was typed must answer at once.
    from rich.console import Console, ConsoleOptions, RenderableType, RenderHook
    from rich.file_proxy import FileProxy
    from rich.segment import Segment

    class PrintableConsole(Console):
        """A console whose texts hold no control characters."""

        @property
        def file(self) -> IO[str]:
            """The stream behind the guarded one: the colours are made here."""
            stream = cast(Any, Console.file).fget(self)
            return cast("IO[str]", getattr(stream, "unguarded", stream))

        @file.setter
        def file(self, new_file: IO[str]) -> None:
            self._file = new_file

        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterable[Segment]:
            """Yield the segments of what is printed; all that is printed comes through here."""
            return map(_printable_segment, super().render(renderable, options))

        def push_render_hook(self, hook: RenderHook) -> None:
            """Guard what others print while a live display is open: rich obeys their colours."""
            super().push_render_hook(hook)
            for name in ("stdout", "stderr"):
                stream = getattr(sys, name)
                # rich 15 puts it in place before it calls this, and takes it away again.
                if isinstance(stream, FileProxy):
                    setattr(sys, name, PrintableStream(cast(TextIO, stream)))

    def _printable_segment(segment: Segment) -> Segment:
        text, style, control = segment
        return segment if control else Segment(printable(redact_known(text)), style)

    return PrintableConsole


_LONGEST_LINE = 100
"""Characters of a line of text: longer ones are hard to read."""
_WIDEST_TABLE = 10_000
"""Columns within which the natural width of a table is measured."""
_REPORT_SECONDS = 30.0
"""The time between two lines of a ProgressReport that has no bar."""
_bars_are_hidden = False


def hide_bars() -> None:
    """Show no progress bars from now on, also on a terminal."""
    global _bars_are_hidden
    _bars_are_hidden = True


def shows_bars() -> bool:
    """Return whether progress bars can be seen: on a terminal, unless they were turned off."""
    return not _bars_are_hidden and sys.stderr is not None and sys.stderr.isatty()


class ProgressReport:
    """How far a long piece of work is: a bar on a terminal, elsewhere a line every half minute.

    Work that is short shows neither: the bar comes after two seconds.
    """

    def __init__(
        self, total: int | None, title: str, unit: str = "rows", is_silent: bool = False
    ) -> None:
        """`total` is in `unit`, None where it is not known; `is_silent` shows nothing at all."""
        self._title, self._unit, self._total = title, unit, total
        self._done, self._reported = 0, time.monotonic()
        self._is_silent, self._bar = is_silent, None
        if shows_bars() and not is_silent:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=title, unit=f" {unit}", leave=False, delay=2, dynamic_ncols=True
            )

    def __enter__(self) -> ProgressReport:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Count what was done since the last call."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self._is_silent and time.monotonic() - self._reported >= _REPORT_SECONDS:
            self._reported = time.monotonic()
            total = f" of {self._total:,}" if self._total else ""
            print(f"{self._title}: {self._done:,}{total} {self._unit}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def format_duration(seconds: float) -> str:
    """Return seconds as people say them, such as `42 s`, `7 min` and `2 h 5 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def format_number(value: float) -> str:
    """Return a measured number as text: four places, and more digits where it is very small."""
    return f"{value:.2e}" if 0 < abs(value) < 0.001 else f"{value:.4f}"


def format_count(count: float) -> str:
    """Return a large number with three digits and its unit, such as `3.07 k` and `135 M`."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,600 is 1 M, and not 1000 k.
        if count >= limit * 0.9995:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f}"


def pluralize(count: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, such as `1 row` and `1,400 rows`."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def format_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in which nothing is cut.

    The first column holds names, to the left; all further ones hold numbers, to the right.
    """
    lines = [headings, *rows]
    widths = [max(len(line[n]) for line in lines) for n in range(len(headings))]
    return [
        "  ".join(
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def make_block(title: str, texts: Mapping[str, str], width: int) -> list[str]:
    """Return the lines of a title and of some named texts below it, wrapped where they are long."""
    indent = max(map(len, texts)) + 2
    lines = [title]
    for name, text in texts.items():
        room = max(min(width, _LONGEST_LINE) - indent - 2, 20)
        wrapped = textwrap.wrap(text, room, break_on_hyphens=False) or ["(empty)"]
        labels = [name, *[""] * (len(wrapped) - 1)]
        lines += [f"  {label:<{indent}}{line}" for label, line in zip(labels, wrapped, strict=True)]
    return lines


def print_table(console: Console, table: Table) -> None:
    """Print a table of rich of which no cell is cut, however narrow the terminal is.

    In a file or a pipe it is as wide as its cells. On a terminal where it does not fit, each row
    is a block: its first cell, and a line for each of the others.
    """
    natural = console.options.update(max_width=_WIDEST_TABLE)
    width = console.measure(table, options=natural).maximum
    if width <= console.width:
        console.print(table)
    elif not console.is_terminal:
        earlier, console.width = console.width, width
        console.print(table)
        console.width = earlier
    else:
        _print_as_blocks(console, table)


def _print_as_blocks(console: Console, table: Table) -> None:
    from rich.text import Text

    headings = [_plain(column.header) for column in table.columns]
    indent = max(map(len, headings[1:]), default=0) + 2
    for number, cells in enumerate(zip(*(column.cells for column in table.columns), strict=True)):
        style = table.rows[number].style or ""
        first, *others = map(_plain, cells)
        title = f"{headings[0]} {first}".strip()
        console.print(Text(title, style=style or "bold"), soft_wrap=True)
        for heading, text in zip(headings[1:], others, strict=True):
            if text:
                console.print(Text(f"  {heading:<{indent}}{text}", style=style), soft_wrap=True)


def _plain(cell: Any) -> str:
    """Return a heading or a cell of a table as one line."""
    return " ".join(str(getattr(cell, "plain", cell)).split())
