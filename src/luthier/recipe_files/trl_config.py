"""A config of TRL's command line (`trl sft --config FILE`, or its flags) as a recipe.

Fields of TRL's config classes have the same names in `trainer.args`; here are the keys that TRL's
scripts have besides (`ScriptArguments`, `ModelConfig`), and those that luthier decides elsewhere.
"""

from typing import Any

from luthier.config.library_fields import UNKNOWN, read_class_fields
from luthier.config.methods import METHODS
from luthier.config.recipes import list_options, load_yaml
from luthier.errors import Mistake, UserError
from luthier.recipe_files.conversion import Conversion, apply, take_trackers

TRL_METHODS = ("sft", "dpo", "kto", "reward", "grpo", "rloo")
"""The scripts of TRL's command line, which are methods of luthier."""


def convert_trl(conversion: Conversion, method: str | None = None) -> None:
    """Take every key of a config of TRL; `method` is the script's, such as `dpo`."""

    def choose_method(conversion: Conversion) -> None:
        named = method or "sft"
        conversion.choose("trainer", named)
        if method is None:
            text = "the file does not say which script read it; trainer: sft is taken."
            conversion.differ("model_name_or_path", text)

    conversion.check_values("a list", "lora_target_modules reward_funcs")
    handlers = (choose_method, _model, _adapter, _dataset, take_trackers, _rewards, _arguments)
    apply(conversion, handlers)


def _model(conversion: Conversion) -> None:
    conversion.choose("model", "hub")
    conversion.rename("model_name_or_path model_revision trust_remote_code")
    for key in ("dtype", "torch_dtype"):
        if (value := conversion.take(key)) is not None:
            conversion.set_key("model.dtype", value, key, "the number format of the weights")
    attention = conversion.take("attn_implementation")
    if attention and not str(attention).startswith("flash_attention"):
        conversion.set_key("model.attention", attention, "attn_implementation", "the attention")
    elif attention:
        text = "model.attention: auto takes flash attention where it is installed"
        conversion.leave_out_taken("attn_implementation", text)


def _adapter(conversion: Conversion) -> None:
    if conversion.take("load_in_4bit"):
        kind = conversion.take("bnb_4bit_quant_type", "nf4")
        option = "fp4" if kind == "fp4" else "nf4"
        conversion.choose("quantization", option, "load_in_4bit", "bnb_4bit_quant_type")
        ours, about = (
            "quantization.bnb_4bit_use_double_quant",
            "whether the scales are quantized, too",
        )
        conversion.carry("use_bnb_nested_quant", ours, False, about)
    elif conversion.take("load_in_8bit"):
        conversion.choose("quantization", "int8", "load_in_8bit")
    keys = (
        "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters "
        "lora_modules_to_save use_rslora use_dora"
    )
    if not conversion.take("use_peft"):
        conversion.leave_out(keys, "without use_peft all weights train")
        return
    conversion.choose("lora", "default", "use_peft")
    conversion.carry("lora_r", "lora.r", 16)
    conversion.carry("lora_alpha", "lora.lora_alpha", 32)
    conversion.carry("lora_dropout", "lora.lora_dropout", 0.05)
    targets = conversion.take("lora_target_modules")
    if targets:
        conversion.set_key("lora.target_modules", _one_or_list(targets), "lora_target_modules")
    else:
        text = "without lora_target_modules peft chooses by the model; luthier takes all layers."
        conversion.differ("use_peft", text)
    conversion.rename("lora_modules_to_save use_rslora use_dora lora_target_parameters")


def _one_or_list(value: Any) -> Any:
    names = str(value).split() if isinstance(value, str) else list(value)
    return names[0] if names == ["all-linear"] else names


