"""Metrics of replies that are to be JSON: whether they are, and which fields are right."""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

from luthier.errors import UserError
from luthier.metrics.metric import MetricScores, Prediction, RowMetric, excerpt, mean
from luthier.metrics.text import IgnoredDifference, normalise

JsonField = tuple[tuple[str | int, ...], str, Any]
"""Where a value stands, what kind it is (1 is not true), and the value."""


class JsonValid(RowMetric):
    """The share of replies that are JSON, an object or a list."""

    fences: bool = False
    """Take off a Markdown code fence around the whole reply."""

    @property
    def needs_reference(self) -> bool:
        """It does not."""
        return False

    def row(self, prediction: str, reference: str) -> float:
        """1 if the reply can be parsed."""
        return float(parse_json(prediction, self.fences) is not None)


class JsonF1(RowMetric):
    """The mean F1 of the fields that reply and reference share, and the share of valid JSON.

    A field is a value with its whole path, so nested objects count by their leaves; an empty
    object or list counts as one. A reply that is no JSON has no fields.
    """

    lists: Literal["ordered", "unordered"] = "ordered"
    """`unordered`: the place of an item in its list makes no difference."""
    fences: bool = False
    """Take off a Markdown code fence around the whole reply."""
    ignore: tuple[IgnoredDifference, ...] = ()
    """What makes no difference between two texts."""

    def objection(self, reference: str) -> str | None:
        """A reference that is no JSON itself."""
        return "is no JSON object or list" if parse_json(reference, self.fences) is None else None

    def row(self, prediction: str, reference: str) -> float:
        """Twice the shared fields over all fields."""
        reference_json = parse_json(reference, self.fences)
        if reference_json is None:
            raise UserError(
                f"metric {self.name}: the reference is no JSON object or list: {excerpt(reference)}"
            )
        reply_json = parse_json(prediction, self.fences)
        if reply_json is None:
            return 0.0
        ours, theirs = self._fields(reply_json), self._fields(reference_json)
        return 2 * (ours & theirs).total() / (ours.total() + theirs.total())

    def measure(self, replies: Sequence[Prediction]) -> MetricScores:
        """The mean F1 and the share of valid JSON, and both for each reply."""
        scored = super().measure(replies)
        valid = [float(parse_json(r.prediction, self.fences) is not None) for r in replies]
        name = f"{self.name}/valid"
        return MetricScores(scored.values | {name: mean(valid)}, {**scored.rows, name: valid})

    def _fields(self, value: Any) -> Counter[JsonField]:
        return Counter(flatten_json(value, self.lists == "ordered", self.ignore))


def parse_json(text: str, fences: bool) -> dict[str, Any] | list[Any] | None:
    """The JSON object or list that the text is; None if it is neither.

    What only Python's parser takes (NaN, Infinity) is no JSON.
    """
    try:
        value = json.loads(_unfenced(text) if fences else text, parse_constant=_refuse)
    # RecursionError: a model that is stuck writes thousands of brackets.
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _refuse(name: str) -> None:
    raise ValueError(name)


def _unfenced(text: str) -> str:
    """The text within a code fence, if the whole of it is one."""
    text = text.strip()
    first, _, rest = text.partition("\n")
    if not (first.startswith("```") and rest.endswith("```")):
        return text
    return rest.removesuffix("```")


def flatten_json(
    value: Any, ordered: bool, ignore: Collection[IgnoredDifference]
) -> Iterator[JsonField]:
    """The leaves of a JSON value, each with its path."""
    rest: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while rest:
        path, value = rest.pop()
        if isinstance(value, dict) and value:
            rest += [((*path, key), item) for key, item in value.items()]
        elif isinstance(value, list) and value:
            rest += [((*path, n if ordered else -1), item) for n, item in enumerate(value)]
        else:
            yield (path, *_leaf(value, ignore))


def _leaf(value: Any, ignore: Collection[IgnoredDifference]) -> tuple[str, Any]:
    """The kind and the value of a leaf, so that equal ones are equal and true is not 1."""
    if isinstance(value, dict | list):
        return type(value).__name__, None
    if isinstance(value, str):
        return "text", normalise(value, ignore) if ignore else value
    if isinstance(value, bool) or value is None:
        return "constant", value
    return "number", value
