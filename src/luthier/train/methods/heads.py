"""Models with a head of their own for a task, and what must hold for the rows they read."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from peft import PeftModel

from luthier.config.schema import ModelConfig, RunConfig
from luthier.data.batching.rows import TokenRows
from luthier.data.prepare import Prepared
from luthier.data.store.table import JoinedTable
from luthier.errors import UserError
from luthier.model import gguf, source
from luthier.model.device import Machine
from luthier.model.load import load_model
from luthier.storage.atomic import write_json
from luthier.train import report
from luthier.train.methods.labels import REGRESSION, Labels, Problem
from luthier.train.methods.tabled import Tabled

_DECIDED = ("num_labels", "id2label", "label2id")
_SHOWN = 8


def model_config(config: ModelConfig, kind: str, trainer: str, needs: str) -> Any:
    """The model's own config; UserError where `kind`, a class of transformers, has no such model.

    `needs` says in words which models there are for `trainer`.
    """
    import transformers

    file = source.gguf_file(config.path)
    try:
        found = transformers.AutoConfig.from_pretrained(
            config.path if file is None else gguf.convert(file),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            local_files_only=source.needs_hub(config.path) and source.is_out_of_reach(),
        )
    except (OSError, ValueError) as error:
        raise source.explain(error, config.path, "model.path") or UserError(
            f"model.path={config.path}: its config.json cannot be read: {error}"
        ) from error
    known = getattr(transformers, kind)._model_mapping.keys()
    if type(found) not in known and not config.trust_remote_code:
        raise UserError(
            f"model.path={config.path}: trainer={trainer} needs {needs}, and transformers has none "
            f"of the type {found.model_type}."
        )
    return found


def load_head(config: RunConfig, machine: Machine, kind: str, labels: Labels, **more: Any) -> Any:
    """The model with a head for these labels: its own where it has one for as many, or a new one.

    `kind`: the class of transformers, such as AutoModelForTokenClassification; `more`: further
    settings of the model's config. Raises UserError for a model that cannot have such a head.
    """
    trainer = config.trainer.method
    given = [name for name in _DECIDED if name in config.model.kwargs]
    if given:
        raise UserError(
            f"model.kwargs.{given[0]} is not set with trainer={trainer}: the labels are those of "
            "the rows. Remove it."
        )
    base = model_config(config.model, kind, trainer, "a model that can have a head for labels")
    has_head = any(name.endswith(kind.removeprefix("AutoModel")) for name in base.architectures)
    is_new = not has_head or base.num_labels != len(labels.names)
    if not is_new:
        labels = labels.in_order_of(base.id2label)
    # Sizes may differ in the head alone, and only if there is one.
    own = labels.settings() | more | {"ignore_mismatched_sizes": has_head and is_new}
    with _quiet("transformers.modeling_utils"):
        model = load_model(
            config.model, config.quantization, machine, full=not config.lora, kind=kind, **own
        )
    if PartialState().is_main_process:
        report.say(_described(labels, vars(model)["new_layers"]))
    return model


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a logger from warning: that a head is new is said in one line, and not in a table."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _described(labels: Labels, new_layers: list[str]) -> str:
    """The labels in one line."""
    shown = ", ".join(labels.names[:_SHOWN]) + (", ..." if len(labels.names) > _SHOWN else "")
    head = f"new layers: {', '.join(new_layers)}" if new_layers else "the model's own head"
    task = labels.problem.replace("_", " ")
    return f"labels    {len(labels.names):,} ({task}): {shown}; {head}"


def labels_of(config: Any) -> Labels:
    """The labels that a model's config names."""
    names = [config.id2label[number] for number in range(config.num_labels)]
    # transformers reads one output without a word as a number.
    problem: Problem = REGRESSION if len(names) == 1 else "single_label_classification"
    return Labels(config.problem_type or problem, tuple(names))


class Labelled(Tabled):
    """Stands before a trainer of a head: `class Mine(Labelled, Trainer)`."""

    labels: Labels

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as Trainer does, and beside an adapter the labels, which it has no config for.

        With the content of labels.json as `labels`, and whole numbers as the keys of its
        `id2label`, `from_pretrained(base, **labels)` makes the base that the adapter goes on.
        """
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and isinstance(self.model, PeftModel):
            problem = {"problem_type": self.model.config.problem_type}
            write_json(folder / "labels.json", self.labels.settings() | problem)


def share_padding(model: Any, tokenizer: Any, prepared: Prepared) -> None:
    """Tell a model the tokenizer's padding token, by which decoders find a row's last token.

    Raises UserError where a row ends with that very token: the model would read the one before.
    """
    pad = tokenizer.pad_token_id
    ends = sum(_ends_with(rows, pad) for rows in (prepared.train, *prepared.eval.values()))
    if ends:
        name = tokenizer.convert_ids_to_tokens(pad)
        raise UserError(
            f"The padding token {name} is also the last token of {ends:,} rows, and models find the"
            " end of a row by it. Name another padding token (pad_token in tokenizer_config.json), "
            "one that texts do not end with, or another tokenizer: model.tokenizer=..."
        )
    model.config.get_text_config().pad_token_id = pad


def _ends_with(rows: Any, token: int) -> int:
    """How many different rows end with a token."""
    assert isinstance(rows, TokenRows)
    return sum(int(rows.table.row(n)["input_ids"][-1]) == token for n in rows.different)


def check_positions(model: Any, prepared: Prepared, column: str = "input_ids") -> None:
    """Raise UserError for a row, in this column, that is longer than the model has positions."""
    limit = positions(model)
    longest = max(_longest(rows, column) for rows in (prepared.train, *prepared.eval.values()))
    if limit is not None and longest > limit:
        raise UserError(
            f"The longest row has {longest:,} tokens, and the model has {limit:,} positions. Set "
            f"chat.max_length={limit}; chat.on_long says what becomes of longer rows: turns cuts "
            "them at their end, drop leaves them out."
        )


def _longest(rows: Any, column: str) -> int:
    """The most tokens that a row which takes part has in a column."""
    assert isinstance(rows, TokenRows) and isinstance(rows.table, JoinedTable)
    lengths = [part.lengths_of(column) for part in rows.table.tables if len(part)]
    return int(np.concatenate(lengths)[rows.different].max(initial=0))


def positions(model: Any) -> int | None:
    """How many tokens a model reads at most; None where it has no such bound."""
    limit = model.config.get_text_config().to_dict().get("max_position_embeddings")
    for name, layer in model.named_modules():
        # RoBERTa and its like begin to count behind their padding token.
        if limit and name.endswith(".position_embeddings") and layer.padding_idx is not None:
            return int(limit) - layer.padding_idx - 1
    return None if limit is None or limit < 0 else int(limit)
