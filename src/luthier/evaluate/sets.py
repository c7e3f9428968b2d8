"""Rows to measure on, and how they are scored."""

from collections.abc import Mapping
from dataclasses import dataclass

from luthier.config.schema import RunConfig
from luthier.evaluate.items import Items
from luthier.metrics import Metric, parse_metrics, prepare_metrics


@dataclass(frozen=True)
class Set:
    """One evaluation set."""

    items: Items
    metrics: list[Metric]
    """Those of replies in words."""
    better: Mapping[str, bool | None]
    """For each metric whether higher is better; None where it is neither."""


def of_replies(items: Items, metrics: list[Metric]) -> Set:
    """A set whose replies are scored by metrics, if there are any; what these need is imported.

    Raises UserError as `prepare_metrics` does.
    """
    questions = [item.question for item in items.rows if item.question is not None]
    if metrics and questions:
        prepare_metrics(metrics, [question.expected for question in questions])
    better = {metric.name: metric.greater_is_better for metric in metrics}
    return Set(items, metrics if questions else [], better)


def metrics_of(config: RunConfig | None, name: str) -> list[Metric]:
    """A run's own metrics of an evaluation set; none for a model that is no run's."""
    if config is None:
        return []
    evaluation = config.trainer.evaluation
    return parse_metrics(evaluation.sets.get(name, evaluation.metrics))
