"""Sweeps as real processes, whose trials act; and what is left of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
ACTING = Path(__file__).with_name("sweep_script.py")


STARTED = []


def start(folder, *words, act=None, launcher=(sys.executable,), script=ACTING, **more):
    """Start a sweep in a folder, as typed."""
    environ = os.environ | {"ACT": json.dumps(act or {}), "OMP_NUM_THREADS": "1"} | more
    STARTED.append(
        subprocess.Popen(
            [*launcher, str(script), "-m", *words], cwd=folder, env=environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )
    )  # fmt: skip
    return STARTED[-1]


def end_all():
    """End what a failed test has left running; the trials end with their sweep."""
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def here(monkeypatch, capsys, folder, *words, act=None, code=0, **environ):
    """Run a sweep to its end within this process, its trials as real ones; returns what it said."""
    from luthier.cli.train import main

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(ACTING), "-m", *words])
    for name, text in ({"ACT": json.dumps(act or {})} | environ).items():
        monkeypatch.setenv(name, text)
    capsys.readouterr()
    got = main(lambda loaded: 0, ["-m", *words])
    said = "".join(capsys.readouterr())
    assert got == code, said
    return said


def until(holds, seconds=60.0):
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def stop(process, number=signal.SIGTERM):
    """Send a signal to the sweep alone, and return its exit code and what it printed."""
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err


def states(folder):
    """The state of each trial on disk, by number."""
    files = sorted((folder / "state").glob("*.json"))
    return [json.loads(file.read_text())["state"] for file in files]


def record(folder, number):
    """The run.json of a trial, or an empty one."""
    path = folder / "trials" / f"{number:03d}" / "run.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def alive(folder):
    """The processes whose command line names this folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(folder) in w for w in words):
            found.append(" ".join(words))
    return found
