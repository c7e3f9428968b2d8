"""The one error type that a user's mistake raises, and how it is shown: in words, once."""

import difflib
import errno
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.redaction import redact_message
from luthier.terminal import printable

LAUNCH_VARIABLE = "LUTHIER_LAUNCH"
"""The environment variable in which `luthier launch` says to its processes how they were started:
JSON with its process number, accelerate's flags and what was typed."""
_SECONDS_TO_SPEAK = 5.0
"""How long the other processes wait, so that the first one speaks before all are ended."""


_WORKER_ERROR = re.compile(
    r"Caught (\w+) in DataLoader worker process \d+\.\nOriginal Traceback .*?^[\w.]*\1: ",
    re.S | re.M,
)
"""What torch writes before the text of a worker's error: where it was raised, and its class."""


class UserError(Exception):
    """A mistake that the user can mend; the text says what is wrong, where, and what to do.

    Entry points show it with `report` and exit with `exit_code`.
    """

    exit_code = 2

    def __str__(self) -> str:
        """Return the text; of an error that a loader's worker raised, too."""
        text = super().__str__()
        # torch 2.13 raises it again in the main process, with the worker's traceback for a text.
        match = _WORKER_ERROR.match(text)
        return text[match.end() :].rstrip("\n") if match else text

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows of it: the text alone, by IPython's own hook."""
        return [redact_message(str(self))]


