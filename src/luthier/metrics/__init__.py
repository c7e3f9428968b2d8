"""Task metrics of generated replies, their confidence, and rewards: nothing heavy until used."""

from luthier.metrics.metric import Measured, Metric, Reply
from luthier.metrics.parse import check_metrics, greater_is_better, parse_metrics
from luthier.metrics.scoring import prepare_metrics, score_replies

__all__ = [
    "Measured",
    "Metric",
    "Reply",
    "check_metrics",
    "greater_is_better",
    "parse_metrics",
    "prepare_metrics",
    "score_replies",
]
