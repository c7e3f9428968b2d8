"""Configs of LLaMA-Factory: what their keys become, and that none is lost."""

import json

import pytest
import yaml

from luthier.config import load_config
from luthier.errors import UserError
from luthier.recipe_files.convert import convert_file

INFO = {
    "plain": {"file_name": "plain.json"},
    "asked": {"file_name": "asked.csv",
              "columns": {"prompt": "question", "response": "answer", "system": "setting"}},
    "chats": {"hf_hub_url": "owner/chats", "formatting": "sharegpt", "subset": "en",
              "split": "train_sft", "columns": {"messages": "dialogue", "tools": "functions"}},
    "openai": {"file_name": "m.jsonl", "formatting": "sharegpt", "columns": {
        "messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user"}},
    "pairs": {"file_name": "pairs.json", "formatting": "sharegpt", "ranking": True,
              "columns": {"messages": "conversations", "chosen": "good", "rejected": "bad"}},
    "votes": {"file_name": "votes.json", "formatting": "sharegpt",
              "columns": {"messages": "messages", "kto_tag": "label"},
              "tags": {"role_tag": "role", "content_tag": "content"}},
    "wiki": {"file_name": "wiki.txt", "columns": {"prompt": "text"}},
    "films": {"file_name": "films.json", "formatting": "sharegpt",
              "columns": {"messages": "messages", "videos": "videos"}},
    "odd": {"file_name": "odd.json", "formatting": "sharegpt",
            "tags": {"role_tag": "who", "content_tag": "what"}},
    "script": {"script_url": "loader"},
}  # fmt: skip
BASE = {
    "model_name_or_path": "owner/model", "stage": "sft", "do_train": True,
    "finetuning_type": "lora", "dataset": "plain", "template": "qwen", "output_dir": "saves/x",
}  # fmt: skip


def convert(workplace, **keys):
    """Convert a config of these keys; every key of it must have come to something."""
    source = {name: value for name, value in {**BASE, **keys}.items() if value is not ...}
    workplace("data/dataset_info.json", json.dumps(INFO))
    file = workplace("examples/mine.yaml", yaml.safe_dump(source))
    converted = convert_file(file, None, None)
    conversion = converted.conversion
    outcome = {*conversion.carried, *conversion.dropped, *conversion.needless, *conversion.empty}
    assert outcome == set(source)
    assert converted.mistakes == []
    return conversion


