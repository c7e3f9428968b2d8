"""A config of LLaMA-Factory as a recipe.

What its keys mean is read from its arguments and trainers (`hparams`, `train`, `data`) as of August
2026. Where a key is missing, its default is written into the recipe if luthier's is another one and
it changes the training.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.config.library_fields import read_class_fields
from luthier.config.methods import METHODS
from luthier.errors import UserError, format_override, suggest_options
from luthier.recipe_files.conversion import (
    MESSAGE_FORMS,
    NO_NEED,
    Conversion,
    SourceDraft,
    apply,
    set_eval_sources,
    set_sources,
    split_names,
    take_trackers,
)
from luthier.recipe_files.draft import recipe_name

DATASET_INFO = "dataset_info.json"
_STAGES = {"sft": "sft", "pt": "pretrain", "rm": "reward", "dpo": "dpo", "kto": "kto"}
_FORMS = {
    "a single value": "stage flash_attn pref_loss finetuning_type quantization_method "
    "quantization_type",
    "a number": "val_size pref_ftx",
    "a whole number": "lora_rank lora_alpha quantization_bit",
}
"""What the values have to be that are read here, and not only written into the recipe."""
_LAUNCH = "it belongs to the launch: see the command below"


def convert_llama_factory(conversion: Conversion, dataset_info: Path | None = None) -> None:
    """Take every key of a config; UserError for one that does not train, or not in a way that
    luthier has.

    `dataset_info` is the file that says what the names in `dataset` are; None looks for it in
    `dataset_dir` and around the config.
    """
    _check_trains(conversion)
    for form, keys in _FORMS.items():
        conversion.check_values(form, keys)
    apply(
        conversion,
        (
            _method,
            _model,
            _adapter,
            lambda conversion: _datasets(conversion, dataset_info),
            _sequences,
            _training,
            _evaluations,
            take_trackers,
            _preferences,
            _launch,
            _needless,
            _refused,
        ),
    )


def _check_trains(conversion: Conversion) -> None:
    source, file = conversion.source, conversion.file
    if {"model", "model_class", "train_dataset"} & set(source) and "stage" not in source:
        raise UserError(
            f"{file}: this is the form of LLaMA-Factory's v1, which is still experimental there; "
            "luthier reads that of version 0 (stage, finetuning_type, dataset, ...)."
        )
    if source.get("export_dir"):
        raise UserError(
            f"{file}: it merges an adapter and trains nothing. A run of luthier is merged with "
            "`luthier merge RUN`."
        )
    # A config without do_train may leave it to the command line.
    if not source.get("do_train") and (source.get("do_predict") or not source.get("dataset")):
        what = "answers rows" if source.get("do_predict") else "trains nothing (no do_train)"
        raise UserError(
            f"{file}: it {what}. A run of luthier answers with `luthier generate`, `luthier chat` "
            "and `luthier evaluate`."
        )


def _method(conversion: Conversion) -> None:
    stage, loss = conversion.take("stage", "sft"), conversion.take("pref_loss", "sigmoid")
    conversion.take("do_train")
    conversion.count_as_carried("do_train")
    if stage not in _STAGES:
        raise UserError(
            f"{conversion.file}: stage: {stage}: luthier does not train this way. Online methods "
            "of luthier are grpo and rloo (`luthier docs methods`)."
        )
    method = {"orpo": "orpo", "simpo": "cpo"}.get(loss, "dpo") if stage == "dpo" else _STAGES[stage]
    conversion.choose("trainer", method, "stage", "pref_loss")
    if method == "cpo":
        conversion.set_key("trainer.args.loss_type", "simpo", "pref_loss", "the loss")
    elif method == "dpo" and loss == "kto_pair":
        conversion.drop("pref_loss", "TRL's DPO has no kto_pair; trainer=kto trains on pairs")
    elif method == "dpo":
        conversion.set_key("trainer.args.loss_type", loss, "pref_loss", "the loss")


def _model(conversion: Conversion) -> None:
    conversion.choose("model", "hub")
    conversion.rename("model_name_or_path trust_remote_code")
    revision = conversion.take("model_revision")
    if revision and revision != "main":
        conversion.set_key("model.revision", revision, "model_revision", "a branch, tag or commit")
    elif revision:
        conversion.leave_out_taken("model_revision", "main is taken anyway")
    for key in ("add_tokens", "add_special_tokens"):
        if value := conversion.take(key):
            about = "texts that become tokens, each with a row that trains"
            conversion.set_key(f"model.{key}", split_names(value), key, about)
    attention = conversion.take("flash_attn")
    names = {"sdpa": "sdpa", "disabled": "eager"}
    if attention in names:
        conversion.set_key("model.attention", names[attention], "flash_attn", "the attention")
    elif attention:
        text = "model.attention: auto takes flash attention where it is installed"
        conversion.leave_out_taken("flash_attn", text)
    if value := conversion.take("rope_scaling"):
        conversion.drop("rope_scaling", f"write {value} into a copy of the model's config.json")
    full = conversion.source.get("finetuning_type", "lora") in ("full", "freeze")
    pure = conversion.take("pure_bf16")
    for key, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if conversion.take(key) and full:
            conversion.set_key(f"trainer.args.{key}", True, key, f"computes in {dtype}")
        elif conversion.has(key):
            conversion.set_key("model.dtype", dtype, key, "the frozen weights")
    if pure and full:
        conversion.set_key("trainer.args.bf16", True, "pure_bf16", "computes in bfloat16")
        conversion.differ(
            "pure_bf16",
            "LLaMA-Factory holds the weights in bfloat16; luthier trains float32 weights and "
            "computes in bfloat16, which takes more memory and loses no small update.",
        )
    elif pure:
        conversion.set_key("model.dtype", "bfloat16", "pure_bf16", "the frozen weights")
        conversion.differ("pure_bf16", "the adapter itself is float32 in luthier.")


def _adapter(conversion: Conversion) -> None:
    kind = conversion.take("finetuning_type", "lora")
    _quantization(conversion)
    if kind in ("full", "freeze"):
        conversion.count_as_carried("finetuning_type")
        conversion.leave_out(
            "lora_rank lora_alpha lora_dropout lora_target additional_target",
            f"finetuning_type: {kind} has no adapter",
        )
        if kind == "freeze":
            _freeze(conversion)
        return
    if kind == "oft":
        conversion.choose("lora", "oft", "finetuning_type")
        conversion.rename("oft_block_size module_dropout")
        if rank := conversion.take("oft_rank"):
            conversion.set_key("lora.r", rank, "oft_rank", "the number of blocks")
        elif conversion.draft.value("lora.oft_block_size"):
            conversion.set_key("lora.r", 0, "", "the size of a block is named instead")
    else:
        conversion.choose("lora", "default", "finetuning_type")
        rank = conversion.carry("lora_rank", "lora.r", 8)
        conversion.carry("lora_alpha", "lora.lora_alpha", 2 * rank)
        conversion.carry("lora_dropout", "lora.lora_dropout", 0.0)
        conversion.rename("loraplus_lr_ratio use_rslora use_dora")
        if conversion.take("pissa_init"):
            steps = conversion.take("pissa_iter", 16)
            start = "pissa" if steps == -1 else f"pissa_niter_{steps}"
            conversion.set_key("lora.init_lora_weights", start, "pissa_init", "starts from PiSSA")
            conversion.count_as_carried("pissa_iter", "pissa_convert")
            conversion.take("pissa_convert")
    target = "oft_target" if kind == "oft" else "lora_target"
    names = split_names(conversion.take(target, "all"))
    key = target if conversion.has(target) else ""
    value: Any = "all-linear" if names == ["all"] else names
    conversion.set_key("lora.target_modules", value, key, "the layers with an adapter")
    if extra := conversion.take("additional_target"):
        about = "layers that train whole"
        conversion.set_key("lora.modules_to_save", split_names(extra), "additional_target", about)


def _quantization(conversion: Conversion) -> None:
    bits, method = conversion.take("quantization_bit"), conversion.take("quantization_method")
    conversion.count_as_carried("quantization_method")
    if not bits:
        return
    if method not in (None, "bnb", "bitsandbytes"):
        conversion.drop("quantization_method", "luthier quantizes with bitsandbytes")
    kind = conversion.take("quantization_type", "nf4")
    if int(bits) == 8:
        conversion.choose("quantization", "int8", "quantization_bit")
    elif int(bits) == 4:
        option = "fp4" if kind == "fp4" else "nf4"
        conversion.choose("quantization", option, "quantization_bit", "quantization_type")
        if conversion.take("double_quantization") is False:
            key = "quantization.bnb_4bit_use_double_quant"
            conversion.set_key(key, False, "double_quantization", "the scales stay whole")
    else:
        conversion.drop("quantization_bit", f"bitsandbytes has 4 and 8 bits, and not {bits}")


def _freeze(conversion: Conversion) -> None:
    """Freezing names a number of layers, and a recipe names the parameters that train."""
    layers = conversion.take("freeze_trainable_layers", 2)
    key = "freeze_trainable_layers"
    key = key if conversion.has(key) else "finetuning_type"
    conversion.drop(
        key,
        f"ATTENTION: without it all weights train. {layers} layers train there; here name their "
        "parameters by pattern, for the last two of 32 layers: "
        + format_override("model.train", [r"layers\.30\.", r"layers\.31\."]),
    )
    conversion.refuse(
        dict.fromkeys(
            ("freeze_trainable_modules", "freeze_extra_modules", "use_llama_pro"),
            "name what trains by pattern in model.train",
        )
    )


def _datasets(conversion: Conversion, dataset_info: Path | None) -> None:
    names = split_names(conversion.take("dataset") or [])
    folder = conversion.take("dataset_dir", "data")
    conversion.count_as_carried("dataset_dir")
    if not names:
        raise UserError(f"{conversion.file}: it names no `dataset`, so there is nothing to train.")
    tests = split_names(conversion.take("eval_dataset") or [])
    described = _DatasetInfo(conversion, folder, dataset_info)
    sources = [described.source(name, "dataset") for name in names]
    set_sources(conversion, sources, "dataset")
    if tests:
        eval_sources = [described.source(name, "eval_dataset") for name in tests]
        set_eval_sources(conversion, eval_sources, "eval_dataset")
    _mixture(conversion, list(conversion.draft.settings), len(sources))
    size = conversion.take("val_size", 0.0)
    key = "val_size" if conversion.source.get("val_size") is not None else ""
    if not tests and not size:
        conversion.set_key("dataset.eval.share", None, key, "no rows are held out")
    elif not tests and float(size) >= 1:
        conversion.set_key("dataset.eval.share", None, key, "in place of a share")
        conversion.set_key("dataset.eval.count", int(size), key, "rows held out")
    elif not tests:
        conversion.set_key("dataset.eval.share", float(size), key, "rows held out")


def _mixture(conversion: Conversion, keys: list[str], count: int) -> None:
    """Take what holds for all sources: their first rows, their system prompt, their shares."""
    paths = [k for k in keys if k.startswith("dataset.") and k.endswith(".path")]
    paths = [key for key in paths if ".sets." not in key]
    for key, ours in (("max_samples", "max_rows"), ("default_system", "system")):
        if (value := conversion.take(key)) is None:
            continue
        for path in paths:
            conversion.set_key(path.removesuffix("path") + ours, value, key)
    strategy = conversion.take("mix_strategy", "concat")
    shares = conversion.take("interleave_probs")
    if strategy != "concat" and count > 1:
        conversion.set_key(
            "dataset.mix", "interleave", "mix_strategy", "by the weight of each source"
        )
        weights = split_names(shares) if shares else ["1.0"] * count
        if len(weights) != len(paths):
            raise UserError(
                f"{conversion.file}: interleave_probs: {len(weights)} numbers for {len(paths)} "
                "datasets."
            )
        for weight in weights:
            conversion.check_value("a number", "interleave_probs", weight)
        for path, share in zip(paths, map(float, weights), strict=True):
            key = "interleave_probs" if shares else ""
            conversion.set_key(path.removesuffix("path") + "weight", share, key)
        conversion.differ(
            "mix_strategy",
            f"{strategy}: LLaMA-Factory draws rows by chance; luthier takes exact shares "
            "(`luthier docs mixtures`).",
        )
    else:
        conversion.count_as_carried("mix_strategy")
    if conversion.take("streaming"):
        conversion.set_key("dataset.streaming", True, "streaming", "rows are encoded as they train")
        if buffer := conversion.take("buffer_size"):
            conversion.set_key("dataset.shuffle_buffer", buffer, "buffer_size")
    if conversion.take("eval_on_each_dataset"):
        conversion.differ("eval_on_each_dataset", "each of dataset.eval.sets has metrics anyway.")


class _DatasetInfo:
    """The datasets that `dataset_info.json` describes."""

    def __init__(self, conversion: Conversion, folder: Any, file: Path | None) -> None:
        self._conversion = conversion
        self._online = folder == "ONLINE"
        self._file: Path | None = None
        self._entries: Mapping[str, Any] = {}
        if isinstance(folder, dict):
            self._entries = folder
        elif not self._online:
            self._file = file or self._find(str(folder))
            self._entries = _read_info(self._file)

    def _find(self, folder: str) -> Path:
        """Return the file: in `dataset_dir` from here, or from a folder above the config."""
        below = Path(folder) / DATASET_INFO
        above = [Path(), *self._conversion.file.absolute().parents]
        beside = self._conversion.file.parent / DATASET_INFO
        for place in [beside, *(start / below for start in above)]:
            if place.is_file():
                return place
        raise UserError(
            f"{self._conversion.file}: dataset: its names are described in {below}, which is not "
            "here. Say where it is: --dataset-info FILE."
        )

    def source(self, name: str, key: str) -> SourceDraft:
        """Return the source of this name."""
        if self._online:
            return SourceDraft(recipe_name(name), {"path": name})
        if name not in self._entries:
            options = suggest_options(name, self._entries)
            raise UserError(f"{self._file}: there is no dataset {name!r}. {options}")
        self._conversion.check_value("a mapping", f"{key}: {name}", self._entries[name])
        entry = dict(self._entries[name])
        for part in ("columns", "tags"):
            value = entry.get(part) or {}
            self._conversion.check_value("a mapping", f"{key}: {name}: {part}", value)
        settings = self._location(entry, name)
        settings |= _row_format(self._conversion, entry, name, key)
        return SourceDraft(recipe_name(name), settings, {"path": f"{name} of {DATASET_INFO}"})

    def _location(self, entry: dict[str, Any], name: str) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        if path := entry.pop("hf_hub_url", None):
            settings["path"] = path
            for theirs, ours in (("subset", "name"), ("split", "split")):
                if value := entry.pop(theirs, None):
                    settings[ours] = value
            if folder := entry.pop("folder", None):
                settings["options"] = {"data_dir": folder}
        elif file := entry.pop("file_name", None):
            folder = self._file.parent if self._file else Path()
            settings["path"] = _from_here(folder / file)
        elif path := entry.pop("cloud_file_name", None):
            settings["path"] = path
        else:
            raise UserError(
                f"{self._file}: {name}: luthier reads files and datasets of the Hugging Face hub, "
                f"and this one has {', '.join(entry) or 'neither'}."
            )
        if samples := entry.pop("num_samples", None):
            settings["max_rows"] = samples
        return settings


def _from_here(path: Path) -> str:
    """Return a path as it is typed from the working folder, where that is shorter."""
    try:
        return str(Path(os.path.normpath(path.absolute())).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _read_info(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: it cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: it is no object of datasets by name.")
    return content


def _row_format(
    conversion: Conversion, entry: dict[str, Any], name: str, key: str
) -> dict[str, Any]:
    """Return how the rows of a described dataset are read."""
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    for media in ("videos", "audios"):
        if columns.get(media):
            raise UserError(f"{conversion.file}: {name}: luthier trains on no {media}.")
    method = conversion.draft.options["trainer"]
    mapped: dict[str, str] = {}
    if entry.get("formatting", "alpaca") == "alpaca":
        kind = _alpaca(columns, mapped, method, bool(entry.get("ranking")))
        if kind == "alpaca":
            text = "LLaMA-Factory puts one line break between an instruction and its input, luthier"
            conversion.differ(key, f"{text} a blank line.")
    else:
        kind = _dialogue(conversion, columns, tags, mapped, name)
        kind = "unpaired" if columns.get("kto_tag") else kind
        kind = "preference" if entry.get("ranking") else kind
    for theirs, ours in (
        ("system", "system"),
        ("tools", "tools"),
        ("images", "images"),
        ("chosen", "chosen"),
        ("rejected", "rejected"),
        ("kto_tag", "label"),
    ):
        if columns.get(theirs) and columns[theirs] != ours and (theirs, ours) != ("kto_tag", ours):
            mapped[ours] = columns[theirs]
        elif theirs == "kto_tag" and columns.get(theirs):
            mapped[ours] = columns[theirs]  # fmt: skip
    settings: dict[str, Any] = {"type": kind}
    if columns.get("images"):
        settings["image_placeholder"] = "<image>"
    return settings | ({"columns": mapped} if mapped else {})


def _alpaca(
    columns: Mapping[str, str], mapped: dict[str, str], method: str, is_ranking: bool
) -> str:
    """Note the columns of the alpaca format, and return what luthier calls it."""
    prompt = columns.get("prompt") or "instruction"
    if method == "pretrain":
        if prompt != "text":
            mapped["text"] = prompt
        return "text"
    names = (("instruction", "prompt", "instruction"), ("input", "query", "input"),
             ("output", "response", "output"), ("history", "history", "history"))  # fmt: skip
    for ours, theirs, default in names:
        if is_ranking and ours == "output":
            continue
        column = columns.get(theirs) if columns else default
        if column and column != ours:
            mapped[ours] = column
    if is_ranking:
        return "preference"
    return "unpaired" if columns.get("kto_tag") else "alpaca"


def _dialogue(
    conversion: Conversion,
    columns: Mapping[str, str],
    tags: Mapping[str, str],
    mapped: dict[str, str],
    name: str,
) -> str:
    """Note the column of messages, and return the form that these have."""
    column = columns.get("messages") or "conversations"
    keys = (tags.get("role_tag", "from"), tags.get("content_tag", "value"))
    if keys not in MESSAGE_FORMS:
        raise UserError(
            f"{conversion.file}: {name}: its messages have the keys {keys[0]} and {keys[1]}; "
            "luthier reads role and content, or from and value. Rename them with a function "
            "(dataset.map, `luthier docs code`)."
        )
    kind, ours = MESSAGE_FORMS[keys]
    if column != ours:
        mapped[ours] = column
    return kind


def _sequences(conversion: Conversion) -> None:
    """The template, lengths, packing, and which turns train."""
    method = conversion.draft.options["trainer"]
    conversion.carry("cutoff_len", "chat.max_length", 2048)
    if method != "pretrain":
        conversion.differ(
            "cutoff_len" if conversion.has("cutoff_len") else "dataset",
            "LLaMA-Factory cuts longer rows within prompt and reply; luthier removes whole turns "
            "from the front (chat.on_long: turns), and leaves out a row that is still too long.",
        )
    template = conversion.take("template")
    if template:
        conversion.differ(
            "template",
            f"{template} is LLaMA-Factory's own; the tokenizer's chat template is used. A base "
            "model without one needs chat.template=FILE.",
        )
    for key in ("enable_thinking", "preserve_thinking"):
        if (value := conversion.take(key)) is not None:
            about = "a variable of the chat template"
            conversion.set_key(f"chat.variables.{key}", value, key, about)
    packing, neat = conversion.take("packing"), conversion.take("neat_packing")
    if method in ("sft", "pretrain"):
        on = bool(neat) or (method == "pretrain" if packing is None else bool(packing))
        key = "neat_packing" if neat else "packing" if packing is not None else ""
        conversion.set_key("trainer.args.packing", on, key, "rows share a sequence, kept apart")
        if packing and not neat:
            text = "there rows in one sequence see each other; here they are kept apart."
            conversion.differ("packing", text)
    elif packing:
        conversion.drop("packing", f"rows of trainer={method} are not packed")
    if conversion.take("mask_history"):
        conversion.set_key("chat.train_on", "last", "mask_history", "the last reply alone trains")
    if conversion.take("train_on_prompt"):
        roles = ["system", "user", "assistant"]
        conversion.set_key("chat.train_on", roles, "train_on_prompt", "every turn trains")


def _training(conversion: Conversion) -> None:
    """Batches, steps, the optimizer and the learning rate, with LLaMA-Factory's defaults."""
    prefix = "trainer.args"
    for key, default in (
        ("per_device_train_batch_size", 8),
        ("per_device_eval_batch_size", 8),
        ("gradient_accumulation_steps", 1),
        ("learning_rate", 5e-5),
        ("num_train_epochs", 3.0),
        ("lr_scheduler_type", "linear"),
        ("weight_decay", 0.0),
    ):
        conversion.carry(key, f"{prefix}.{key}", default)
    steps, share = conversion.take("warmup_steps"), conversion.take("warmup_ratio")
    key = "warmup_steps" if steps else "warmup_ratio" if share else ""
    about = "steps of warm-up; below 1 a share of all steps"
    conversion.set_key(f"{prefix}.warmup_steps", steps or share or 0, key, about)
    conversion.rename(
        "max_steps optim optim_args adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
        "lr_scheduler_kwargs neftune_noise_alpha torch_compile dataloader_num_workers "
        "logging_steps save_steps save_strategy save_total_limit save_only_model "
        "load_best_model_at_end metric_for_best_model greater_is_better",
    )
    if conversion.source.get("save_strategy") is None:
        conversion.set_key(f"{prefix}.save_strategy", "steps", "", "checkpoints")
        if conversion.source.get("save_steps") is None:
            conversion.set_key(f"{prefix}.save_steps", 500, "", "steps between two checkpoints")
    if conversion.take("use_muon"):
        conversion.set_key("trainer.optimizer.name", "muon", "use_muon", "the optimizer")
    if conversion.take("use_dft_loss"):
        conversion.set_key(f"{prefix}.loss_type", "dft", "use_dft_loss", "the loss")
    if conversion.take("enable_liger_kernel"):
        conversion.set_key(
            f"{prefix}.use_liger_kernel", True, "enable_liger_kernel", "Liger's kernels"
        )
    for key, kind in (("disable_shuffling", "sequential"), ("group_by_length", "group_by_length")):
        if conversion.take(key):
            about = "the order of rows"
            conversion.set_key(f"{prefix}.train_sampling_strategy", kind, key, about)
    keeps_all = conversion.take("disable_gradient_checkpointing")
    conversion.leave_out("gradient_checkpointing", "LLaMA-Factory recomputes in any case")
    conversion.leave_out(
        "gradient_checkpointing_kwargs", "luthier recomputes without re-entrance, as torch advises"
    )
    if keeps_all:
        key = "disable_gradient_checkpointing"
        conversion.set_key(f"{prefix}.activation_checkpointing", False, key, "keeps activations")
    else:
        conversion.set_key(f"{prefix}.activation_checkpointing", True, "", "recomputes activations")
    if conversion.source.get("seed") is not None:
        conversion.set_key("seed", conversion.take("seed"), "seed")


