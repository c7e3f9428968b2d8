"""What is typed reaches the run, and wins over files."""

import pytest

from luthier.config import load_config

Q = "recipe=quickstart"

REACHES = {
    "a listed setting": ("trainer.args.learning_rate=5e-4", "learning_rate", 5e-4),
    "a setting that no file lists": ("trainer.args.weight_decay=0.1", "weight_decay", 0.1),
    "the same with a plus": ("+trainer.args.adam_beta2=0.9", "adam_beta2", 0.9),
    "the same with two": ("++trainer.args.adam_beta2=0.9", "adam_beta2", 0.9),
    "a number in quotes": ("trainer.args.learning_rate='1e-4'", "learning_rate", 1e-4),
    "a whole number as a float": ("trainer.args.save_total_limit=2.0", "save_total_limit", 2),
    "no for an option": ("trainer.args.eval_strategy=no", "eval_strategy", "no"),
    "false for the option no": ("trainer.args.eval_strategy=false", "eval_strategy", "no"),
    "a mapping": ("trainer.args.lr_scheduler_kwargs={a:1}", "lr_scheduler_kwargs", {"a": 1}),
    "a list": ("trainer.args.optim_target_modules=[q,k]", "optim_target_modules", ["q", "k"]),
}


@pytest.mark.parametrize("override, name, value", REACHES.values(), ids=REACHES)
def test_a_setting_reaches_the_trainer(override, name, value):
    loaded = load_config([Q, override])
    assert loaded.config.trainer.args[name] == value
    assert type(loaded.config.trainer.args[name]) is type(value)
    assert loaded.resolved["trainer"]["args"][name] == value
    assert loaded.overrides == [Q, override]


def test_lora_takes_what_no_file_lists():
    assert load_config([Q, "lora.use_rslora=true"]).config.lora["use_rslora"] is True


def test_a_group_as_a_mapping_is_merged():
    lora = load_config([Q, "lora={r: 4, use_dora: true}"]).config.lora
    assert (lora["r"], lora["use_dora"], lora["lora_alpha"]) == (4, True, 32)


def test_a_key_can_be_removed():
    assert "lora_dropout" not in load_config([Q, "~lora.lora_dropout"]).config.lora


def test_resolved_is_whole_and_plain():
    loaded = load_config([Q])
    assert loaded.resolved["model"]["attention"] == "auto"
    assert loaded.resolved == loaded.config.model_dump(mode="json")


def test_a_typed_group_replaces_what_the_recipe_says():
    assert load_config([Q]).config.lora["lora_dropout"] == 0.0
    assert load_config([Q, "lora=default"]).config.lora["lora_dropout"] == 0.05
    assert load_config([Q, "lora=none", "quantization=none"]).config.lora == {}


def test_a_typed_way_of_holding_out_replaces_the_other():
    chosen = load_config([Q, "dataset.eval.count=50"]).config.dataset.eval
    assert (chosen.count, chosen.path) == (50, None)


def test_typed_epochs_lift_the_steps_of_a_file():
    args = load_config([Q, "trainer.args.num_train_epochs=3"]).config.trainer.args
    assert (args["num_train_epochs"], args["max_steps"]) == (3, -1)
    both = load_config([Q, "trainer.args.num_train_epochs=3", "trainer.args.max_steps=5"]).config
    assert both.trainer.args["max_steps"] == 5


def test_the_last_of_two_wins():
    assert load_config([Q, "seed=1", "seed=2"]).config.seed == 2


def test_debug_wins_over_the_recipe():
    config = load_config([Q, "debug=overfit"]).config
    assert (config.trainer.args["max_steps"], config.dataset.eval.path) == (60, None)
