"""`accelerate launch` within this process, with its output owned.

The processes that train print as they do without a launcher, but only the first of this machine;
the output of the others goes to files. What ends the launch is said once, in words, and the exit
code is that of the process that failed first. Signals reach every process, and none is killed while
it writes its checkpoint.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import psutil

from luthier.errors import LAUNCH_VARIABLE, UserError
from luthier.train.signals import STOPPED_EXIT_CODE, signal_name

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_SHOWN_LINES = 40
"""The number of lines that are shown of what a process printed before it failed."""


def launch_training(
    flags: Sequence[str], words: Sequence[str], typed: Sequence[str], local_processes: int
) -> int:
    """Run `luthier train WORDS` in the processes that accelerate's flags ask for; return the code.

    `typed` are the words that started this launch, for messages, and `local_processes` is how many
    processes run on this machine. Raises UserError where accelerate refuses the flags.
    """
    launch = {"process": os.getpid(), "flags": list(flags), "typed": list(typed)}
    others = ",".join(f"{rank}:3" for rank in range(1, local_processes))
    # torchrun (torch 2.13) takes defaults from PET_*, and accelerate 1.15 passes no such flags on.
    # Its own handlers of signals would kill the processes after 30 seconds: a step may take longer.
    settings = {
        LAUNCH_VARIABLE: json.dumps(launch),
        "PET_SIGNALS_TO_HANDLE": "SIGQUIT",
        "PET_REDIRECTS": others or "0",
    }
    with TemporaryDirectory(prefix="luthier-launch-") as logs, _forwarded_signals() as sent:
        os.environ |= settings
        try:
            return _run_accelerate([*flags, "--log_dir", logs, "-m", "luthier", "train", *words])
        except _failed_launch() as error:
            return _report_failure(error, Path(logs), local_processes, sent)


def _run_accelerate(arguments: list[str]) -> int:
    """Run `accelerate launch` without its warnings; returns 0 where all processes ended well."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    # It logs what it takes for granted, and torchrun a table of failures: this process prints what
    # there is to say.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except (ValueError, ImportError, NotImplementedError) as error:
        raise UserError(f"accelerate refuses this launch: {error}") from error
    return 0


def _failed_launch() -> tuple[type[BaseException], ...]:
    """Return the errors by which accelerate and torchrun say that a process failed."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    return ChildFailedError, subprocess.CalledProcessError


@contextmanager
def _forwarded_signals() -> Iterator[list[int]]:
    """Pass signals on to the processes of this one for as long as the block runs.

    Yields the list of those that came. A terminal sends Ctrl-C to all processes by itself; the
    training takes two of the same within a second for one.
    """
    sent: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        sent.append(number)
        for child in psutil.Process().children():
            try:
                child.send_signal(number)
            except psutil.Error:  # it has just ended
                continue

    # What is ignored, as nohup has SIGHUP, stays so here and in the processes.
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, forward) for number in heard}
    try:
        yield sent
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _report_failure(error: Any, logs: Path, local_processes: int, sent: list[int]) -> int:
    """Print why the launch ended, unless its process has said so; return the exit code."""
    if isinstance(error, subprocess.CalledProcessError):
        # A single process prints its own messages.
        code = error.returncode
        if code < 0 and -code not in sent:
            print(f"The training {_describe_end(code)}", file=sys.stderr)
        return _shell_code(code)
    rank, failure = _choose_failure(error.failures)
    code, message = failure.exitcode, failure.error_file_data.get("message")
    if code == STOPPED_EXIT_CODE or (code < 0 and -code in sent):
        return _shell_code(code)
    if isinstance(message, dict):
        text = str(message["message"])
    else:
        text = f"Process {rank} {_describe_end(code)}"
        # The first process of this machine has printed its traceback.
        shown = "" if failure.local_rank == 0 else _read_last_lines(logs, failure.local_rank)
        text += f" It printed at last:\n{shown}" if shown else ""
    where = f" (process {rank} of {local_processes})" if rank and isinstance(message, dict) else ""
    print(f"{text}{where}", file=sys.stderr, flush=True)
    return _shell_code(code)


def _choose_failure(failures: dict[int, Any]) -> tuple[int, Any]:
    """Return the failure that is the cause of the others, with its rank.

    That is the first one that torchrun noticed, as it ends all other processes by signals then; but
    for processes that left a message, and for those that only noticed that another one was gone.
    """

    def order(entry: tuple[int, Any]) -> tuple[bool, bool]:
        data = entry[1].error_file_data
        return bool(data.get("is_lost")), not isinstance(data.get("message"), dict)

    return min(failures.items(), key=order)


def _describe_end(code: int) -> str:
    """Return the end of a sentence on a process that said nothing in words."""
    if code >= 0:
        return f"ended with exit code {code}."
    name = signal_name(-code)
    reason = ", often for want of memory" if name == "SIGKILL" else ""
    return f"was ended by {name}{reason}."


def _shell_code(code: int) -> int:
    """Return an exit code as a shell has it: 128 plus the number of the signal that ended it."""
    return 128 - code if code < 0 else code


def _read_last_lines(logs: Path, local_rank: int) -> str:
    files = sorted(logs.glob(f"*/attempt_0/{local_rank}/stderr.log"))
    lines = files[-1].read_text(encoding="utf-8", errors="replace").splitlines() if files else []
    # A progress bar writes itself over and over behind carriage returns.
    return "\n".join(line.rpartition("\r")[2] for line in lines[-_SHOWN_LINES:])
