"""Settings under the names of other trainers, and what they are called in luthier.

`FOREIGN_SETTINGS` is the one table of them: a mistake in a config (`luthier.config.validate`),
`luthier explain` and `luthier convert` answer from it. Its keys are names without a group, such as
`micro_batch_size`, and `ForeignSetting.overrides(value)` returns what is typed in their place.

The names are those of axolotl, LLaMA-Factory, ms-swift, Oumi, unsloth, torchtune, TRL and
transformers. Where two of them mean different things by one name, the commoner meaning stands.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from luthier.errors import format_override


class ForeignSetting(NamedTuple):
    """What a setting of another trainer is called in luthier."""

    key: str = ""
    """The key that takes the same value; empty where no key does."""
    values: Mapping[str, str] = {}
    """A value of theirs in lower case -> the overrides that stand for it, with a space between
    two; an empty text where nothing has to be set."""
    count_key: str = ""
    """The key for a value of 1 or more, where `key` takes a share below 1."""
    note: str = ""
    """A sentence on what to do instead, where no override stands for the value."""

    def overrides(self, value: object) -> list[str]:
        """Return what is typed for this value, ready for a shell; empty if nothing is."""
        text = str(value).lower()
        if text in self.values:
            return self.values[text].split()
        if not self.key or value is None:
            return []
        is_count = bool(self.count_key) and isinstance(value, int | float) and value >= 1
        return [format_override(self.count_key if is_count else self.key, value)]

    @property
    def keys(self) -> list[str]:
        """Return the keys of luthier that stand for it, the nearest first."""
        words = " ".join(self.values.values()).split()
        typed = [word.lstrip("'").partition("=")[0] for word in words]
        return list(dict.fromkeys(key for key in (self.key, self.count_key, *typed) if key))

    def explain(self, value: object) -> str:
        """Return the sentences that answer the setting with this value, where it is a mistake."""
        words = self.overrides(value)
        if words:
            return f"In luthier it is written {' '.join(words)}."
        if str(value).lower() in self.values:
            return "Leave it out: luthier does this by default."
        return self.about

    @property
    def about(self) -> str:
        """The sentences about the setting, whatever its value is."""
        answer = f"In luthier it is {' or '.join(self.keys)}." if self.keys else ""
        return f"{answer} {self.note}".strip()


def _table() -> Iterator[tuple[str, ForeignSetting]]:
    for key, names in _SAME_VALUE.items():
        for name in names.split():
            yield name, ForeignSetting(key)
    for override, names in _SWITCHES.items():
        for name in names.split():
            yield name, ForeignSetting(values=_OFF | {"true": override})
    for names, setting in _DIFFERENT:
        for name in names.split():
            yield name, setting


_ARGS = "trainer.args."
_SAME_VALUE = {
    f"{_ARGS}per_device_train_batch_size": """
        micro_batch_size batch_size bs train_batch_size per_device_batch_size per_device_batch
        mini_batch_size
    """,
    f"{_ARGS}per_device_eval_batch_size": "eval_batch_size per_device_val_batch_size",
    f"{_ARGS}gradient_accumulation_steps": """
        grad_accum grad_accum_steps grad_accumulation_steps gradient_accumulation
        accumulation_steps accumulate_grad_batches
    """,
    f"{_ARGS}num_train_epochs": "num_epochs epochs epoch max_epochs n_epochs",
    f"{_ARGS}max_steps": "max_train_steps num_train_steps num_steps steps",
    f"{_ARGS}learning_rate": "lr",
    f"{_ARGS}lr_scheduler_type": "lr_scheduler scheduler",
    f"{_ARGS}warmup_steps": "warmup_ratio num_warmup_steps lr_warmup_steps warmup",
    f"{_ARGS}max_grad_norm": "gradient_clipping clip_grad_norm max_norm",
    f"{_ARGS}adam_epsilon": "adam_eps",
    f"{_ARGS}optim": "optimizer optimizer_type optimizer_name",
    f"{_ARGS}packing": "sample_packing use_packing dataset_packed packed",
    f"{_ARGS}eval_packing": "eval_sample_packing",
    f"{_ARGS}eval_strategy": "evaluation_strategy",
    f"{_ARGS}activation_offloading": "offload_activations",
    f"{_ARGS}use_liger_kernel": "enable_liger_kernel use_liger liger_kernel",
    f"{_ARGS}beta": "rl_beta dpo_beta pref_beta kl_coef",
    f"{_ARGS}loss_type": "pref_loss dpo_loss",
    f"{_ARGS}torch_compile": "compile use_torch_compile",
    f"{_ARGS}logging_steps": "log_every_n_steps log_steps logging_interval",
    "chat.max_length": """
        sequence_len cutoff_len max_seq_length max_seq_len max_length model_max_length
        seq_len seq_length sequence_length tokenizer_max_length block_size max_len context_length
        context_len
    """,
    "chat.template": "chat_template_path chat_template_jinja",
    "chat.train_on": "roles_to_train",
    "model.path": """
        base_model model_name_or_path model_name model_id model_id_or_path pretrained_model
    """,
    "model.tokenizer": "tokenizer_config tokenizer_name tokenizer_name_or_path",
    "model.revision": "revision_of_model model_revision",
    "model.dtype": "torch_dtype torch_dtype_str",
    "model.attention": "attn_implementation attn_impl",
    "model.add_tokens": "new_tokens add_tokens",
    "model.add_special_tokens": "new_special_tokens",
    "model.train": "unfrozen_parameters trainable_parameters",
    "model.freeze": "freeze_parameters",
    "lora.r": "lora_rank lora_r adapter_rank rank",
    "lora.lora_alpha": "alpha",
    "lora.lora_dropout": "dropout",
    "lora.target_modules": "lora_target lora_target_modules lora_attn_modules",
    "lora.modules_to_save": "lora_modules_to_save additional_target",
    "lora.layers_to_transform": "peft_layers_to_transform",
    "lora.layers_pattern": "peft_layers_pattern",
    "lora.target_parameters": "lora_target_parameters",
    "lora.exclude_modules": "lora_exclude_modules",
    "lora.rank_pattern": "lora_rank_pattern",
    "lora.alpha_pattern": "lora_alpha_pattern",
    "lora.fan_in_fan_out": "lora_fan_in_fan_out",
    "lora.trainable_token_indices": "peft_trainable_token_indices",
    "lora.use_dora": "peft_use_dora lora_use_dora",
    "lora.use_rslora": "peft_use_rslora lora_use_rslora",
    "lora.init_lora_weights": "peft_init_lora_weights init_weights",
    "lora.plus_ratio": "loraplus_lr_ratio lorap_lr_ratio",
    "dataset.path": """
        train_file data_path train_data dataset_path data_files dataset_name train_dataset_path
        train_dataset
    """,
    "dataset.split": "dataset_train_split train_split dataset_split",
    "dataset.eval.split": "dataset_test_split eval_split test_split",
    "dataset.eval.path": "eval_file val_file validation_file eval_dataset val_dataset",
    "dataset.max_rows": "max_samples max_train_samples num_samples sample_count",
    "dataset.system": "default_system system_prompt system_message",
    "dataset.workers": """
        preprocessing_num_workers dataset_num_proc dataset_processes num_proc num_workers
    """,
    "dataset.cache": "dataset_prepared_path tokenized_path",
    "dataset.shuffle_buffer": "shuffle_buffer_size buffer_size",
    "trainer.evaluation.patience": "early_stopping_patience",
    "trainer.evaluation.max_new_tokens": "eval_max_new_tokens",
    "trainer.rewards": "reward_funcs reward_functions",
    "trainer.teacher": "teacher_model teacher_model_name_or_path",
    "tracker.wandb.project": "wandb_project",
    "tracker.wandb.entity": "wandb_entity wandb_team",
    "tracker.wandb.name": "wandb_name wandb_run_name run_name",
    "tracker.wandb.id": "wandb_run_id",
    "tracker.mlflow.uri": "mlflow_tracking_uri",
    "tracker.mlflow.experiment": "mlflow_experiment_name",
    "tracker.mlflow.name": "mlflow_run_name",
    "tracker.trackio.project": "trackio_project_name",
    "tracker.trackio.space_id": "trackio_space_id",
    "output_dir": "save_dir output_path out_dir save_path",
    "overwrite": "overwrite_output_dir",
    "seed": "random_seed random_state train_seed",
}
"""Key of luthier -> its names elsewhere, where the value stays as it is."""

_OFF = {"false": "", "none": ""}
_IN_CARE_OF_LAUNCH = "Start the run with luthier launch --config {} (luthier docs launch)."
_PUSH = "Upload a finished run with luthier push RUN --to OWNER/NAME."

_SWITCHES = {
    "quantization=nf4": "load_in_4bit use_4bit",
    "quantization=int8": "load_in_8bit",
    "lora.target_modules=all-linear": "lora_target_linear",
    "model.attention=flash_attention_2": """
        flash_attention use_flash_attention use_flash_attention_2 use_flash_attn
    """,
    "model.device=cpu": "use_cpu no_cuda cpu",
    "model.attention=sdpa": "sdp_attention xformers_attention",
    "model.attention=eager": "eager_attention",
    "trainer.padding=max_length": "pad_to_sequence_len pad_to_max_length",
    "tracker=tensorboard": "use_tensorboard",
    "tracker=mlflow": "use_mlflow",
    f"{_ARGS}train_sampling_strategy=group_by_length": "group_by_length",
    "chat.train_on=last": "mask_history train_on_last_turn",
}
"""Override of luthier -> the switches elsewhere that stand for it where they are true."""

_DIFFERENT: tuple[tuple[str, ForeignSetting], ...] = (
    (
        "quantization_bit quant_bits quantization_bits bits",
        ForeignSetting(values=_OFF | {"4": "quantization=nf4", "8": "quantization=int8"}),
    ),
    (
        "full_finetuning full_finetune",
        ForeignSetting(values={"true": "lora=none", "false": "lora=default"}),
    ),
    (
        "use_peft use_lora",
        ForeignSetting(values={"true": "lora=default", "false": "lora=none"}),
    ),
    (
        "adapter finetuning_type train_type tuner_type sft_type peft_method",
        ForeignSetting(
            values={
                "lora": "lora=default",
                "qlora": "lora=default quantization=nf4",
                "full": "lora=none",
                "dora": "lora=dora",
                "freeze": "lora=none",
                "none": "lora=none",
                "": "lora=none",
            },
            note="Other options: luthier explain lora.",
        ),
    ),
    (
        "stage rl rlhf_type trainer_type training_type",
        ForeignSetting(
            values={
                "sft": "trainer=sft",
                "trl_sft": "trainer=sft",
                "pt": "trainer=pretrain",
                "dpo": "trainer=dpo",
                "trl_dpo": "trainer=dpo",
                "simpo": "trainer=cpo trainer.args.loss_type=simpo",
                "ipo": "trainer=dpo trainer.args.loss_type=ipo",
                "kto": "trainer=kto",
                "trl_kto": "trainer=kto",
                "orpo": "trainer=orpo",
                "cpo": "trainer=cpo",
                "rm": "trainer=reward",
                "reward": "trainer=reward",
                "grpo": "trainer=grpo",
                "trl_grpo": "trainer=grpo",
                "rloo": "trainer=rloo",
                "gkd": "trainer=distill",
                "none": "",
            },
            note="Other options: luthier explain trainer.",
        ),
    ),
    (
        "val_set_size val_size val_split split_dataset_ratio test_size eval_ratio validation_split",
        ForeignSetting("dataset.eval.share", _OFF | {"0": ""}, "dataset.eval.count"),
    ),
    (
        "gradient_checkpointing enable_activation_checkpointing use_gradient_checkpointing",
        ForeignSetting(
            f"{_ARGS}activation_checkpointing",
            {"unsloth": f"{_ARGS}activation_checkpointing=true"},
        ),
    ),
    (
        "train_on_inputs train_on_prompt train_on_prompts train_on_input",
        ForeignSetting(
            values={"false": "", "true": "'chat.train_on=[system,user,assistant]'"},
            note="chat.train_on names the roles whose turns train.",
        ),
    ),
    (
        "train_on_eot train_on_eos",
        ForeignSetting(values={"turn": "", "true": "", "false": ""}),
    ),
    (
        "assistant_only_loss completion_only_loss train_on_responses_only",
        ForeignSetting(
            values={"true": "", "false": "'chat.train_on=[system,user,assistant]'"},
            note="chat.train_on names the roles whose turns train.",
        ),
    ),
    (
        "chat_template",
        ForeignSetting(
            values=_OFF | {"tokenizer_default": ""},
            note="The tokenizer's own template is used; chat.template=FILE takes another one.",
        ),
    ),
    (
        "flash_attn",
        ForeignSetting(
            values={
                "fa2": "model.attention=flash_attention_2",
                "fa3": "model.attention=flash_attention_3",
                "sdpa": "model.attention=sdpa",
                "disabled": "model.attention=eager",
                "auto": "",
            },
        ),
    ),
    (
        "compute_dtype precision mixed_precision",
        ForeignSetting(
            values={
                "bf16": "model.dtype=bfloat16",
                "fp16": "model.dtype=float16",
                "fp32": "model.dtype=float32",
                "no": "model.dtype=float32",
            },
            note="model.dtype is float32, bfloat16, float16 or auto.",
        ),
    ),
    (
        "report_to use_wandb trackers log_with",
        ForeignSetting(
            values={
                "wandb": "tracker=wandb",
                "true": "tracker=wandb",
                "tensorboard": "tracker=tensorboard",
                "mlflow": "tracker=mlflow",
                "trackio": "tracker=trackio",
                "none": "",
                "false": "",
            },
            note="Other options: luthier explain tracker.",
        ),
    ),
    (
        "wandb_mode",
        ForeignSetting("tracker.wandb.mode", {"disabled": "tracker=none", "none": "tracker=none"}),
    ),
    (
        "saves_per_epoch",
        ForeignSetting(
            values=_OFF | {"1": f"{_ARGS}save_strategy=epoch"},
            note=f"Or name a number of steps: {_ARGS}save_strategy=steps {_ARGS}save_steps=N.",
        ),
    ),
    (
        "evals_per_epoch",
        ForeignSetting(
            values=_OFF | {"1": f"{_ARGS}eval_strategy=epoch"},
            note=f"Or name a number of steps: {_ARGS}eval_strategy=steps {_ARGS}eval_steps=N.",
        ),
    ),
    (
        "datasets test_datasets",
        ForeignSetting(
            note="One source is dataset=files dataset.path=PATH (on the hub dataset=hub); "
            "several are dataset=mixture dataset.sources.NAME.path=PATH (luthier docs mixtures).",
        ),
    ),
    (
        "device_map",
        ForeignSetting(
            values={"auto": "", "none": ""},
            note="One process uses one device, model.device; for several, use luthier launch.",
        ),
    ),
    (
        "gpus num_gpus n_gpu n_gpus devices num_devices world_size nproc_per_node",
        ForeignSetting(note="Start the run with luthier launch --num_processes N."),
    ),
    (
        "padding_side pad_token pad_token_id",
        ForeignSetting(note="luthier pads by itself, and padding never trains; leave it out."),
    ),
    (
        "deepspeed",
        ForeignSetting(values=_OFF, note=_IN_CARE_OF_LAUNCH.format("zero2")),
    ),
    (
        "fsdp fsdp_config fsdp_version",
        ForeignSetting(values=_OFF, note=_IN_CARE_OF_LAUNCH.format("fsdp2")),
    ),
    (
        "push_to_hub hub_model_id hub_strategy",
        ForeignSetting(values=_OFF, note=_PUSH),
    ),
    (
        "resume_from_checkpoint auto_resume_from_checkpoints",
        ForeignSetting(
            values=_OFF | {"true": ""},
            note="The same command resumes from the last checkpoint of its folder by itself.",
        ),
    ),
    (
        "embedding_lr embedding_learning_rate",
        ForeignSetting(
            note="Write 'trainer.optimizer.groups=[{match: embed_tokens, learning_rate: 1e-5}]'.",
        ),
    ),
    (
        "lora_on_cpu strict is_llama_derived_model remove_unused_columns shuffle_merged_datasets",
        ForeignSetting(note="luthier needs no such setting; leave it out."),
    ),
)
"""Names elsewhere, with a space between two, where more than a name or a switch differs."""

FOREIGN_SETTINGS: Mapping[str, ForeignSetting] = dict(_table())
"""Name of another trainer, without a group -> what it is in luthier."""


def explain_foreign_key(key: str, value: object) -> str | None:
    """Return what another trainer's setting is called here; None if the name is not known.

    `key` may stand in any group (`trainer.args.num_epochs`): its last name counts.
    """
    setting = FOREIGN_SETTINGS.get(key.rpartition(".")[2])
    return None if setting is None else setting.explain(value)
