"""What a run goes on from and with what: damage, changed settings and data, a full disk."""

import json
import os
import pickle
import shutil
import subprocess

import pytest

from helpers.train_command import ROOT, STEPS, WAY, metrics, record, said, weights, words
from luthier.record import checkpoints
from luthier.storage.manifest import write_manifest

pytestmark = pytest.mark.train


def interrupted(folder, whole, name, step=6):
    """A copy of a whole run as it was when it was killed behind a step, and its command."""
    run = folder / name
    shutil.copytree(whole, run)
    for number, path in checkpoints.list_checkpoints(run / "checkpoints"):
        if number > step:
            shutil.rmtree(path)
    shutil.rmtree(run / "model")
    (run / "run.json").write_text(json.dumps(record(run) | {"status": "running"}))
    return run, [*words(folder), *WAY, f"output_dir={name}"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(forks, tiny, whole):
    run, line = interrupted(tiny, whole, "damaged")
    newest = run / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert forks.run(tiny, *line) == 0
    assert "checkpoint-6 is not used: optimizer.pt has" in said(tiny)
    assert "resuming at step 4 instead, from damaged/checkpoints/checkpoint-4" in said(tiny)
    assert record(run)["sessions"][-1]["from_step"] == 4
    assert weights(run) == weights(whole)
    assert metrics(run) == metrics(whole)


def spoil(file, change):
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(change(lines)))


HEALED = {
    "a line of metrics that is no JSON, no first measurement": (
        lambda run: (
            spoil(run / "metrics.jsonl", lambda lines: [*lines[:2], "{garbage\n", *lines[3:]]),
            (run / "before.json").unlink(),
        ),
        ("metrics.jsonl was damaged and has been restored from checkpoint-6",
         "before.json was missing and has been restored from checkpoint-6"),
    ),
    "a changed digit of metrics, half a first measurement": (
        lambda run: (
            spoil(run / "metrics.jsonl", lambda lines: [line.replace("7", "8") for line in lines]),
            (run / "before.json").write_text((run / "before.json").read_text()[:40]),
        ),
        ("metrics.jsonl was damaged and has been restored from checkpoint-6",
         "before.json was damaged and has been restored from checkpoint-6"),
    ),
    "no metrics, a file where the next checkpoint goes": (
        lambda run: (
            (run / "metrics.jsonl").unlink(),
            (run / "checkpoints" / "checkpoint-8").write_text("not a checkpoint"),
            (run / "checkpoints" / ".checkpoint-8.old").write_text("not a checkpoint"),
        ),
        ("metrics.jsonl was missing and has been restored from checkpoint-6",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HEALED)
def test_logs_that_are_damaged_come_back_from_the_checkpoint(forks, tiny, whole, what):
    damage, sentences = HEALED[what]
    run, line = interrupted(tiny, whole, f"healed-{list(HEALED).index(what)}")
    damage(run)
    assert forks.run(tiny, *line) == 0
    for sentence in sentences:
        assert sentence in said(tiny)
    assert weights(run) == weights(whole)
    assert metrics(run) == metrics(whole)
    assert record(run)["results"] == record(whole)["results"]


def test_a_damaged_first_measurement_is_made_again_before_the_first_step(forks, tiny, whole):
    run, line = interrupted(tiny, whole, "measured", step=0)
    file = run / "before.json"
    file.write_text(file.read_text().replace("results", "rezults"))
    assert forks.run(tiny, *line) == 0
    assert "before.json: results is missing" in said(tiny)
    assert "Nothing was trained yet, so the start is measured again." in said(tiny)
    assert weights(run) == weights(whole)
    assert metrics(run) == metrics(whole)


def test_a_run_that_goes_on_under_other_versions_says_so_and_keeps_both(forks, tiny, whole):
    run, line = interrupted(tiny, whole, "versions")
    entries = record(run) | {"status": "running"}
    now = entries["sessions"][0]["versions"]["torch"]
    entries["sessions"][0]["versions"]["torch"] = "2.0.0"
    (run / "run.json").write_text(json.dumps(entries))
    assert forks.run(tiny, *line) == 0
    assert f"versions  changed since the run's last part: torch 2.0.0 -> {now}." in said(tiny)
    assert [session["versions"]["torch"] for session in record(run)["sessions"]] == ["2.0.0", now]


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_pickle_in_a_sealed_checkpoint_does_not_run(forks, tiny, whole):
    run, line = interrupted(tiny, whole, "hostile")
    checkpoint = run / "checkpoints" / "checkpoint-6"
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Payload(run / "ran")))
    facts = checkpoints.read_checkpoint_facts(checkpoint)
    write_manifest(checkpoint, facts)
    assert forks.run(tiny, *line) == 2
    assert "checkpoint-6: its optimizer or random state cannot be read" in said(tiny)
    assert not (run / "ran").exists()


