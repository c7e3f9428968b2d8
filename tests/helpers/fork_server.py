"""A process that has imported everything once, and forks runs: a start costs a second, not twenty.

Started by `Forks` in a process of its own, so that no thread of the tests is forked. Each line of
its input is a run to start, or one to wait for.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PRELOADED = (
    "luthier.train.build", "luthier.train.methods.sft", "luthier.train.methods.dpo",
    "trl", "peft", "bitsandbytes", "torch.utils.data", "pyarrow", "matplotlib.pyplot",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
)  # fmt: skip


def send_at(place, number, what):
    """Have this process get a signal in the middle of the n-th call of a function."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), what)
        return real(*args, **kwargs)

    setattr(owner, name, counted)


def child(order):
    out = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(order["cwd"])
    os.environ.update(order["environment"])
    # Python reads this variable as it starts.
    sys.path[:0] = filter(None, order["environment"].get("PYTHONPATH", "").split(":"))
    for place, number, what in order["signals"]:
        send_at(place, number, what)
    from luthier.cli.train import main
    from luthier.train.run import run

    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # Found here because this file is run as a script.
        importlib.import_module("fsdp_cpu").choose_fsdp_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        importlib.import_module("helpers.zero_cpu").choose_zero_on_cpu()
    sys.argv = ["train.py", *order["words"]]
    code = main(run, order["words"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for(pid, limit):
    """The exit code of a child; it is killed where it takes longer than `limit` seconds."""
    deadline = time.monotonic() + (limit or float("inf"))
    while True:
        ended, status = os.waitpid(pid, 0 if limit is None else os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            limit = None
        time.sleep(0.02)


def serve():
    for module in PRELOADED:
        importlib.import_module(module)
    # What a start reads from the sources of the libraries is then known, too.
    load_config = importlib.import_module("luthier.config").load_config
    for adapter in ("none", "default"):
        load_config(
            ["model=hub", "model.path=m", "dataset=jsonl", "dataset.path=d", f"lora={adapter}"]
        )
    # A child looks through its own objects only, and not through those of all libraries.
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(wait_for(order["wait"], order["limit"]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            try:
                child(order)
            except BaseException:
                import traceback

                traceback.print_exc()
            os._exit(99)
        print(pid, flush=True)


class Forks:
    """The server, as tests use it."""

    def __init__(self, **environment):
        settings = environment | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=os.environ | settings,
        )  # fmt: skip
        # Some libraries print a line when they are imported.
        lines = iter(self._server.stdout.readline, "")
        assert any(line == "ready\n" for line in lines), "the server did not start"

    def start(self, folder, *words, signals=(), **environment):
        """Start a run in `folder`; `signals`: (function, number of the call, signal)."""
        order = {
            "words": words, "cwd": str(folder), "out": str(folder / "out.txt"),
            "environment": environment, "signals": [[p, n, int(s)] for p, n, s in signals],
        }  # fmt: skip
        return int(self._ask(order))

    def wait(self, pid, limit=None):
        """The exit code; minus the number of the signal that ended it.

        A process that takes longer than `limit` seconds is killed.
        """
        return int(self._ask({"wait": pid, "limit": limit}))

    def run(self, folder, *words, limit=None, **how):
        return self.wait(self.start(folder, *words, **how), limit)

    def killed(self, folder, *words, after):
        """Start a run and kill it after some seconds; how it ended."""
        pid = self.start(folder, *words)
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return self.wait(pid)

    def together(self, folder, port, *words, ranks=2, signals=None, **environment):
        """Start the processes of one run; `signals` by rank."""
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                  "ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(ranks)}  # fmt: skip
        shared |= environment
        return [
            self.start(
                folder, *words, signals=(signals or {}).get(rank, ()),
                **shared, RANK=str(rank), LOCAL_RANK=str(rank),
            )
            for rank in range(ranks)
        ]  # fmt: skip

    def close(self):
        self._server.stdin.close()
        self._server.wait()

    def _ask(self, order):
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return self._server.stdout.readline()


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / "src"), str(Path(__file__).parents[1])]
    serve()
