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
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO, cast

from luthier.redaction import redact_known

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

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
        kept = move[0] if move else ""
        shown = kept + printable(text[len(kept) :])
        try:
            self.unguarded.write(shown)
        except UnicodeEncodeError as error:
            data = shown.encode(error.encoding, "backslashreplace")
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