def _evaluations(conversion: Conversion) -> None:
    held_out = conversion.has("val_size") or conversion.has("eval_dataset")
    chooser = "evaluation_strategy" if conversion.has("evaluation_strategy") else "eval_strategy"
    strategy, steps = conversion.take(chooser), conversion.take("eval_steps")
    key = chooser if strategy else ""
    if held_out and strategy:
        conversion.set_key("trainer.args.eval_strategy", strategy, key, "when held-out rows count")
        if steps:
            conversion.set_key("trainer.args.eval_steps", steps, "eval_steps", "optimizer steps")
    else:
        conversion.set_key("trainer.args.eval_strategy", "no", key, "no evaluations while training")
    if (patience := conversion.take("early_stopping_steps")) and held_out:
        key = "early_stopping_steps"
        conversion.set_key(
            "trainer.evaluation.patience", patience, key, "evaluations without a gain"
        )


def _preferences(conversion: Conversion) -> None:
    method, prefix = conversion.draft.options["trainer"], "trainer.args"
    fields = read_class_fields(*METHODS[method].config) or {}
    if method in ("dpo", "kto", "orpo", "cpo"):
        conversion.carry("pref_beta", f"{prefix}.beta", 0.1)
    if method == "cpo":
        about = "by how much the better reply leads"
        conversion.carry("simpo_gamma", f"{prefix}.simpo_gamma", 0.5, about)
        conversion.set_key(f"{prefix}.cpo_alpha", 0.0, "", "SimPO alone")
    for key, ours in (("dpo_label_smoothing", "label_smoothing"), ("ld_alpha", "ld_alpha"),
                      ("kto_chosen_weight", "desirable_weight"),
                      ("kto_rejected_weight", "undesirable_weight")):  # fmt: skip
        if (value := conversion.take(key)) is None:
            continue
        if ours in fields:
            conversion.set_key(f"{prefix}.{ours}", value, key)
        else:
            conversion.drop(key, f"trainer={method} has no {ours}")
    if extra := conversion.take("pref_ftx"):
        loss = conversion.draft.value(f"{prefix}.loss_type")
        if method == "dpo" and isinstance(loss, str):
            conversion.set_key(f"{prefix}.loss_type", [loss, "sft"], "pref_ftx", "two losses")
            conversion.set_key(f"{prefix}.loss_weights", [1.0, float(extra)], "pref_ftx")
        else:
            conversion.drop("pref_ftx", f"trainer={method} has no further loss")


