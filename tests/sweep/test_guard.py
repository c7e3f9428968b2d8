"""The guard of a trial: no process of the trial outlives the sweep, or its own grace."""

import subprocess
import sys
import time

import psutil
import pytest

from luthier.sweep.local import start_guarded

SLEEP = "import time; time.sleep(60)"
STUBBORN = (
    "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
)
POLITE = (
    "import signal, sys, time\n"
    "signal.signal(15, lambda *_: sys.exit(75))\n"
    "print(1, flush=True)\n"
    # Many short sleeps: a signal that comes just before one long sleep would not wake it.
    "for _ in range(1200): time.sleep(0.05)"
)


def run(folder, code, grace=5.0, has_launcher=False):
    out, err = folder / "out", folder / "err"
    words = start_guarded([sys.executable, "-c", code], has_launcher, (out, err), grace)
    process = subprocess.Popen(words, stdin=subprocess.PIPE)
    return process, out


def ready(path, lines=1):
    deadline = time.monotonic() + 20
    while not (path.is_file() and path.read_text().count("\n") >= lines):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "code, wanted",
    [("pass", 0), ("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)],
    ids=["an end", "an error", "a kill"],
)
def test_the_exit_code_is_the_commands(tmp_path, code, wanted):
    process, _ = run(tmp_path, code)
    assert process.wait(20) == wanted


def test_a_byte_asks_the_trial_to_stop(tmp_path):
    process, out = run(tmp_path, POLITE)
    ready(out)
    process.stdin.write(b"x")
    process.stdin.flush()
    assert process.wait(20) == 75


def test_the_end_of_the_sweep_asks_the_trial_to_stop(tmp_path):
    process, out = run(tmp_path, POLITE)
    ready(out)
    process.stdin.close()
    assert process.wait(20) == 75


def test_a_trial_that_does_not_stop_is_killed_after_its_grace(tmp_path):
    process, out = run(tmp_path, STUBBORN, grace=0.3)
    ready(out)
    process.stdin.close()
    assert process.wait(20) == 137


def test_a_second_byte_kills_at_once(tmp_path):
    process, out = run(tmp_path, STUBBORN, grace=60)
    ready(out)
    for _ in range(2):
        process.stdin.write(b"x")
        process.stdin.flush()
        time.sleep(0.2)
    assert process.wait(20) == 137


def test_what_a_trial_leaves_behind_is_ended(tmp_path):
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', '{SLEEP}']).pid)"
    process, out = run(tmp_path, code)
    assert process.wait(20) == 0
    assert not psutil.pid_exists(int(out.read_text()))


LAUNCHER = """
import subprocess, sys
here = [sys.executable, "-c", {!r}]
workers = [subprocess.Popen(here, start_new_session=True) for _ in range(2)]
sys.exit(max(worker.wait() for worker in workers))
"""


def test_a_launcher_stays_until_its_processes_have_ended(tmp_path):
    """torch's starts them in sessions of their own, and holds the store that they share."""
    process, out = run(tmp_path, LAUNCHER.format(POLITE), has_launcher=True)
    ready(out, 2)
    process.stdin.close()
    assert process.wait(20) == 75


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are seen on Linux")
def test_processes_in_sessions_of_their_own_are_killed_too(tmp_path):
    process, out = run(tmp_path, LAUNCHER.format(STUBBORN), grace=0.5, has_launcher=True)
    ready(out, 2)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 3
    process.stdin.close()
    assert process.wait(20) == 137
    assert not any(worker.is_running() for worker in workers)


def test_workers_of_the_training_hear_nothing(tmp_path):
    """The death of a process that loads data would be an error to the training."""
    training = (
        "import signal, subprocess, sys, time\n"
        f"worker = subprocess.Popen([sys.executable, '-c', {SLEEP!r}])\n"
        "stopped = []\n"
        "signal.signal(15, lambda *_: stopped.append(1))\n"
        "print(1, flush=True)\n"
        "while not stopped: time.sleep(0.05)\n"
        "time.sleep(0.3)\n"
        "sys.exit(75 if worker.poll() is None else 1)"
    )
    process, out = run(tmp_path, training)
    ready(out)
    process.stdin.close()
    assert process.wait(20) == 75
