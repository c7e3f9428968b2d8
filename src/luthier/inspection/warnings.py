"""What usually ruins a training and stops none: each rule as a function of the facts of a run.

`luthier check` prints all of it with its numbers, and a training prints a line for each before its
first step. What is certainly wrong is an error elsewhere and not here: a `chat.max_length` beyond
the model's positions (`luthier.model.positions`), a tokenizer of another model or with more tokens
than the model has rows for (`luthier.model.tokenizer`), a template without a stop token
(`luthier.chat`), settings of the launch and of the hub in `trainer.args`
(`luthier.config.passthrough`). Adapters never train in 16 bits (`luthier.train.trainers.base`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from luthier.config.methods import METHODS
from luthier.config.schema import RunConfig
from luthier.data.batching.settings import BatchingSettings
from luthier.errors import UserError, format_override
from luthier.inspection.batch_fill import BatchFill, Lengths, measure_batch_fill
from luthier.model.packing_support import find_packing_problem
from luthier.model.quantized import read_config_json
from luthier.model.tokenizer import end_token_ids
from luthier.model.untrained_tokens import (
    count_parameters,
    find_embeddings,
    find_untrained_tokens,
    find_weights_folder,
    template_token_ids,
)
from luthier.terminal import pluralize


class RunWarning(NamedTuple):
    """Something that usually ruins a training."""

    key: str
    """The setting that it is about."""
    text: str
    """What is wrong, with its numbers, in whole sentences."""
    fix: str
    """The overrides that mend it, as they are typed in a shell; empty where no setting does."""

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" + (f" Set {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class RunFacts:
    """What the rules look at. The defaults stand for what is not known, and warn of nothing."""

    config: RunConfig
    lengths: Lengths | None = None
    """The tokens of each sequence of an epoch; None for a stream, and for other rows than chats
    and texts."""
    rows: int = 0
    """The different rows that train."""
    similar_rows: Mapping[str, int] = field(default_factory=dict)
    """Training rows that differ from a held-out row in case, space or Unicode form alone, by the
    name of the evaluation set."""
    fill: BatchFill | None = None
    processes: int = 1
    """The processes that train, each with batches of its own."""
    model_fields: Mapping[str, Any] = field(default_factory=dict)
    """The content of the model's config.json."""
    end_tokens: Sequence[int] = ()
    """The ids that end a text: those of the model's files and of the chat template."""
    tokenizer_end: int | None = None
    """The tokenizer's own end token."""
    parameters: int | None = None
    """The numbers in the model's weight files."""
    untrained_tokens: Sequence[str] = ()
    """Tokens of the chat template that the model has never seen in its training."""


def collect_run_facts(
    config: RunConfig,
    tokenizer: Any,
    chat_encoder: Any | None,
    batching: BatchingSettings,
    *,
    lengths: Lengths | None,
    rows: int,
    similar_rows: Mapping[str, int],
    processes: int = 1,
) -> RunFacts:
    """Return the facts of a run whose rows are encoded; no weights are loaded.

    `chat_encoder` is the `ChatEncoder` of its conversations, None for plain texts.
    """
    folder = find_weights_folder(config.model)
    fields = _read_fields(config)
    stops = [] if chat_encoder is None else list(chat_encoder.stop_token_ids)
    untrained: list[str] = []
    if chat_encoder is not None and folder is not None and config.lora and not _trains_rows(config):
        ids = [*template_token_ids(tokenizer, _template_texts(chat_encoder)), *stops]
        new = set(config.model.add_tokens) | set(config.model.add_special_tokens)
        if (embeddings := find_embeddings(folder)) is not None:
            untrained_ids = find_untrained_tokens(
                embeddings, ids, max(tokenizer.get_vocab().values()) + 1
            )
            texts = tokenizer.convert_ids_to_tokens(untrained_ids)
            untrained = [text for text in texts if text not in new]
    is_token_rows = config.trainer.base_method in _TOKEN_METHODS and lengths is not None
    return RunFacts(
        config=config,
        lengths=lengths,
        rows=rows,
        similar_rows=similar_rows,
        fill=measure_batch_fill(lengths, config, batching)
        if is_token_rows and lengths is not None
        else None,
        processes=processes,
        model_fields=fields,
        end_tokens=[*stops, *_model_ends(config), *_listed(fields.get("eos_token_id"))],
        tokenizer_end=tokenizer.eos_token_id,
        parameters=None if folder is None else count_parameters(folder),
        untrained_tokens=untrained,
    )


