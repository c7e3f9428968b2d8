"""The labels of a dataset: which there are, and what they make of the task."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from luthier.data.batching.rows import TokenRows
from luthier.data.prepare import Prepared
from luthier.data.store.table import JoinedTable
from luthier.errors import UserError

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
"""What transformers calls the task of a classifier (`problem_type`)."""
REGRESSION: Problem = "regression"
KEY = "model.kwargs.problem_type"
_LABELS_SHOWN = 5


@dataclass(frozen=True)
class Labels:
    """The classes of a dataset in the order of their numbers, and the task they make."""

    problem: Problem
    names: tuple[str, ...]
    """The names of the classes; `value` where a number is predicted."""

    @property
    def numbers(self) -> dict[str, int]:
        """The number of each class."""
        return {name: number for number, name in enumerate(self.names)}

    def in_order_of(self, known: Mapping[int, str]) -> "Labels":
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


def find_labels(prepared: Prepared, problem: str | None) -> Labels:
    """The labels of texts, from the column `label` of the rows that train.

    Numbers with a fraction make a regression, lists a task of several classes a text; `problem` is
    what the user says it is, if anything. Classes are sorted, whole numbers by their value. Raises
    UserError for labels that do not go together, for a single class, and for a class of evaluation
    rows that no training row has.
    """
    values = values_of(prepared.train, "label")
    held = [value for rows in prepared.eval.values() for value in values_of(rows, "label")]
    kind = _problem(values, problem)
    _refuse(prepared, [*values, *held], lambda value: not _fits(value, kind), _NOT[kind])
    if kind == REGRESSION:
        return Labels(REGRESSION, ("value",))
    _refuse(prepared, values, _is_negative, _NEGATIVE)
    classes = _sorted(values, prepared)
    if kind == "single_label_classification" and len(classes) < 2:
        raise UserError(
            f"dataset: every training row has the label {classes[0]!r}, so there is nothing to "
            f"learn. For numbers to predict: {KEY}=regression."
        )
    return Labels(kind, _known(classes, held, prepared))


def find_tags(prepared: Prepared) -> Labels:
    """The tags of words, from the column `tags`; raises UserError as `find_labels` does."""
    values = values_of(prepared.train, "tags")
    held = [value for rows in prepared.eval.values() for value in values_of(rows, "tags")]
    tags = _sorted(values, prepared)
    if len(tags) < 2:
        raise UserError(
            f"dataset: every word has the tag {tags[0]!r}, so there is nothing to learn."
        )
    return Labels("single_label_classification", _known(tags, held, prepared))


def values_of(rows: Any, column: str) -> list[Any]:
    """The different values of a column of JSON, over all rows that take part, in a fixed order."""
    assert isinstance(rows, TokenRows) and isinstance(rows.table, JoinedTable)
    table, index = rows.table, rows.different
    texts: set[str] = set()
    for number, part in enumerate(table.tables):
        own = index - table.start_of(number)
        texts.update(part.values(column, own[(own >= 0) & (own < len(part))]))
    return [json.loads(text) for text in sorted(texts)]


def _problem(values: Iterable[Any], problem: str | None) -> Problem:
    """What the task is: what the user says, or else the values."""
    for known in get_args(Problem):
        if problem == known:
            return known
    if problem is not None:
        raise UserError(f"{KEY}={problem} is none of {', '.join(get_args(Problem))}.")
    kinds = {type(value) for value in values}
    if list in kinds:
        return "multi_label_classification"
    return REGRESSION if float in kinds else "single_label_classification"


_NOT: dict[Problem, str] = {
    "regression": f"no number, and numbers are to be predicted. To predict classes: {KEY}="
    "single_label_classification",
    "multi_label_classification": "no list, and other rows have lists of classes. Write a class "
    "alone as a list, too",
    "single_label_classification": f"no class, by name or whole number. To predict numbers: {KEY}="
    "regression; several classes a row: lists in all rows",
}
_NEGATIVE = (
    "below zero, which in hub datasets means that a row has no label. Leave such rows out: "
    f"dataset.filter='label >= 0'; or for numbers to predict: {KEY}=regression"
)


def _fits(value: Any, problem: Problem) -> bool:
    if problem == "multi_label_classification":
        return isinstance(value, list)
    return isinstance(value, int | float if problem == REGRESSION else int | str)


def _is_negative(value: Any) -> bool:
    return isinstance(value, int) and value < 0


def _refuse(
    prepared: Prepared, values: Iterable[Any], is_wrong: Callable[[Any], bool], what: str
) -> None:
    """Raise UserError with the first wrong label, its place, and what it is not."""
    wrong = next((value for value in values if is_wrong(value)), None)
    if wrong is not None:
        raise UserError(f"{_place(prepared, wrong)}: the label {wrong!r} is {what}.")


def _sorted(values: Iterable[Any], prepared: Prepared) -> list[Any]:
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


def _known(classes: Sequence[Any], held: Iterable[Any], prepared: Prepared) -> tuple[str, ...]:
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


def _place(prepared: Prepared, wanted: Any) -> str:
    """Where the first row with this label stands."""
    for part in prepared.parts.values():
        for number, example in enumerate(part.examples(range(len(part)))):
            label = example["label"] if "label" in example else example["tags"]
            if _same(label, wanted) or any(_same(one, wanted) for one in _flat([label])):
                (where,) = part.rows.values("where", [number])
                return str(where)
    return "dataset"


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other