def _launch(conversion: Conversion) -> None:
    if value := conversion.take("deepspeed"):
        conversion.launch = "zero3" if "z3" in str(value) or "zero3" in str(value) else "zero2"
        conversion.dropped["deepspeed"] = _LAUNCH
        if "z0" in str(value):
            conversion.launch = "ddp"
    for key in ("fsdp", "fsdp_config", "fsdp_transformer_layer_cls_to_wrap"):
        if conversion.take(key):
            conversion.launch, conversion.dropped[key] = "fsdp2", _LAUNCH
    conversion.leave_out(
        "ddp_timeout ddp_find_unused_parameters ddp_backend local_rank ray_num_workers "
        "ray_init_kwargs master_addr master_port",
        "it belongs to the launch, which luthier sets up itself",
    )


def _needless(conversion: Conversion) -> None:
    for keys, why in (
        ("output_dir overwrite_output_dir",
         "a run's folder is runs/<recipe>/...; type output_dir=FOLDER for another one"),
        ("resume_from_checkpoint", "the same command resumes from the last checkpoint by itself"),
        ("overwrite_cache preprocessing_num_workers preprocessing_batch_size tokenized_path "
         "cache_dir data_shared_file_system", "luthier keeps encoded rows in its own cache"),
        ("plot_loss", "every run has a loss.png"),
        ("media_dir", "paths of images are beside the data file"),
        ("use_fast_tokenizer low_cpu_mem_usage use_v1_kernels use_unsloth use_unsloth_gc "
         "use_reentrant_gc print_param_status include_num_input_tokens_seen "
         "include_effective_tokens_per_second upcast_lmhead_output dataloader_pin_memory "
         "infer_backend use_kv_cache", NO_NEED),
        ("hf_hub_token ms_hub_token", "log in with `hf auth login`"),
        ("compute_accuracy", "the share of right tokens is always logged"),
        ("ignore_pad_token_for_loss remove_unused_columns", "luthier lays out the rows itself"),
        ("resize_vocab", "new tokens get their rows by themselves"),
        ("freeze_vision_tower freeze_multi_modal_projector freeze_language_model",
         "the vision tower and the projector are frozen unless opened (`luthier docs images`)"),
        ("do_eval do_predict predict_with_generate max_new_tokens temperature top_p top_k "
         "num_beams repetition_penalty eval_num_beams",
         "replies are written and scored by trainer.evaluation"),
        ("loraplus_lr_embedding", "it is read with an adapter on the embeddings alone"),
    ):  # fmt: skip
        conversion.leave_out(keys, why)


