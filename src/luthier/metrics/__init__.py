"""Task metrics of generated replies, their confidence, and rewards: nothing heavy until used."""

from luthier.metrics.metric import Metric, MetricScores, Prediction, prepare_metrics, score_replies
from luthier.metrics.parse import check_metrics, greater_is_better, parse_metrics

__all__ = [
    "Metric",
    "MetricScores",
    "Prediction",
    "check_metrics",
    "greater_is_better",
    "parse_metrics",
    "prepare_metrics",
    "score_replies",
]
