"""How sure a measured number is: the bootstrap over rows, of one system and of two.

Rows are drawn with replacement as often as there are rows, and the number is taken of each draw;
the middle of what comes out is the interval (Efron and Tibshirani 1993, the percentile method).
Two systems are compared on the same draws (Koehn 2004, "Statistical Significance Tests for Machine
Translation Evaluation", https://aclanthology.org/W04-3250): what makes a row hard for both cancels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ELEMENTS = 1 << 22
"""Draws times rows that are held at once: 32 MB."""

_ROUNDING = 1e-9
"""Below this a difference is one of rounding: equal systems are neither higher nor lower."""


@dataclass(frozen=True)
class SumStatistics:
    """A number that is made of sums over rows, such as BLEU of its n-gram counts."""

    rows: NDArray[Any]
    """(rows, columns): what is added up."""
    value: Callable[[NDArray[Any]], NDArray[Any]]
    """From sums, (draws, columns), to the number of each draw, (draws,)."""

    def whole(self) -> float:
        """The number over all rows."""
        return float(self.value(self.rows.sum(axis=0, keepdims=True))[0])


@dataclass(frozen=True)
class Interval:
    """A number and the range in which it lies with this confidence."""

    value: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class PairedComparison:
    """Two systems on the same rows: the difference second minus first, and how sure its sign is."""

    first: Interval
    second: Interval
    difference: Interval
    higher: float
    """The share of draws in which the second is higher; 0.95 is Koehn's 95 % confidence."""
    lower: float
    """The share of draws in which it is lower."""


def bootstrap_interval(
    sample: Sequence[float | None] | SumStatistics,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The confidence interval of the mean of row scores, or of a number made of sums.

    The same seed gives the same interval. Raises ValueError without rows.
    """
    statistics = _statistics(sample)
    (sums,) = _resampled([statistics.rows], draws, seed)
    return _interval(statistics.whole(), statistics.value(sums), level)


def compare_paired(
    first: Sequence[float | None] | SumStatistics,
    second: Sequence[float | None] | SumStatistics,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> PairedComparison:
    """Compare two systems that answered the same rows, in the same order.

    Raises ValueError if they have not equally many rows.
    """
    first_samples, second_samples = _statistics(first), _statistics(second)
    if len(first_samples.rows) != len(second_samples.rows):
        raise ValueError(
            f"paired rows: {len(first_samples.rows)} of the first, "
            f"{len(second_samples.rows)} of the other"
        )
    sums = _resampled([first_samples.rows, second_samples.rows], draws, seed)
    before, after = first_samples.value(sums[0]), second_samples.value(sums[1])
    difference = after - before
    return PairedComparison(
        first=_interval(first_samples.whole(), before, level),
        second=_interval(second_samples.whole(), after, level),
        difference=_interval(second_samples.whole() - first_samples.whole(), difference, level),
        higher=float(np.mean(difference > _ROUNDING)),
        lower=float(np.mean(difference < -_ROUNDING)),
    )


def _statistics(sample: Sequence[float | None] | SumStatistics) -> SumStatistics:
    """Row scores as sums: the mean is their sum over as many rows. None is no score."""
    if isinstance(sample, SumStatistics):
        return sample
    if None in sample:
        scored = np.array([(score or 0.0, score is not None) for score in sample], dtype=float)
        return SumStatistics(scored, mean_of_sums)
    rows = np.asarray(sample, dtype=float).reshape(-1, 1)
    return SumStatistics(rows, lambda sums: sums[:, 0] / len(rows))


def mean_of_sums(sums: NDArray[Any]) -> NDArray[Any]:
    """The mean of each draw, from its sums of values and of how many there are; 0 without any."""
    mean: NDArray[Any] = sums[:, 0] / sums[:, 1].clip(min=1)
    return mean


def _resampled(tables: list[NDArray[Any]], draws: int, seed: int) -> list[NDArray[Any]]:
    """The sums of each draw for each table, drawn together; (draws, columns) each."""
    count = len(tables[0])
    if not count:
        raise ValueError("a bootstrap needs at least one row")
    random, stacked = np.random.default_rng(seed), np.hstack(tables).astype(float)
    sums = np.empty((draws, stacked.shape[1]))
    size = max(1, _ELEMENTS // count)
    for start in range(0, draws, size):
        some = min(size, draws - start)
        # How often each row was drawn: counts times rows is one product of matrices.
        drawn = random.integers(count, size=(some, count)) + count * np.arange(some)[:, None]
        times = np.bincount(drawn.ravel(), minlength=some * count).reshape(some, count)
        sums[start : start + some] = times.astype(float) @ stacked
    return np.split(sums, np.cumsum([table.shape[1] for table in tables])[:-1], axis=1)


def _interval(value: float, drawn: NDArray[Any], level: float) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)
