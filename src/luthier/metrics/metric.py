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
    has_reference: bool = True
    """Whether the row has a reply in words to compare with; `reference` is empty where not."""
    calls: tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]] | None = None
    """The tool calls of the reply and those of the row; None where no tool is offered."""
    message: Mapping[str, Any] = field(default_factory=dict)
    """The reply as a message, with its reasoning and its calls."""
    reference_message: Mapping[str, Any] = field(default_factory=dict)
    """The message that the row has in its place."""


@dataclass(frozen=True)
class MetricScores:
    """A metric over all replies, over each of them, and what its confidence is drawn from."""

    values: dict[str, float]
    """One number over all replies, by name."""
    rows: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """One number for each reply, by name, where the metric has such; None for a reply that is not
    the metric's to score."""
    statistics: dict[str, "SumStatistics"] = field(default_factory=dict)
    """Where the number over all is no mean of the rows: what it is made of, for the bootstrap."""

    def sample(self, name: str) -> "Sequence[float | None] | SumStatistics | None":
        """What the bootstrap resamples for this number; None where it has nothing for each row."""
        return self.statistics.get(name) or self.rows.get(name)

    def by_row(self, rows: Sequence[int]) -> "MetricScores":
        """Return the scores with what the bootstrap draws added up for each row.

        `rows`: the number of the row that each reply belongs to. Where each row has one reply
        nothing changes.
        """
        if len(set(rows)) == len(rows):
            return self
        import numpy as np

        from luthier.metrics.bootstrap import SumStatistics, mean_of_sums

        statistics = dict(self.statistics)
        for name, scores in self.rows.items():
            pairs = [(score or 0.0, score is not None) for score in scores]
            statistics.setdefault(name, SumStatistics(np.array(pairs, float), mean_of_sums))
        places = {row: place for place, row in enumerate(dict.fromkeys(rows))}
        for name, each in statistics.items():
            table = np.zeros((len(places), each.rows.shape[1]))
            np.add.at(table, [places[row] for row in rows], each.rows)
            statistics[name] = SumStatistics(table, each.value)
        return MetricScores(self.values, self.rows, statistics)

    def spread(self, numbers: Sequence[int], count: int) -> "MetricScores":
        """Return the scores of the replies with these numbers as scores of `count` replies."""
        if len(numbers) == count:
            return self
        import numpy as np

        from luthier.metrics.bootstrap import SumStatistics

        rows = {}
        for name, scores in self.rows.items():
            spread = dict(zip(numbers, scores, strict=True))
            rows[name] = [spread.get(number) for number in range(count)]
        statistics = {}
        for name, each in self.statistics.items():
            table = np.zeros((count, each.rows.shape[1]))
            table[list(numbers)] = each.rows
            statistics[name] = SumStatistics(table, each.value)
        return MetricScores(self.values, rows, statistics)


class Metric(BaseModel, ABC):
    """A metric with its settings; its numbers are called `name`, and `name/...` beside that one."""

    # Built when one is made: a config that names two of them needs no more.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
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

    def takes(self, reply: Prediction) -> bool:
        """Whether it can score a reply: only replies to rows with a reply in words."""
        return reply.has_reference

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
    """All numbers of all metrics, each of the replies that it takes.

    Raises UserError where a metric has no reply to score, and where it fails.
    """
    total = MetricScores({})
    for metric in metrics:
        numbers = [number for number, reply in enumerate(replies) if metric.takes(reply)]
        if not numbers:
            raise UserError(f"metric {metric.name}: there are no replies to score.")
        scores = metric.measure([replies[number] for number in numbers])
        scores = scores.spread(numbers, len(replies))
        total = MetricScores(
            {**total.values, **scores.values},
            {**total.rows, **scores.rows},
            {**total.statistics, **scores.statistics},
        )
    return total
