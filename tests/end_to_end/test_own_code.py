"""Runs with code of the user's own: what they say, record and compare, and its state."""

import json
import shutil

import pytest

from helpers.train_command import WAY, metrics, record, said, weights, words
from luthier.record import checkpoints

pytestmark = pytest.mark.train

CODE = '''
import json
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


def clean(row, without="green"):
    return None if row["completion"] == without else row


class Count(TrainerCallback, ExportableState):
    """Counts steps, writes them, and ends the training."""

    def __init__(self, file, last=100):
        self.file, self.last, self.steps = file, last, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.write("begin")

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        control.should_training_stop = control.should_training_stop or self.steps >= self.last
        return control

    def on_save(self, args, state, control, **kwargs):
        self.write("save")

    def write(self, event):
        with Path(self.file).open("a") as file:
            file.write(json.dumps([event, self.steps]) + "\\n")

    def state(self):
        return {"args": {"file": self.file, "last": self.last}, "attributes": {"steps": self.steps}}


class Broken(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyError("absent")
'''


@pytest.fixture
def code(tiny):
    (tiny / "own_run.py").write_text(CODE)
    return tiny


def command(folder, name, *callbacks):
    return [
        *words(folder), *WAY, "dataset.map=python:own_run.py:clean",
        f"trainer.callbacks=[{','.join(callbacks)}]", f"output_dir={name}",
    ]  # fmt: skip


def count(file, last=100):
    return rf"{{python\:own_run.py\:Count: {{file: {file}, last: {last}}}}}"


def events(folder, file):
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def interrupt(run, step):
    for number, path in checkpoints.list_checkpoints(run / "checkpoints"):
        if number > step:
            shutil.rmtree(path)
    shutil.rmtree(run / "model")
    (run / "run.json").write_text(json.dumps(record(run) | {"status": "running"}))


def test_a_run_says_and_records_its_code_and_goes_on_with_the_state_of_its_callbacks(forks, code):
    line = command(code, "coded", count("one.txt"), count("two.txt"))
    assert forks.run(code, *line) == 0, said(code)
    text = said(code)
    first = text[text.index("code      ") :].splitlines()[0]
    assert first == (
        "code      dataset.map runs python:own_run.py:clean; "
        "trainer.callbacks runs python:own_run.py:Count"
    )
    assert "map       dataset.map left out 4 of 48 rows" in text
    run = code / "coded"
    entries = record(run)["code"]
    assert {path: entry["settings"] for path, entry in entries.items()} == {
        "python:own_run.py:clean": ["dataset.map"],
        "python:own_run.py:Count": ["trainer.callbacks"],
    }
    assert all(len(entry["sha256"]) == 64 for entry in entries.values())
    whole = [["begin", 0], *(["save", step] for step in (2, 4, 6, 8))]
    assert events(code, "one.txt") == events(code, "two.txt") == whole
    before = weights(run), metrics(run)
    # Killed behind step 4: both go on with their own count, before the training begins.
    interrupt(run, 4)
    assert forks.run(code, *line) == 0, said(code)
    assert events(code, "one.txt")[5:] == [["begin", 4], ["save", 6], ["save", 8]]
    assert events(code, "two.txt") == events(code, "one.txt")
    assert (weights(run), metrics(run)) == before
    state = json.loads((run / "checkpoints" / "checkpoint-8" / "trainer_state.json").read_text())
    assert [each["attributes"] for each in state["stateful_callbacks"]["Count"]] == [
        {"steps": 8}
    ] * 2
    # Another map that makes the same rows is no other run, and another callback is.
    (code / "own_run.py").write_text(CODE.replace("return None if", "return [] if"))
    interrupt(run, 4)
    assert forks.run(code, *line) == 0, said(code)
    assert "dataset.map: python:own_run.py:clean (SHA-256 " in said(code)
    (code / "own_run.py").write_text(CODE.replace("self.steps += 1", "self.steps += 2"))
    interrupt(run, 4)
    assert forks.run(code, *line) == 2
    assert "coded holds a run that began with other code" in said(code)
    assert "trainer.callbacks: python:own_run.py:Count (SHA-256 " in said(code)
    # Other rows are refused as ever, with the function that makes them.
    (code / "own_run.py").write_text(CODE.replace('completion"] == without', "completion\"] > 'g'"))
    assert forks.run(code, *line) == 2
    text = said(code)
    assert "dataset: the rows, or what trains in them with python:own_run.py:clean (SHA" in text


def test_a_training_that_a_callback_ended_stays_ended_where_it_goes_on(forks, code):
    line = command(code, "ended", count("ended.txt", 4))
    assert forks.run(code, *line) == 0, said(code)
    run = code / "ended"
    assert [event for event in events(code, "ended.txt") if event[0] == "save"] == [
        ["save", 2],
        ["save", 4],
    ]
    before = weights(run)
    interrupt(run, 4)
    assert forks.run(code, *line) == 0, said(code)
    assert events(code, "ended.txt")[-1] == ["begin", 4]
    assert weights(run) == before


def test_a_callback_that_fails_is_named_with_its_step_and_line(forks, code):
    assert forks.run(code, *command(code, "broken", "python:own_run.py:Broken")) == 2
    text = said(code)
    assert (
        "trainer.callbacks: python:own_run.py:Broken: on_step_end failed at step 1: "
        f"KeyError: 'absent' ({code / 'own_run.py'}:"
    ) in text
    assert "Traceback" not in text[text.rindex("code      ") :]
