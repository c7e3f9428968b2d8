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
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

STOPPED_EXIT_CODE = 75
"""The exit code of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h."""
EXIT_CODE_VARIABLE = "LUTHIER_EXIT_FILE"
"""The environment variable that names the file in which the first process leaves its exit code.

`accelerate launch` and torchrun end with 1 whatever their processes returned.
"""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_REPEAT_SECONDS = 1.0
"""Seconds within which a repeated signal is the same one, passed on by a launcher as well."""


class StoppedBySignal(KeyboardInterrupt):
    """A run was asked to stop where nothing is lost; the text is the signal's name."""


class SignalListener:
    """The signals that ask this process to stop its run."""

    def __init__(self) -> None:
        self.number = 0
        """The signal that came; 0 for none."""
        self.is_deferred = False
        """Whether a signal is only noted, for the end of a step."""
        self._process = 0
        self._launcher = 0
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen in this process for as long as the block runs."""
        # Python lets the main thread alone set handlers.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.number, self.is_deferred, self._process = 0, False, os.getpid()
        # accelerate's own process dies of a signal and leaves this one behind.
        is_launched = any(key.startswith(("ACCELERATE_", "TORCHELASTIC_")) for key in os.environ)
        self._launcher = os.getppid() if is_launched else 0
        handlers = {number: signal.signal(number, self._take) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def requested_signal(self) -> int:
        """Return the signal that came, 0 for none; SIGTERM where the launcher is gone."""
        # An orphan gets another parent, and nobody is left to pass a signal on to it.
        if self._launcher and os.getppid() != self._launcher:
            self.number = self.number or signal.SIGTERM
        return self.number

    def _take(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: end the run at once, or note the signal where steps are taken."""
        # A process that was forked from this one, such as a data worker, has the handlers too.
        if os.getpid() != self._process:
            _take_default_action(number)
        is_repeated = self.number == number and time.monotonic() - self._since > _REPEAT_SECONDS
        if number == signal.SIGINT and is_repeated:
            _take_default_action(number)
        if self.number:
            return
        self.number, self._since = number, time.monotonic()
        if not self.is_deferred:
            raise StoppedBySignal(signal_name(number))
        if os.environ.get("RANK", "0") == "0":
            more = " Press Ctrl-C again to stop at once." if number == signal.SIGINT else ""
            notice = "stopping after this step, with a checkpoint."
            # Not print, which a signal handler may interrupt in the middle of itself.
            os.write(sys.stderr.fileno(), f"\n{signal_name(number)}: {notice}{more}\n".encode())


SIGNALS = SignalListener()
"""The listener of this process."""


def signal_name(number: int) -> str:
    """Return what a signal is called, such as SIGTERM."""
    return signal.Signals(number).name


def _take_default_action(number: int) -> None:
    """Do what the signal does to a process that does not listen."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def agree_on_signal(accelerator: Any) -> int:
    """Return the highest signal that any process of the run got, the same in all; 0 for none.

    All processes call it together. The numbers are exchanged between the processors, so that no
    accelerator has to wait.
    """
    number = SIGNALS.requested_signal()
    if accelerator.num_processes == 1:
        return number
    import torch

    highest = torch.tensor([number])
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, gloo_group())
    return int(highest.item())


@cache
def gloo_group() -> Any:
    """Return the group of all processes over gloo; it is built when all of them first ask for it.

    None is torch's default group, where that is one of gloo already.
    """
    from torch import distributed

    # NCCL would compare the numbers on the GPU, which each step would then wait for.
    return None if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")


def write_exit_code(code: int) -> None:
    """Leave the exit code where the launcher's caller looks for it, if a file is named for it.

    The first process leaves its code, and another one that fails leaves its own. A failure stays:
    the launcher ends the others by a signal, which is no reason to begin again.
    """
    path = os.environ.get(EXIT_CODE_VARIABLE)
    is_first = os.environ.get("RANK", "0") == "0"
    if not path or not (is_first or code not in (0, STOPPED_EXIT_CODE)):
        return
    file = Path(path)
    left = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    if code == STOPPED_EXIT_CODE and left not in ("", "0", str(STOPPED_EXIT_CODE)):
        return
    file.write_text(f"{code}\n", encoding="utf-8")