_OPTIMIZERS = "luthier has no equal; trainer.optimizer.name takes a function of your own"
_PIXELS = "set it for the model's own image processor in model.processor (`luthier docs images`)"


def _refused(conversion: Conversion) -> None:
    conversion.refuse(_REFUSED)
    for key in conversion.source:
        if key.startswith(("galore_", "apollo_", "badam_")):
            conversion.refuse({key: _OPTIMIZERS})
        elif key.startswith(_OTHER_BACKENDS):
            conversion.refuse({key: "luthier has no equal of this part of LLaMA-Factory"})


_OTHER_BACKENDS = (
    "swanlab_", "ppo_", "megatron", "hyper_parallel", "kt_", "tensor_model_parallel",
    "pipeline_model_parallel", "expert_model_parallel", "sequence_parallel", "context_parallel",
    "use_distributed_optimizer", "bias_activation_fusion", "apply_rope_fusion", "overlap_",
    "moe_grouped_gemm", "moe_token_dispatcher", "recompute_granularity", "use_packed_sequences",
    "export_hf_on_finish", "mixed_precision",
)  # fmt: skip
"""How the keys begin that belong to backends of LLaMA-Factory which luthier does not have."""

_REFUSED = {
    **dict.fromkeys(("use_galore", "use_apollo", "use_badam", "use_adam_mini"), _OPTIMIZERS),
    **dict.fromkeys(
        ("use_asft_loss", "asft_alpha", "use_eaft_loss", "eaft_alpha"),
        "luthier has no such loss; trainer.loss takes a function of your own",
    ),
    **dict.fromkeys(
        ("image_max_pixels", "image_min_pixels", "image_do_pan_and_scan", "crop_to_patches"),
        _PIXELS,
    ),
    **dict.fromkeys(
        ("video_max_pixels", "video_min_pixels", "video_fps", "video_maxlen"),
        "luthier trains on no videos",
    ),
    **dict.fromkeys(
        ("fp8", "fp8_backend", "fp8_enable_fsdp_float8_all_gather"),
        "luthier computes in bfloat16, float16 or float32",
    ),
    **dict.fromkeys(
        ("use_kt", "use_mca", "use_megatron_bridge", "use_hyper_parallel"),
        "luthier trains with TRL and accelerate alone",
    ),
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "export_hub_model_id"),
        "upload a finished run with `luthier push RUN --to OWNER/NAME`",
    ),
    "use_swanlab": "luthier logs to wandb, TensorBoard, MLflow and Trackio",
    "adapter_name_or_path": "a run starts a new adapter; merge the old one first (luthier merge)",
    "create_new_adapter": "merge the old adapter first (luthier merge)",
    "mixture_of_depths": "luthier does not change a model's layers",
    "shift_attn": "luthier has no shifted sparse attention",
    "moe_aux_loss_coef": "use trainer.args.router_aux_loss_coef with output_router_logits",
    "train_from_scratch": "luthier fine-tunes; it does not begin from random weights",
    "upcast_layernorm": "what trains is float32 anyway; frozen weights keep their format",
    "new_special_tokens_config": "name the tokens in model.add_special_tokens",
    "init_special_tokens": "new rows begin as transformers makes them",
    "split_special_tokens": "text of users is always encoded as plain text",
    "tool_format": "the chat template writes tools in its own format",
    "pref_bco_weight": "TRL has bco_pair as a loss of its own: trainer.args.loss_type",
    "ref_model": "the reference is the model before the training",
    "ref_model_adapters": "the reference is the model before the training",
    "reward_model": "the method has none",
    "pissa_convert": "a PiSSA adapter is saved as plain LoRA anyway",
}
"""Keys whose effect the recipe does not have, and what to do instead."""