def report_error(error: UserError) -> int:
    """Print a mistake once for all processes of a launch, and return the exit code.

    torch's launcher stops all processes when one fails, and closes its own report with the text in
    the error file of that one: so each process leaves the text there, and the first one goes first.
    `luthier launch` prints that text itself.
    """
    # A message shows what was typed, and an address or a header in it may hold a secret.
    text = redact_message(str(error))
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    is_lost, launch = isinstance(error, LostProcessError), read_own_launch()
    # What only follows from the end of another process must not stand for it in torch's report.
    if error_file is not None and (launch or not is_lost):
        # torch's launcher prints it, whose output nobody guards.
        note = {"message": printable(text), "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):  # the disk of this file may be the full one
            content = json.dumps({"message": note, "is_lost": is_lost})
            Path(error_file).write_text(content, encoding="utf-8")
            if launch:
                return error.exit_code
    if error_file is not None and os.environ.get("RANK", "0") != "0":
        time.sleep(_SECONDS_TO_SPEAK)
    print(text, file=sys.stderr, flush=True)
    return error.exit_code


def read_own_launch() -> dict[str, Any] | None:
    """Return what `luthier launch` says of this process; None where that did not start it.

    That is `process`, the launcher's number, `flags` of accelerate, and `typed`, the words that
    were typed before the overrides.
    """
    try:
        launch: dict[str, Any] = json.loads(os.environ.get(LAUNCH_VARIABLE, ""))
        # A process that a rank starts inherits the variable, and has another parent.
        return launch if launch["process"] == os.getppid() else None
    except (ValueError, TypeError, KeyError):
        return None


_NO_MEMORY_ERRNOS = (errno.ENOMEM,)
# torch, numpy, OpenMP and the dynamic linker each have their own words.
_NO_MEMORY_TEXTS = (
    *("out of memory", "not enough memory", "allocate memory", "unable to allocate", "bad_alloc"),
    *("failed to map segment", "start new thread", "cannot allocate"),
)
_GPU = ("cuda", "hip ", "xpu", "mps ")


def report_unexpected(error: Exception) -> int:
    """Print what an error of the machine means, and return the exit code; raise any other again.

    The entry points call it through `report_machine_error` of `luthier.storage.write_errors`.
    """
    mistake = explain_memory_shortage(error) or explain_lost_process(error)
    if mistake is None:
        raise error
    return report_error(mistake)


def explain_memory_shortage(error: BaseException) -> UserError | None:
    """Return the mistake behind an error for want of memory or of threads; None for others.

    Python raises MemoryError, and libraries raise errors of many classes, of which the text tells.
    """
    cause: BaseException | None = error
    while cause is not None:
        text = " ".join(str(cause).split())
        is_system = isinstance(cause, OSError) and cause.errno in _NO_MEMORY_ERRNOS
        is_worded = isinstance(cause, RuntimeError | ImportError | OSError | SystemError) and any(
            phrase in text.lower() for phrase in _NO_MEMORY_TEXTS
        )
        if isinstance(cause, MemoryError) or is_system or is_worded:
            return UserError(_memory_message(text))
        cause = cause.__cause__ or cause.__context__
    return None


class LostProcessError(UserError):
    """Another process of the launch has ended, and this one waited for it in vain."""

    exit_code = 1


_LOST_TEXTS = ("connection closed", "connection reset", "connection refused", "broken pipe")


def explain_lost_process(error: BaseException) -> UserError | None:
    """Return what an error means whose cause is another process of this launch; None for others."""
    text = " ".join(str(error).split())
    # Errors of torch's processes have classes of their own; gloo raises a plain RuntimeError.
    is_of_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    is_of_gloo = isinstance(error, RuntimeError) and "gloo" in text
    is_lost = any(phrase in text.lower() for phrase in _LOST_TEXTS)
    if os.environ.get("WORLD_SIZE", "1") == "1" or not is_lost or not (is_of_torch or is_of_gloo):
        return None
    rank = os.environ.get("RANK", "0")
    return LostProcessError(
        f"rank {rank}: another process of this run has ended, or cannot be reached, so this one "
        f"stops, too: its own message says why.\n({text[:300]})"
    )


def _memory_message(text: str) -> str:
    """Say which memory is too small, by the text of the error, and what takes less of it."""
    detail = f": {text[:300]}" if text else ""
    if any(device in text.lower() for device in _GPU):
        return (
            f"The memory of the GPU is full{detail}.\n"
            "Less is needed with a smaller trainer.args.per_device_train_batch_size (and more "
            "gradient_accumulation_steps), chat.max_length, quantization=nf4 or a smaller model; "
            "`luthier plan` says what a run needs. Other programs may hold some of it: nvidia-smi."
        )
    if "thread" in text.lower():
        return (
            f"The system gives this process no further threads{detail}.\n"
            "Raise its limits of processes or of memory (ulimit -u, ulimit -v, the job's memory), "
            "or set OMP_NUM_THREADS=1 and dataset.workers=1."
        )
    return (
        f"The memory of this machine is not enough{detail}.\n"
        "Close other programs, raise the limit (ulimit -v, the memory of the container or job), or "
        "take less: a smaller model or trainer.args.per_device_train_batch_size, one process for "
        "the data (dataset.workers=1). `luthier plan` says what a run needs."
    )


# Mistakes in the user's words: where, what is wrong, what is nearest, what to do.

_CLOSE = 0.6
_LONG_LIST = 12


@dataclass(frozen=True)
class Mistake:
    """One thing to mend: the key it is about and a sentence."""

    key: str
    text: str


def nearest_option(word: str, options: Iterable[str]) -> str | None:
    """Return the option that looks or begins most like the word; None if none comes close."""
    return next(iter(nearest_options(word, options)), None)


def nearest_options(word: str, options: Iterable[str]) -> list[str]:
    """Return the options that look or begin most like the word, the shortest first.

    Several only where they are equally near, as all that begin with `adamw_` are to `adamw9`; none
    where nothing comes close.
    """
    scores = {option: _likeness(word, option) for option in sorted(options, key=_by_length)}
    best = max(scores.values(), default=0.0)
    return [option for option, score in scores.items() if score == best >= _CLOSE]


def _by_length(option: str) -> tuple[int, str]:
    return len(option), option


def _likeness(word: str, option: str) -> float:
    """Return how much an option is like a word, from 0 to 1; a common beginning counts more."""
    lower, target = word.lower(), option.lower()
    whole = difflib.SequenceMatcher(None, lower, target).ratio()
    start = difflib.SequenceMatcher(None, lower, target[: len(word)]).ratio()
    likeness = max(whole, start - 0.1)  # a whole that is alike counts more than a beginning
    # As Jaro and Winkler do: people seldom mistype the first letters.
    prefix = sum(target.startswith(lower[:length]) for length in range(1, min(4, len(lower)) + 1))
    return round(likeness + 0.1 * prefix * (1 - likeness) if likeness >= _CLOSE else likeness, 6)


def suggest_options(word: str, options: Iterable[str]) -> str:
    """Return the sentences that follow `'word' is not one of them`: the nearest, then the list."""
    options = sorted(options)
    guess = ask_nearest(word, options)
    if guess and len(options) > _LONG_LIST:
        return guess
    return f"{guess} Options: {', '.join(options) or 'none'}.".lstrip()


def ask_nearest(word: str, options: Iterable[str], prefix: str = "") -> str:
    """Return `Did you mean ...?` with the nearest options, each behind a prefix; empty if none."""
    near = [f"{prefix}{option}" for option in nearest_options(word, options)]
    if not near:
        return ""
    *others, last = near
    return f"Did you mean {', '.join(others)} or {last}?" if others else f"Did you mean {last}?"


_BARE_TEXT = re.compile(r"[A-Za-z_./@+%-][\w./@+%-]*", re.ASCII)
_NO_TEXT = re.compile(r"null|true|false|yes|no|on|off|[-+]?(nan|inf)", re.IGNORECASE)


def format_override(key: str, value: object) -> str:
    """Return a setting as it is typed in a shell, such as `'dataset.options.delimiter=";"'`.

    Values are what JSON holds. It reads back as the same value through bash and Hydra's grammar.
    """
    return shlex.quote(f"{key}={format_for_hydra(value)}")


def format_for_hydra(value: object) -> str:
    """Return a value in the grammar of Hydra's overrides."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(format_for_hydra, value))}]"
    if isinstance(value, dict):
        pairs = [f"{_escape_key(key)}: {format_for_hydra(each)}" for key, each in value.items()]
        return f"{{{','.join(pairs)}}}"
    if not isinstance(value, str):
        return format_value(value)
    is_bare = _BARE_TEXT.fullmatch(value) and not _NO_TEXT.fullmatch(value)
    if is_bare and not _is_number(value):
        return value
    # Only backslashes before a quote are read as such.
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)
    return '"' + re.sub(r"\\+\Z", lambda end: end[0] * 2, escaped) + '"'


def _escape_key(key: object) -> str:
    """Return the key of a mapping; Hydra's grammar has no quotes for it, and ends it at a colon."""
    return re.sub(r"([\\()\[\]{}:=,])", r"\\\1", str(key))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def format_value(given: object) -> str:
    """Return a value as YAML would show it, text in quotes."""
    if given is None or isinstance(given, bool):
        return {None: "null", True: "true", False: "false"}[given]
    shown = repr(given)
    return shown if len(shown) <= 60 else shown[:57] + "..."
