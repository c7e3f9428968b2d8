"""axolotl's configs: what its keys become, and that none is lost."""

from itertools import pairwise

import pytest
import yaml

from luthier.config import load_config
from luthier.errors import UserError
from luthier.recipe_files.convert import convert_file

BASE = {
    "base_model": "owner/model",
    "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
    "learning_rate": "2e-4",
    "output_dir": "./out",
}


def convert(workplace, **keys):
    """Convert a config of these keys; every key of it must have come to something."""
    source = {name: value for name, value in {**BASE, **keys}.items() if value is not ...}
    file = workplace("mine.yml", yaml.safe_dump(source))
    converted = convert_file(file, None, None)
    conversion = converted.conversion
    outcome = {*conversion.carried, *conversion.dropped, *conversion.needless, *conversion.empty}
    assert outcome == set(source)
    assert converted.mistakes == []
    return conversion


def settings(conversion):
    """Return the values of the recipe by key."""
    return {key: setting.value for key, setting in conversion.draft.settings.items()}


QLORA = {
    "adapter": "qlora", "load_in_4bit": True, "lora_r": 32, "lora_alpha": 16,
    "lora_dropout": 0.05, "lora_target_linear": True, "lora_modules_to_save": ["embed_tokens"],
    "peft_use_rslora": True, "loraplus_lr_ratio": 16, "bnb_config_kwargs": {
        "bnb_4bit_use_double_quant": False}, "bf16": True,
}  # fmt: skip
CASES = {
    "batches": (
        {"micro_batch_size": 2, "gradient_accumulation_steps": 4, "num_epochs": 3, "max_steps": 9},
        {"trainer.args.per_device_train_batch_size": 2, "trainer.args.num_train_epochs": 3,
         "trainer.args.per_device_eval_batch_size": 2, "trainer.args.max_steps": 9,
         "trainer.args.gradient_accumulation_steps": 4},
    ),
    "the batch in all": (
        {"micro_batch_size": 2, "batch_size": 8, "eval_batch_size": 1},
        {"trainer.args.gradient_accumulation_steps": 4,
         "trainer.args.per_device_eval_batch_size": 1},
    ),
    "its own defaults": (
        {},
        {"trainer.args.per_device_train_batch_size": 1, "trainer.args.lr_scheduler_type": "cosine",
         "trainer.args.warmup_steps": 0.03, "trainer.args.weight_decay": 0.0,
         "trainer.args.save_strategy": "epoch", "trainer.args.save_total_limit": 4,
         "chat.max_length": 512, "chat.on_long": "drop", "dataset.eval.share": None,
         "trainer.args.packing": False, "trainer.args.eval_strategy": "no"},
    ),
    "qlora": (
        QLORA,
        {"lora.r": 32, "lora.lora_alpha": 16, "lora.lora_dropout": 0.05,
         "lora.target_modules": "all-linear", "lora.modules_to_save": ["embed_tokens"],
         "lora.use_rslora": True, "lora.plus_ratio": 16, "model.dtype": "bfloat16",
         "quantization.bnb_4bit_use_double_quant": False},
    ),
    "full in bfloat16": ({"bf16": True}, {"trainer.args.bf16": True}),
    "lengths": (
        {"sequence_len": 4096, "excess_length_strategy": "raise", "sample_packing": True,
         "eval_sample_packing": False, "pad_to_sequence_len": True, "group_by_length": True},
        {"chat.max_length": 4096, "chat.on_long": "error", "trainer.args.packing": True,
         "trainer.args.eval_packing": False, "trainer.padding": "max_length",
         "trainer.args.train_sampling_strategy": "group_by_length"},
    ),
    "held out by share": (
        {"val_set_size": 0.05, "evals_per_epoch": 4, "saves_per_epoch": 2, "num_epochs": 2,
         "early_stopping_patience": 3},
        {"dataset.eval.share": 0.05, "trainer.args.eval_strategy": "steps",
         "trainer.args.eval_steps": 0.125, "trainer.args.save_steps": 0.25,
         "trainer.evaluation.patience": 3},
    ),
    "held out by count": (
        {"val_set_size": 200, "eval_steps": 50, "save_steps": 100},
        {"dataset.eval.share": None, "dataset.eval.count": 200, "trainer.args.eval_steps": 50,
         "trainer.args.save_strategy": "steps", "trainer.args.save_steps": 100},
    ),
    "optimizer": (
        {"optimizer": "ao_adamw_8bit", "adam_beta2": 0.95, "adam_epsilon": "1e-5",
         "lr_scheduler": "cosine", "cosine_min_lr_ratio": 0.1, "warmup_ratio": 0.1,
         "max_grad_norm": 1.0, "optim_args": {"a": 1}, "embedding_lr": 1e-5},
        {"trainer.args.optim": "adamw_torch_8bit", "trainer.args.adam_beta2": 0.95,
         "trainer.args.adam_epsilon": 1e-5, "trainer.args.warmup_steps": 0.1,
         "trainer.args.lr_scheduler_type": "cosine_with_min_lr",
         "trainer.args.lr_scheduler_kwargs": {"min_lr_rate": 0.1},
         "trainer.args.optim_args": "a=1",
         "trainer.optimizer.groups": [{"match": "embed_tokens", "learning_rate": 1e-5}]},
    ),
    "muon": ({"optimizer": "muon"}, {"trainer.optimizer.name": "muon"}),
    "wandb": (
        {"wandb_project": "p", "wandb_entity": "e", "wandb_name": "n", "wandb_log_model": "end"},
        {"tracker.wandb.project": "p", "tracker.wandb.entity": "e", "tracker.wandb.name": "n",
         "tracker.artifacts": True},
    ),
    "alpaca": (
        {"datasets": [{"path": "a.json", "type": "alpaca"}], "train_on_inputs": True},
        {"dataset.path": "a.json", "chat.train_on": ["system", "user", "assistant"]},
    ),
    "sharegpt": (
        {"datasets": [{
            "path": "owner/chats", "type": "chat_template", "split": "train[:10%]", "name": "en",
            "field_messages": "turns", "roles_to_train": ["gpt", "human"],
            "message_property_mappings": {"role": "from", "content": "value"}}]},
        {"dataset.path": "owner/chats", "dataset.type": "sharegpt", "dataset.name": "en",
         "dataset.columns": {"conversations": "turns"}, "dataset.split": "train[:10%]",
         "dataset.train_on": ["assistant", "user"]},
    ),
    "several sources": (
        {"datasets": [{"path": "a/x.jsonl", "type": "chat_template"},
                      {"path": "b/x.jsonl", "type": "alpaca"}],
         "dataset_exact_deduplication": True, "seed": 7},
        {"dataset.sources.x.path": "a/x.jsonl", "dataset.sources.x_2.path": "b/x.jsonl",
         "dataset.deduplicate": "exact", "seed": 7},
    ),
    "files by the loader's name": (
        {"datasets": [{"path": "json", "data_files": ["a.jsonl"], "type": "completion",
                       "field": "body"}]},
        {"dataset.path": ["a.jsonl"], "dataset.type": "text", "dataset.columns": {"text": "body"},
         "dataset.eval.share": None},
    ),
    "pre-training": (
        {"datasets": ..., "pretraining_dataset": {"path": "owner/web", "name": "en"},
         "max_steps": 100},
        {"dataset.path": "owner/web", "dataset.type": "text", "dataset.streaming": True},
    ),
    "columns that it describes": (
        {"datasets": [{"path": "q.csv", "type": {
            "field_instruction": "question", "field_output": "answer", "system_prompt": "Be brief.",
            "format": "Q: {instruction}"}}]},
        {"dataset.type": "prompt_completion", "dataset.system": "Be brief.",
         "dataset.columns": {"prompt": "question", "completion": "answer"}},
    ),
    "evaluation sets": (
        {"test_datasets": [{"path": "held.jsonl", "type": "chat_template"}], "eval_steps": 5},
        {"dataset.eval.sets.held.path": "held.jsonl", "dataset.eval.share": None},
    ),
    "dpo": (
        {"rl": "dpo", "rl_beta": 0.2, "dpo_loss_type": ["sigmoid", "sft"],
         "dpo_loss_weights": [1.0, 0.2], "datasets": [
             {"path": "p.jsonl", "type": "chat_template.default", "field_messages": "conversation",
              "field_chosen": "good", "field_rejected": "bad"}]},
        {"trainer.args.beta": 0.2, "trainer.args.loss_type": ["sigmoid", "sft"],
         "trainer.args.loss_weights": [1.0, 0.2], "dataset.type": "preference",
         "dataset.columns": {"chosen": "good", "rejected": "bad"}},
    ),
    "ipo": (
        {"rl": "ipo", "datasets": [{"path": "p.jsonl", "type": "chatml.intel"}]},
        {"trainer.args.loss_type": "ipo", "dataset.columns": {"prompt": "question"}},
    ),
    "simpo": (
        {"rl": "simpo", "rl_beta": 2.0, "cpo_alpha": 0.5, "simpo_gamma": 1.0,
         "datasets": [{"path": "p.jsonl", "type": "chatml.ultra"}]},
        {"trainer.args.loss_type": "simpo", "trainer.args.beta": 2.0,
         "trainer.args.simpo_gamma": 1.0, "trainer.args.cpo_alpha": 0.5},
    ),
    "kto": (
        {"rl": "kto", "kto_desirable_weight": 0.2,
         "datasets": [{"path": "k.jsonl", "type": "llama3.argilla"}]},
        {"trainer.args.desirable_weight": 0.2, "dataset.type": "unpaired"},
    ),
    "a reward model": (
        {"reward_model": True, "num_labels": 1, "center_rewards_coefficient": 0.01,
         "datasets": [{"path": "p.jsonl", "type": "bradley_terry.chat_template"}]},
        {"trainer.args.center_rewards_coefficient": 0.01, "dataset.type": "preference"},
    ),
    "speed": (
        {"gradient_checkpointing": "offload", "torch_compile": True, "liger_rope": True,
         "plugins": ["axolotl.integrations.liger.LigerPlugin"], "flex_attention": True},
        {"trainer.args.activation_offloading": True, "trainer.args.torch_compile": True,
         "trainer.args.use_liger_kernel": True, "model.attention": "flex_attention"},
    ),
    "new tokens": (
        {"tokens": ["<a>"], "special_tokens": {"additional_special_tokens": ["<b>"]}},
        {"model.add_tokens": ["<a>"], "model.add_special_tokens": ["<b>"]},
    ),
    "a template": (
        {"chat_template": "jinja", "chat_template_jinja": "{{ messages }}"},
        {"chat.template": "{{ messages }}"},
    ),
    "parts of the weights": ({"unfrozen_parameters": ["lm_head"]}, {"model.train": ["lm_head"]}),
}  # fmt: skip