def _dataset(conversion: Conversion) -> None:
    path = conversion.take("dataset_name")
    if not path:
        raise UserError(
            f"{conversion.file}: it names no dataset_name, so there is nothing to train. A mixture "
            "(datasets) is written by hand: `luthier docs mixtures`."
        )
    conversion.choose("dataset", "hub")
    conversion.set_key("dataset.path", path, "dataset_name", "a dataset of the hub, or files")
    if name := conversion.take("dataset_config"):
        conversion.set_key("dataset.name", name, "dataset_config", "its configuration")
    if split := conversion.take("dataset_train_split"):
        conversion.set_key("dataset.split", split, "dataset_train_split", "the split to train on")
    evaluates = conversion.source.get("eval_strategy") not in (None, "no", False)
    conversion.set_key("dataset.eval.share", None, "", "no rows are held out of the training split")
    split = conversion.take("dataset_test_split", "test")
    if evaluates:
        key = "dataset_test_split" if conversion.has("dataset_test_split") else ""
        conversion.set_key("dataset.eval.split", split, key, "the held-out split")
    elif conversion.has("dataset_test_split"):
        text = "TRL reads it where eval_strategy is set"
        conversion.leave_out_taken("dataset_test_split", text)
    if conversion.take("dataset_streaming"):
        conversion.set_key("dataset.streaming", True, "dataset_streaming")
    if (field := conversion.take("dataset_text_field")) not in (None, "text"):
        conversion.set_key("dataset.columns.text", field, "dataset_text_field")
    conversion.count_as_carried("dataset_text_field")
    for key in ("max_length", "max_seq_length"):
        if value := conversion.take(key):
            conversion.set_key("chat.max_length", value, key, "the longest sequence, in tokens")
    method = conversion.draft.options["trainer"]
    if (
        method in ("sft", "dpo", "kto", "reward")
        and conversion.draft.value("chat.max_length") is None
    ):
        conversion.set_key("chat.max_length", 1024, "", "the longest sequence, in tokens")
    if template := conversion.take("chat_template_path"):
        conversion.set_key(
            "chat.template", template, "chat_template_path", "a template of your own"
        )
    replies_alone = conversion.take("assistant_only_loss")
    conversion.count_as_carried("assistant_only_loss")
    if method == "sft" and not replies_alone:
        conversion.differ(
            "dataset_name" if replies_alone is None else "assistant_only_loss",
            "TRL trains on whole conversations unless assistant_only_loss is set; luthier trains "
            "the replies. 'chat.train_on=[system,user,assistant]' trains every turn.",
        )


def _arguments(conversion: Conversion) -> None:
    """Take the fields of the method's config class, and what luthier decides elsewhere."""
    conversion.leave_out(
        "output_dir overwrite_output_dir",
        "a run's folder is runs/<recipe>/...; type output_dir=FOLDER for another one",
    )
    conversion.leave_out("seed_worker log_level hub_token", "it is not about the training")
    conversion.leave_out("resume_from_checkpoint", "the same command resumes by itself")
    conversion.leave_out("do_train do_eval", "a run trains, and measures before and after")
    if conversion.source.get("seed") is not None:
        conversion.set_key("seed", conversion.take("seed"), "seed")
    prefix = "trainer.args"
    if (share := conversion.take("warmup_ratio")) is not None:
        conversion.set_key(f"{prefix}.warmup_steps", share, "warmup_ratio", "a share of all steps")
    for key in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        if (value := conversion.take(key)) is not None:
            ours = key.replace("gradient", "activation")
            conversion.set_key(f"{prefix}.{ours}", value, key)
    fields = read_class_fields(*METHODS[conversion.draft.options["trainer"]].config) or {}
    for key in [key for key in conversion.source if key in fields]:
        if key not in conversion.dropped and key not in conversion.needless:
            value = conversion.take(key)
            if value is not None:
                conversion.set_key(f"{prefix}.{key}", value, key)
    option = load_yaml(list_options("trainer")[conversion.draft.options["trainer"]])
    settings = {} if isinstance(option, Mistake) else option["args"]
    for key, value in settings.items():
        default = fields[key].default if key in fields else UNKNOWN
        is_set = f"{prefix}.{key}" in conversion.draft.settings or key == "activation_checkpointing"
        if not is_set and default not in (value, UNKNOWN):
            conversion.set_key(f"{prefix}.{key}", default)


def _rewards(conversion: Conversion) -> None:
    functions, model = conversion.take("reward_funcs"), conversion.take("reward_model_name_or_path")
    names = functions.split() if isinstance(functions, str) else list(functions or [])
    rewards: list[Any] = [f"python:{name}" for name in names]
    if model:
        rewards.append({"model": model})
    if rewards:
        conversion.set_key("trainer.rewards", rewards, "reward_funcs" if names else
                       "reward_model_name_or_path")  # fmt: skip
        conversion.count_as_carried("reward_funcs", "reward_model_name_or_path")
