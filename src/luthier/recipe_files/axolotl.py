"""An axolotl config as a recipe.

What its keys mean is read from axolotl's schema and builders (`utils/schemas`, `core/builders`,
`utils/config`) as of July 2026. Where a key is missing, axolotl's default is written into the
recipe if luthier's is another one and it changes the training.
"""

from typing import Any

from luthier.config.library_fields import read_class_fields
from luthier.config.methods import METHODS
from luthier.errors import UserError
from luthier.recipe_files.axolotl_datasets import read_datasets
from luthier.recipe_files.conversion import NO_NEED, Conversion, apply

_METHODS = {
    None: "sft",
    "dpo": "dpo",
    "ipo": "dpo",
    "kto": "kto",
    "orpo": "orpo",
    "simpo": "cpo",
    "grpo": "grpo",
    "gdpo": "grpo",
}
"""`rl` -> our method."""
_LAUNCH = "it belongs to the launch: see the command below"


def convert_axolotl(conversion: Conversion) -> None:
    """Take every key of an axolotl config; UserError for one that trains in no way luthier has."""
    for form, keys in _FORMS.items():
        conversion.check_values(form, keys)
    apply(
        conversion,
        (
            _method,
            _model,
            _precision,
            _adapter,
            read_datasets,
            _held_out,
            _sequences,
            _steps,
            _optimizer,
            _evaluations,
            _preferences,
            _rewards,
            _trackers,
            _launch,
            _plugins,
            _needless,
            _refused,
        ),
    )


_FORMS = {
    "a single value": "rl adapter optimizer lr_scheduler excess_length_strategy "
    "chat_template_jinja",
    "a number": "adam_epsilon adam_eps adam_beta1 adam_beta2 max_grad_norm embedding_lr "
    "val_set_size cosine_min_lr_ratio evals_per_epoch saves_per_epoch num_epochs",
    "a whole number": "micro_batch_size batch_size gradient_accumulation_steps",
    "a list": "unfrozen_parameters plugins",
    "a mapping": "bnb_config_kwargs lr_scheduler_kwargs chat_template_kwargs",
}
"""What the values have to be that are read here, and not only written into the recipe."""


def _method(conversion: Conversion) -> None:
    source = conversion.source
    rl = conversion.take("rl") or None
    for key, what in (
        ("process_reward_model", "a process reward model (a label for each step)"),
        ("diffusion", "a text diffusion model"),
    ):
        if source.get(key):
            raise UserError(f"{conversion.file}: {key}: luthier does not train {what}.")
    if rl not in _METHODS:
        raise UserError(
            f"{conversion.file}: rl: {rl}: luthier does not train this way. It trains dpo, ipo, "
            "kto, orpo, simpo, grpo and gdpo."
        )
    method = _METHODS[rl]
    if conversion.take("reward_model"):
        method = "reward"
        conversion.leave_out("num_labels", "a reward model has one number")
    elif _is_plain_text(source):
        method = "pretrain"
    conversion.choose("trainer", method, "rl", "reward_model")
    if rl in ("ipo", "simpo"):
        conversion.set_key("trainer.args.loss_type", rl, "rl", "the loss")
    if rl == "gdpo":
        aggregation = "trainer.args.multi_objective_aggregation"
        conversion.set_key(aggregation, "normalize_then_sum", "rl", "each reward is normalised")


def _is_plain_text(source: Any) -> bool:
    """Return whether all rows are documents whose every token trains."""
    if source.get("rl") or source.get("reward_model"):
        return False
    if source.get("pretraining_dataset"):
        return True
    rows = source.get("datasets")
    rows = rows if isinstance(rows, list) else []
    return bool(rows) and all(
        isinstance(each, dict) and str(each.get("type")).startswith("completion") for each in rows
    )


def _model(conversion: Conversion) -> None:
    conversion.choose("model", "hub")
    base = conversion.source.get("base_model")
    conversion.rename("base_model revision_of_model model_revision trust_remote_code tokens")
    tokenizer = conversion.take("tokenizer_config")
    conversion.count_as_carried("tokenizer_config", "base_model_config")
    if tokenizer and tokenizer != base:
        conversion.set_key("model.tokenizer", tokenizer, "tokenizer_config", "another tokenizer")
    if conversion.take("base_model_config") not in (None, base):
        conversion.drop("base_model_config", "a model's folder holds its own config.json")
    tokens = conversion.source.get("tokens")
    if isinstance(tokens, dict):
        conversion.draft.settings.pop("model.add_tokens", None)
        conversion.drop("tokens", "it is a mapping, and model.add_tokens takes a list of texts")
    _special_tokens(conversion)
    patterns = conversion.take("unfrozen_parameters")
    if patterns and any("[" in str(p) and ":" in str(p) for p in patterns):
        conversion.drop("unfrozen_parameters", "luthier trains whole parameters, not rows of one")
    elif patterns:
        conversion.set_key(
            "model.train", patterns, "unfrozen_parameters", "what trains, by pattern"
        )
    for key in ("model_config", "overrides_of_model_config"):
        conversion.refuse(
            {key: "write it into a copy of the model's config.json, and name that folder"}
        )
    if value := conversion.take("processor_kwargs"):
        about = "settings of the image processor"
        conversion.set_key("model.processor", value, "processor_kwargs", about)
    for key in ("model_kwargs", "overrides_of_model_kwargs"):
        if value := conversion.take(key):
            conversion.set_key("model.kwargs", value, key, "goes to from_pretrained")
    _attention(conversion)


