"""The text of a recipe reads back as the values that went in."""

import pytest
from omegaconf import OmegaConf

from luthier.errors import UserError
from luthier.recipe_files.draft import (
    RecipeDraft,
    command_prefix,
    format_yaml,
    recipe_name,
    recipe_path,
)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, -3, 12),
        *(2e-4, 1e-5, 0.05, 1.0, 3.0, 1e-10, 123456.789, 0.333333, 1e20),
        *("plain", "no", "null", "1e-5", "12", "a: b", "# no comment", "<image>", "", " padded "),
        *("a 'quoted' \"text\"", "two\nlines", "{{ messages }}", "data/*.jsonl", "~/data", "./x"),
        *("${oc.env:HOME}", "{% if a %}", "café", "@x", "2026-01-01", "hub/Name-1.5"),
        *([], ["a", "b: c"], [1, 2.5], {}, {"a": 1, "b: c": [True]}, [{"match": "x", "lr": 1e-5}]),
    ],
    ids=repr,
)
def test_a_value_reads_back(value):
    read = OmegaConf.to_container(OmegaConf.create(f"key: {format_yaml(value)}"), resolve=True)
    assert read == {"key": value}


def test_the_text_has_a_comment_at_each_key_and_no_long_line():
    draft = RecipeDraft(["A recipe."], {"trainer": "sft", "model": "hub"})
    draft.set_key("seed", 1, "draws the order")
    draft.set_key("trainer.args.learning_rate", 1e-4, "long " * 30)
    draft.set_key("model.path", "owner/name", "the model")
    lines = draft.text().splitlines()
    assert lines[:4] == ["# A recipe.", "defaults:", "  - override /model: hub",
                         "  - override /trainer: sft"]  # fmt: skip
    assert "  path: owner/name  # the model" in lines
    assert (
        lines.index("model:") < lines.index("trainer:") < lines.index("seed: 1  # draws the order")
    )
    at = lines.index("    learning_rate: 1e-4")
    assert lines[at - 1].startswith("    # long") and max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    "text, name",
    [
        ("data/My Rows.csv.gz", "my_rows"),
        ("qlora-8b.yml", "qlora_8b"),
        ("HuggingFaceH4/ultrachat_200k", "ultrachat_200k"),
        ("data/", "data"),
        ("???", "mine"),
    ],
)
def test_a_name_is_made_of_a_path(text, name):
    assert recipe_name(text) == name


def test_nothing_is_overwritten_without_force(workplace):
    workplace("recipes/mine.yaml", "seed: 1\n")
    with pytest.raises(UserError, match=r"recipes/mine.yaml exists.*--force"):
        recipe_path(None, "mine", force=False)
    assert recipe_path(None, "mine", force=True).name == "mine.yaml"
    with pytest.raises(UserError, match=r"-o recipes/mine.yaml"):
        recipe_path("recipes/mine.yml", "mine", force=False)
    with pytest.raises(UserError, match=r"is a .yaml file"):
        recipe_path("recipes/mine.txt", "mine", force=False)


def test_a_recipe_elsewhere_is_found_by_its_folder(workplace):
    folder = workplace("other/x.yaml", "").parent
    assert command_prefix(folder / "mine.yaml") == "LUTHIER_RECIPES=other "
    assert command_prefix(folder.parent / "recipes" / "mine.yaml") == ""
