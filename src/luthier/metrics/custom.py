"""Metrics that are not luthier's: a function of the user's own, or one of the package `evaluate`.

What they return is read in one way: a number, a mapping of names to numbers, or one number for
each reply (a list), of which the mean is taken.
"""

import math
import os
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from numbers import Real
from typing import Any, ClassVar

from pydantic import Field

from luthier.errors import UserError
from luthier.errors import format_value as shown
from luthier.metrics.metric import Metric, MetricScores, Prediction, excerpt, mean
from luthier.python_code import (
    check_python_path,
    describe_exception,
    load_python_object,
    named_parameters,
)

_POSITIONAL = ("predictions", "references", "rows")
_MESSAGES = {"reply_messages": "message", "reference_messages": "reference_message"}
"""What a function gets besides where it has parameters of these names, and where it is."""


class FunctionMetric(Metric):
    """`python:module.function`, called with predictions, references and rows.

    One with a parameter `reply_messages` or `reference_messages` gets these, too, and scores every
    turn: also one that calls a tool, which has no reply in words.
    """

    path: str
    """Where the function is."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments that it takes."""

    def prepare(self, references: Sequence[str]) -> None:
        """Load the function and see that it takes what it will get."""
        self._load()

    def check(self) -> str | None:
        """What is wrong with the path, as far as can be told without importing it."""
        return check_python_path(
            self.path, self.arguments, positional=_POSITIONAL, by_name=list(_MESSAGES)
        )

    def takes(self, reply: Prediction) -> bool:
        """Whether the function scores a reply: those without words only where it reads messages."""
        return reply.has_reference or bool(self._message_parameters)

    @cached_property
    def _message_parameters(self) -> list[str]:
        """Those of `_MESSAGES` that the function takes, but for what the settings give it."""
        names = named_parameters(self._load(), list(_MESSAGES), _POSITIONAL)
        return [name for name in names if name not in self.arguments]

    def _load(self) -> Any:
        try:
            return load_python_object(
                self.path, self.arguments, positional=_POSITIONAL, by_name=list(_MESSAGES)
            )
        except UserError as error:
            raise UserError(f"metric {self.name}: {error}") from error

    def measure(self, replies: Sequence[Prediction]) -> MetricScores:
        """What the function returns."""
        messages = {
            name: [dict(getattr(reply, _MESSAGES[name])) for reply in replies]
            for name in self._message_parameters
        }
        try:
            returned = load_python_object(self.path)(
                [reply.prediction for reply in replies],
                [reply.reference for reply in replies],
                [dict(reply.row) for reply in replies],
                **messages,
                **self.arguments,
            )
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"metric {self.name}: it failed: {describe_exception(error)}"
            ) from error
        return read_returned_scores(returned, self.name, len(replies))


class HubMetric(Metric):
    """`evaluate:NAME`: a metric of the package `evaluate`, from the hub or a local folder."""

    packages: ClassVar[tuple[str, ...]] = ("evaluate",)

    path: str
    """The metric's name there, or a folder."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Passed to its `compute`."""

    def prepare(self, references: Sequence[str]) -> None:
        """Fetch the metric."""
        _evaluate(self.path)

    def measure(self, replies: Sequence[Prediction]) -> MetricScores:
        """What `compute` returns; what is no number there, such as a version, is left out."""
        try:
            returned = _evaluate(self.path).compute(
                predictions=[reply.prediction for reply in replies],
                references=[reply.reference for reply in replies],
                **self.arguments,
            )
        except Exception as error:
            raise UserError(
                f"metric {self.name}: {self.path} of evaluate failed: {describe_exception(error)}"
            ) from error
        return read_returned_scores(_numbers(returned, len(replies)), self.name, len(replies))


@cache
def _evaluate(path: str) -> Any:
    """The metric of that name; raises UserError where it cannot be had."""
    import evaluate

    try:
        return evaluate.load(path)
    except Exception as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
        why = " (HF_HUB_OFFLINE is set)" if offline else ""
        raise UserError(
            f"metric evaluate:{path}: it cannot be loaded{why}: {excerpt(str(error), 300)}\n"
            "Its code comes from the Hugging Face hub: check the name and the network, or use a "
            "metric of luthier's own."
        ) from error


def _numbers(returned: Any, count: int) -> Any:
    """The entries that are numbers, or one number for each reply."""
    if not isinstance(returned, Mapping):
        return returned
    return {
        key: value
        for key, value in returned.items()
        if isinstance(value, Real) or (_is_rows(value) and len(value) == count)
    }


def read_returned_scores(returned: Any, name: str, count: int) -> MetricScores:
    """The numbers in what a function returned for so many replies; raises UserError for others.

    Of a mapping, the key that is called as the metric is its main number; the others are called
    `name/key`.
    """
    if not isinstance(returned, Mapping):
        return _one(returned, name, name, count)
    if not returned:
        raise UserError(f"metric {name}: it returned no numbers.")
    values: dict[str, float] = {}
    rows: dict[str, Sequence[float | None]] = {}
    for key, value in returned.items():
        scores = _one(value, name if key == name else f"{name}/{key}", name, count)
        values |= scores.values
        rows |= scores.rows
    return MetricScores(values, rows)


def _one(value: Any, key: str, name: str, count: int) -> MetricScores:
    if isinstance(value, Real):
        return MetricScores({key: _finite(value, key, name)})
    if not _is_rows(value):
        raise UserError(
            f"metric {name}: {key} is {shown(value)} ({type(value).__name__}). Return a "
            "number, a mapping of names to numbers, or a list with a number for each reply."
        )
    if len(value) != count:
        raise UserError(f"metric {name}: {key} has {len(value)} numbers for {count} replies.")
    rows = [_finite(item, key, name) for item in value]
    return MetricScores({key: mean(rows)}, {key: rows})


def _is_rows(value: Any) -> bool:
    """Whether it is a list, a tuple or an array of one dimension."""
    import numpy as np

    if isinstance(value, np.ndarray):
        return value.ndim == 1
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _finite(value: Any, key: str, name: str) -> float:
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    raise UserError(f"metric {name}: {key} is {shown(value)}, and must be a finite number.")
