"""The labels of a dataset, models with a head for them, and what must hold for their rows."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from accelerate import PartialState

from luthier.config.schema import ModelConfig, RunConfig
from luthier.data.batching.token_rows import TokenRows
from luthier.data.prepare import PreparedData
from luthier.data.store.table import JoinedTable
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.model.load import read_model_config
from luthier.model.model_class import TASK_CLASSES, has_model_class
from luthier.train import console
from luthier.train.methods.method import load_trained_model

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
"""What transformers calls the task of a classifier (`problem_type`)."""
REGRESSION: ProblemType = "regression"
PROBLEM_TYPE_KEY = "model.kwargs.problem_type"
"""The setting by which the user says what the task is."""
_LISTED_UNSEEN = 5
"""The number of labels that an error names."""


@dataclass(frozen=True)
class LabelSet:
    """The classes of a dataset in the order of their numbers, and the task they make."""

    problem_type: ProblemType
    names: tuple[str, ...]
    """The names of the classes; `value` where a number is predicted."""

    @property
    def numbers(self) -> dict[str, int]:
        """The number of each class."""
        return {name: number for number, name in enumerate(self.names)}

    def reordered_like(self, id2label: Mapping[int, str]) -> "LabelSet":
        """The classes in the order of a model's config, if they are the same ones; else as here."""
        names = tuple(id2label[number] for number in sorted(id2label))
        return replace(self, names=names) if set(names) == set(self.names) else self

    def config_settings(self) -> dict[str, Any]:
        """The labels as the model's config has them."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": self.numbers,
        }


def collect_labels(prepared: PreparedData, problem_type: str | None) -> LabelSet:
    """The labels of texts, from the column `label` of the rows that train.

    Numbers with a fraction make a regression, lists a task of several classes a text, unless
    `problem_type` is set by the user. Classes are sorted, whole numbers by their value. Raises
    UserError for labels that do not go together, for a single class, and for a class of evaluation
    rows that no training row has.
    """
    labels = distinct_values(prepared.train, "label")
    eval_labels = _distinct_eval_values(prepared, "label")
    problem = _choose_problem_type(labels, problem_type)

    def is_unfit(label: Any) -> bool:
        return not _fits_problem(label, problem)

    _refuse_labels(prepared, [*labels, *eval_labels], is_unfit, _UNFIT_LABELS[problem])
    if problem == REGRESSION:
        return LabelSet(REGRESSION, ("value",))
    _refuse_labels(prepared, labels, _is_negative, _NEGATIVE_LABEL)
    classes = _sort_classes(labels, prepared)
    if problem == "single_label_classification" and len(classes) < 2:
        raise UserError(
            f"dataset: every training row has the label {classes[0]!r}, so there is nothing to "
            f"learn. For numbers to predict: {PROBLEM_TYPE_KEY}=regression."
        )
    _refuse_unseen_labels(prepared, classes, eval_labels)
    return LabelSet(problem, tuple(map(str, classes)))


def collect_tags(prepared: PreparedData) -> LabelSet:
    """The tags of words, from the column `tags`; raises UserError as `collect_labels` does."""
    tags = _sort_classes(distinct_values(prepared.train, "tags"), prepared)
    if len(tags) < 2:
        raise UserError(
            f"dataset: every word has the tag {tags[0]!r}, so there is nothing to learn."
        )
    _refuse_unseen_labels(prepared, tags, _distinct_eval_values(prepared, "tags"))
    return LabelSet("single_label_classification", tuple(map(str, tags)))


def distinct_values(rows: Any, column: str) -> list[Any]:
    """The different values of a column of JSON, over all rows that take part, in a fixed order."""
    assert isinstance(rows, TokenRows) and isinstance(rows.table, JoinedTable)
    table, index = rows.table, rows.different
    # Texts of JSON are compared and not values, as True equals 1.
    texts: set[str] = set()
    for number, source_table in enumerate(table.tables):
        numbers = index - table.start_of(number)
        in_source = (numbers >= 0) & (numbers < len(source_table))
        texts.update(source_table.values(column, numbers[in_source]))
    return [json.loads(text) for text in sorted(texts)]


def _distinct_eval_values(prepared: PreparedData, column: str) -> list[Any]:
    return [value for rows in prepared.eval.values() for value in distinct_values(rows, column)]


def _choose_problem_type(labels: Iterable[Any], problem_type: str | None) -> ProblemType:
    """What the user says that the task is, or else the labels."""
    for supported in get_args(ProblemType):
        if problem_type == supported:
            return supported
    if problem_type is not None:
        raise UserError(
            f"{PROBLEM_TYPE_KEY}={problem_type} is none of {', '.join(get_args(ProblemType))}."
        )
    types = {type(label) for label in labels}
    if list in types:
        return "multi_label_classification"
    return REGRESSION if float in types else "single_label_classification"


_UNFIT_LABELS: dict[ProblemType, str] = {
    "regression": "no number, and numbers are to be predicted. To predict classes: "
    f"{PROBLEM_TYPE_KEY}=single_label_classification",
    "multi_label_classification": "no list, and other rows have lists of classes. Write a class "
    "alone as a list, too",
    "single_label_classification": "no class, by name or whole number. To predict numbers: "
    f"{PROBLEM_TYPE_KEY}=regression; several classes a row: lists in all rows",
}
_NEGATIVE_LABEL = (
    "below zero, which in hub datasets means that a row has no label. Leave such rows out: "
    f"'dataset.filter=\"label >= 0\"'; or for numbers to predict: {PROBLEM_TYPE_KEY}=regression"
)


def _fits_problem(label: Any, problem: ProblemType) -> bool:
    if problem == "multi_label_classification":
        return isinstance(label, list)
    return isinstance(label, int | float if problem == REGRESSION else int | str)


def _is_negative(label: Any) -> bool:
    return isinstance(label, int) and label < 0


def _refuse_labels(
    prepared: PreparedData, labels: Iterable[Any], is_bad: Callable[[Any], bool], problem: str
) -> None:
    """Raise UserError with the first bad label, where it stands, and what is wrong with it."""
    bad_label = next((label for label in labels if is_bad(label)), None)
    if bad_label is not None:
        raise UserError(
            f"{_locate_label(prepared, bad_label)}: the label {bad_label!r} is {problem}."
        )


def _sort_classes(labels: Iterable[Any], prepared: PreparedData) -> list[Any]:
    """All classes, sorted; UserError for names and numbers at once, and for no class at all."""
    classes = set(_flatten_labels(labels))
    names = [label for label in classes if isinstance(label, str)]
    if 0 < len(names) < len(classes):
        name, number = min(names), min(label for label in classes if not isinstance(label, str))
        raise UserError(
            f"dataset: some classes are names ({name!r}, {_locate_label(prepared, name)}) and some "
            f"numbers ({number!r}, {_locate_label(prepared, number)}). Write all of them alike."
        )
    if not classes:
        raise UserError("dataset: no training row has a class, so there is nothing to learn.")
    return sorted(classes)


def _refuse_unseen_labels(
    prepared: PreparedData, classes: Sequence[Any], eval_labels: Iterable[Any]
) -> None:
    """Raise UserError for a class that only evaluation rows have."""
    unseen = sorted(set(_flatten_labels(eval_labels)) - set(classes), key=str)
    if unseen:
        more = f" and {len(unseen) - _LISTED_UNSEEN} more" if len(unseen) > _LISTED_UNSEEN else ""
        raise UserError(
            f"{_locate_label(prepared, unseen[0])}: no training row has the label "
            f"{', '.join(map(repr, unseen[:_LISTED_UNSEEN]))}{more}, so it cannot be learned.\n"
            "Hold other rows out, add rows of it to the training data, or leave it out with "
            "dataset.filter."
        )


def _flatten_labels(labels: Iterable[Any]) -> Iterable[Any]:
    for label in labels:
        yield from label if isinstance(label, list) else [label]


def _locate_label(prepared: PreparedData, label: Any) -> str:
    """Where the first row with this label stands; `dataset` if no row has it."""
    for source_rows in prepared.sources.values():
        for number, example in enumerate(source_rows.examples(range(len(source_rows)))):
            row_label = example["label"] if "label" in example else example["tags"]
            candidates = [row_label, *_flatten_labels([row_label])]
            # True and 1 are equal, and different labels.
            if any(type(other) is type(label) and other == label for other in candidates):
                (location,) = source_rows.rows.values("where", [number])
                return str(location)
    return "dataset"


_LABEL_SETTINGS = ("num_labels", "id2label", "label2id")
"""The settings of a model's config that luthier decides by the rows."""
_LISTED_LABELS = 8
"""The number of labels that the line about a head names."""


