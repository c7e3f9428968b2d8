"""What a metric is: replies beside what was wanted in, numbers out."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from luthier.errors import UserError

if TYPE_CHECKING:
    from luthier.metrics.bootstrap import SumStatistics


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model said, what the row has in its place, and the row itself."""

    prediction: str
    reference: str
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricScores:
    """A metric over all replies, over each of them, and what its confidence is drawn from."""

    values: dict[str, float]
    """One number over all replies, by name."""
    rows: dict[str, list[float]] = field(default_factory=dict)
    """One number for each reply, by name, where the metric has such."""
    statistics: dict[str, "SumStatistics"] = field(default_factory=dict)
    """Where the number over all is no mean of the rows: what it is made of, for the bootstrap."""

    def sample(self, name: str) -> "Sequence[float] | SumStatistics | None":
        """What the bootstrap resamples for this number; None where it has nothing for each row."""
        return self.statistics.get(name) or self.rows.get(name)


class Metric(BaseModel, ABC):
    """A metric with its settings; its numbers are called `name`, and `name/...` beside that one."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    packages: ClassVar[tuple[str, ...]] = ()

    name: str = Field(min_length=1)
    """What its number is called in logs and tables."""
    greater_is_better: bool | None = True
    """Which way the best checkpoint lies; null for a number that is neither good nor bad."""

    def needed(self) -> tuple[str, ...]:
        """The packages that this metric imports."""
        return self.packages

    def prepare(self, references: Sequence[str]) -> None:
        """Import what is needed and look at every reference; raises UserError, in words."""
        wrong = [
            (n, objection)
            for n, text in enumerate(references)
            if (objection := self.objection(text))
        ]
        if wrong:
            number, objection = wrong[0]
            raise UserError(
                f"metric {self.name}: {len(wrong)} of {len(references)} references cannot be "
                f"compared with. The first, row {number}, {objection}: "
                f"{excerpt(references[number])}\n"
                "Change the metric's settings, or use only rows that have such an answer."
            )

    def objection(self, reference: str) -> str | None:
        """Why nothing can be compared with this reference, as words that follow `it`."""

    @abstractmethod
    def measure(self, replies: Sequence[Prediction]) -> MetricScores:
        """The metric of these replies, at least one, and where it has them those of each."""

    def score(self, replies: Sequence[Prediction]) -> dict[str, float]:
        """The metric of these replies, at least one, by name."""
        return self.measure(replies).values


class RowMetric(Metric):
    """A metric of one reply at a time; over all replies it is the mean."""

    @abstractmethod
    def row(self, prediction: str, reference: str) -> float:
        """The metric of one reply."""

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with a reference at all."""
        return True

    def measure(self, replies: Sequence[Prediction]) -> MetricScores:
        """The mean over the replies, and each of them."""
        rows = [float(self.row(reply.prediction, reply.reference)) for reply in replies]
        return MetricScores({self.name: mean(rows)}, {self.name: rows})


def mean(rows: Sequence[float]) -> float:
    """The mean, without rounding on the way."""
    return math.fsum(rows) / len(rows)


def excerpt(text: str, width: int = 80) -> str:
    """A text as one quoted line, cut where it is long."""
    return repr(text if len(text) <= width else text[: width - 3] + "...")


# Replies scored by several metrics at once, and what must be so before the first of them.


def prepare_metrics(metrics: Sequence[Metric], references: Sequence[str]) -> None:
    """Import what the metrics need and look at every reference, before a model is trained.

    Raises UserError for a reference that a metric cannot compare with, for a function that cannot
    be imported or takes other arguments, and for a metric of `evaluate` that cannot be had.
    """
    for metric in metrics:
        metric.prepare(references)


def score_replies(metrics: Sequence[Metric], replies: Sequence[Prediction]) -> MetricScores:
    """All numbers of all metrics; raises UserError without replies, and where a metric fails."""
    if metrics and not replies:
        raise UserError("metrics: there are no replies to score.")
    total = MetricScores({}, {}, {})
    for metric in metrics:
        scores = metric.measure(replies)
        total.values.update(scores.values)
        total.rows.update(scores.rows)
        total.statistics.update(scores.statistics)
    return total
