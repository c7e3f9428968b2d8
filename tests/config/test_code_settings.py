"""Settings that name code: checked with the config, placed beside the recipe, hashed, announced."""

import pytest

from luthier.config.code_settings import describe_code, hash_code, read_code_entries
from luthier.config.load import load_config
from luthier.errors import UserError
from luthier.record.config_diff import find_code_changes

CODE = """
from transformers import TrainerCallback
from trl import DPOTrainer, SFTTrainer

def clean(row, limit=3):
    return row

class Stop(TrainerCallback):
    def __init__(self, steps): ...

def load(path, dtype): ...

def load_one(path): ...

def load_all(path, weights): ...

class Bare(SFTTrainer): ...

class Pairs(DPOTrainer):
    base_method = "dpo"

class Own(SFTTrainer):
    base_method = "sft"

class Below(Own): ...

def loss(log_probs, labels, weight, scale=1.0): ...
"""
RECIPE = """# @package _global_
# A recipe with code.
defaults:
  - override /model: hub
  - override /dataset: files
  - _self_
dataset:
  path: rows.jsonl
  map: python:own_steps.py:clean
trainer:
  callbacks:
    - python:own_steps.py:Stop: {steps: 2}
"""
OVERRIDES = ["recipe=coded", "model.path=none/here"]


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A project with a recipe in a folder of recipes, and code beside it."""
    project = tmp_path / "project"
    (project / "recipes").mkdir(parents=True)
    (project / "recipes" / "coded.yaml").write_text(RECIPE)
    (project / "recipes" / "own_steps.py").write_text(CODE)
    monkeypatch.chdir(project)
    return project


def test_a_file_is_looked_for_beside_the_recipe_and_then_in_the_working_folder(project):
    config = load_config(OVERRIDES).config
    assert config.dataset.map == "python:recipes/own_steps.py:clean"
    assert config.trainer.callbacks == [{"python:recipes/own_steps.py:Stop": {"steps": 2}}]
    # What is typed is relative to the working folder alone.
    (project / "typed.py").write_text(CODE)
    typed = load_config([*OVERRIDES, "dataset.map=python:typed.py:clean"]).config
    assert typed.dataset.map == "python:typed.py:clean"
    (project / "own_steps.py").write_text(CODE)
    (project / "recipes" / "own_steps.py").unlink()
    assert load_config(OVERRIDES).config.dataset.map == "python:own_steps.py:clean"


def test_a_recipe_elsewhere_may_bring_the_code_beside_it(project, tmp_path, monkeypatch):
    shared, here = tmp_path / "shared", tmp_path / "here"
    (project / "recipes").rename(shared)
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("LUTHIER_RECIPES", str(shared))
    loaded = load_config(OVERRIDES)
    assert loaded.config.dataset.map == f"python:{shared}/own_steps.py:clean"
    line = describe_code(loaded.resolved)
    assert line is not None
    assert line.startswith(f"code      dataset.map runs python:{shared}/own_steps.py:clean; ")
    # Code that lies somewhere else does not run on a recipe's word.
    (tmp_path / "other.py").write_text(CODE)
    recipe = RECIPE.replace("python:own_steps.py:clean", f"python:{tmp_path}/other.py:clean")
    (shared / "coded.yaml").write_text(recipe)
    with pytest.raises(UserError, match="names code that you have not typed"):
        load_config(OVERRIDES)
    assert load_config(OVERRIDES, is_trusted=True)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.loader=load", "model.loader: 'load' names no code."),
        ("model.loader=python:recipes/own_steps.py:lod", "'lod'. Did you mean load?"),
        (
            r"model.loader={python\:recipes/own_steps.py\:load: {layers: 3}}",
            "takes (path, dtype), and is called with path, layers, dtype: got an unexpected",
        ),
        (
            "model.loader=python:recipes/own_steps.py:load_all",
            "takes (path, weights), and is called with path: missing a required argument",
        ),
        ("trainer.method=stf", "trainer.method: 'stf' is not an option. Did you mean sft?"),
        (
            "trainer.method=python:recipes/own_steps.py:load",
            "load is a function, and a class of transformers.Trainer is needed",
        ),
        (
            "trainer.method=python:recipes/own_steps.py:Bare",
            "Bare has no base_method. Write base_method = 'sft' into the class, or 'pretrain'",
        ),
        (
            "trainer.method=python:recipes/own_steps.py:Pairs",
            "Pairs has base_method = 'dpo'. Write base_method = 'sft'",
        ),
        ("trainer.loss=python:recipes/own_steps.py:los", "'los'. Did you mean loss?"),
        ("trainer.loss=nll", "trainer.loss: 'nll' names no code."),
        (
            "trainer.loss=python:recipes/own_steps.py:load_one",
            "takes (path), and is called with log_probs, labels: too many positional arguments.",
        ),
        (
            r"trainer.loss={python\:recipes/own_steps.py\:loss: {scales: 2}}",
            "takes (log_probs, labels, weight, scale=1.0), and is called with log_probs, labels, "
            "scales, weight, scale: got an unexpected keyword argument 'scales'.",
        ),
        (
            r"trainer.loss={python\:recipes/own_steps.py\:loss: {}, python\:a.b: {}}",
            "'python:a.b' are several; write one of them.",
        ),
        ("dataset.map=clean", "dataset.map: 'clean' names no code. Write python:module.name or"),
        ("dataset.map=python:recipes/own_steps.py:clear", "'clear'. Did you mean clean?"),
        ("dataset.map=python:recipes/own_step.py:clean", "there is no file recipes/own_step.py"),
        (
            r"dataset.map={python\:recipes/own_steps.py\:clean: {limits: 3}}",
            "takes (row, limit=3), and is called with row, limits: got an unexpected",
        ),
        (
            "dataset.map={'python:recipes/own_steps.py:clean': {limit: 3}}",
            r"Write 'dataset.map={python\:recipes/own_steps.py\:clean: {limit: 3}}'.",
        ),
        (
            r"dataset.map={python\:recipes/own_steps.py\:clean: {}, python\:a.b: {}}",
            "dataset.map: 'python:recipes/own_steps.py:clean', 'python:a.b' are several",
        ),
        ("dataset.map={}", "dataset.map: {} names no code."),
        (
            "trainer.callbacks=[python:recipes/own_steps.py:clean]",
            "is a function, and a class of transformers.TrainerCallback is needed",
        ),
        (
            "trainer.callbacks=[python:recipes/own_steps.py:Stop]",
            "takes (steps), and is called with nothing: missing a required argument: 'steps'.",
        ),
    ],
)
def test_mistakes_are_told_with_the_config(override, words):
    with pytest.raises(UserError) as caught:
        load_config([*OVERRIDES, override])
    assert words in str(caught.value)


LOSS = "trainer.loss=python:recipes/own_steps.py:loss"
LOADER = "model.loader=python:recipes/own_steps.py:load"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["trainer=dpo", "+trainer.loss=python:recipes/own_steps.py:loss"],
            "trainer.loss: trainer.method=dpo has a loss that is none of single tokens.",
        ),
        (
            [LOSS, "+trainer.args.loss_type=dft"],
            "trainer.loss: trainer.args.loss_type=dft is another loss.",
        ),
        (
            [LOSS, "dataset.streaming=true"],
            "trainer.loss: rows of a stream come without their columns.",
        ),
        (
            [LOADER, "trainer=classify"],
            "model.loader: trainer.method=classify needs a head or an encoder",
        ),
        (
            [LOADER, "quantization=nf4", "lora=default"],
            "quantization: remove it, with quantization=none: weights are packed while",
        ),
        (
            [LOADER, "+model.kwargs.layers=3"],
            "model.kwargs: goes to from_pretrained of transformers, which model.loader",
        ),
    ],
    ids=["loss-of-dpo", "two-losses", "loss-of-a-stream", "head", "packed", "kwargs"],
)
def test_what_does_not_go_with_code_is_told_with_the_config(overrides, words):
    with pytest.raises(UserError) as caught:
        load_config([*OVERRIDES, *overrides])
    assert words in str(caught.value)
    # What goes with both says nothing.
    load_config([*OVERRIDES, LOSS, LOADER])


def test_a_method_of_ones_own_has_the_facts_of_its_base():
    method = "python:recipes/own_steps.py:Below"
    config = load_config([*OVERRIDES, f"trainer.method={method}", "dataset.streaming=true"]).config
    assert (config.trainer.method, config.trainer.base_method) == (method, "sft")
    with pytest.raises(UserError, match=r"trainer.args.beta: is not a setting of trl.SFTConfig"):
        load_config([*OVERRIDES, f"trainer.method={method}", "+trainer.args.beta=0.1"])
    with pytest.raises(UserError, match="has a loss of its own, or leaves the method's"):
        load_config([*OVERRIDES, f"trainer.method={method}", LOSS])


def test_what_is_hashed_is_named_with_its_setting(project):
    before = hash_code(load_config(OVERRIDES).resolved)
    assert {path: entry["settings"] for path, entry in before.items()} == {
        "python:recipes/own_steps.py:clean": ["dataset.map"],
        "python:recipes/own_steps.py:Stop": ["trainer.callbacks"],
    }
    text = (project / "recipes" / "own_steps.py").read_text()
    (project / "recipes" / "own_steps.py").write_text(text.replace("return row", "return None"))
    after = hash_code(load_config(OVERRIDES).resolved)
    changed = [path for path in before if before[path] != after[path]]
    assert changed == ["python:recipes/own_steps.py:clean"]


def test_code_of_two_settings_is_compared_as_the_one_for_which_it_matters(project):
    """A function that measures may change, and the same one as a reward may not."""
    (project / "own_scores.py").write_text("def score(*args, **kwargs): return 1\n")
    config = {
        "trainer": {
            "rewards": ["python:own_scores.score"],
            "evaluation": {"metrics": ["python:own_scores.score"]},
        }
    }
    record = {"code": hash_code(config)}
    assert record["code"]["python:own_scores.score"]["settings"] == [
        "trainer.rewards",
        "trainer.evaluation.metrics",
    ]
    (project / "own_scores.py").write_text("def score(*args, **kwargs): return 2\n")
    changes = {change.key: change.effect for change in find_code_changes(record, config)}
    assert changes == {"trainer.rewards": "matters", "trainer.evaluation.metrics": "harmless"}


def test_entries_of_all_forms():
    assert read_code_entries("python:a.b") == [("python:a.b", {})]
    assert read_code_entries(["exact_match", {"python:a.b": {"x": 1}}, {"python:c.d": None}]) == [
        ("python:a.b", {"x": 1}),
        ("python:c.d", {}),
    ]
