"""Which changes of a config stand in the way of going on, and which do not."""

import copy

import pytest

from luthier.errors import UserError
from luthier.record.checkpoints import publish_checkpoint
from luthier.record.config_diff import compare_configs, schedule_depends_on_length
from luthier.record.record import RECORD_FORMAT, RunRecord, read_record
from luthier.record.run_dir import inspect_run, is_run_finished, open_run
from luthier.storage.atomic import write_json

CONFIG = {
    "seed": 1, "lora": {"r": 8}, "output_dir": "x", "tracker": {"to": []},
    "dataset": {"path": "a", "workers": None, "max_rows": 5}, "chat": {"max_length": 64},
    "trainer": {
        "args": {"max_steps": 10, "learning_rate": 1e-3, "logging_steps": 5, "save_steps": 2,
                 "eval_steps": 4, "per_device_eval_batch_size": 4, "lr_scheduler_type": "cosine"},
        "evaluation": {"rows": 10, "patience": None}, "checkpoints": {"budget": None},
    },
}  # fmt: skip
BEST = {"trainer.args.load_best_model_at_end": True}
EFFECTS = [
    ("the learning rate", "trainer.args.learning_rate", 1e-4, {}, "matters"),
    ("the rank", "lora.r", 16, {}, "matters"),
    ("the seed", "seed", 2, {}, "matters"),
    ("the rows", "dataset.path", "b", {}, "matters"),
    ("the length of rows", "chat.max_length", 32, {}, "matters"),
    ("a new setting", "trainer.args.weight_decay", 0.1, {}, "matters"),
    ("more steps", "trainer.args.max_steps", 20, {}, "length"),
    ("epochs", "trainer.args.num_train_epochs", 3, {}, "length"),
    ("logging", "trainer.args.logging_steps", 1, {}, "harmless"),
    ("how often it is saved", "trainer.args.save_steps", 1, {}, "harmless"),
    ("what saves the best", "trainer.args.save_steps", 1, BEST, "matters"),
    ("how often it is evaluated", "trainer.args.eval_steps", 1, {}, "harmless"),
    ("what measures the best", "trainer.args.eval_steps", 1, BEST, "matters"),
    ("the batches of an evaluation", "trainer.args.per_device_eval_batch_size", 1, {}, "harmless"),
    ("what is answered", "trainer.evaluation.rows", 3, {}, "harmless"),
    ("patience", "trainer.evaluation.patience", 3, {}, "matters"),
    ("a profile", "trainer.profile", True, {}, "harmless"),
    ("the budget", "trainer.checkpoints.budget", "1GB", {}, "harmless"),
    ("processes that encode", "dataset.workers", 4, {}, "harmless"),
]  # fmt: skip


def changed(config, **settings):
    config = copy.deepcopy(config)
    for key, value in settings.items():
        *path, name = key.split(".")
        node = config
        for part in path:
            node = node[part]
        node[name] = value
    return config


@pytest.mark.parametrize(
    ("key", "value", "both", "effect"), [k[1:] for k in EFFECTS], ids=[k[0] for k in EFFECTS]
)
def test_what_a_change_means(key, value, both, effect):
    old = changed(CONFIG, **both)
    (change,) = compare_configs(old, changed(old, **{key: value}))
    assert (change.key, change.effect) == (key, effect)


@pytest.mark.parametrize("key", ["output_dir", "tracker.to", "overwrite", "recipe"])
def test_where_and_whether_a_run_happens_is_no_change(key):
    assert compare_configs(CONFIG, changed(CONFIG, **{key: "other"})) == []


ABSENT = [
    ("a loss", "trainer.loss", None, True),
    ("a loader", "model.loader", None, True),
    ("an optimizer", "trainer.optimizer", {"name": None, "groups": []}, True),
    ("an empty group", "trainer.optimizer", {}, True),
    ("tools", "trainer.tools", [], True),
    ("a map of a source", "dataset.sources", {"a": {"map": None}}, True),
    ("a loss of one's own", "trainer.loss", "python:own.py:loss", False),
    ("muon", "trainer.optimizer", {"name": "muon", "groups": []}, False),
    ("null, where absent is a value", "chat.add_eos", None, False),
    ("a field of the trainer", "trainer.args.optim", None, False),
]


