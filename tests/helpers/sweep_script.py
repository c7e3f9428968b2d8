"""A train.py that acts: with `-m` the real controller, else a trial that leaves what a run does.

ACT, from the environment, is a JSON object: `steps`, `seconds` a step, `fail` (ranks that fail),
`stubborn` (SIGTERM is ignored), `orphan` (a process is left behind), `stop_at` (a step at which the
trial stops by itself, once, as one that ran out of time does).
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RESUME = 75


def act(words):
    """Log an eval_loss that falls towards a value that is best for rank 16 and rate 0.001."""
    play = json.loads(os.environ.get("ACT", "{}"))
    given = dict(word.split("=", 1) for word in words)
    folder = Path(given["output_dir"].strip("'"))
    folder.mkdir(parents=True, exist_ok=True)
    record = {"status": "running", "pid": os.getpid(), "words": words, "seen": seen()}
    write(folder / "run.json", record)
    stopped = []
    stubborn = play.get("stubborn")
    signal.signal(signal.SIGTERM, signal.SIG_IGN if stubborn else lambda *_: stopped.append(1))
    if play.get("orphan"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (folder / "orphan").write_text(str(child.pid))
    rank = int(given.get("lora.r", 16))
    rate = float(given.get("trainer.args.learning_rate", 1e-3))
    if rank in play.get("fail", []):
        print("10%|\r20%|#\nTraceback: no room", file=sys.stderr)
        write(folder / "run.json", record | {"status": "failed", "error": f"rank {rank} is big"})
        return 1
    record["data"] = {"sha256": "0"}
    write(folder / "run.json", record)
    state = folder / "checkpoint.json"
    begun = json.loads(state.read_text())["step"] if state.exists() else 0
    final = abs(math.log2(rank / 16)) + abs(math.log10(rate / 1e-3)) + 0.1
    for step in range(begun + 1, play.get("steps", 3) + 1):
        time.sleep(play.get("seconds", 0.02))
        log(folder, {"step": step, "epoch": 0.1, "eval_loss": final + 1 / step})
        write(state, {"step": step})
        if stopped or (step == play.get("stop_at") and begun == 0):
            write(folder / "run.json", record | {"status": "stopped"})
            return RESUME
    after = {"eval_loss": final, "exact_match": 1 - final / 9}
    results = {name: {"before": 5.0, "after": value} for name, value in after.items()}
    facts = {"status": "finished", "results": results, "training_seconds": rank / 10}
    write(folder / "run.json", record | facts)
    return 0


def write(path, value):
    """Write JSON whole or not at all."""
    path.with_suffix(".tmp").write_text(json.dumps(value))
    path.with_suffix(".tmp").replace(path)


def log(folder, row):
    """Append a line of metrics."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def seen():
    """What of the environment a test asks for."""
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "RANK", "LOCAL_RANK")
    return {name: os.environ[name] for name in names if name in os.environ}


if __name__ == "__main__":
    if {"-m", "--multirun"} & set(sys.argv):
        from luthier.cli.train import main

        sys.exit(main(lambda loaded: 0))
    sys.exit(act(sys.argv[1:]))
