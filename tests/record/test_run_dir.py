"""Who may write into a run's directory, and what stands there."""

import json
import os

import numpy as np
import pytest

from luthier.errors import UserError
from luthier.record.run_dir import inspect_run, open_run
from luthier.storage.atomic import write_json, write_text
from luthier.storage.output_folder import publish_folder, seal_model

CONFIG = {"seed": 1, "lora": {"r": 8}, "output_dir": "x", "tracker": {"to": []}}


def begin(folder, config=CONFIG, status="running"):
    with open_run(folder, config, ["lora.r=8"]):
        pass
    write_json(folder / "run.json", {"status": status})


def test_a_new_folder_is_new(tmp_path):
    assert inspect_run(tmp_path / "run", CONFIG).state == "new"


@pytest.mark.parametrize(
    ("status", "state"),
    [("running", "unfinished"), ("failed", "unfinished"), ("finished", "finished")],
)
def test_the_same_config_finds_its_own_run(tmp_path, status, state):
    begin(tmp_path, status=status)
    assert inspect_run(tmp_path, CONFIG).state == state


@pytest.mark.parametrize("key", ["output_dir", "tracker"])
def test_what_does_not_change_the_result_is_the_same_run(tmp_path, key):
    begin(tmp_path)
    assert inspect_run(tmp_path, CONFIG | {key: "other"}).state == "unfinished"


def test_another_config_is_refused_with_the_keys_that_differ(tmp_path):
    begin(tmp_path)
    with pytest.raises(UserError, match=r"lora\.r: 8 -> 16") as error:
        inspect_run(tmp_path, CONFIG | {"lora": {"r": 16}})
    assert "overwrite=true" in str(error.value)
    assert inspect_run(tmp_path, CONFIG | {"lora": {"r": 16}}, overwrite=True).state == "new"


def test_a_run_that_failed_before_training_gives_way(tmp_path):
    begin(tmp_path, status="failed")
    assert inspect_run(tmp_path, CONFIG | {"seed": 2}).state == "new"
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 1.0}\n')
    assert inspect_run(tmp_path, CONFIG | {"seed": 2}).state == "new"
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    with pytest.raises(UserError, match="seed: 1 -> 2"):
        inspect_run(tmp_path, CONFIG | {"seed": 2})


def test_a_folder_of_somebody_elses_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="no run of luthier"):
        inspect_run(tmp_path, CONFIG, overwrite=True)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        inspect_run(tmp_path / "run", CONFIG)


def test_overwriting_removes_only_what_luthier_writes(tmp_path):
    begin(tmp_path)
    (tmp_path / "notes.md").write_text("mine")
    with open_run(tmp_path, CONFIG, [], overwrite=True) as run:
        assert run.state == "new"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".luthier.json", "config.yaml", "notes.md", "overrides.yaml"]
    assert run.foreign == ["notes.md"]


def test_a_finished_run_is_left_as_it_is(tmp_path):
    begin(tmp_path, status="finished")
    before = (tmp_path / "config.yaml").read_text()
    with open_run(tmp_path, CONFIG | {"tracker": "other"}, ["tracker=other"]) as run:
        assert run.state == "finished"
    assert (tmp_path / "config.yaml").read_text() == before


def test_secrets_are_not_written(tmp_path):
    config = {"model": {"kwargs": {"token": "hf_secret"}}, "tokenizer": "kept", "max_new_tokens": 5}
    with open_run(tmp_path, config, ["model.kwargs.token=hf_secret", "lora.r=8"]):
        pass
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "hf_secret" not in text
    assert "kept" in text
    assert "lora.r=8" in text
    assert inspect_run(tmp_path, config).state == "unfinished"


def test_a_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_text(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_publishing_replaces_the_older_folder(tmp_path):
    for name, text in (("model", "old"), (".model.tmp", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(text)
        seal_model(tmp_path / name)
    publish_folder(tmp_path / ".model.tmp", tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_others_may_read_published_weights_as_they_may_new_files(tmp_path, mask):
    from safetensors.numpy import save_file

    before = os.umask(mask)
    try:
        (tmp_path / "new").mkdir()
        save_file({"a": np.zeros(3)}, tmp_path / "new" / "model.safetensors")
        publish_folder(tmp_path / "new", tmp_path / "model")
    finally:
        os.umask(before)
    (file,) = (tmp_path / "model").iterdir()
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_the_record_says_what_ran(tmp_path, monkeypatch):
    from luthier.config.schema import DatasetConfig, ModelConfig, RunConfig
    from luthier.record.record import RunRecord

    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    config = RunConfig(model=ModelConfig(path="m"), dataset=DatasetConfig(path="d"), output_dir="o")
    record = RunRecord(tmp_path)
    record.start(config, ["seed=42"])
    record.end("finished", results={"loss": 1.0})
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["status"] == "finished"
    assert written["versions"]["torch"]
    assert written["hardware"]["cores"] >= 1
    assert written["peak_memory_gib"]["host"] > 0
    assert "hf_very_secret" not in json.dumps(written)