@pytest.mark.parametrize("keys, expected", CASES.values(), ids=CASES)
def test_what_its_keys_become(keys, expected, workplace):
    recipe = settings(convert(workplace, **keys))
    assert {key: recipe.get(key, "not set") for key in expected} == expected


OPTIONS = {
    "qlora": (QLORA, {"lora": "default", "quantization": "nf4", "trainer": "sft"}),
    "8 bits": (
        {"adapter": "lora", "load_in_8bit": True, "lora_r": 8, "lora_alpha": 16},
        {"lora": "default", "quantization": "int8"},
    ),
    "documents": (
        {"datasets": [{"path": "a.txt", "type": "completion"}]},
        {"trainer": "pretrain", "dataset": "files"},
    ),
    "several trackers": (
        {"wandb_project": "p", "use_tensorboard": True},
        {"tracker": "wandb"},
    ),
}


@pytest.mark.parametrize("keys, expected", OPTIONS.values(), ids=OPTIONS)
def test_which_options_it_chooses(keys, expected, workplace):
    options = convert(workplace, **keys).draft.options
    assert {group: options.get(group) for group in expected} == expected


DROPPED = {
    "hub_model_id": ("owner/name", "luthier push"),
    "lora_model_dir": ("./old", "luthier merge"),
    "relora": (True, "no equal"),
    "tensor_parallel_size": (2, "does not split"),
    "a_new_key": (3, "does not know this key"),
    "deepspeed": ("deepspeed_configs/zero3_bf16.json", "belongs to the launch"),
    "plugins": (["axolotl.integrations.kernels.KernelsPlugin"], "KernelsPlugin"),
    "optimizer": ("came_pytorch", "no came_pytorch"),
    "max_grad_norm": (-1.0, "luthier refuses trainer.args.max_grad_norm"),
}


