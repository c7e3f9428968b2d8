"""The JSON Schema of a recipe: bundled recipes fit it, and mistakes do not."""

from pathlib import Path

import jsonschema
import pytest
import yaml
from omegaconf import OmegaConf

from luthier.config.json_schema import (
    OWNER,
    config_schema,
    describe_type,
    find_node,
    recipe_schema,
    walk_keys,
)
from luthier.config.load import load_config

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator():
    schema = recipe_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_bundled_recipe_fits(path, validator):
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert [error.message for error in validator.iter_errors(content)] == []


MISTAKES = {
    "key": ("chat: {max_lenght: 3}", "max_lenght"),
    "top key": ("micro_batch_size: 2", "micro_batch_size"),
    "setting of a library": ("trainer: {args: {lerning_rate: 0.1}}", "lerning_rate"),
    "setting of an adapter": ("lora: {ranks: 8}", "ranks"),
    "setting that luthier decides": ("trainer: {args: {max_length: 8}}", "max_length"),
    "setting in a source": ("dataset: {sources: {a: {paht: x}}}", "paht"),
    "type": ("seed: x", "x"),
    "range": ("trainer: {args: {learning_rate: -1}}", "-1"),
    "choice": ("chat: {on_long: cut}", "cut"),
    "option": ("defaults: [override /lora: huge]", "huge"),
    "group": ("defaults: [override /loras: small]", "loras"),
}


@pytest.mark.parametrize("text, part", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_does_not_fit(text, part, validator):
    (error, *_) = validator.iter_errors(yaml.safe_load(text))
    assert part in error.message


@pytest.mark.parametrize(
    "text",
    [
        "seed: ${oc.env:SEED,3}",
        "trainer: {args: {learning_rate: '${oc.env:RATE}'}}",
        "defaults: [quickstart, my_base, _self_, override /lora: small, override /debug: fast]",
        "hydra: {sweeper: {n_trials: 3}}",
        "dataset: {sources: {mine: {path: a.jsonl, repeats: 2}}}",
        "model: {kwargs: {anything: 1}}",
        "trainer: {args: {beta: 0.1, num_generations: 4}}",
    ],
)
def test_what_a_recipe_may_say_fits(text, validator):
    assert [error.message for error in validator.iter_errors(yaml.safe_load(text))] == []


def test_every_key_says_what_it_means_and_whose_it_is():
    for method in ("sft", "dpo", "grpo"):
        root = config_schema({"trainer": {"method": method}, "lora": {"method": "lora"}})
        keys = dict(walk_keys(root))
        assert len(keys) > 200
        assert [key for key, node in keys.items() if OWNER not in node] == []
        # wandb documents all of its arguments but one, which is there to be refused.
        silent = [key for key, node in keys.items() if not node.get("description")]
        assert silent == ["tracker.wandb.anonymous"]


def test_every_key_of_a_loaded_config_is_in_the_schema():
    resolved = load_config(["recipe=quickstart"]).resolved
    root = config_schema(resolved)

    def missing(value, key):
        if find_node(root, key) is None:
            return [key]
        below = (
            value.items()
            if isinstance(value, dict) and "properties" in find_node(root, key)
            else ()
        )
        return [name for part, inner in below for name in missing(inner, f"{key}.{part}")]

    assert [key for name, value in resolved.items() for key in missing(value, name)] == []


@pytest.mark.parametrize(
    "key, words",
    {
        "chat.max_length": "a whole number of at least 1, or null",
        "dataset.eval.share": "a number above 0 and below 1, or null",
        "chat.on_long": "one of turns, drop, error",
        "chat.train_on": "one of all, last or a list of strings",
        "trainer.args.learning_rate": "a number of at least 0",
        "trainer.args.save_total_limit": "a whole number of at least 0, or null",
        "lora.bias": "one of none, all, lora_only",
        "trainer.args.activation_checkpointing": "auto or true or false, or null",
        "dataset.columns": "a mapping",
    }.items(),
)
def test_types_in_words(key, words):
    assert describe_type(find_node(config_schema({"seed": 1}), key)) == words