@pytest.mark.parametrize(
    ("key", "value", "is_same"), [row[1:] for row in ABSENT], ids=[row[0] for row in ABSENT]
)
def test_a_setting_that_an_older_version_did_not_know_equals_its_default(key, value, is_same):
    base = CONFIG | {"model": {"path": "m"}}
    new = changed(base, **{key: value})
    for changes in (compare_configs(base, new), compare_configs(new, base)):
        assert (changes == []) is is_same, changes


RATES = [
    ("constant", 0, False), ("constant", 0.1, False), ("constant_with_warmup", 10, False),
    ("constant_with_warmup", 0.1, True), ("linear", 0, True), ("cosine", 0, True),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "warmup", "follows"), RATES)
def test_which_learning_rates_depend_on_the_number_of_steps(kind, warmup, follows):
    args = {"trainer.args.lr_scheduler_type": kind, "trainer.args.warmup_steps": warmup}
    assert schedule_depends_on_length(changed(CONFIG, **args)) is follows


def finished(folder, status="finished"):
    with open_run(folder, CONFIG, []):
        pass
    ended = {"results": {}, "seconds": 2.0, "training_seconds": 1.0, "peak_memory_gib": {}}
    write_json(folder / "run.json", {"status": status, "format": RECORD_FORMAT} | ended)
    (folder / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n')


def test_a_finished_run_that_is_to_be_longer_is_unfinished(tmp_path):
    finished(tmp_path)
    assert (
        inspect_run(tmp_path, changed(CONFIG, **{"trainer.args.logging_steps": 1})).state
        == "finished"
    )
    longer = changed(CONFIG, **{"trainer.args.max_steps": 20})
    assert inspect_run(tmp_path, longer).state == "unfinished"


def test_a_run_that_is_to_be_longer_is_not_finished_for_the_other_processes(tmp_path):
    finished(tmp_path)
    checkpoint = tmp_path / "checkpoints" / ".new" / "checkpoint-10"
    checkpoint.mkdir(parents=True)
    facts = {"step": 10, "planned": True, "resumable": True}
    publish_checkpoint(checkpoint, tmp_path / "checkpoints" / "checkpoint-10", facts)
    longer = changed(CONFIG, **{"trainer.args.max_steps": 20})
    assert is_run_finished(tmp_path, CONFIG)
    assert not is_run_finished(tmp_path, longer)
    with open_run(tmp_path, longer, []) as run:
        assert (run.state, run.extended_from) == ("unfinished", 10)
    # The new config is written now, and no step of it was taken yet.
    assert not is_run_finished(tmp_path, longer)
    assert inspect_run(tmp_path, longer).state == "unfinished"
    (extension,) = read_record(tmp_path)["extended"]
    assert extension == {"at_step": 10, "changes": ["trainer.args.max_steps: 10 -> 20"]}


def test_a_finished_run_without_a_checkpoint_does_not_become_longer(tmp_path):
    finished(tmp_path)
    longer = changed(CONFIG, **{"trainer.args.max_steps": 20})
    with (
        pytest.raises(UserError, match="finished without a checkpoint"),
        open_run(tmp_path, longer, []),
    ):
        pass
    assert is_run_finished(tmp_path, CONFIG)


def test_what_stands_in_the_way_is_told_from_what_does_not(tmp_path):
    finished(tmp_path, "stopped")
    new = changed(CONFIG, **{"lora.r": 16, "trainer.args.logging_steps": 1})
    with pytest.raises(Exception, match=r"lora\.r: 8 -> 16") as error:
        inspect_run(tmp_path, new)
    assert "would not stand in the way: trainer.args.logging_steps" in str(error.value)


def test_a_folder_of_a_newer_luthier_is_refused_in_words(tmp_path):
    write_json(tmp_path / "run.json", {"format": RECORD_FORMAT + 1, "versions": {"luthier": "9.0"}})
    with pytest.raises(Exception, match=r"written by luthier 9\.0, in a form \(format 3\)"):
        RunRecord(tmp_path)


def test_an_unfinished_run_of_an_older_form_is_refused_in_words(tmp_path):
    finished(tmp_path)
    write_json(tmp_path / "run.json", {"status": "running", "versions": {"luthier": "0.1.0"}})
    with pytest.raises(Exception, match=r"luthier 0\.1\.0 in an older form.*carry no seal"):
        inspect_run(tmp_path, CONFIG)
    write_json(tmp_path / "run.json", {"status": "finished", "versions": {"luthier": "0.1.0"}})
    assert inspect_run(tmp_path, CONFIG).state == "finished"
