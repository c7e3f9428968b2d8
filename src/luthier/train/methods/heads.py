"""Models with a head of their own for a task, and what must hold for the rows they read."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from accelerate import PartialState
from peft import PeftModel

from luthier.config.schema import ModelConfig, RunConfig
from luthier.data.batching.token_rows import TokenRows
from luthier.data.prepare import PreparedData
from luthier.data.store.table import JoinedTable
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.model.load import TASK_CLASSES, auto_class, load_model, read_model_config
from luthier.storage.atomic import write_json
from luthier.train import console
from luthier.train.methods.labelled import LabelledTrainerMixin

# The labels of a dataset: which there are, and what they make of the task.

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
"""What transformers calls the task of a classifier (`problem_type`)."""
REGRESSION: ProblemType = "regression"
PROBLEM_TYPE_KEY = "model.kwargs.problem_type"
_LABELS_SHOWN = 5


@dataclass(frozen=True)
class LabelSet:
    """The classes of a dataset in the order of their numbers, and the task they make."""

    problem: ProblemType
    names: tuple[str, ...]
    """The names of the classes; `value` where a number is predicted."""

    @property
    def numbers(self) -> dict[str, int]:
        """The number of each class."""
        return {name: number for number, name in enumerate(self.names)}

    def in_order_of(self, known: Mapping[int, str]) -> "LabelSet":
        """The classes in the order of a model's own, if they are the same ones."""
        names = tuple(known[number] for number in sorted(known))
        return replace(self, names=names) if set(names) == set(self.names) else self

    def settings(self) -> dict[str, Any]:
        """What the model's config says of them."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": self.numbers,
        }


def collect_labels(prepared: PreparedData, problem: str | None) -> LabelSet:
    """The labels of texts, from the column `label` of the rows that train.

    Numbers with a fraction make a regression, lists a task of several classes a text; `problem` is
    what the user says it is, if anything. Classes are sorted, whole numbers by their value. Raises
    UserError for labels that do not go together, for a single class, and for a class of evaluation
    rows that no training row has.
    """
    values = distinct_values(prepared.train, "label")
    held = [value for rows in prepared.eval.values() for value in distinct_values(rows, "label")]
    kind = _problem(values, problem)
    _refuse(prepared, [*values, *held], lambda value: not _fits(value, kind), _NOT[kind])
    if kind == REGRESSION:
        return LabelSet(REGRESSION, ("value",))
    _refuse(prepared, values, _is_negative, _NEGATIVE)
    classes = _sorted(values, prepared)
    if kind == "single_label_classification" and len(classes) < 2:
        raise UserError(
            f"dataset: every training row has the label {classes[0]!r}, so there is nothing to "
            f"learn. For numbers to predict: {PROBLEM_TYPE_KEY}=regression."
        )
    return LabelSet(kind, _known(classes, held, prepared))


def collect_tags(prepared: PreparedData) -> LabelSet:
    """The tags of words, from the column `tags`; raises UserError as `find_labels` does."""
    values = distinct_values(prepared.train, "tags")
    held = [value for rows in prepared.eval.values() for value in distinct_values(rows, "tags")]
    tags = _sorted(values, prepared)
    if len(tags) < 2:
        raise UserError(
            f"dataset: every word has the tag {tags[0]!r}, so there is nothing to learn."
        )
    return LabelSet("single_label_classification", _known(tags, held, prepared))


def distinct_values(rows: Any, column: str) -> list[Any]:
    """The different values of a column of JSON, over all rows that take part, in a fixed order."""
    assert isinstance(rows, TokenRows) and isinstance(rows.table, JoinedTable)
    table, index = rows.table, rows.different
    texts: set[str] = set()
    for number, part in enumerate(table.tables):
        own = index - table.start_of(number)
        texts.update(part.values(column, own[(own >= 0) & (own < len(part))]))
    return [json.loads(text) for text in sorted(texts)]


def _problem(values: Iterable[Any], problem: str | None) -> ProblemType:
    """What the task is: what the user says, or else the values."""
    for known in get_args(ProblemType):
        if problem == known:
            return known
    if problem is not None:
        raise UserError(
            f"{PROBLEM_TYPE_KEY}={problem} is none of {', '.join(get_args(ProblemType))}."
        )
    kinds = {type(value) for value in values}
    if list in kinds:
        return "multi_label_classification"
    return REGRESSION if float in kinds else "single_label_classification"


_NOT: dict[ProblemType, str] = {
    "regression": "no number, and numbers are to be predicted. To predict classes: "
    f"{PROBLEM_TYPE_KEY}=single_label_classification",
    "multi_label_classification": "no list, and other rows have lists of classes. Write a class "
    "alone as a list, too",
    "single_label_classification": "no class, by name or whole number. To predict numbers: "
    f"{PROBLEM_TYPE_KEY}=regression; several classes a row: lists in all rows",
}
_NEGATIVE = (
    "below zero, which in hub datasets means that a row has no label. Leave such rows out: "
    f"dataset.filter='label >= 0'; or for numbers to predict: {PROBLEM_TYPE_KEY}=regression"
)


def _fits(value: Any, problem: ProblemType) -> bool:
    if problem == "multi_label_classification":
        return isinstance(value, list)
    return isinstance(value, int | float if problem == REGRESSION else int | str)


def _is_negative(value: Any) -> bool:
    return isinstance(value, int) and value < 0


def _refuse(
    prepared: PreparedData, values: Iterable[Any], is_wrong: Callable[[Any], bool], what: str
) -> None:
    """Raise UserError with the first wrong label, its place, and what it is not."""
    wrong = next((value for value in values if is_wrong(value)), None)
    if wrong is not None:
        raise UserError(f"{_place(prepared, wrong)}: the label {wrong!r} is {what}.")


def _sorted(values: Iterable[Any], prepared: PreparedData) -> list[Any]:
    """All classes, sorted; UserError for names and numbers at once."""
    classes = set(_flat(values))
    names = [one for one in classes if isinstance(one, str)]
    if 0 < len(names) < len(classes):
        one, other = min(names), min(one for one in classes if not isinstance(one, str))
        raise UserError(
            f"dataset: some classes are names ({one!r}, {_place(prepared, one)}) and some numbers "
            f"({other!r}, {_place(prepared, other)}). Write all of them alike."
        )
    if not classes:
        raise UserError("dataset: no training row has a class, so there is nothing to learn.")
    return sorted(classes)


def _known(classes: Sequence[Any], held: Iterable[Any], prepared: PreparedData) -> tuple[str, ...]:
    """The names of the classes; UserError for one that only evaluation rows have."""
    unseen = sorted(set(_flat(held)) - set(classes), key=str)
    if unseen:
        more = f" and {len(unseen) - _LABELS_SHOWN} more" if len(unseen) > _LABELS_SHOWN else ""
        raise UserError(
            f"{_place(prepared, unseen[0])}: no training row has the label "
            f"{', '.join(map(repr, unseen[:_LABELS_SHOWN]))}{more}, so it cannot be learned.\n"
            "Hold other rows out, add rows of it to the training data, or leave it out with "
            "dataset.filter."
        )
    return tuple(map(str, classes))


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        yield from value if isinstance(value, list) else [value]


def _place(prepared: PreparedData, wanted: Any) -> str:
    """Where the first row with this label stands."""
    for part in prepared.sources.values():
        for number, example in enumerate(part.examples(range(len(part)))):
            label = example["label"] if "label" in example else example["tags"]
            if _same(label, wanted) or any(_same(one, wanted) for one in _flat([label])):
                (where,) = part.rows.values("where", [number])
                return str(where)
    return "dataset"


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


_DECIDED = ("num_labels", "id2label", "label2id")
_SHOWN = 8


def load_task_config(config: ModelConfig, task: str, trainer: str, needs: str) -> Any:
    """The model's own config; UserError where transformers has no such model for `task`.

    `needs` says in words which models there are for `trainer`.
    """
    # Settings of the head in `model.kwargs` are refused elsewhere, and do not decide what fits.
    found = read_model_config(config.model_copy(update={"kwargs": {}}))
    known = auto_class(task)._model_mapping.keys()
    if type(found) not in known and not config.trust_remote_code:
        raise UserError(
            f"model.path={config.path}: trainer={trainer} needs {needs}, and transformers has none "
            f"of the type {found.model_type}."
        )
    return found


def load_head_model(
    config: RunConfig, machine: Machine, task: str, labels: LabelSet, **more: Any
) -> Any:
    """The model with a head for these labels: its own where it has one for as many, or a new one.

    `task`: a key of `luthier.model.load.TASK_CLASSES`; `more`: further settings of the model's
    config. Raises UserError for a model that cannot have such a head.
    """
    trainer = config.trainer.method
    given = [name for name in _DECIDED if name in config.model.kwargs]
    if given:
        raise UserError(
            f"model.kwargs.{given[0]} is not set with trainer={trainer}: the labels are those of "
            "the rows. Remove it."
        )
    base = load_task_config(config.model, task, trainer, "a model that can have a head for labels")
    ending = TASK_CLASSES[task].removeprefix("AutoModel")
    has_head = any(name.endswith(ending) for name in base.architectures)
    is_new = not has_head or base.num_labels != len(labels.names)
    if not is_new:
        labels = labels.in_order_of(base.id2label)
    # Sizes may differ in the head alone, and only if there is one.
    own = labels.settings() | more | {"ignore_mismatched_sizes": has_head and is_new}
    with _quiet("transformers.modeling_utils"):
        model = load_model(
            config.model,
            config.quantization,
            machine,
            full=not config.lora.is_enabled,
            task=task,
            **own,
        )
    if PartialState().is_main_process:
        console.print_line(_described(labels, vars(model)["new_layers"]))
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


def _described(labels: LabelSet, new_layers: list[str]) -> str:
    """The labels in one line."""
    shown = ", ".join(labels.names[:_SHOWN]) + (", ..." if len(labels.names) > _SHOWN else "")
    head = f"new layers: {', '.join(new_layers)}" if new_layers else "the model's own head"
    task = labels.problem.replace("_", " ")
    return f"labels    {len(labels.names):,} ({task}): {shown}; {head}"


def labels_from_config(config: Any) -> LabelSet:
    """The labels that a model's config names."""
    names = [config.id2label[number] for number in range(config.num_labels)]
    # transformers reads one output without a word as a number.
    problem: ProblemType = REGRESSION if len(names) == 1 else "single_label_classification"
    return LabelSet(config.problem_type or problem, tuple(names))


class Labelled(LabelledTrainerMixin):
    """Stands before a trainer of a head: `class Mine(Labelled, Trainer)`."""

    labels: LabelSet

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
    lengths = [part.lengths_of(column) for part in rows.table.tables if len(part)]
    return int(np.concatenate(lengths)[rows.different].max(initial=0))


def max_positions(model: Any) -> int | None:
    """How many tokens a model reads at most; None where it has no such bound."""
    limit = model.config.get_text_config().to_dict().get("max_position_embeddings")
    for name, layer in model.named_modules():
        # RoBERTa and its like begin to count behind their padding token.
        if limit and name.endswith(".position_embeddings") and layer.padding_idx is not None:
            return int(limit) - layer.padding_idx - 1
    return None if limit is None or limit < 0 else int(limit)
