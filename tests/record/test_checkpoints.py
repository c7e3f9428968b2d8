"""Checkpoints on disk: what is not whole is none, and no more are kept than may be."""

import json

import pytest

from luthier.record import checkpoints
from luthier.record.checkpoints import CheckpointLimits

MADE = {"planned": True, "resumable": True}


def write(folder, step, size=1000, **made):
    new = folder / checkpoints.NEW_FOLDER / f"checkpoint-{step}"
    (new / "ref").mkdir(parents=True)
    (new / "model.safetensors").write_bytes(bytes([step]) * size)
    (new / "ref" / "adapter.safetensors").write_bytes(b"x")
    checkpoints.publish_checkpoint(new, folder / new.name, MADE | made)
    return folder / new.name


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flipped(path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[500] ^= 1
    (path / "model.safetensors").write_bytes(data)


DAMAGE = {
    "one bit of the weights": (flipped, "the content of model.safetensors has changed"),
    "weights cut short": (
        lambda path: (path / "model.safetensors").write_bytes(b"\3" * 400),
        "model.safetensors has 400 bytes instead of 1000",
    ),
    "no weights": (
        lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing",
    ),
    "a file of a folder within": (
        lambda path: (path / "ref" / "adapter.safetensors").unlink(),
        "ref/adapter.safetensors is missing",
    ),
    "no seal": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "another seal": (
        lambda path: (path / "manifest.json").write_text(
            (path / "manifest.json").read_text().replace('"planned": true', '"planned": false')
        ),
        "the content of manifest.json has changed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_one_is_found_and_the_one_before_is_used(tmp_path, damage):
    write(tmp_path, 2)
    newest = write(tmp_path, 3)
    assert checkpoints.find_newest_checkpoint(tmp_path).path == newest
    break_it, problem = DAMAGE[damage]
    break_it(newest)
    found = checkpoints.find_newest_checkpoint(tmp_path)
    assert found.path == tmp_path / "checkpoint-2"
    (sentence,) = found.skipped
    assert str(newest) in sentence
    assert problem in sentence


def test_the_newest_is_that_of_the_highest_step(tmp_path):
    for step in (9, 10, 2):
        write(tmp_path, step)
    assert checkpoints.find_newest_checkpoint(tmp_path).path == tmp_path / "checkpoint-10"


def test_a_model_alone_is_nothing_to_go_on_from(tmp_path):
    write(tmp_path, 2)
    write(tmp_path, 4, resumable=False)
    found = checkpoints.find_newest_checkpoint(tmp_path)
    assert found.path == tmp_path / "checkpoint-2"
    assert "save_only_model" in found.skipped[0]


def test_without_checkpoints_there_is_none(tmp_path):
    assert checkpoints.find_newest_checkpoint(tmp_path / "nowhere") == checkpoints.NewestCheckpoint(
        None, []
    )


def half_written(folder):
    (folder / ".new" / "checkpoint-6").mkdir(parents=True)
    (folder / ".new" / "checkpoint-6" / "model.safetensors").write_bytes(b"half")


def sealed_and_not_renamed(folder):
    write(folder, 6)
    (folder / ".new").mkdir()
    (folder / "checkpoint-6").rename(folder / ".new" / "checkpoint-6")


def between_two_renames(folder):
    (folder / "checkpoint-4").rename(folder / ".checkpoint-4.old")


def half_removed(folder):
    (folder / "checkpoint-2" / "manifest.json").unlink()
    (folder / "checkpoint-2").rename(folder / ".checkpoint-2.old")


KILLED = {
    "while it was written": (half_written, [2, 4]),
    "between its seal and its name": (sealed_and_not_renamed, [2, 4, 6]),
    "while one took another's place": (between_two_renames, [2, 4]),
    "while one was removed": (half_removed, [4]),
}


@pytest.mark.parametrize("when", KILLED)
def test_a_killed_process_leaves_whole_checkpoints_or_none(tmp_path, when):
    write(tmp_path, 2)
    write(tmp_path, 4)
    leave, steps = KILLED[when]
    leave(tmp_path)
    checkpoints.recover_checkpoints(tmp_path)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in steps]
    assert all(checkpoints.read_checkpoint_facts(tmp_path / name) for name in names(tmp_path))
    assert checkpoints.find_newest_checkpoint(tmp_path).skipped == []


def test_one_takes_the_place_of_another_of_its_step(tmp_path):
    write(tmp_path, 2)
    write(tmp_path, 2, size=50)
    assert (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_size == 50
    assert names(tmp_path) == ["checkpoint-2"]


KEPT = {
    "all of them": (CheckpointLimits(), None, [1, 2, 3, 4]),
    "the last two": (CheckpointLimits(max_count=2), None, [3, 4]),
    "the last and the best": (CheckpointLimits(max_count=2), 1, [1, 4]),
    "the last and the best, of one": (CheckpointLimits(max_count=1), 2, [2, 4]),
    "what fits the budget": (CheckpointLimits(max_bytes=3500), None, [3, 4]),
    "what fits the budget, with the best": (CheckpointLimits(max_bytes=3500), 2, [2, 4]),
}


@pytest.mark.parametrize("which", KEPT)
def test_no_more_are_kept_than_may_be(tmp_path, which):
    bounds, best, steps = KEPT[which]
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    said = checkpoints.prune_checkpoints(
        tmp_path, 4, best and tmp_path / f"checkpoint-{best}", bounds
    )
    assert names(tmp_path) == [f"checkpoint-{step}" for step in steps]
    assert said == []


def test_the_newest_and_the_best_are_kept_beyond_the_budget_and_it_is_said(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, size=2 * 2**20)
    (said,) = checkpoints.prune_checkpoints(
        tmp_path, 3, tmp_path / "checkpoint-1", CheckpointLimits(max_bytes=2**20)
    )
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]
    assert "take 4.0 MiB, more than the 1.0 MiB" in said


def test_what_was_taken_for_a_signal_goes_when_there_is_a_newer_one(tmp_path):
    write(tmp_path, 2)
    write(tmp_path, 3, planned=False)
    write(tmp_path, 4)
    checkpoints.prune_checkpoints(tmp_path, 4, None, CheckpointLimits())
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_those_of_a_later_step_are_none_of_this_run_s_business_yet(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step)
    checkpoints.prune_checkpoints(tmp_path, 4, None, CheckpointLimits(max_count=1))
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]


def test_the_seal_names_every_file(tmp_path):
    sealed = json.loads((write(tmp_path, 2) / "manifest.json").read_text())
    assert set(sealed["files"]) == {"model.safetensors", "ref/adapter.safetensors"}
    assert sealed["files"]["model.safetensors"]["size"] == 1000
