"""Replies scored by several metrics at once, and what must be so before the first of them."""

from collections.abc import Sequence

from luthier.errors import UserError
from luthier.metrics.metric import Measured, Metric, Reply


def prepare_metrics(metrics: Sequence[Metric], references: Sequence[str]) -> None:
    """Import what the metrics need and look at every reference, before a model is trained.

    Raises UserError for a reference that a metric cannot compare with, for a function that cannot
    be imported or takes other arguments, and for a metric of `evaluate` that cannot be had.
    """
    for metric in metrics:
        metric.prepare(references)


def score_replies(metrics: Sequence[Metric], replies: Sequence[Reply]) -> Measured:
    """All numbers of all metrics; raises UserError without replies, and where a metric fails."""
    if metrics and not replies:
        raise UserError("metrics: there are no replies to score.")
    whole = Measured({}, {}, {})
    for metric in metrics:
        found = metric.measure(replies)
        whole.values.update(found.values)
        whole.rows.update(found.rows)
        whole.statistics.update(found.statistics)
    return whole
