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
        ("a.yaml", "- 1", "no mapping"),
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
