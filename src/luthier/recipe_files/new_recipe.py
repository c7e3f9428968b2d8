"""A recipe for a user's rows: the trainer, the model and the settings that fit them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.config.schema import SourceConfig
from luthier.data.formats.image_parts import TYPED_PLACEHOLDER
from luthier.model.positions import read_max_positions
from luthier.recipe_files.draft import RecipeDraft
from luthier.recipe_files.model_choice import ModelChoice
from luthier.recipe_files.row_survey import RowSurvey, TokenLengths
from luthier.terminal import pluralize

TRAINERS = {
    "conversation": "sft",
    "text": "pretrain",
    "preference": "dpo",
    "unpaired": "kto",
    "classification": "classify",
    "tagging": "tag",
    "seq2seq": "seq2seq",
}
"""What rows are -> the method that trains on them."""
_WORDS = {
    "sft": "Supervised fine-tuning",
    "pretrain": "Continued pre-training",
    "dpo": "Preference optimisation (DPO)",
    "kto": "Learning from good and bad replies (KTO)",
    "classify": "Classification",
    "tag": "Tagging of words",
    "seq2seq": "One text from another",
    "grpo": "Learning from rewards (GRPO)",
}
_GPU_LONGEST, _CPU_LONGEST = 4096, 1024
"""The longest sequences that a new recipe begins with; longer rows are cut or windowed."""
_FEW, _MANY = 200, 20_000


@dataclass(frozen=True)
class RecipeInputs:
    """What a new recipe is made of."""

    survey: RowSurvey
    source: SourceConfig
    choice: ModelChoice
    lengths: TokenLengths | None
    """None where no tokenizer is at hand."""
    memory: int
    """GiB of the GPU, 0 for a CPU."""

    @property
    def method(self) -> str:
        """The method of training."""
        return find_method(self.survey)


def find_method(survey: RowSurvey) -> str:
    """Return the method that trains on these rows."""
    if survey.opened.row_format.type == "prompt":
        return "grpo"
    return TRAINERS[survey.example_type]


def draft_recipe(inputs: RecipeInputs, command: str) -> RecipeDraft:
    """Return the recipe; `command` is how it is run."""
    draft = RecipeDraft()
    _choose(inputs, draft)
    _set_dataset(inputs, draft)
    _set_chat(inputs, draft)
    _set_steps(inputs, draft)
    _set_method(inputs, draft)
    survey = inputs.survey
    more = "" if survey.is_all else " and more"
    draft.header = [
        f"{_WORDS[inputs.method]} on {_path_words(inputs.source)}: "
        f"{survey.rows:,}{more} rows, {inputs.choice.name}.",
        f"Needs: {_needs(inputs)}.",
        f"Command: {command}",
        "Paths are those of the folder in which `luthier init` was run: run it from there.",
    ]
    if inputs.method == "dpo":
        draft.header.insert(1, "trainer=orpo, cpo, kto and reward train on the same rows.")
    return draft


def _path_words(source: SourceConfig) -> str:
    return source.path if isinstance(source.path, str) else ", ".join(source.path or ())


def _needs(inputs: RecipeInputs) -> str:
    needs = []
    if inputs.choice.option == "smollm2_135m":
        needs.append("2 CPU cores and 2 GB of memory")
    elif inputs.memory:
        needs.append(f"chosen for a GPU of {inputs.memory} GB (see `luthier plan`)")
    else:
        needs.append("chosen for a CPU (see `luthier plan`)")
    if inputs.choice.quantization:
        needs.append("bitsandbytes")
    if inputs.choice.note:
        needs.append("the network on first use")
    return "; ".join(needs)


def _choose(inputs: RecipeInputs, draft: RecipeDraft) -> None:
    choice = inputs.choice
    draft.options = {"model": choice.option, "dataset": "files", "trainer": inputs.method}
    if choice.lora:
        draft.options["lora"] = "default"
    if choice.quantization:
        draft.options["quantization"] = choice.quantization
    if choice.path is not None:
        draft.set_key("model.path", choice.path, f"{choice.why}; a hub name or a local folder")


def _set_dataset(inputs: RecipeInputs, draft: RecipeDraft) -> None:
    source, survey = inputs.source, inputs.survey
    row_format = survey.opened.row_format
    draft.set_key("dataset.path", source.path, "your rows: a file, a glob, a folder, a hub name")
    draft.set_key("dataset.type", row_format.type, "the row format (`luthier docs formats`)")
    columns = dict(source.columns)
    read = ", ".join(row_format.columns.source_names.values())
    comment = f"our name: the column's; {read} are read"
    if columns:
        draft.set_key("dataset.columns", columns, comment)
    for name in SourceConfig.model_fields:
        value = getattr(source, name)
        if name in ("path", "type", "columns") or value == SourceConfig.model_fields[name].default:
            continue
        if not value and name in ("options", "remove_columns"):
            continue
        draft.set_key(f"dataset.{name}", value, "as it was typed")
    if row_format.columns.image_placeholder == TYPED_PLACEHOLDER:
        comment = "texts hold it where an image of the row stands"
        draft.set_key("dataset.image_placeholder", TYPED_PLACEHOLDER, comment)
    if survey.repeated:
        count = pluralize(len(survey.repeated), "row repeats", "rows repeat")
        draft.set_key("dataset.deduplicate", "exact", f"{count} another one and would count twice")
    if survey.bad.rows:
        count = pluralize(len(survey.bad.rows), "row")
        comment = f"{count} that cannot be read; they are listed in dropped.jsonl"
        draft.set_key("dataset.on_bad_row", "drop", comment)
    _hold_out(inputs, draft)


def _hold_out(inputs: RecipeInputs, draft: RecipeDraft) -> None:
    """Hold rows out: a twentieth, of few rows a tenth, of very many a thousand."""
    usable = inputs.survey.usable
    if usable < 20:
        draft.set_key("dataset.eval.share", None, "too few rows to hold any out")
    elif usable < _FEW:
        draft.set_key("dataset.eval.share", None, "in place of a share")
        draft.set_key("dataset.eval.count", max(2, usable // 10), "rows held out from training")
    elif usable > _MANY:
        draft.set_key("dataset.eval.share", None, "in place of a share")
        draft.set_key("dataset.eval.count", 1000, "rows held out from training")
    else:
        draft.set_key("dataset.eval.share", 0.05, "of the rows are held out from training")


def max_length(inputs: RecipeInputs) -> int:
    """Return the longest sequence of the recipe: all rows fit, unless some are very long."""
    bound = _GPU_LONGEST if inputs.memory else _CPU_LONGEST
    if inputs.choice.is_here and (positions := read_max_positions(inputs.choice.config)):
        bound = min(bound, positions)
    if inputs.method == "pretrain":
        return min(bound, 2048 if inputs.memory else 512)
    if inputs.method in ("classify", "tag", "seq2seq"):
        bound = min(bound, 512)
    if inputs.lengths is None:
        return bound
    needed = int(inputs.lengths.longest * 1.1) + 32
    return min(bound, max(128, -(-needed // 64) * 64))


def rows_over(inputs: RecipeInputs, length: int) -> int:
    """Return about how many rows are longer than so many tokens."""
    if inputs.lengths is None:
        return 0
    per_character = max(inputs.lengths.per_character, 1e-9)
    return sum(count * per_character > length for count in inputs.survey.characters)


def _set_chat(inputs: RecipeInputs, draft: RecipeDraft) -> None:
    survey, length = inputs.survey, max_length(inputs)
    over = rows_over(inputs, length)
    if inputs.method == "pretrain":
        comment = "tokens of a sequence, which several documents share"
    elif inputs.lengths is None:
        comment = "tokens of the longest sequence; `luthier check` shows how long yours are"
    elif over:
        about = pluralize(over, "row is", "rows are")
        comment = f"tokens of the longest sequence; about {about} longer, see on_long"
    else:
        comment = (
            f"tokens of the longest sequence; your longest row has about {inputs.lengths.longest}"
        )
    draft.set_key("chat.max_length", length, comment)
    if over and survey.example_type == "conversation":
        comment = "a longer row loses whole turns from its front; drop leaves it out"
        draft.set_key("chat.on_long", "turns", comment)
    if survey.empty:
        count = pluralize(len(survey.empty), "row has", "rows have")
        comment = f"{count} an empty reply, which would teach the model to stop at once"
        draft.set_key("chat.empty_replies", "drop", comment)
    if survey.roles and sum(survey.roles.values()) * 10 <= survey.rows:
        roles = ", ".join(survey.roles)
        draft.set_key("chat.on_lost", "drop", f"leaves out the rows with other roles: {roles}")


def _set_steps(inputs: RecipeInputs, draft: RecipeDraft) -> None:
    """Set batches, epochs and what is measured when, by the number of rows."""
    usable, prefix = inputs.survey.usable, "trainer.args"
    epochs = 3 if usable < 2000 else 2 if usable < _MANY else 1
    if inputs.method in ("dpo", "kto", "grpo", "pretrain"):
        epochs = 1
    draft.set_key(f"{prefix}.num_train_epochs", epochs, "how often every row is seen")
    size = 4 if inputs.memory or inputs.method not in ("classify", "tag") else 8
    size = 16 if inputs.memory and inputs.method in ("classify", "tag") else size
    steps = 4 if inputs.memory and usable >= 500 else 2 if usable >= 100 else 1
    draft.set_key(f"{prefix}.per_device_train_batch_size", size, "rows in one step on one device")
    draft.set_key(f"{prefix}.per_device_eval_batch_size", size, "rows in one step of an evaluation")
    comment = f"steps before the weights change: {size * steps} rows a change on one device"
    draft.set_key(f"{prefix}.gradient_accumulation_steps", steps, comment)
    rate, why = _learning_rate(inputs)
    draft.set_key(f"{prefix}.learning_rate", rate, f"the highest learning rate; {why}")
    if inputs.method in ("sft", "pretrain"):
        packed, comment = _packing(inputs)
        draft.set_key(f"{prefix}.packing", packed, comment)
    changes = max(usable * epochs // (size * steps), 1)
    logging = 1 if changes < 50 else 5 if changes < 1000 else 10
    comment = f"optimizer steps between two lines of metrics; about {changes:,} in all"
    draft.set_key(f"{prefix}.logging_steps", logging, comment)
    if usable >= 20:
        comment = "the loss on held-out rows, after each epoch"
        draft.set_key(f"{prefix}.eval_strategy", "epoch", comment)
    comment = "checkpoints to resume from, after each epoch"
    draft.set_key(f"{prefix}.save_strategy", "epoch", comment)
    draft.set_key(f"{prefix}.save_total_limit", 1, "older checkpoints are removed")


_RATES: Mapping[str, tuple[float, float]] = {
    "sft": (2e-4, 2e-5),
    "pretrain": (2e-4, 2e-5),
    "dpo": (1e-5, 1e-6),
    "kto": (1e-5, 1e-6),
    "grpo": (1e-5, 1e-6),
    "classify": (3e-4, 3e-5),
    "tag": (3e-4, 3e-5),
    "seq2seq": (1e-3, 3e-4),
}
"""Method -> usual rates with an adapter, and of all weights."""


def _learning_rate(inputs: RecipeInputs) -> tuple[float, str]:
    adapter, full = _RATES[inputs.method]
    if inputs.choice.lora:
        return adapter, "usual with LoRA, all weights (lora=none) take a tenth"
    return full, "usual where all weights train"


def _packing(inputs: RecipeInputs) -> tuple[bool, str]:
    if inputs.method == "pretrain":
        return True, "several documents share a sequence, kept apart"
    short = inputs.lengths is not None and inputs.lengths.median * 4 <= max_length(inputs)
    if short and inputs.survey.usable >= 2000 and not inputs.survey.images:
        return True, "rows are short: several share a sequence, kept apart, which saves padding"
    return False, "true: several rows share a sequence, kept apart; worth it for many short rows"


def _set_method(inputs: RecipeInputs, draft: RecipeDraft) -> None:
    """Set what one method needs, and what replies are written for."""
    method, settings = inputs.method, dict[str, tuple[Any, str]]()
    if method == "grpo":
        tokens, count = (256, 8) if inputs.memory else (64, 4)
        settings["trainer.args.num_generations"] = (count, "completions of a prompt to compare")
        settings["trainer.args.per_device_train_batch_size"] = (count, "completions in one step")
        settings["trainer.args.per_device_eval_batch_size"] = (count, "completions in one step")
        settings["trainer.args.max_completion_length"] = (tokens, "the longest completion")
        comment = "put your own reward here, such as python:my.py:score (`luthier docs metrics`)"
        settings["trainer.rewards"] = ([{"length": {"max": 300}}], comment)
    if method in ("sft", "dpo", "kto", "seq2seq", "grpo"):
        comment = (
            "scores of replies to held-out rows, such as [exact_match] (`luthier docs metrics`)"
        )
        settings["trainer.evaluation.metrics"] = ([], comment)
        comment = "replies shown side by side, before and after; 0 writes none and saves the time"
        settings["trainer.evaluation.samples"] = (3, comment)
    if method in ("dpo", "kto"):
        comment = "how near the model stays to the one it was"
        settings["trainer.args.beta"] = (0.1, comment)
    for key, (value, comment) in settings.items():
        draft.set_key(key, value, comment)