def _special_tokens(conversion: Conversion) -> None:
    tokens = conversion.take("special_tokens")
    if not tokens:
        return
    if not isinstance(tokens, dict):
        conversion.drop("special_tokens", "it is no mapping of names to tokens")
        return
    if extra := tokens.get("additional_special_tokens"):
        about = "control tokens with rows of the embeddings that train"
        conversion.set_key("model.add_special_tokens", extra, "special_tokens", about)
    changed = [name for name in ("bos_token", "eos_token", "unk_token") if tokens.get(name)]
    if tokens.get("pad_token"):
        conversion.differ(
            "special_tokens",
            "pad_token: luthier pads with a token of its own choice, which never trains.",
        )
    if changed:
        conversion.differ(
            "special_tokens",
            f"{', '.join(changed)}: the tokenizer's own are used. If yours differ from these, "
            "change them in a copy of the tokenizer and name it in model.tokenizer.",
        )


_ATTENTION_SWITCHES = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
    "flex_attention": "flex_attention",
    "xformers_attention": "xformers",
    "sage_attention": "sage",
    "s2_attention": "s2",
}


def _attention(conversion: Conversion) -> None:
    """Carry an attention over that luthier has; `auto` takes flash attention where it is."""
    for key in ("attn_implementation", *_ATTENTION_SWITCHES):
        value = conversion.take(key)
        if not value:
            continue
        name = str(value) if key == "attn_implementation" else _ATTENTION_SWITCHES[key]
        if name.startswith("flash_attention"):
            conversion.leave_out_taken(
                key, "model.attention: auto takes flash attention where it is installed"
            )
        elif name in ("sdpa", "eager", "flex_attention") or "/" in name:
            conversion.set_key("model.attention", name, key, "the attention implementation")
        else:
            conversion.drop(key, f"luthier has no {name} attention; model.attention: auto is used")


_FULL_BF16 = (
    "in full fine-tuning axolotl holds the weights themselves in bfloat16; luthier trains float32 "
    "weights and computes in bfloat16, which takes twice the memory (16 bytes a weight with AdamW) "
    "and loses no small update."
)


def _precision(conversion: Conversion) -> None:
    """Number formats: adapters and full fine-tuning keep what trains in float32 here."""
    full = not conversion.has("adapter")
    bf16, bfloat16 = conversion.take("bf16"), conversion.take("bfloat16")
    conversion.count_as_carried(*(["bfloat16"] if bfloat16 else []))
    if bf16 in (True, "true", "full") or bfloat16:
        key = "bf16" if conversion.has("bf16") else "bfloat16"
        if not full:
            conversion.set_key("model.dtype", "bfloat16", key, "the frozen weights")
        else:
            conversion.set_key("trainer.args.bf16", True, key, "computes in bfloat16")
            conversion.differ(key, _FULL_BF16)
    elif conversion.source.get("bf16") == "auto" and full:
        conversion.count_as_carried("bf16")
        conversion.differ("bf16", _FULL_BF16)
    elif conversion.source.get("bf16") == "auto":
        conversion.leave_out_taken("bf16", "model.dtype: auto is the same")
    if conversion.take("fp16") or conversion.take("float16"):
        key = "fp16" if conversion.has("fp16") else "float16"
        if full:
            conversion.set_key("trainer.args.fp16", True, key, "computes in float16")
        else:
            conversion.set_key("model.dtype", "float16", key, "the frozen weights")
    if conversion.take("tf32") is True:
        conversion.set_key("trainer.args.tf32", True, "tf32", "float32 products in 19 bits on GPUs")
    dtype = conversion.take("torch_dtype")
    if dtype:
        conversion.set_key("model.dtype", dtype, "torch_dtype", "the number format of the weights")