def test_a_moved_run_goes_on_with_other_logging_and_says_so(forks, tiny, whole):
    run, line = interrupted(tiny, whole, "logged")
    shutil.move(run, tiny / "moved")
    line[-1] = "output_dir=moved"
    assert forks.run(tiny, *line, "trainer.args.logging_steps=1", "trainer.args.save_steps=1") == 0
    text = said(tiny)
    assert "trainer.args.logging_steps: 3 -> 1, which changes nothing of the training" in text
    assert weights(tiny / "moved") == weights(whole)
    assert [row["step"] for row in metrics(tiny / "moved") if "loss" in row] == [3, 6, 7, 8]


LONGER = {
    "rates that do not follow": ("constant", "resumes at step 8 and trains to its new end"),
    "rates that follow": ("cosine", "the learning rate is that of a run of the new length"),
}


@pytest.mark.parametrize("how", LONGER)
def test_a_finished_run_becomes_longer(forks, tiny, how):
    kind, sentence = LONGER[how]
    args = {"lr_scheduler_type": kind, "warmup_steps": 2, "eval_strategy": "no"}
    short = [*words(tiny, **args), f"output_dir=longer-{kind}"]
    long = [*words(tiny, **args | {"max_steps": STEPS + 4}), f"output_dir=longer-{kind}"]
    assert forks.run(tiny, *short) == 0
    assert forks.run(tiny, *long) == 0
    assert sentence in said(tiny)
    run = tiny / f"longer-{kind}"
    assert record(run)["extended"] == [
        {"at_step": 8, "changes": ["trainer.args.max_steps: 8 -> 12"]}
    ]
    assert metrics(run)[-1]["step"] == STEPS + 4
    if kind == "constant":
        assert forks.run(tiny, *long[:-1], "output_dir=at-once") == 0
        assert weights(run) == weights(tiny / "at-once")
    # It cannot become shorter than it is.
    assert forks.run(tiny, *short) == 2
    assert "this run has taken 12 steps already" in said(tiny)


def swap(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return lambda: path.write_text(text)


CHANGED = {
    "the rows": ("rows.jsonl", "green", "blue", "dataset: the rows"),
    "the template": (
        "model/chat_template.jinja", "<|end|>{% endfor", "\n<|end|>{% endfor",
        "chat.template: the chat template",
    ),
    "the tokenizer": (
        "model/tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true',
        "model.tokenizer: the tokenizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGED)
def test_a_run_whose_material_changed_is_refused_in_words(forks, tiny, whole, what):
    file, old, new, words_ = CHANGED[what]
    run, line = interrupted(tiny, whole, f"changed-{file.replace('/', '-')}")
    back = swap(tiny / file, old, new)
    try:
        assert forks.run(tiny, *line) == 2
    finally:
        back()
    text = said(tiny).rpartition("held out")[2]
    assert words_ in text
    assert "overwrite=true to begin anew" in text
    assert "Traceback" not in text
    assert not (run / "model").exists()
    assert record(run)["status"] == "failed"


def test_another_number_of_processes_is_refused_in_words(forks, tiny, whole):
    run, line = interrupted(tiny, whole, "alone")
    now = record(run)
    now["launch"]["processes"] = 2
    (run / "run.json").write_text(json.dumps(now))
    assert forks.run(tiny, *line) == 2
    assert "launched with the number of processes 2, and now with 1" in said(tiny)


@pytest.fixture
def disk(tmp_path):
    """Mounts a disk of so many kilobytes besides what luthier's own changes take in a record."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a disk")
    place = tmp_path / "disk"
    place.mkdir()
    diff = subprocess.run(["git", "-C", ROOT, "diff", "HEAD"], capture_output=True, check=False)
    more = min(len(diff.stdout), 1_000_000) // 1000

    def mount(size, *options):
        size = f"size={size + more}k"
        command = ["mount", "-t", "tmpfs", "-o", ",".join((size, *options)), "tmpfs", place]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no disk can be mounted here")
        return place

    yield mount
    subprocess.run(["umount", place], capture_output=True, check=False)


# A checkpoint of full weights takes about 600 kB, and there is one in every step.
DISKS = {
    "in the first one": (400, "There is no good one yet"),
    "later": (1600, "The last good one is"),
}


@pytest.mark.parametrize("when", DISKS)
def test_a_full_disk_ends_the_run_in_words_and_keeps_the_last_good_one(forks, tiny, disk, when):
    size, sentence = DISKS[when]
    run = disk(size) / "run"
    line = [*words(tiny, save_steps=1, eval_strategy="no"), f"output_dir={run}", "lora=none"]
    assert forks.run(tiny, *line) == 2
    text = said(tiny).rpartition("model     ")[2]
    assert f"The disk of {run / 'checkpoints'} is full" in text
    assert sentence in text
    assert "Traceback" not in text
    last = checkpoints.find_newest_checkpoint(run / "checkpoints")
    assert last.skipped == []
    assert (last.path is None) == (when == "in the first one")
    assert record(run)["status"] == "failed"
    assert not (run / "checkpoints" / ".new").exists()
    # With room it goes on.
    disk(64_000, "remount")
    assert forks.run(tiny, *line) == 0
    step = checkpoints.checkpoint_step(last.path) if last.path else 0
    assert record(run)["sessions"][-1]["from_step"] == step
