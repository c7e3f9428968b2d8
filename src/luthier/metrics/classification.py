"""Scores of classes, numbers and tags with what the bootstrap draws them from.

The samples of a row are sums, so that a bootstrap can draw rows and add them up.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.metrics.bootstrap import SumStatistics
from luthier.metrics.metric import MetricScores
from luthier.metrics.text import macro_f1

# Scores of predicted classes and numbers, over all rows at once.
#
# Accuracy, precision, recall and F1 = 2 TP / (2 TP + FP + FN) are those of Manning, Raghavan
# and Schütze, Introduction to Information Retrieval (2008), chapters 8.3 and 13.6: macro F1 is
# the mean of the classes' F1, micro F1 that of the counts of all classes together. A class that
# is neither predicted nor right in any row counts nothing, as in scikit-learn.

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


# Entities in tagged words, and their F1 as CoNLL counts it.
#
# An entity is right if its type, its first and its last word are (Tjong Kim Sang and De Meulder
# 2003, CoNLL-2003, and its script conlleval; seqeval without `mode` follows the same rules).
# Tags are `O` and B, I, E, S with a type (`B-PER`). An entity also begins without a B, where an
# I or E stands behind O, behind the end of another entity, or behind another type.

OUTSIDE = "O"
_TAG = re.compile(r"[BIES]-.+", re.DOTALL)
Entity = tuple[str, int, int]
"""Its type, and its first and last word."""


def are_entity_tags(tags: Iterable[str]) -> bool:
    """Whether these are tags of entities, and not, say, parts of speech."""
    others = [tag for tag in tags if tag != OUTSIDE]
    return bool(others) and all(map(_TAG.fullmatch, others))


def find_entities(tags: Sequence[str]) -> Iterator[Entity]:
    """The entities of one sentence, in order."""
    begin = 0
    around = [OUTSIDE, *tags, OUTSIDE]
    for index, (before, tag) in enumerate(pairwise(around)):
        if _ends(before, tag):
            yield before[2:], begin, index - 1
        if _begins(before, tag):
            begin = index


def _ends(tag: str, behind: str) -> bool:
    """Whether an entity ends with a tag."""
    if tag == OUTSIDE:
        return False
    return tag[0] in "ES" or behind == OUTSIDE or behind[0] in "BS" or tag[2:] != behind[2:]


def _begins(before: str, tag: str) -> bool:
    """Whether an entity begins with a tag."""
    if tag == OUTSIDE:
        return False
    return tag[0] in "BS" or before == OUTSIDE or before[0] in "ES" or before[2:] != tag[2:]


def entity_counts(predicted: Sequence[str], right: Sequence[str]) -> tuple[int, int, int]:
    """Of one sentence: right entities, those predicted, and those there are."""
    predicted_entities, right_entities = set(find_entities(predicted)), set(find_entities(right))
    return len(predicted_entities & right_entities), len(predicted_entities), len(right_entities)


def entity_scores(
    predicted: Iterable[Sequence[str]], right: Iterable[Sequence[str]]
) -> dict[str, float]:
    """Precision, recall and F1 of the entities of all sentences; 0 where there is nothing to count.

    P = right entities / predicted ones, R = right entities / those there are, F1 = 2PR / (P + R).
    """
    hits = predicted_count = there = 0
    for predicted_tags, reference_tags in zip(predicted, right, strict=True):
        counts = entity_counts(predicted_tags, reference_tags)
        hits, predicted_count, there = (
            hits + counts[0],
            predicted_count + counts[1],
            there + counts[2],
        )
    return {
        "entity_precision": hits / max(predicted_count, 1),
        "entity_recall": hits / max(there, 1),
        "entity_f1": 2 * hits / max(predicted_count + there, 1),
    }


def single_label_samples(predicted: Array, right: Array, classes: int) -> MetricScores:
    """Accuracy, macro and micro F1 of one class a row: class numbers, shape (rows,)."""
    flags = np.eye(classes, dtype=bool)
    return multi_label_samples(flags[predicted], flags[right])


def multi_label_samples(predicted: Array, right: Array) -> MetricScores:
    """The same of several classes a row: truth values, shape (rows, classes)."""
    hits, either = predicted & right, predicted.astype(int) + right
    row_accuracy = (predicted == right).all(axis=1).astype(float).tolist()
    micro = np.stack([hits.sum(axis=1), either.sum(axis=1)], axis=1)
    statistics = {
        "macro_f1": SumStatistics(np.hstack([hits, either]), macro_f1),
        "micro_f1": SumStatistics(micro, lambda sums: 2 * sums[:, 0] / np.maximum(sums[:, 1], 1)),
    }
    return _measured({"accuracy": row_accuracy}, statistics)


def regression_samples(predicted: Array, right: Array) -> MetricScores:
    """Mean absolute error, root mean square error and Pearson's correlation; shape (rows,)."""
    predicted_values, reference_values = predicted.astype(float), right.astype(float)
    error = predicted_values - reference_values
    moments = np.stack(
        [
            np.ones_like(predicted_values),
            predicted_values,
            reference_values,
            predicted_values**2,
            reference_values**2,
            predicted_values * reference_values,
        ],
        axis=1,
    )
    statistics = {
        "rmse": SumStatistics(
            np.stack([error**2, np.ones_like(error)], axis=1),
            lambda sums: np.sqrt(sums[:, 0] / sums[:, 1]),
        ),
        "pearson": SumStatistics(moments, pearson),
    }
    return _measured({"mae": np.abs(error).tolist()}, statistics)


def tag_samples(
    predicted: Sequence[Sequence[str]], right: Sequence[Sequence[str]], are_entities: bool
) -> MetricScores:
    """Accuracy over all words, and where tags are of entities, their precision, recall and F1."""
    hits = [
        sum(a == b for a, b in zip(predicted_tags, reference_tags, strict=True))
        for predicted_tags, reference_tags in zip(predicted, right, strict=True)
    ]
    hits_and_words = np.array(
        [[hit, len(reference_tags)] for hit, reference_tags in zip(hits, right, strict=True)]
    )
    statistics = {"accuracy": SumStatistics(hits_and_words, lambda sums: sums[:, 0] / sums[:, 1])}
    if are_entities:
        counts = np.array([entity_counts(*pair) for pair in zip(predicted, right, strict=True)])
        statistics |= {
            "entity_precision": SumStatistics(counts, lambda s: s[:, 0] / np.maximum(s[:, 1], 1)),
            "entity_recall": SumStatistics(counts, lambda s: s[:, 0] / np.maximum(s[:, 2], 1)),
            "entity_f1": SumStatistics(
                counts, lambda s: 2 * s[:, 0] / np.maximum(s[:, 1] + s[:, 2], 1)
            ),
        }
    rows = {
        "accuracy": [
            hit / len(reference_tags) for hit, reference_tags in zip(hits, right, strict=True)
        ]
    }
    return _measured(rows, statistics)


def preference_samples(chosen: Array, rejected: Array) -> MetricScores:
    """The share of pairs in the right order, and the mean margin; rewards of shape (rows,)."""
    margin = chosen - rejected
    return _measured(
        {"accuracy": (margin > 0).astype(float).tolist(), "margin": margin.tolist()}, {}
    )


def _measured(
    rows: Mapping[str, list[float]], statistics: Mapping[str, SumStatistics]
) -> MetricScores:
    means = {name: float(np.mean(row_scores)) for name, row_scores in rows.items()}
    totals = {name: statistic.whole() for name, statistic in statistics.items()}
    return MetricScores(means | totals, dict(rows), dict(statistics))