CASES = {
    "its own defaults": (
        {},
        {"lora.r": 8, "lora.lora_alpha": 16, "lora.lora_dropout": 0.0,
         "lora.target_modules": "all-linear", "chat.max_length": 2048, "dataset.eval.share": None,
         "trainer.args.learning_rate": 5e-5, "trainer.args.num_train_epochs": 3.0,
         "trainer.args.per_device_train_batch_size": 8, "trainer.args.lr_scheduler_type": "linear",
         "trainer.args.warmup_steps": 0, "trainer.args.save_steps": 500,
         "trainer.args.packing": False, "trainer.args.activation_checkpointing": True},
    ),
    "an adapter": (
        {"lora_rank": 16, "lora_alpha": 8, "lora_target": "q_proj,v_proj", "use_dora": True,
         "additional_target": "embed_tokens", "loraplus_lr_ratio": 16.0, "pissa_init": True,
         "pissa_iter": 4, "pissa_convert": True, "bf16": True},
        {"lora.r": 16, "lora.lora_alpha": 8, "lora.target_modules": ["q_proj", "v_proj"],
         "lora.use_dora": True, "lora.modules_to_save": ["embed_tokens"], "lora.plus_ratio": 16.0,
         "lora.init_lora_weights": "pissa_niter_4", "model.dtype": "bfloat16"},
    ),
    "full": (
        {"finetuning_type": "full", "pure_bf16": True, "enable_liger_kernel": True},
        {"trainer.args.bf16": True, "trainer.args.use_liger_kernel": True},
    ),
    "the command says that it trains": ({"do_train": ...}, {"dataset.path": "data/plain.json"}),
    "oft": (
        {"finetuning_type": "oft", "oft_block_size": 16, "oft_target": "all"},
        {"lora.oft_block_size": 16, "lora.r": 0, "lora.target_modules": "all-linear"},
    ),
    "training": (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "warmup_ratio": 0.1,
         "learning_rate": "1e-4", "optim": "adamw_bnb_8bit", "max_steps": 7, "seed": 3,
         "disable_shuffling": True, "disable_gradient_checkpointing": True, "max_grad_norm": 0.5},
        {"trainer.args.per_device_train_batch_size": 1, "trainer.args.warmup_steps": 0.1,
         "trainer.args.gradient_accumulation_steps": 8, "trainer.args.learning_rate": 1e-4,
         "trainer.args.optim": "adamw_bnb_8bit", "trainer.args.max_steps": 7, "seed": 3,
         "trainer.args.train_sampling_strategy": "sequential",
         "trainer.args.activation_checkpointing": False, "trainer.args.max_grad_norm": 0.5},
    ),
    "held out": (
        {"val_size": 0.1, "eval_strategy": "steps", "eval_steps": 50, "early_stopping_steps": 2},
        {"dataset.eval.share": 0.1, "trainer.args.eval_strategy": "steps",
         "trainer.args.eval_steps": 50, "trainer.evaluation.patience": 2},
    ),
    "turns": (
        {"mask_history": True, "neat_packing": True, "default_system": "Hi", "max_samples": 5,
         "enable_thinking": False},
        {"chat.train_on": "last", "trainer.args.packing": True, "dataset.system": "Hi",
         "dataset.max_rows": 5, "chat.variables.enable_thinking": False},
    ),
    "columns": (
        {"dataset": "asked"},
        {"dataset.path": "data/asked.csv", "dataset.type": "alpaca", "dataset.columns":
         {"instruction": "question", "output": "answer", "system": "setting"}},
    ),
    "a hub dataset": (
        {"dataset": "chats"},
        {"dataset.path": "owner/chats", "dataset.type": "sharegpt", "dataset.name": "en",
         "dataset.split": "train_sft",
         "dataset.columns": {"conversations": "dialogue", "tools": "functions"}},
    ),
    "images": (
        {"dataset": "openai"},
        {"dataset.type": "messages", "dataset.image_placeholder": "<image>"},
    ),
    "a mixture": (
        {"dataset": "plain,chats", "mix_strategy": "interleave_under",
         "interleave_probs": "0.7,0.3", "max_samples": 9},
        {"dataset.sources.plain.path": "data/plain.json", "dataset.mix": "interleave",
         "dataset.sources.plain.weight": 0.7, "dataset.sources.chats.weight": 0.3,
         "dataset.sources.chats.max_rows": 9},
    ),
    "evaluation sets": (
        {"eval_dataset": "chats", "eval_strategy": "epoch"},
        {"dataset.eval.sets.chats.path": "owner/chats", "trainer.args.eval_strategy": "epoch"},
    ),
    "pre-training": (
        {"stage": "pt", "dataset": "wiki"},
        {"dataset.type": "text", "trainer.args.packing": True},
    ),
    "dpo": (
        {"stage": "dpo", "dataset": "pairs", "pref_beta": 0.2, "pref_ftx": 0.5},
        {"dataset.type": "preference", "dataset.columns": {"chosen": "good", "rejected": "bad"},
         "trainer.args.beta": 0.2, "trainer.args.loss_type": ["sigmoid", "sft"],
         "trainer.args.loss_weights": [1.0, 0.5]},
    ),
    "simpo": (
        {"stage": "dpo", "dataset": "pairs", "pref_loss": "simpo", "simpo_gamma": 0.7},
        {"trainer.args.loss_type": "simpo", "trainer.args.simpo_gamma": 0.7,
         "trainer.args.cpo_alpha": 0.0, "trainer.args.beta": 0.1},
    ),
    "kto": (
        {"stage": "kto", "dataset": "votes", "kto_chosen_weight": 1.5},
        {"dataset.type": "unpaired", "trainer.args.desirable_weight": 1.5},
    ),
    "wandb": (
        {"report_to": "wandb", "run_name": "mine"},
        {"tracker.wandb.name": "mine"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("keys, expected", CASES.values(), ids=CASES)
def test_what_its_keys_become(keys, expected, workplace):
    settings = convert(workplace, **keys).draft.settings
    recipe = {key: setting.value for key, setting in settings.items()}
    assert {key: recipe.get(key, "not set") for key in expected} == expected


OPTIONS = {
    "qlora": (
        {"quantization_bit": 4, "quantization_method": "bnb"},
        {"lora": "default", "quantization": "nf4"},
    ),
    "fp4": ({"quantization_bit": 4, "quantization_type": "fp4"}, {"quantization": "fp4"}),
    "8 bits": ({"quantization_bit": 8}, {"quantization": "int8"}),
    "full": ({"finetuning_type": "full"}, {"lora": None, "trainer": "sft"}),
    "orpo": ({"stage": "dpo", "dataset": "pairs", "pref_loss": "orpo"}, {"trainer": "orpo"}),
    "reward": ({"stage": "rm", "dataset": "pairs"}, {"trainer": "reward"}),
    "a mixture": ({"dataset": "plain,chats"}, {"dataset": "mixture"}),
}


@pytest.mark.parametrize("keys, expected", OPTIONS.values(), ids=OPTIONS)
def test_which_options_it_chooses(keys, expected, workplace):
    options = convert(workplace, **keys).draft.options
    assert {group: options.get(group) for group in expected} == expected


DROPPED = {
    "use_galore": (True, "no equal"),
    "adapter_name_or_path": ("saves/old", "luthier merge"),
    "deepspeed": ("examples/deepspeed/ds_z3_config.json", "belongs to the launch"),
    "report_to": ("swanlab", "luthier logs to"),
    "a_new_key": (1, "does not know this key"),
    "optim": ("adamw9", "luthier refuses trainer.args.optim"),
}


@pytest.mark.parametrize("key", DROPPED)
def test_what_it_cannot_carry_over_has_a_reason(key, workplace):
    value, reason = DROPPED[key]
    assert reason in convert(workplace, **{key: value}).dropped[key]


def test_frozen_layers_are_not_trained_in_silence(workplace):
    conversion = convert(workplace, finetuning_type="freeze", freeze_trainable_layers=2)
    assert "without it all weights train" in conversion.dropped["freeze_trainable_layers"]


REFUSED = {
    "online": ({"stage": "ppo"}, "does not train this way"),
    "merging": ({"export_dir": "out", "do_train": ...}, "luthier merge"),
    "talking": ({"do_train": ..., "dataset": ...}, "trains nothing"),
    "answers": ({"do_train": ..., "do_predict": True}, "luthier generate"),
    "v1": ({"model": "a", "model_class": "llm", "stage": ...}, "experimental"),
    "an unknown name": ({"dataset": "plane"}, "Did you mean plain"),
    "videos": ({"dataset": "films"}, "no videos"),
    "other keys of messages": ({"dataset": "odd"}, "dataset.map"),
    "a script": ({"dataset": "script"}, "script_url"),
    "no file": ({"dataset_dir": "elsewhere"}, "--dataset-info FILE"),
}


@pytest.mark.parametrize("keys, words", REFUSED.values(), ids=REFUSED)
def test_what_luthier_does_not_train_is_refused(keys, words, workplace):
    with pytest.raises(UserError, match=words):
        convert(workplace, **keys)


def test_names_are_looked_up_where_it_is_said(workplace):
    info = workplace("elsewhere/info.json", json.dumps({"rows": {"file_name": "r.json"}}))
    file = workplace("mine.yaml", yaml.safe_dump({**BASE, "dataset": "rows"}))
    conversion = convert_file(file, info, None).conversion
    assert conversion.draft.value("dataset.path") == "elsewhere/r.json"


def test_names_of_the_hub_need_no_file(workplace):
    file = workplace("mine.yaml", yaml.safe_dump(
        {**BASE, "dataset": "owner/rows", "dataset_dir": "ONLINE"}))  # fmt: skip
    conversion = convert_file(file, None, None).conversion
    assert conversion.draft.value("dataset.path") == "owner/rows"


def test_the_recipe_loads_as_a_file(workplace):
    conversion = convert(workplace, quantization_bit=4, val_size=0.1)
    workplace("recipes/mine.yaml", conversion.draft.text())
    config = load_config(["recipe=mine"]).config
    assert config.quantization.bits == 4 and config.dataset.path == "data/plain.json"
