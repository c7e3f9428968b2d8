"""Scores of classes, numbers and tags with what the bootstrap draws them from.

The numbers are those of `luthier.metrics.classes` and `luthier.metrics.entities`, made of sums over
rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.metrics.bootstrap import Statistics
from luthier.metrics.classes import pearson
from luthier.metrics.entities import entity_counts
from luthier.metrics.labels import macro_f1
from luthier.metrics.metric import Measured

Array = NDArray[Any]


def single_label_samples(predicted: Array, right: Array, classes: int) -> Measured:
    """Accuracy, macro and micro F1 of one class a row: class numbers, shape (rows,)."""
    flags = np.eye(classes, dtype=bool)
    return multi_label_samples(flags[predicted], flags[right])


def multi_label_samples(predicted: Array, right: Array) -> Measured:
    """The same of several classes a row: truth values, shape (rows, classes)."""
    hits, either = predicted & right, predicted.astype(int) + right
    whole = (predicted == right).all(axis=1).astype(float).tolist()
    micro = np.stack([hits.sum(axis=1), either.sum(axis=1)], axis=1)
    statistics = {
        "macro_f1": Statistics(np.hstack([hits, either]), macro_f1),
        "micro_f1": Statistics(micro, lambda sums: 2 * sums[:, 0] / np.maximum(sums[:, 1], 1)),
    }
    return _measured({"accuracy": whole}, statistics)


def regression_samples(predicted: Array, right: Array) -> Measured:
    """Mean absolute error, root mean square error and Pearson's correlation; shape (rows,)."""
    one, other = predicted.astype(float), right.astype(float)
    error = one - other
    moments = np.stack([np.ones_like(one), one, other, one**2, other**2, one * other], axis=1)
    statistics = {
        "rmse": Statistics(
            np.stack([error**2, np.ones_like(error)], axis=1),
            lambda sums: np.sqrt(sums[:, 0] / sums[:, 1]),
        ),
        "pearson": Statistics(moments, pearson),
    }
    return _measured({"mae": np.abs(error).tolist()}, statistics)


def tags(
    predicted: Sequence[Sequence[str]], right: Sequence[Sequence[str]], are_entities: bool
) -> Measured:
    """Accuracy over all words, and where tags are of entities, their precision, recall and F1."""
    hits = [
        sum(a == b for a, b in zip(said, wanted, strict=True))
        for said, wanted in zip(predicted, right, strict=True)
    ]
    words = np.array([[hit, len(wanted)] for hit, wanted in zip(hits, right, strict=True)])
    statistics = {"accuracy": Statistics(words, lambda sums: sums[:, 0] / sums[:, 1])}
    if are_entities:
        counts = np.array([entity_counts(*pair) for pair in zip(predicted, right, strict=True)])
        statistics |= {
            "entity_precision": Statistics(counts, lambda s: s[:, 0] / np.maximum(s[:, 1], 1)),
            "entity_recall": Statistics(counts, lambda s: s[:, 0] / np.maximum(s[:, 2], 1)),
            "entity_f1": Statistics(
                counts, lambda s: 2 * s[:, 0] / np.maximum(s[:, 1] + s[:, 2], 1)
            ),
        }
    rows = {"accuracy": [hit / len(wanted) for hit, wanted in zip(hits, right, strict=True)]}
    return _measured(rows, statistics)


def pairs(chosen: Array, rejected: Array) -> Measured:
    """The share of pairs in the right order, and the mean margin; rewards of shape (rows,)."""
    margin = chosen - rejected
    return _measured(
        {"accuracy": (margin > 0).astype(float).tolist(), "margin": margin.tolist()}, {}
    )


def _measured(rows: Mapping[str, list[float]], statistics: Mapping[str, Statistics]) -> Measured:
    means = {name: float(np.mean(own)) for name, own in rows.items()}
    whole = {name: one.whole() for name, one in statistics.items()}
    return Measured(means | whole, dict(rows), dict(statistics))