@pytest.mark.parametrize("key", DROPPED)
def test_what_it_cannot_carry_over_has_a_reason(key, workplace):
    value, reason = DROPPED[key]
    conversion = convert(workplace, **{key: value})
    assert reason in conversion.dropped[key]
    assert f"- {key}: " in conversion.draft.text().replace("\n#   ", " ")


DIFFERENT = {
    "bf16": ({"bf16": True}, "float32 weights"),
    "datasets": ({"datasets": [{"path": "a.json", "type": "alpaca"}]}, "format of its own"),
    "chat_template": ({"chat_template": "llama3"}, "the tokenizer's own"),
    "sample_packing": ({"sample_packing": True}, "as many tokens"),
    "special_tokens": ({"special_tokens": {"pad_token": "<pad>", "eos_token": "<e>"}}, "eos_token"),
}


@pytest.mark.parametrize("key", DIFFERENT)
def test_what_means_something_else_is_said(key, workplace):
    keys, words = DIFFERENT[key]
    conversion = convert(workplace, **keys)
    assert words in conversion.different[key] and key in conversion.carried


REFUSED = {
    "process rewards": ({"process_reward_model": True}, "process reward model"),
    "another method": ({"rl": "ebft"}, "does not train this way"),
    "no rows": ({"datasets": ...}, "nothing to train"),
    "tokens": ({"datasets": [{"path": "a", "type": None}]}, "holds tokens already"),
    "unknown rows": ({"datasets": [{"path": "a", "type": "pygmalion"}]}, "no such row format"),
    "other keys of messages": (
        {"datasets": [{"path": "a", "type": "chat_template",
                       "message_property_mappings": {"role": "who", "content": "what"}}]},
        "dataset.map",
    ),
}  # fmt: skip


@pytest.mark.parametrize("keys, words", REFUSED.values(), ids=REFUSED)
def test_what_luthier_does_not_train_is_refused(keys, words, workplace):
    with pytest.raises(UserError, match=words):
        convert(workplace, **keys)


def test_shards_go_to_a_launch_file(workplace):
    assert convert(workplace, fsdp_version=2, fsdp_config={"a": 1}).launch == "fsdp2"
    assert convert(workplace, deepspeed="deepspeed_configs/zero3.json").launch == "zero3"


def test_the_recipe_loads_as_a_file(workplace):
    conversion = convert(workplace, **QLORA, sequence_len=64, val_set_size=0.5)
    workplace("recipes/mine.yaml", conversion.draft.text())
    config = load_config(["recipe=mine"]).config
    assert config.quantization.bits == 4 and config.chat.max_length == 64
    assert config.trainer.args["learning_rate"] == 2e-4 and config.lora["r"] == 32


def test_every_setting_of_the_recipe_has_a_comment(workplace):
    lines = convert(workplace, **QLORA).draft.text().splitlines()
    for above, line in pairwise(lines):
        is_setting = ": " in line and not line.lstrip().startswith(("#", "- "))
        assert not is_setting or "  # " in line or above.lstrip().startswith("# "), line