def _adapter(conversion: Conversion) -> None:
    draft, adapter = conversion.draft, conversion.take("adapter")
    four, eight = conversion.take("load_in_4bit"), conversion.take("load_in_8bit")
    if adapter not in (None, "", "lora", "qlora"):
        conversion.drop("adapter", f"axolotl's {adapter} has no equal here; LoRA is used")
    if not adapter:
        conversion.leave_out(
            "lora_r lora_alpha lora_dropout lora_target_linear lora_target_modules "
            "lora_fan_in_fan_out lora_modules_to_save lora_target_parameters",
            "without `adapter` all weights train",
        )
        return
    conversion.choose("lora", "default", "adapter")
    if four and adapter == "qlora":
        conversion.choose("quantization", "nf4", "load_in_4bit")
    elif eight:
        conversion.choose("quantization", "int8", "load_in_8bit")
    elif four:
        conversion.differ("load_in_4bit", "axolotl reads it with adapter: qlora alone.")
    for name, value in (conversion.take("bnb_config_kwargs") or {}).items():
        conversion.set_key(f"quantization.{name}", value, "bnb_config_kwargs")
    conversion.rename("lora_r lora_alpha")
    conversion.carry("lora_dropout", "lora.lora_dropout", 0.0)
    _adapter_targets(conversion)
    conversion.rename(
        "lora_modules_to_save peft_layers_to_transform peft_use_dora peft_use_rslora "
        "peft_init_lora_weights loraplus_lr_ratio lora_fan_in_fan_out lora_rank_pattern "
        "lora_alpha_pattern lora_exclude_modules peft_layers_pattern peft_trainable_token_indices"
    )
    if peft := conversion.take("peft"):
        if isinstance(peft, dict) and "loftq_config" in peft:
            conversion.set_key("lora.init_lora_weights", "loftq", "peft", "starts from LoftQ")
            if draft.options.get("quantization") != "nf4":
                conversion.draft.settings.pop("lora.init_lora_weights")
                conversion.drop("peft", "LoftQ needs 4-bit weights: quantization=nf4")
        else:
            conversion.drop("peft", "luthier has no equal of these settings")


def _adapter_targets(conversion: Conversion) -> None:
    """Which layers get an adapter; a pattern is matched with whole names here, as in peft."""
    modules, linear = conversion.take("lora_target_modules"), conversion.take("lora_target_linear")
    parameters = conversion.take("lora_target_parameters")
    if parameters:
        conversion.set_key("lora.target_parameters", parameters, "lora_target_parameters")
        conversion.set_key(
            "lora.experts", False, "lora_target_parameters", "they are named instead"
        )
    if linear:
        key = "lora.target_modules"
        conversion.set_key(key, "all-linear", "lora_target_linear", "all linear layers")
        if modules:
            conversion.leave_out_taken("lora_target_modules", "all linear layers are in already")
    elif modules:
        conversion.set_key("lora.target_modules", modules, "lora_target_modules", "which layers")


def _held_out(conversion: Conversion) -> None:
    size = conversion.take("val_set_size", 0)
    if conversion.has("test_datasets"):
        return
    key = "val_set_size" if conversion.source.get("val_set_size") is not None else ""
    if not size:
        conversion.set_key("dataset.eval.share", None, key, "no rows are held out")
    elif float(size) >= 1:
        conversion.set_key("dataset.eval.share", None, key, "in place of a share")
        conversion.set_key("dataset.eval.count", int(size), key, "rows held out")
    else:
        conversion.set_key("dataset.eval.share", float(size), key, "rows held out")


_TOO_LONG = {None: "drop", "drop": "drop", "truncate": "turns", "raise": "error"}


def _sequences(conversion: Conversion) -> None:
    """Lengths, packing, and what becomes of rows that are too long."""
    conversion.carry("sequence_len", "chat.max_length", 512)
    strategy = conversion.take("excess_length_strategy")
    key = "excess_length_strategy" if strategy else ""
    method = conversion.draft.options["trainer"]
    if method != "pretrain":
        on_long = _TOO_LONG.get(strategy, "drop")
        conversion.set_key("chat.on_long", on_long, key, "what becomes of a longer row")
    if strategy == "truncate":
        conversion.differ(
            "excess_length_strategy",
            "axolotl cuts a long row anywhere; luthier removes whole turns from its front.",
        )
    trains_tokens = method in ("sft", "pretrain")
    packing = conversion.take("sample_packing")
    packing_eval = conversion.take("eval_sample_packing")
    if trains_tokens:
        key = "sample_packing" if packing is not None else ""
        conversion.set_key("trainer.args.packing", bool(packing), key, "rows share a sequence")
        if packing_eval is not None:
            about = "the same for held-out rows"
            conversion.set_key(
                "trainer.args.eval_packing", packing_eval, "eval_sample_packing", about
            )
        if packing:
            conversion.differ(
                "sample_packing",
                "both keep packed rows apart; axolotl joins the rows of a micro batch into one "
                "sequence, luthier fills sequences of chat.max_length and batches them: a step "
                "has as many tokens.",
            )
    elif packing or packing_eval:
        conversion.drop("sample_packing", f"rows of trainer={method} are not packed")
    if conversion.take("pad_to_sequence_len"):
        about = "all rows to chat.max_length"
        conversion.set_key("trainer.padding", "max_length", "pad_to_sequence_len", about)
    if conversion.take("group_by_length"):
        strategy = "trainer.args.train_sampling_strategy"
        conversion.set_key(
            strategy, "group_by_length", "group_by_length", "rows of a batch are alike"
        )
    conversion.rename("neftune_noise_alpha pad_to_multiple_of")
    if alpha := conversion.take("noisy_embedding_alpha"):
        conversion.set_key("trainer.args.neftune_noise_alpha", alpha, "noisy_embedding_alpha")


