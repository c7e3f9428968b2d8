"""Whose config a file is, flags of shell scripts, and TRL's command line."""

import json

import pytest
import yaml

from luthier.errors import UserError
from luthier.recipe_files.convert import convert_file, read_foreign_config

AXOLOTL = {"base_model": "owner/model", "datasets": [{"path": "a", "type": "alpaca"}]}
FACTORY = {"model_name_or_path": "owner/model", "stage": "sft", "dataset": "x"}
TRL = {"model_name_or_path": "owner/model", "dataset_name": "owner/rows", "learning_rate": 1e-5}


@pytest.mark.parametrize(
    "name, text, project",
    [
        ("a.yml", yaml.safe_dump(AXOLOTL), "axolotl"),
        ("a.yaml", yaml.safe_dump(FACTORY), "LLaMA-Factory"),
        ("a.json", json.dumps(FACTORY, indent="\t"), "LLaMA-Factory"),
        ("a.yaml", yaml.safe_dump(TRL), "TRL"),
    ],
)
def test_whose_config_it_is(name, text, project, workplace):
    assert read_foreign_config(workplace(name, text)).project == project


SCRIPT = """\
#!/bin/bash
MODEL=owner/model
llamafactory-cli train \\
    --model_name_or_path ${MODEL} \\
    --stage dpo --do_train \\
    --learning_rate=1e-5  # a comment
"""


def test_flags_of_a_script_are_read(workplace):
    config = read_foreign_config(workplace("run.sh", SCRIPT))
    assert config.settings == {
        "model_name_or_path": "owner/model", "stage": "dpo", "do_train": True,
        "learning_rate": "1e-5",
    }  # fmt: skip


def test_the_script_of_trl_says_the_method(workplace):
    file = workplace(
        "run.sh",
        "trl dpo --model_name_or_path owner/model --dataset_name owner/pairs --beta 0.3 "
        "--use_peft --lora_r 8 --lora_target_modules q_proj v_proj --eval_strategy steps",
    )
    draft = convert_file(file, None, None).conversion.draft
    assert draft.options["trainer"] == "dpo" and draft.options["lora"] == "default"
    assert draft.value("trainer.args.beta") == 0.3
    assert draft.value("lora.target_modules") == ["q_proj", "v_proj"]
    assert draft.value("dataset.eval.split") == "test"


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.yaml", "defaults:\n- override /lora: none\ntrainer: {}", "recipe of luthier already"),
        ("a.yaml", "distributed_type: FSDP", "config of accelerate"),
        ("a.yaml", "x: 1\ny: 2", "none of them. Its keys: x, y"),
        ("a.yaml", "- 1", "this is not a mapping of keys to values"),
        ("a.yaml", "a: [", "cannot be read as YAML"),
        ("a.sh", "echo hello", "finds no command"),
        ("a.sh", "axolotl train qlora.yml", "luthier convert qlora.yml"),
    ],
)
def test_what_is_no_config_is_refused(name, text, words, workplace):
    with pytest.raises(UserError, match=words):
        read_foreign_config(workplace(name, text))


def test_keys_of_trl(workplace):
    keys = TRL | {
        "dataset_config": "en", "max_length": 512, "packing": True, "use_peft": True,
        "load_in_4bit": True, "torch_dtype": "bfloat16", "gradient_checkpointing": True,
        "warmup_ratio": 0.1, "report_to": "none", "output_dir": "out", "logging_steps": 5,
        "attn_implementation": "flash_attention_2", "assistant_only_loss": True,
    }  # fmt: skip
    file = workplace("sft.yaml", yaml.safe_dump(keys))
    converted = convert_file(file, None, "sft")
    conversion, draft = converted.conversion, converted.conversion.draft
    assert converted.mistakes == []
    outcome = {*conversion.carried, *conversion.dropped, *conversion.needless}
    assert outcome == set(keys)
    assert draft.options["quantization"] == "nf4" and draft.options["lora"] == "default"
    expected = {
        "dataset.path": "owner/rows", "dataset.name": "en", "chat.max_length": 512,
        "trainer.args.packing": True, "model.dtype": "bfloat16",
        "trainer.args.activation_checkpointing": True, "trainer.args.warmup_steps": 0.1,
        "trainer.args.num_train_epochs": 3.0, "trainer.args.logging_steps": 5,
    }  # fmt: skip
    assert {key: draft.value(key) for key in expected} == expected


@pytest.mark.parametrize(
    "method, expected",
    [
        ("sft", {"learning_rate": 2e-5, "lr_scheduler_type": "linear", "warmup_steps": 0,
                 "per_device_train_batch_size": 8, "num_train_epochs": 3.0,
                 "save_strategy": "steps", "logging_steps": 10}),
        ("dpo", {"learning_rate": 1e-6, "gradient_accumulation_steps": 1, "warmup_steps": 0}),
        ("reward", {"center_rewards_coefficient": None, "lr_scheduler_type": "linear"}),
        ("rloo", {"num_generations": 2, "max_completion_length": 512, "learning_rate": 1e-6}),
    ],
)  # fmt: skip
def test_defaults_of_trl_are_written_where_luthier_has_others(method, expected, workplace):
    keys = {"model_name_or_path": "owner/model", "dataset_name": "owner/rows"}
    file = workplace("a.yaml", yaml.safe_dump(keys | {"use_peft": True}))
    draft = convert_file(file, None, method).conversion.draft
    for name, value in expected.items():
        assert draft.settings[f"trainer.args.{name}"].value == value
        assert "TRL's default" in draft.settings[f"trainer.args.{name}"].comment


