"""Settings with a new name: the old one is a mistake in a config, and is read in a run's record."""

import pytest
import yaml

from luthier.config import load_config
from luthier.config.renamed_settings import read_recorded_config, with_new_result_names
from luthier.errors import UserError
from luthier.record.run_dir import inspect_run

RECIPE = """defaults: [quickstart]
dataset:
  path: null
  shape: auto
  sources:
    mine: {path: a.jsonl, shape: text}
  eval:
    path: null
    sets:
      more:
        path: b.jsonl
        shape: messages
"""
OLD_CONFIG = {
    "dataset": {
        "path": "a.jsonl",
        "shape": "text",
        "columns": {"shape": "form"},
        "sources": {"shape": {"path": "b.jsonl", "shape": "auto"}},
        "eval": {"sets": {"more": {"shape": "messages", "system": None}}},
    },
    "lora": {"shape": 1},
    "seed": 3,
    "trainer": {"evaluation": {"when": "ends", "rows": 5}},
}
NEW_CONFIG = {
    "dataset": {
        "path": "a.jsonl",
        "type": "text",
        "columns": {"shape": "form"},
        "sources": {"shape": {"path": "b.jsonl", "type": "auto"}},
        "eval": {"sets": {"more": {"type": "messages", "system": None}}},
    },
    "lora": {"shape": 1},
    "seed": 3,
    "trainer": {"evaluation": {"when": "start_and_end", "rows": 5}},
}


def test_an_old_key_in_a_recipe_is_a_mistake_with_its_line_and_new_name(workplace):
    workplace("recipes/mine.yaml", RECIPE)
    with pytest.raises(UserError) as caught:
        load_config(["recipe=mine"])
    text = str(caught.value)
    assert text.startswith("3 mistakes in the configuration")
    for key, line in (
        ("dataset", 4), ("dataset.sources.mine", 6), ("dataset.eval.sets.more", 12),
    ):  # fmt: skip
        says = f"{key}.shape: this key is called {key}.type now.  [recipes/mine.yaml:{line}]"
        assert says in text


def test_an_old_value_is_a_mistake_with_its_new_name():
    with pytest.raises(UserError) as caught:
        load_config(["recipe=quickstart", "trainer.evaluation.when=ends"])
    assert "trainer.evaluation.when: 'ends' is called start_and_end now." in str(caught.value)


def test_an_old_key_in_the_record_of_a_run_is_read_as_the_new_one(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(OLD_CONFIG), encoding="utf-8")
    assert read_recorded_config(file) == NEW_CONFIG
    (tmp_path / "run.json").write_text('{"status": "stopped", "versions": {"luthier": "0.1.0"}}')
    assert inspect_run(tmp_path, NEW_CONFIG).changes == []


def test_a_record_in_new_names_is_read_as_it_is(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(NEW_CONFIG), encoding="utf-8")
    assert read_recorded_config(file) == NEW_CONFIG


def test_results_of_an_older_run_have_the_names_of_today():
    old = {"held_out_loss": 1, "code/held_out_loss": 2, "exact_match": 3, "code/exact_match": 4}
    assert with_new_result_names(old) == {
        "eval_loss": 1, "code/eval_loss": 2, "exact_match": 3, "code/exact_match": 4,
    }  # fmt: skip