def find_warnings(facts: RunFacts) -> list[RunWarning]:
    """Return what usually ruins such a training, in the order of the rules."""
    return [warning for rule in RULES for warning in rule.find(facts)]


def _read_fields(config: RunConfig) -> dict[str, Any]:
    try:
        content = read_config_json(config.model)
    except (OSError, ValueError, UserError):
        return {}
    text_config = content.get("text_config")
    return {**content, **(text_config if isinstance(text_config, dict) else {})}


def _model_ends(config: RunConfig) -> list[int]:
    # A model that a function of the user's own loads may have no files that transformers reads.
    return [] if config.model.loader is not None else end_token_ids(config.model)


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value] if isinstance(value, int) else []


def _template_texts(chat_encoder: Any) -> list[str]:
    template = chat_encoder.settings()["template"]
    return [template] if isinstance(template, str) else list(template.values())


def _trains_rows(config: RunConfig) -> bool:
    """Tell whether rows of the embeddings train beside the adapter."""
    lora = config.lora
    names = [*lora.modules_to_save, *_texts(lora.target_modules)]
    has_rows = lora.get("trainable_token_indices") or lora.get("token_indices")
    return bool(has_rows) or any("embed" in name or "wte" in name for name in names)


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


# The learning rate.

_TOKEN_METHODS = ("sft", "pretrain")
_PREFERENCE_METHODS = ("dpo", "kto", "orpo", "cpo", "reward")
_ONLINE_METHODS = ("grpo", "rloo", "distill")
_HEAD_METHODS = ("classify", "tag")


class RateRange(NamedTuple):
    """Usual learning rates of AdamW, and one to begin with."""

    least: float
    most: float
    usual: float


# Full fine-tuning: Tülu 3 (https://arxiv.org/abs/2411.15124) takes 5e-6 for SFT and 5e-7 for DPO,
# Llama 2 (https://arxiv.org/abs/2307.09288) 2e-5 and 1e-6 (its PPO), BERT
# (https://arxiv.org/abs/1810.04805, A.3) 2e-5 to 5e-5, T5 (https://arxiv.org/abs/1910.10683) 1e-3
# and BART 3e-5. LoRA: QLoRA (https://arxiv.org/abs/2305.14314, B.2) takes 2e-4 for 7B and 13B;
# "LoRA Without Regret" (https://thinkingmachines.ai/blog/lora) finds ten times the best full rate,
# and more in short runs, such as the bundled tiny recipes with 3e-3.
_FULL_RATES = {
    **dict.fromkeys(_TOKEN_METHODS, RateRange(5e-7, 1e-4, 2e-5)),
    **dict.fromkeys(_PREFERENCE_METHODS, RateRange(5e-8, 2e-5, 1e-6)),
    **dict.fromkeys(_ONLINE_METHODS, RateRange(5e-8, 2e-5, 1e-6)),
    **dict.fromkeys(_HEAD_METHODS, RateRange(2e-6, 2e-4, 3e-5)),
    "seq2seq": RateRange(2e-6, 2e-3, 1e-4),
}
_ADAPTER_RATES = {
    **dict.fromkeys(_TOKEN_METHODS, RateRange(1e-5, 5e-3, 2e-4)),
    **dict.fromkeys(_PREFERENCE_METHODS, RateRange(5e-7, 5e-3, 1e-5)),
    **dict.fromkeys(_ONLINE_METHODS, RateRange(5e-7, 5e-3, 1e-5)),
    **dict.fromkeys(_HEAD_METHODS, RateRange(2e-5, 1e-2, 3e-4)),
    "seq2seq": RateRange(2e-5, 2e-2, 1e-3),
}
_LORA_METHODS = ("lora", "adalora")
"""Adapters whose rates are known well; VeRA, IA3 and others take far higher ones."""
_TRAINED_SIZE = 20_000_000
"""Parameters below which a model is taken for one that begins with random weights."""