def load_task_config(config: ModelConfig, task: str, trainer: str, needs: str) -> Any:
    """The model's own config; UserError where transformers has no such model for `task`.

    `needs` says in words which models there are for `trainer`.
    """
    # Settings of the head in `model.kwargs` are refused elsewhere, and do not decide what fits.
    model_config = read_model_config(config.model_copy(update={"kwargs": {}}))
    if not has_model_class(model_config, task) and not config.trust_remote_code:
        raise UserError(
            f"model.path={config.path}: trainer={trainer} needs {needs}, and transformers has none "
            f"of the type {model_config.model_type}."
        )
    return model_config


def load_head_model(
    config: RunConfig, machine: Machine, task: str, labels: LabelSet, **more: Any
) -> Any:
    """The model with a head for these labels: its own where it has one for as many, or a new one.

    `task` is a key of `luthier.model.model_class.TASK_CLASSES`, and `more` are further settings of
    the model's config. Raises UserError for a model that cannot have such a head.
    """
    trainer = config.trainer.method
    refused = [name for name in _LABEL_SETTINGS if name in config.model.kwargs]
    if refused:
        raise UserError(
            f"model.kwargs.{refused[0]} is not set with trainer={trainer}: the labels are those of "
            "the rows. Remove it."
        )
    base = load_task_config(config.model, task, trainer, "a model that can have a head for labels")
    ending = TASK_CLASSES[task].removeprefix("AutoModel")
    has_head = any(name.endswith(ending) for name in base.architectures)
    is_new = not has_head or base.num_labels != len(labels.names)
    if not is_new:
        labels = labels.reordered_like(base.id2label)
    # Sizes may differ in the head alone, and only if there is one.
    settings = labels.config_settings() | more | {"ignore_mismatched_sizes": has_head and is_new}
    with _quiet_logger("transformers.modeling_utils"):
        model = load_trained_model(config, machine, task, **settings)
    if PartialState().is_main_process:
        console.print_line(_describe_head(labels, vars(model)["new_layers"]))
    return model


