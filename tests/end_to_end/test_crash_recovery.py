"""Runs that are killed, at random moments and in the middle of everything, end as if they had not.

`LUTHIER_FAULTS=40 pytest tests/runs/test_faults.py -s` tries so many, and says what was survived.
"""

import os
import random
import signal
import time

import pytest

from helpers.train_command import WAY, metrics, record, said, weights, words
from luthier.storage.output_folder import MARKER

pytestmark = pytest.mark.train

FAULTS = int(os.environ.get("LUTHIER_FAULTS", "6"))
SEED = int(os.environ.get("LUTHIER_FAULTS_SEED", time.time_ns() % 10_000))
TRAINER = "luthier.train.methods.sft:TokenTrainer"
# What is going on -> the function in whose n-th call the process dies, and how often it is called.
MOMENTS = {
    "a step": [(f"{TRAINER}.training_step", 16)],
    "an evaluation": [(f"{TRAINER}.prediction_step", 3)],
    "a checkpoint write": [("torch:save", 12), ("luthier.record.checkpoints:_sync", 60)],
    "data preparation": [
        ("luthier.data.encode_source:_write", 1),
        ("luthier.data.store.store:write_manifest", 1),
    ],
    "the last lines": [("luthier.train.loop:save_model", 1), ("luthier.train.loop:plot_loss", 1)],
}  # fmt: skip


def fault(forks, folder, line, moment, chance):
    """Start a run and kill it; how it ended, and what to know of when that was."""
    if moment == "any moment":
        after = chance.uniform(0.3, 4.0)
        return forks.killed(folder, *line, after=after), f"after {after:.2f} s"
    place, calls = chance.choice(MOMENTS[moment])
    number = chance.randint(1, calls)
    code = forks.run(folder, *line, signals=[(place, number, signal.SIGKILL)])
    return code, f"in call {number} of {place}"


def test_a_killed_run_ends_as_one_that_was_not(forks, tiny, whole):
    chance, survived, killed, tried = random.Random(SEED), 0, 0, []
    names = [*MOMENTS, "any moment"]
    for number in range(FAULTS):
        moment, run = names[number % len(names)], tiny / f"fault-{number}"
        line = [
            *(word for word in words(tiny) if not word.startswith("dataset.cache=")), *WAY,
            f"dataset.cache={tiny / f'cache-{number}'}", f"output_dir={run}",
        ]  # fmt: skip
        code, when = fault(forks, tiny, line, moment, chance)
        killed += code == -signal.SIGKILL
        tried.append(f"{moment}, {when}: {code}")
        assert forks.run(tiny, *line) == 0, said(tiny)[-3000:]
        same = weights(run) == weights(whole) and metrics(run) == metrics(whole)
        assert same, (SEED, tried[-1], metrics(run), metrics(whole))
        assert list(run.glob(".*")) == [run / MARKER]
        assert not list((run / "checkpoints").glob(".*"))
        survived += same
    print(f"\nfaults: {FAULTS} tried (seed {SEED}), {killed} killed in time, {survived} survived")
    print("\n".join(tried))
    assert killed >= FAULTS - FAULTS // len(names) - 1


def test_kills_one_after_the_other_lose_only_what_came_after_the_last_checkpoint(
    forks, tiny, whole
):
    line = [*words(tiny), *WAY, "output_dir=often"]
    for call in (7, 7):  # of the first start, and of the second, each in its fourth step
        signals = [(f"{TRAINER}.training_step", call, signal.SIGKILL)]
        assert forks.run(tiny, *line, signals=signals) == -signal.SIGKILL
    assert forks.run(tiny, *line) == 0
    run = tiny / "often"
    assert [part["from_step"] for part in record(run)["sessions"]] == [0, 2, 4]
    assert [part["status"] for part in record(run)["sessions"]] == ["killed", "killed", "finished"]
    assert weights(run) == weights(whole)
    assert metrics(run) == metrics(whole)