def _learning_rate(facts: RunFacts) -> Iterator[RunWarning]:
    config = facts.config
    args, lora = config.trainer.args, config.lora
    rate = args.get("learning_rate")
    is_adam = "adamw" in config.trainer.optimizer_name
    if not is_adam or not isinstance(rate, int | float) or _is_tiny(facts):
        return
    if lora and lora.method not in _LORA_METHODS:
        return
    usual = (_ADAPTER_RATES if lora else _FULL_RATES).get(config.trainer.base_method)
    if usual is None or usual.least <= rate <= usual.most:
        return
    is_high = rate > usual.most
    what = f"an adapter (lora.method={lora.method})" if lora else "full fine-tuning (lora=none)"
    effect = (
        "a higher rate usually makes a model forget what it knew"
        if is_high
        else "a lower rate hardly changes a model"
    )
    rates = " to ".join(map(_format_rate, usual[:2]))
    yield RunWarning(
        "trainer.args.learning_rate",
        f"{_format_rate(rate)} is too {'high' if is_high else 'low'} for {what} with "
        f"trainer.method={config.trainer.method}. {rates} is usual; {effect}.",
        f"trainer.args.learning_rate={_format_rate(usual.usual)}",
    )


def _format_rate(rate: float) -> str:
    """Return a rate as people type it: `2e-4`."""
    digits, _, exponent = f"{rate:.3e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}" if rate else "0"


def _is_tiny(facts: RunFacts) -> bool:
    return facts.parameters is not None and facts.parameters < _TRAINED_SIZE


# How often rows are seen.

_MOST_EPOCHS = 16
"""Epochs beyond which repeated rows teach nothing (Muennighoff et al.,
https://arxiv.org/abs/2305.16264: up to 4 are as good as new rows, 16 are half as good)."""
_FEWEST_STEPS = 10
_ENOUGH_STEPS = 30


def _epochs(facts: RunFacts) -> Iterator[RunWarning]:
    config = facts.config
    args, sequences = config.trainer.args, facts.lengths
    # Completions of prompts are written anew in each epoch, and `max_rows` is a choice.
    if sequences is None or _is_tiny(facts) or config.dataset.max_rows is not None:
        return
    facts_of_method = METHODS[config.trainer.base_method]
    if facts_of_method.uses_rewards or facts_of_method.uses_teacher:
        return
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * facts.processes
    rows = len(sequences)
    if facts.fill is not None and facts.fill.packing and facts.fill.packed is not None:
        rows = facts.fill.packed.rows
    steps_per_epoch = math.ceil(rows / per_step)
    steps = args.get("max_steps", -1)
    # As in transformers 5.23, whose TrainingArguments have 3 epochs.
    epochs = steps / steps_per_epoch if steps > 0 else args.get("num_train_epochs", 3)
    if epochs > _MOST_EPOCHS:
        fix = f"trainer.args.num_train_epochs={_MOST_EPOCHS // 4}"
        yield RunWarning(
            "trainer.args.max_steps" if steps > 0 else "trainer.args.num_train_epochs",
            f"each of the {pluralize(facts.rows, 'row')} is seen {epochs:,.0f} times, and beyond "
            f"{_MOST_EPOCHS} times a model learns rows by heart and little else.",
            f"trainer.args.max_steps=-1 {fix}" if steps > 0 else fix,
        )
    elif steps <= 0 and steps_per_epoch * epochs < _FEWEST_STEPS:
        yield from _few_steps(facts, steps_per_epoch, math.ceil(steps_per_epoch * epochs))