def _steps(conversion: Conversion) -> None:
    """Batches and the number of steps."""
    micro = int(conversion.take("micro_batch_size", 1) or 1)
    total, steps = conversion.take("batch_size"), conversion.take("gradient_accumulation_steps")
    if not steps and total:
        steps = max(int(total) // micro, 1)
        conversion.differ(
            "batch_size",
            f"becomes {steps} steps of gradient accumulation, on one device; with more devices, "
            "divide it by their number.",
        )
    named = {k for k in ("micro_batch_size", "eval_batch_size") if conversion.has(k)}
    prefix = "trainer.args"
    key = "micro_batch_size" if "micro_batch_size" in named else ""
    about = "rows in one step on one device"
    conversion.set_key(f"{prefix}.per_device_train_batch_size", micro, key, about)
    evaluated = conversion.take("eval_batch_size") or micro
    key = "eval_batch_size" if "eval_batch_size" in named else key
    about = "rows in one step of an evaluation"
    conversion.set_key(f"{prefix}.per_device_eval_batch_size", evaluated, key, about)
    key = "gradient_accumulation_steps"
    key = key if conversion.has(key) else ("batch_size" if total else "")
    about = "steps whose gradients are added up"
    conversion.set_key(f"{prefix}.gradient_accumulation_steps", int(steps or 1), key, about)
    conversion.carry("num_epochs", f"{prefix}.num_train_epochs", 1.0)
    conversion.rename("max_steps")
    if conversion.source.get("seed") is not None:
        conversion.set_key("seed", conversion.take("seed"), "seed", "draws the order, and more")


_RENAMED_OPTIMIZERS = {"optimi_adamw": "adamw_torch", "ao_adamw_8bit": "adamw_torch_8bit",
                   "ao_adamw_4bit": "adamw_torch_4bit"}  # fmt: skip
"""Optimizers of axolotl that transformers has under another name."""
_SCHEDULES = {"one_cycle": "cosine", "rex": "cosine", "log_sweep": "cosine"}


def _optimizer(conversion: Conversion) -> None:
    prefix = "trainer.args"
    if conversion.source.get("learning_rate") is not None:
        conversion.carry("learning_rate", f"{prefix}.learning_rate", 0.0)
    _optimizer_name(conversion)
    _schedule(conversion)
    conversion.carry("weight_decay", f"{prefix}.weight_decay", 0.0)
    for key in ("adam_epsilon", "adam_eps"):
        if (value := conversion.take(key)) is not None:
            conversion.set_key(f"{prefix}.adam_epsilon", float(value), key)
    for key in ("adam_beta1", "adam_beta2", "max_grad_norm"):
        if (value := conversion.take(key)) is not None:
            conversion.set_key(f"{prefix}.{key}", float(value), key)
    arguments = conversion.take("optim_args")
    if isinstance(arguments, dict):
        arguments = ",".join(f"{name}={value}" for name, value in arguments.items())
    if arguments:
        conversion.set_key(f"{prefix}.optim_args", arguments, "optim_args")
    targets = conversion.take("optim_target_modules")
    if targets:
        conversion.set_key(f"{prefix}.optim_target_modules", targets, "optim_target_modules")
    if (value := conversion.take("embedding_lr")) is not None:
        group = [{"match": "embed_tokens", "learning_rate": float(value)}]
        conversion.set_key("trainer.optimizer.groups", group, "embedding_lr", "rates of their own")


def _optimizer_name(conversion: Conversion) -> None:
    name = conversion.take("optimizer") or "adamw_torch_fused"
    key = "optimizer" if conversion.has("optimizer") else ""
    fields = read_class_fields("transformers", "training_args.py", "TrainingArguments") or {}
    choices = fields["optim"].choices if "optim" in fields else (name,)
    if name == "muon" and "lora" not in conversion.draft.options:
        conversion.set_key("trainer.optimizer.name", "muon", key, "the optimizer")
        conversion.differ("optimizer", "muon is luthier's own; its AdamW part has the same rate.")
    elif name in choices:
        conversion.set_key("trainer.args.optim", name, key, "the optimizer")
    elif name in _RENAMED_OPTIMIZERS:
        other = _RENAMED_OPTIMIZERS[name]
        conversion.set_key("trainer.args.optim", other, key, "the optimizer")
        conversion.differ("optimizer", f"{name} is {other} in transformers.")
    else:
        conversion.drop("optimizer", f"luthier has no {name}; trainer.args.optim stays AdamW")


def _schedule(conversion: Conversion) -> None:
    name = conversion.take("lr_scheduler") or "cosine"
    key = "lr_scheduler" if conversion.has("lr_scheduler") else ""
    arguments = dict(conversion.take("lr_scheduler_kwargs") or {})
    least = conversion.take("cosine_min_lr_ratio")
    if name in _SCHEDULES:
        conversion.differ("lr_scheduler", f"axolotl's own {name} becomes cosine.")
        name = "cosine"
    if least and name == "cosine":
        name, arguments["min_lr_rate"] = "cosine_with_min_lr", float(least)
        key = "cosine_min_lr_ratio"
    conversion.set_key("trainer.args.lr_scheduler_type", name, key, "how the rate falls")
    if arguments:
        key = key if least else "lr_scheduler_kwargs"
        conversion.set_key("trainer.args.lr_scheduler_kwargs", arguments, key)
    steps, share = conversion.take("warmup_steps"), conversion.take("warmup_ratio")
    value = steps if steps is not None else share if share is not None else 0.03
    key = "warmup_steps" if steps is not None else "warmup_ratio" if share is not None else ""
    about = "steps of warm-up; below 1 a share of all steps"
    conversion.set_key("trainer.args.warmup_steps", value, key, about)


def _evaluations(conversion: Conversion) -> None:
    """When a run is evaluated and saved."""
    source, prefix = conversion.source, "trainer.args"
    epochs = float(source.get("num_epochs") or 1)
    held_out = source.get("val_set_size") or source.get("test_datasets")
    chooser = "evaluation_strategy" if conversion.has("evaluation_strategy") else "eval_strategy"
    strategy = conversion.take(chooser)
    steps, times = conversion.take("eval_steps"), conversion.take("evals_per_epoch")
    if not held_out:
        conversion.set_key(f"{prefix}.eval_strategy", "no", "", "there are no held-out rows")
        for key in ("eval_steps", "evals_per_epoch", "eval_strategy", "evaluation_strategy"):
            if source.get(key):
                conversion.leave_out_taken(key, "no rows are held out")
    elif times or steps:
        key = "evals_per_epoch" if times else "eval_steps"
        _set_times(conversion, "eval", steps if not times else None, times, epochs, key)
    elif strategy:
        conversion.set_key(f"{prefix}.eval_strategy", strategy, chooser, "when")
    strategy = conversion.take("save_strategy")
    conversion.count_as_carried("save_strategy")
    steps, times = conversion.take("save_steps"), conversion.take("saves_per_epoch")
    if times or steps:
        key = "saves_per_epoch" if times else "save_steps"
        _set_times(conversion, "save", steps if not times else None, times, epochs, key)
    else:
        key = "save_strategy" if strategy else ""
        conversion.set_key(f"{prefix}.save_strategy", strategy or "epoch", key, "checkpoints")
    limit = conversion.take("save_total_limit") or 4
    key = "save_total_limit" if source.get("save_total_limit") else ""
    conversion.set_key(f"{prefix}.save_total_limit", limit, key, "older checkpoints are removed")
    if (patience := conversion.take("early_stopping_patience")) and held_out:
        key = "early_stopping_patience"
        conversion.set_key(
            "trainer.evaluation.patience", patience, key, "evaluations without a gain"
        )
    conversion.rename(
        "logging_steps load_best_model_at_end metric_for_best_model greater_is_better "
        "save_only_model auto_find_batch_size"
    )
    if source.get("logging_steps") is None:
        conversion.set_key(f"{prefix}.logging_steps", 1, "", "steps between two lines of metrics")


def _set_times(
    conversion: Conversion, what: str, steps: Any, times: Any, epochs: float, key: str
) -> None:
    """Evaluate or save every so many steps, or so many times in an epoch."""
    prefix = "trainer.args"
    share = 1.0 / (float(times) * epochs) if times else None
    if times == 1 or (share is not None and share >= 1):
        conversion.set_key(f"{prefix}.{what}_strategy", "epoch", key, "at the end of each epoch")
        return
    conversion.set_key(f"{prefix}.{what}_strategy", "steps", key, f"{what} every {what}_steps")
    value = round(share, 6) if share is not None else steps
    about = "optimizer steps; below 1 a share of all steps"
    conversion.set_key(f"{prefix}.{what}_steps", value, key, about)


def _preferences(conversion: Conversion) -> None:
    method, prefix = conversion.draft.options["trainer"], "trainer.args"
    beta = next((k for k in ("rl_beta", "dpo_beta", "orpo_alpha") if conversion.has(k)), None)
    if beta and method in ("dpo", "kto", "orpo", "cpo", "grpo"):
        conversion.set_key(
            f"{prefix}.beta", conversion.take(beta), beta, "how near to the reference"
        )
    elif method == "cpo":
        conversion.set_key(
            f"{prefix}.beta", 0.1, "", "TRL's CPOConfig, which axolotl leaves as it is"
        )
    names = {
        "simpo_gamma": "simpo_gamma", "cpo_alpha": "cpo_alpha",
        "dpo_loss_type": "loss_type", "dpo_loss_weights": "loss_weights",
        "dpo_label_smoothing": "label_smoothing", "dpo_use_weighting": "use_weighting",
        "precompute_ref_log_probs": "precompute_ref_log_probs",
        "dpo_use_liger_kernel": "use_liger_kernel",
        "center_rewards_coefficient": "center_rewards_coefficient",
        "kto_desirable_weight": "desirable_weight", "kto_undesirable_weight": "undesirable_weight",
    }  # fmt: skip
    fields = read_class_fields(*METHODS[method].config) or {}
    for key, ours in names.items():
        value = conversion.take(key)
        if value is None:
            continue
        if ours in fields:
            conversion.set_key(f"{prefix}.{ours}", value, key)
        else:
            conversion.drop(key, f"trainer={method} has no {ours}")
    if method == "cpo" and not conversion.has("cpo_alpha"):
        conversion.set_key(f"{prefix}.cpo_alpha", 1.0, "", "what learning the better reply counts")


def _rewards(conversion: Conversion) -> None:
    settings = conversion.take("trl")
    if not settings:
        return
    method = conversion.draft.options["trainer"]
    if method != "grpo" or not isinstance(settings, dict):
        conversion.drop("trl", f"trainer={method} does not read it")
        return
    weights = settings.get("reward_weights") or []
    rewards: list[Any] = []
    for number, name in enumerate(settings.get("reward_funcs") or []):
        path = f"python:{name}" if "/" not in str(name) else None
        weight = weights[number] if number < len(weights) else 1.0
        entry: Any = {"model": name} if path is None else path
        if path is None:
            entry["weight"] = weight
        elif weight != 1.0:
            entry = {path: {"weight": weight}}
        rewards.append(entry)
    if rewards:
        about = "functions of prompts, completions and columns"
        conversion.set_key("trainer.rewards", rewards, "trl", about)
    left = []
    fields = read_class_fields(*METHODS["grpo"].config) or {}
    for name, value in settings.items():
        if name in ("reward_funcs", "reward_weights") or value is None:
            continue
        if name == "scale_rewards" and isinstance(value, bool):
            value = "group" if value else "none"
        if name in fields and not name.startswith(("vllm_", "use_vllm")):
            conversion.set_key(f"trainer.args.{name}", value, "trl")
        else:
            left.append(name)
    if left:
        conversion.differ("trl", f"these of its keys are not carried over: {', '.join(left)}.")


def _trackers(conversion: Conversion) -> None:
    trackers = []
    for name, switch, keys in (
        ("wandb", "use_wandb", "wandb_project wandb_entity wandb_name wandb_run_id wandb_mode"),
        ("mlflow", "use_mlflow", "mlflow_experiment_name mlflow_tracking_uri mlflow_run_name"),
        ("trackio", "use_trackio", "trackio_project_name trackio_space_id"),
        ("tensorboard", "use_tensorboard", ""),
    ):
        is_on = conversion.take(switch)
        # As in axolotl, the first of the keys switches its tracker on.
        is_named = any(conversion.has(key) for key in keys.split()[:1])
        if is_on or (is_on is None and is_named):
            trackers.append(name)
            conversion.count_as_carried(switch)
            conversion.rename(keys)
        else:
            conversion.leave_out(keys, f"{name} is off")
    if trackers:
        conversion.choose("tracker", trackers[0])
    if len(trackers) > 1:
        conversion.draft.set_key("tracker.to", trackers, "all trackers")
    if conversion.take("wandb_log_model") in ("checkpoint", "end", "true", True):
        about = "the trained model goes to the tracker, too"
        conversion.set_key("tracker.artifacts", True, "wandb_log_model", about)
    conversion.leave_out("wandb_watch", "luthier logs norms of gradients, and no histograms")


def _launch(conversion: Conversion) -> None:
    """What belongs to the launch file: DeepSpeed, FSDP, and how many devices there are."""
    deepspeed = conversion.take("deepspeed")
    if deepspeed:
        conversion.launch = "zero3" if "zero3" in str(deepspeed).lower() else "zero2"
        conversion.dropped["deepspeed"] = _LAUNCH
    sharded = [k for k in ("fsdp", "fsdp_config") if conversion.take(k)]
    for key in sharded:
        conversion.launch = "fsdp2"
        conversion.dropped[key] = _LAUNCH
    conversion.leave_out("fsdp_version", "luthier launches version 2")
    conversion.refuse(
        {
            "dp_shard_size": f"{_LAUNCH}; its sizes: `luthier docs launch`",
            "dp_replicate_size": f"{_LAUNCH}; its sizes: `luthier docs launch`",
            **dict.fromkeys(
                ("tensor_parallel_size", "context_parallel_size", "context_parapllel_size",
                 "sequence_parallel_degree", "expert_parallel_size"),
                "luthier does not split layers, rows or experts (`luthier docs launch`)",
            ),
            "use_ray": "luthier starts runs with accelerate or SLURM, not with Ray",
        }
    )  # fmt: skip
    conversion.leave_out(
        "ddp ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
        "local_rank world_size device device_map ray_num_workers accelerator_config gpu_count "
        "qlora_sharded_model_loading",
        "it belongs to the launch, which luthier sets up itself",
    )


def _plugins(conversion: Conversion) -> None:
    """Liger's kernels; other plugins are programs of axolotl."""
    plugins = conversion.take("plugins") or []
    names = [str(name).rpartition(".")[2] for name in plugins]
    liger = [key for key in conversion.source if key.startswith("liger_") and conversion.has(key)]
    if any(name == "LigerPlugin" for name in names) or liger:
        key = liger[0] if liger else "plugins"
        conversion.set_key("trainer.args.use_liger_kernel", True, key, "Liger's kernels")
        conversion.count_as_carried("plugins", *liger)
        for each in liger:
            conversion.take(each)
    others = [n for n in names if n not in ("LigerPlugin", "CutCrossEntropyPlugin")]
    if others:
        conversion.drop("plugins", f"{', '.join(others)}: programs of axolotl's own")
    elif "CutCrossEntropyPlugin" in names:
        conversion.differ(
            "plugins",
            "CutCrossEntropyPlugin: trainer.args.use_liger_kernel=true saves the same memory.",
        )
    conversion.leave_out(" ".join(k for k in conversion.source if k.startswith("liger_")), NO_NEED)
    checkpointing = conversion.take("gradient_checkpointing")
    if checkpointing in ("offload", "offload_disk"):
        key = "trainer.args.activation_offloading"
        conversion.set_key(key, True, "gradient_checkpointing", "activations wait in main memory")
        conversion.set_key("trainer.args.activation_checkpointing", True, "gradient_checkpointing")
    elif checkpointing is not None:
        about = "recomputes activations; auto decides by the memory"
        key = "trainer.args.activation_checkpointing"
        conversion.set_key(key, bool(checkpointing), "gradient_checkpointing", about)
    if conversion.take("activation_offloading"):
        key = "trainer.args.activation_offloading"
        conversion.set_key(key, True, "activation_offloading", "activations wait in main memory")
    conversion.rename("torch_compile torch_compile_backend torch_compile_mode")


def _needless(conversion: Conversion) -> None:
    for keys, why in _NEEDLESS:
        conversion.leave_out(keys, why)
    kernels = " ".join(
        key for key in conversion.source if key.startswith("lora_") and key.endswith("_kernel")
    )
    conversion.leave_out(kernels, NO_NEED)


_NEEDLESS = (
    ("model_type tokenizer_type processor_type cls_model_config is_llama_derived_model "
     "is_mistral_derived_model is_falcon_derived_model is_qwen_derived_model",
     "the classes follow from the model's own files"),
    ("output_dir", "a run's folder is runs/<recipe>/...; type output_dir=FOLDER for another one"),
    ("dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory "
     "num_dataset_shards_to_save", "luthier keeps encoded rows in its own cache"),
    ("resume_from_checkpoint auto_resume_from_checkpoints",
     "the same command resumes from the last checkpoint by itself"),
    ("strict debug seed_dataset test_value base_model_ignore_patterns low_cpu_mem_usage "
     "hf_use_auth_token secrets gpu provider node_count volumes branch dockerfile_commands "
     "memory timeout memory_preprocess timeout_preprocess", "it is not about the training"),
    ("gradient_checkpointing_kwargs", "luthier recomputes without re-entrance, as torch advises"),
    ("skip_prepare_dataset remove_unused_columns sample_packing_eff_est total_num_tokens "
     "sample_packing_seq_len_multiplier sample_packing_group_size sample_packing_bin_size "
     "sample_packing_mp_start_method streaming_multipack_buffer_size pretrain_multipack_attn "
     "pretrain_multipack_buffer_size multipack_real_batches batch_flattening",
     "luthier lays out the rows itself"),
    ("flash_attn_cross_entropy flash_attn_fuse_mlp flash_optimum flash_attn_rms_norm "
     "flex_attn_compile_kwargs fused_attn_kernel cut_cross_entropy use_scattermoe use_sonicmoe "
     "experts_implementation use_kernels quantize_moe_experts lora_on_cpu "
     "experimental_skip_move_to_device tiled_mlp tiled_mlp_num_shards gemma4_hybrid_attn_impl "
     "llama4_linearized_experts dataloader_pin_memory dataloader_prefetch_factor "
     "dataloader_num_workers dataloader_drop_last gc_steps torch_empty_cache_steps "
     "use_dsv4_kernels dsv4_fp4_grouped_mode use_glm_dsa_kernels torch_compile_options", NO_NEED),
    ("tokenizer_use_fast tokenizer_legacy tokenizer_save_jinja_files save_safetensors",
     "luthier reads fast tokenizers, and writes safetensors"),
    ("eot_tokens", "luthier finds the tokens that end a turn in the chat template"),
    ("loss_watchdog_threshold loss_watchdog_patience",
     "a run stops at the first gradient that is no number"),
    ("shuffle_merged_datasets shuffle_before_merging_datasets", "rows are shuffled with seed"),
    ("gptq gptq_groupsize gptq_model_v1 gptq_disable_exllama",
     "what a model comes quantized with stands in its own files"),
    ("include_tokens_per_second include_tkps profiler_steps profiler_steps_start "
     "use_otel_metrics otel_metrics_host otel_metrics_port", "tokens/s are always logged"),
    ("eval_table_size eval_max_new_tokens eval_causal_lm_metrics do_causal_lm_eval "
     "generate_samples", "replies are written and scored by trainer.evaluation"),
    ("trackio_run_name torchdistx_path mean_resizing_embeddings project_name",
     "luthier has no use for it"),
    ("freeze_mm_modules", "the vision tower and the projector are frozen unless opened"),
    ("nvfp4_merge_aware merge_lora merge_method", "merging is a command of its own"),
    ("resize_token_embeddings_to_32x", "speed only"),
    ("full_finetune", "without `adapter` all weights train"),
    ("loraplus_lr_embedding", "it is read with an adapter on the embeddings alone"),
)  # fmt: skip
"""Keys that need no setting here, and why."""


def _refused(conversion: Conversion) -> None:
    conversion.refuse(_REFUSED)
    for key in list(conversion.source):
        if key.startswith(("swanlab_", "comet_", "use_comet", "use_swanlab", "otel_")):
            conversion.refuse({key: "luthier logs to wandb, TensorBoard, MLflow and Trackio"})
        elif key.startswith(("jagged_restart", "relora", "lisa_", "qgalore_", "dion_", "eaft_")):
            conversion.refuse({key: "luthier has no equal of this method"})
    for key in ("chat_template", "chat_template_jinja", "train_on_inputs"):
        conversion.take(key)


_REFUSED = {
    "hub_model_id": "upload a finished run with `luthier push RUN --to OWNER/NAME`",
    "hub_strategy": "upload a finished run with `luthier push RUN`",
    "push_dataset_to_hub": "luthier uploads no datasets",
    "lora_model_dir": "a run starts a new adapter; merge the old one first (`luthier merge`)",
    "trainer_cls": "write a class of your own as trainer.method=python:FILE.py:CLASS",
    "tokenizer_use_mistral_common": "luthier reads the tokenizer by transformers",
    "use_eaft": "luthier has no such loss; trainer.loss takes a function of your own",
    "qat": "luthier has no quantization-aware training",
    "quantization": "quantize a finished run with `luthier merge --quantize`",
    "llmcompressor": "luthier does not sparsify",
    "fp8": "luthier computes in bfloat16, float16 or float32",
    "fp8_enable_fsdp_float8_all_gather": "luthier computes in bfloat16, float16 or float32",
    "reinit_weights": "luthier fine-tunes; it does not begin from random weights",
    "use_onebitllms": "luthier trains no 1.58-bit models",
    "model_quantization_config": "set quantization=dequantize for a model that comes packed",
    "model_quantization_config_kwargs": "set quantization=dequantize for a model that comes packed",
    "sample_packing_sequentially": "luthier packs for the fullest sequences",
    "curriculum_sampling": "rows are shuffled; trainer.args.train_sampling_strategy=sequential "
    "keeps their order",
    "min_sample_len": "leave short rows out with dataset.filter",
    "max_prompt_len": "chat.max_length bounds the whole row",
    "eval_sequence_len": "chat.max_length holds for held-out rows, too",
    "vllm": "luthier generates with transformers",
    "cosine_constant_lr_ratio": "luthier has no schedule that stays at the end",
    "lr_quadratic_warmup": "warm-up is linear",
    "eta_min": "use lr_scheduler_type=cosine_with_min_lr with lr_scheduler_kwargs.min_lr",
    "max_packed_sequence_len": "axolotl removed it; chat.max_length with trainer.args.packing",
    "lr_groups": "use trainer.optimizer.groups",
    "use_pose": "luthier does not stretch positions while training",
    "s2_attention": "luthier has no shifted sparse attention",
    "ebft": "luthier has no energy-based fine-tuning",
    "rope_scaling": "write it into a copy of the model's config.json",
    "dynamic_checkpoint": "a signal to the run makes a checkpoint",
    "layer_offloading": "luthier keeps the layers on the device",
    "selective_checkpointing": "luthier recomputes all activations or none",
}
"""Keys whose effect the recipe does not have, and what to do instead."""
