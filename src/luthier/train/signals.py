"""A signal that asks a run to stop: heard in every process, acted on by all of them at one step.

Before the first step nothing is lost, and a signal ends the run at once. From then on it is only
noted. At the end of each step the processes agree on the highest signal that any of them got, so
that it does not matter whom it reached, nor that they are a step apart: a process that waits for
the others hears of it in the same exchange. Needs no torch until then.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

STOPPED_EXIT_CODE = 75
"""The exit code of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h."""
EXIT_CODE_VARIABLE = "LUTHIER_EXIT_FILE"
"""The variable with the file in which the first process leaves its exit code.

`accelerate launch` and torchrun end with 1 whatever their processes said.
"""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_REPEAT_SECONDS = 1.0
"""Seconds within which a signal again is the same wish, passed on by a launcher."""


class StoppedBySignal(KeyboardInterrupt):
    """A run was asked to stop where nothing is lost; the text is the signal's name."""


class SignalListener:
    """What this process was asked by signals."""

    def __init__(self) -> None:
        self.number = 0
        """The signal that came; 0 for none."""
        self.waits = False
        """Whether a signal is only noted, for the end of a step."""
        self._process = 0
        self._launcher = 0
        self._since = 0.0

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listen in this process for as long as the block runs."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.number, self.waits, self._process = 0, False, os.getpid()
        # accelerate's own process dies of a signal and leaves this one behind.
        launched = any(key.startswith(("ACCELERATE_", "TORCHELASTIC_")) for key in os.environ)
        self._launcher = os.getppid() if launched else 0
        before = {number: signal.signal(number, self._take) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def wanted(self) -> int:
        """The signal that came, if one did; SIGTERM where the launcher is gone."""
        if self._launcher and os.getppid() != self._launcher:
            self.number = self.number or signal.SIGTERM
        return self.number

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            _take_default_action(number)
        again = self.number == number and time.monotonic() - self._since > _REPEAT_SECONDS
        if number == signal.SIGINT and again:
            _take_default_action(number)
        if not self.number:
            self.number, self._since = number, time.monotonic()
            if not self.waits:
                raise StoppedBySignal(signal_name(number))
            if os.environ.get("RANK", "0") == "0":
                os.write(sys.stderr.fileno(), _stop_notice(number).encode())


def signal_name(number: int) -> str:
    """What a signal is called."""
    return signal.Signals(number).name


def _take_default_action(number: int) -> None:
    """Do what the signal does to a process that does not listen."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _stop_notice(number: int) -> str:
    more = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
    return (
        f"\n{signal_name(number)}: the run stops with a checkpoint at the end of this step{more}\n"
    )


SIGNALS = SignalListener()
"""Those of this process."""


def agree_on_signal(accelerator: Any) -> int:
    """The highest signal that any process of the run got, known to all of them; 0 for none.

    Exchanged between the processors, so that no accelerator has to wait.
    """
    own = SIGNALS.wanted()
    if accelerator.num_processes == 1:
        return own
    import torch

    most = torch.tensor([own])
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, _gloo_group())
    return int(most.item())


_GLOO_GROUPS: list[Any] = []


def _gloo_group() -> Any:
    """The processes, over a connection between processors; made when all first ask for it."""
    from torch import distributed

    if not _GLOO_GROUPS:
        is_theirs = distributed.get_backend() == "gloo"
        _GLOO_GROUPS.append(None if is_theirs else distributed.new_group(backend="gloo"))
    return _GLOO_GROUPS[0]


def write_exit_code(code: int) -> None:
    """Leave the exit code where the launcher's caller looks for it, if someone wants it."""
    path = os.environ.get(EXIT_CODE_VARIABLE)
    if path and os.environ.get("RANK", "0") == "0":
        Path(path).write_text(f"{code}\n", encoding="utf-8")