def _few_steps(facts: RunFacts, steps_per_epoch: int, steps: int) -> Iterator[RunWarning]:
    args = facts.config.trainer.args
    if args.gradient_accumulation_steps > 1:
        fix = "trainer.args.gradient_accumulation_steps=1"
    else:
        epochs = min(_MOST_EPOCHS // 2, math.ceil(_ENOUGH_STEPS / steps_per_epoch))
        fix = f"trainer.args.num_train_epochs={epochs}"
    rows, count = pluralize(facts.rows, "row"), pluralize(steps, "optimizer step")
    yield RunWarning(
        "trainer.args.num_train_epochs",
        f"training takes {count} in all, over {rows}, which rarely changes what a model does.",
        fix,
    )


# Padding and packing.

_MOST_PADDING = 0.5
_WORTH_PACKING = 0.25


def _padding(facts: RunFacts) -> Iterator[RunWarning]:
    fill = facts.fill
    if fill is None or fill.packing or fill.padded.batch_size == 1:
        return
    padding = 1 - fill.padded.efficiency
    if padding < _WORTH_PACKING or (padding < _MOST_PADDING and not _can_pack(facts)):
        return
    text = f"{padding:.0%} of the tokens in a batch are padding, because rows differ in length."
    if not _can_pack(facts):
        fix = "trainer.args.train_sampling_strategy=group_by_length"
        yield RunWarning("trainer.args.train_sampling_strategy", text, fix)
        return
    length = facts.config.chat.max_length
    packed, fix = fill.packed, "trainer.args.packing=true"
    if packed is not None:
        tokens = packed.efficiency * packed.rows * packed.length if packed.length else 0
        times = tokens / fill.padded.efficiency / (packed.rows * (packed.length or 1))
        text += (
            f" With packing, an epoch has {times:.1f} times fewer tokens to compute, in "
            f"{packed.batches:,} batches instead of {fill.padded.batches:,}."
        )
    if length is None and facts.lengths is not None:
        fix += f" chat.max_length={_round_up(int(facts.lengths.max()))}"
    yield RunWarning("trainer.args.packing", text, fix)


def _can_pack(facts: RunFacts) -> bool:
    config, fill = facts.config, facts.fill
    if config.trainer.base_method not in _TOKEN_METHODS or config.model.loader is not None:
        return False
    # Few rows that share a few packed ones would leave hardly a step to take.
    if fill is not None and fill.packed is not None and fill.packed.batches < _FEWEST_STEPS:
        return False
    return find_packing_problem(facts.model_fields) is None


def _round_up(length: int) -> int:
    return -(-length // 64) * 64


# Rows that stand on both sides.


def _held_out_rows(facts: RunFacts) -> Iterator[RunWarning]:
    for name, count in facts.similar_rows.items():
        if count:
            of = f"of the evaluation set {name}" if name not in ("", "held out") else "held out"
            yield RunWarning(
                "dataset.deduplicate",
                f"{pluralize(count, 'training row')} {'equals' if count == 1 else 'equal'} a row "
                f"{of} but for case, white space or Unicode form, so the evaluation looks better "
                "than the model is.",
                "dataset.deduplicate=normalised",
            )


# Tokens.


def _end_token(facts: RunFacts) -> Iterator[RunWarning]:
    end = facts.tokenizer_end
    if end is None or not facts.end_tokens or end in facts.end_tokens:
        return
    ids = ", ".join(map(str, dict.fromkeys(facts.end_tokens)))
    yield RunWarning(
        "model.tokenizer",
        f"the tokenizer ends texts with the id {end}, and the model's files and the chat template "
        f"with {ids}. The tokenizer may belong to another model.",
        "" if facts.config.model.tokenizer is None else "model.tokenizer=null",
    )


def _untrained_tokens(facts: RunFacts) -> Iterator[RunWarning]:
    tokens = list(facts.untrained_tokens)
    if tokens:
        yield RunWarning(
            "lora.trainable_token_indices",
            f"the chat template writes {', '.join(tokens)}, whose embeddings the model's own "
            "training never changed: this is a base model, and the adapter leaves them as they "
            "are.",
            format_override("lora.trainable_token_indices", tokens),
        )


class WarningRule(NamedTuple):
    """A rule by what it looks for."""

    name: str
    find: Callable[[RunFacts], Iterator[RunWarning]]


RULES = (
    WarningRule("learning rate outside of its usual range", _learning_rate),
    WarningRule("too many epochs, or too few steps", _epochs),
    WarningRule("batches full of padding, packing off", _padding),
    WarningRule("evaluation rows in training", _held_out_rows),
    WarningRule("end token of another model", _end_token),
    WarningRule("template of untrained tokens", _untrained_tokens),
)
"""All rules; docs/inspect.md lists them by these names, which a test compares."""