@pytest.mark.parametrize(
    "method, keys, key",
    [
        ("sft", {}, "dataset_name"),
        ("sft", {"assistant_only_loss": False}, "assistant_only_loss"),
        ("sft", {"assistant_only_loss": True}, None),
        ("dpo", {}, None),
    ],
    ids=["TRL's default", "every turn trains", "the replies train", "pairs"],
)
def test_only_another_choice_of_trained_turns_is_said(method, keys, key, workplace):
    file = workplace("a.yaml", yaml.safe_dump(TRL | keys))
    conversion = convert_file(file, None, method).conversion
    about_turns = [k for k, text in conversion.different.items() if "chat.train_on" in text]
    assert about_turns == ([key] if key else [])
    assert conversion.dropped == {}
    assert set(keys) <= set(conversion.carried)


@pytest.mark.parametrize(
    "argument, value",
    [
        ("$MODEL_PATH", "owner/second"),
        ("${MODEL}/x", "owner/first/x"),
        ("$MODEL-x", "owner/first-x"),
        ("'[no yaml'", "[no yaml"),
    ],
)
def test_values_of_a_script(argument, value, workplace):
    script = (
        "MODEL=owner/first\nMODEL_PATH='owner/second'\n"
        f"trl sft --model_name_or_path {argument} --dataset_name owner/rows\n"
    )
    assert read_foreign_config(workplace("run.sh", script)).settings["model_name_or_path"] == value


@pytest.mark.parametrize(
    "keys, message",
    [
        (AXOLOTL | {"micro_batch_size": "auto"}, "micro_batch_size: 'auto' is not a whole number"),
        (AXOLOTL | {"micro_batch_size": 1.5}, "micro_batch_size: 1.5 is not a whole number"),
        (AXOLOTL | {"learning_rate": "fast"}, "learning_rate: 'fast' is not a number"),
        (AXOLOTL | {"lr_scheduler_kwargs": "x"}, "lr_scheduler_kwargs: 'x' is not a mapping"),
        (AXOLOTL | {"plugins": 3}, "plugins: 3 is not a list"),
        (AXOLOTL | {"optimizer": ["adamw"]}, "optimizer: .* is not a single value"),
        (AXOLOTL | {"datasets": [{"path": "a", "type": "chat_template", "roles": ["x"]}]},
         "datasets: roles: .* is not a mapping"),
        (FACTORY | {"dataset_dir": "ONLINE", "lora_rank": "auto"}, "lora_rank: 'auto' is not a wh"),
        (FACTORY | {"dataset_dir": "ONLINE", "val_size": "x"}, "val_size: 'x' is not a number"),
        (FACTORY | {"dataset_dir": {"x": "y"}}, "dataset: x: 'y' is not a mapping"),
        (FACTORY | {"dataset": "a,b", "dataset_dir": "ONLINE", "mix_strategy": "interleave_under",
                    "interleave_probs": "0.5"}, "interleave_probs: 1 numbers for 2 datasets"),
        (TRL | {"lora_r": "x", "use_peft": True}, "lora_r: 'x' is not a whole number"),
        (TRL | {"reward_funcs": 3}, "reward_funcs: 3 is not a list"),
    ],
)  # fmt: skip
def test_a_value_of_another_form_is_named(keys, message, workplace):
    file = workplace("a.yaml", yaml.safe_dump(keys))
    with pytest.raises(UserError, match=message):
        convert_file(file, None, None)


@pytest.mark.parametrize(
    "keys",
    [AXOLOTL | {"val_set_size": 0.1}, FACTORY | {"dataset_dir": "ONLINE", "val_size": 0.1}, TRL],
    ids=["axolotl", "LLaMA-Factory", "TRL"],
)
def test_an_unquoted_no_is_no_strategy(keys, workplace):
    text = yaml.safe_dump(keys) + "save_strategy: no\neval_strategy: no\n"
    conversion = convert_file(workplace("a.yaml", text), None, None).conversion
    assert conversion.draft.value("trainer.args.save_strategy") == "no"
    assert conversion.draft.value("trainer.args.eval_strategy") == "no"
    assert {"save_strategy", "eval_strategy"} <= set(conversion.carried)


@pytest.mark.parametrize(
    "keys",
    [AXOLOTL | {"val_set_size": 0.1}, FACTORY | {"dataset_dir": "ONLINE", "val_size": 0.1}],
    ids=["axolotl", "LLaMA-Factory"],
)
def test_the_old_name_of_eval_strategy_is_carried_over(keys, workplace):
    file = workplace("a.yaml", yaml.safe_dump(keys | {"evaluation_strategy": "epoch"}))
    conversion = convert_file(file, None, None).conversion
    assert conversion.draft.value("trainer.args.eval_strategy") == "epoch"
    assert "evaluation_strategy" in conversion.carried and conversion.dropped == {}


@pytest.mark.parametrize(
    "keys", [FACTORY | {"dataset_dir": "ONLINE"}, TRL], ids=["LLaMA-Factory", "TRL"]
)
def test_every_tracker_of_luthier_is_carried_over(keys, workplace):
    file = workplace("a.yaml", yaml.safe_dump(keys | {"report_to": "trackio"}))
    conversion = convert_file(file, None, None).conversion
    assert conversion.draft.options["tracker"] == "trackio" and conversion.dropped == {}
