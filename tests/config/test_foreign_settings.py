"""Names of other trainers: each is answered with a setting of luthier that a shell takes."""

import shlex

import pytest

from luthier.config import load_config
from luthier.config.foreign_settings import FOREIGN_SETTINGS
from luthier.errors import UserError, format_for_hydra

Q = "recipe=quickstart"
WRONG_NAMES = ("no such key", "is not a setting", "no such group", "option", "is not set here")

OTHER_VALUES = {
    "tokenizer": "org/name", "train_on": ["user"], "r": 4, "path": "x.jsonl", "rewards": ["number"],
    "add_tokens": ["<a>"], "add_special_tokens": ["<a>"], "train": ["mlp"], "freeze": ["mlp"],
    "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "dtype": "float32",
    "optim": "adamw_torch", "lr_scheduler_type": "linear", "eval_strategy": "steps",
    "share": 0.1, "plus_ratio": 4.0, "loss_type": "nll", "mode": "offline",
}  # fmt: skip
"""The last name of a key -> a value that it takes, where true and 3 do not do."""
BOOLEAN = {"packing", "eval_packing", "activation_offloading", "use_liger_kernel", "overwrite"}
BOOLEAN |= {"torch_compile", "use_dora", "use_rslora", "activation_checkpointing"}
TEXT = {"template", "revision", "attention", "split", "system", "cache", "teacher", "project"}
TEXT |= {"entity", "name", "uri", "experiment", "init_lora_weights"}


def example_of(key):
    name = key.rpartition(".")[2]
    if name in BOOLEAN:
        return True
    return OTHER_VALUES.get(name, "x" if name in TEXT else 3)


def mistakes_in_names(words):
    """Return what a config with these overrides says of names that do not exist."""
    try:
        load_config([Q, *words])
    except UserError as error:
        lines = str(error).splitlines()
        return [line for line in lines if any(text in line for text in WRONG_NAMES)]
    return []


def test_the_table_knows_the_names_that_people_type():
    names = """micro_batch_size sequence_len cutoff_len num_epochs lora_rank lora_r load_in_4bit
        sample_packing val_set_size adapter base_model max_seq_length warmup_ratio wandb_project"""
    assert set(names.split()) <= set(FOREIGN_SETTINGS)
    assert len(FOREIGN_SETTINGS) > 150


def test_each_key_of_the_table_exists():
    keys = {setting.key for setting in FOREIGN_SETTINGS.values() if setting.key}
    words = [f"{key}={format_for_hydra(example_of(key))}" for key in sorted(keys)]
    # Another method than sft has another class's settings.
    beta, *others = sorted(words, key=lambda word: not word.startswith("trainer.args.beta"))
    assert len(others) > 40
    assert mistakes_in_names([*others, "dataset.eval.count=3"]) == []
    assert mistakes_in_names(["trainer=dpo", beta]) == []


TYPED = sorted({t for s in FOREIGN_SETTINGS.values() for t in s.values.values() if t})


@pytest.mark.parametrize("text", TYPED)
def test_what_stands_for_a_value_can_be_typed(text):
    assert mistakes_in_names(shlex.split(text)) == []


@pytest.mark.parametrize(
    "typed, says",
    [
        ("micro_batch_size=2", "written trainer.args.per_device_train_batch_size=2."),
        ("trainer.args.num_epochs=3", "trl.SFTConfig. In luthier it is written trainer.args.num_t"),
        ("lora.lora_rank=8", "peft.LoraConfig. In luthier it is written lora.r=8."),
        ("lora_target=[q_proj,v_proj]", "written 'lora.target_modules=[q_proj,v_proj]'."),
        ("val_set_size=0.1", "written dataset.eval.share=0.1."),
        ("val_set_size=200", "written dataset.eval.count=200."),
        ("load_in_4bit=true", "written quantization=nf4."),
        ("load_in_4bit=false", "Leave it out: luthier does this by default."),
        ("adapter=qlora", "written lora=default quantization=nf4."),
        ("adapter=mine", "it is lora or quantization. Other options: luthier explain lora."),
        ("datasets=a.jsonl", "no such key. One source is dataset=files dataset.path=PATH"),
    ],
)
def test_the_answer_has_the_value(typed, says):
    with pytest.raises(UserError, match="1 mistake") as caught:
        load_config([Q, typed])
    assert says in str(caught.value)
