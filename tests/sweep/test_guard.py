"""The guard of a trial: no process of the trial outlives the sweep, or its own grace."""

import subprocess
import sys
import time

import psutil
import pytest

from luthier.sweep import guard

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


def run(folder, code, grace=5.0, command=None):
    out, err = folder / "out", folder / "err"
    words = command or [sys.executable, "-c", code]
    process = subprocess.Popen(
        [sys.executable, "-I", guard.__file__, str(grace), str(out), str(err), *words],
        stdin=subprocess.PIPE,
    )
    return process, out


def ready(path):
    deadline = time.monotonic() + 20
    while not (path.is_file() and path.read_text()):
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


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are seen on Linux")
def test_the_code_of_a_trial_whose_launcher_died_first(tmp_path):
    """`accelerate launch` with one process dies of SIGTERM, and the training goes on."""
    # One that ends at once may be collected by its dying launcher, and its code is lost with it.
    trial = POLITE.replace("sys.exit(75)", "(time.sleep(0.5), sys.exit(75))")
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {trial!r}]).wait()"
    process, out = run(tmp_path, launcher)
    ready(out)
    process.stdin.close()
    assert process.wait(20) == 75