@contextmanager
def _quiet_logger(name: str) -> Iterator[None]:
    """Keep a logger from warning within the block.

    transformers 5.23 prints a table of the layers that are new, and luthier says it in one line.
    """
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _describe_head(labels: LabelSet, new_layers: list[str]) -> str:
    """The labels and the layers of the head in one line."""
    names = ", ".join(labels.names[:_LISTED_LABELS])
    more = ", ..." if len(labels.names) > _LISTED_LABELS else ""
    head = f"new layers: {', '.join(new_layers)}" if new_layers else "the model's own head"
    task = labels.problem_type.replace("_", " ")
    return f"labels    {len(labels.names):,} ({task}): {names}{more}; {head}"


def labels_from_config(config: Any) -> LabelSet:
    """The labels that a model's config names."""
    names = [config.id2label[number] for number in range(config.num_labels)]
    # transformers reads one output without a word as a number.
    problem: ProblemType = REGRESSION if len(names) == 1 else "single_label_classification"
    return LabelSet(config.problem_type or problem, tuple(names))


def set_padding_token(model: Any, tokenizer: Any, prepared: PreparedData) -> None:
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


def check_row_lengths(model: Any, prepared: PreparedData, column: str = "input_ids") -> None:
    """Raise UserError for a row, in this column, that is longer than the model has positions."""
    limit = max_positions(model)
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
    lengths = [table.lengths_of(column) for table in rows.table.tables if len(table)]
    return int(np.concatenate(lengths)[rows.different].max(initial=0))


def max_positions(model: Any) -> int | None:
    """How many tokens a model reads at most; None where it has no such bound."""
    limit = model.config.get_text_config().to_dict().get("max_position_embeddings")
    for name, layer in model.named_modules():
        # RoBERTa and its like begin to count behind their padding token.
        if limit and name.endswith(".position_embeddings") and layer.padding_idx is not None:
            return int(limit) - layer.padding_idx - 1
    return None if limit is None or limit < 0 else int(limit)
