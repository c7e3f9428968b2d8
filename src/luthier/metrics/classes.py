"""Scores of predicted classes and numbers, over all rows at once.

Accuracy, precision, recall and F1 = 2 TP / (2 TP + FP + FN) are those of Manning, Raghavan and
Schütze, Introduction to Information Retrieval (2008), chapters 8.3 and 13.6: macro F1 is the mean
of the classes' F1, micro F1 that of the counts of all classes together. A class that is neither
predicted nor right in any row counts nothing, as in scikit-learn.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.metrics.labels import macro_f1

Array = NDArray[Any]
Scores = dict[str, float]


def single_label_scores(predicted: Array, right: Array, classes: int) -> Scores:
    """Scores of one class a row: class numbers, shape (rows,).

    Micro F1 is the same as accuracy here: each miss is one false positive and one false negative.
    """
    hits = np.bincount(right[predicted == right], minlength=classes)
    either = np.bincount(predicted, minlength=classes) + np.bincount(right, minlength=classes)
    return {"accuracy": float(np.mean(predicted == right)), **_f1(hits, either)}


def multi_label_scores(predicted: Array, right: Array) -> Scores:
    """Scores of several classes a row: truth values, shape (rows, classes).

    Accuracy is the share of rows in which all classes are right.
    """
    hits = (predicted & right).sum(axis=0)
    either = predicted.sum(axis=0) + right.sum(axis=0)
    return {"accuracy": float((predicted == right).all(axis=1).mean()), **_f1(hits, either)}


def _f1(hits: Array, either: Array) -> Scores:
    """F1 from each class's true positives, and its rows said plus its rows right: 2TP + FP + FN."""
    micro = 2 * hits.sum() / max(either.sum(), 1)
    macro = macro_f1(np.concatenate([hits, either])[None])[0]
    return {"macro_f1": float(macro), "micro_f1": float(micro)}


def regression_scores(predicted: Array, right: Array) -> Scores:
    """Mean absolute error, root mean square error, and Pearson's correlation; shape (rows,).

    The correlation is 0 where one side does not vary, as it is not defined there.
    """
    error = predicted - right
    sides = [side - side.mean() for side in (predicted, right)]
    spread = np.sqrt(np.prod([(side**2).sum() for side in sides]))
    return {
        "mae": float(np.abs(error).mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "pearson": float((sides[0] * sides[1]).sum() / spread) if spread else 0.0,
    }


def pearson(sums: Array) -> Array:
    """The correlation from sums of 1, x, y, x², y² and xy: shape (draws, 6) to (draws,)."""
    count, x, y, xx, yy, xy = sums.T
    spread = (xx - x * x / count) * (yy - y * y / count)
    # Of equal numbers rounding leaves a little.
    varies = spread > 1e-12 * np.maximum(xx * yy, 1e-300)
    return np.where(varies, (xy - x * y / count) / np.sqrt(np.where(varies, spread, 1)), 0.0)
