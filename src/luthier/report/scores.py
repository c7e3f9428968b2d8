"""A run's results with intervals: how sure a number is that was measured on some rows."""

import math
from collections import defaultdict
from dataclasses import dataclass

from luthier.metrics.bootstrap import Interval, bootstrap_interval
from luthier.metrics.parse import BUILT_IN_METRICS
from luthier.report.charts import format_number
from luthier.report.run_files import RunFiles

INTERVAL_NOTE = (
    "In brackets: the middle 95% of what bootstrap samples of the scored rows give (luthier "
    "evaluate compares two models row by row)."
)
_NEITHER = ("length",)
_GREATER = frozenset(
    ["reward", "accuracies", "margins", "margin", "macro_f1", "micro_f1", "entity_f1",
     "entity_precision", "entity_recall", "pearson", *BUILT_IN_METRICS]
) - {*_NEITHER}  # fmt: skip
_LESS = ("mae", "rmse", "perplexity")
_DRAWS = 2_000_000
"""Rows that are drawn for one interval, all its samples together."""


@dataclass(frozen=True)
class Result:
    """One number of the untrained and of the trained model."""

    name: str
    before: float | None
    after: float | None
    interval: Interval | None = None
    """Of the trained model's; None where the rows have no scores whose mean it is."""
    rows: int = 0
    """The rows that were scored."""

    @property
    def is_better(self) -> bool | None:
        """Whether the trained model's is better; None where nobody can say."""
        last = self.name.rpartition("/")[2]
        if self.before is None or self.after is None or self.before == self.after:
            return None
        if last.endswith("loss") or last in _LESS:
            return self.after < self.before
        return self.after > self.before if last in _GREATER else None


def read_results(run: RunFiles) -> list[Result]:
    """Return the results of a run's record, each with its interval where the replies give one."""
    scores = _scores_by_result(run)
    results = []
    for name, pair in (run.record.get("results") or {}).items():
        before, after = pair.get("before"), pair.get("after")
        values = scores.get(name, [])
        interval = None
        # A number that is no mean of rows, such as BLEU, is not drawn from their scores; and where
        # all rows have one score, every sample has it too, which says nothing of other rows.
        if after is not None and len(set(values)) > 1 and _is_mean(values, after):
            draws = min(10_000, max(200, _DRAWS // len(values)))
            interval = bootstrap_interval(values, draws=draws)
        results.append(Result(name, before, after, interval, len(values) if interval else 0))
    return results


def describe_interval(result: Result) -> str:
    """Return the interval of a result, such as `[0.78, 0.92], 100 rows`; empty without one."""
    if result.interval is None:
        return ""
    low, high = (format_number(value) for value in (result.interval.low, result.interval.high))
    return f"[{low}, {high}], {result.rows:,} rows"


def _scores_by_result(run: RunFiles) -> dict[str, list[float]]:
    """Return the scores of the trained model's replies, by the name of the result."""
    scores = defaultdict(list)
    for row in run.replies:
        label = f"{row['set']}/" if row.get("set") else ""
        pairs = row.get("scores")
        for name, pair in pairs.items() if isinstance(pairs, dict) else ():
            value = pair.get("after") if isinstance(pair, dict) else None
            if isinstance(value, int | float) and math.isfinite(value):
                scores[f"{label}{name}"].append(float(value))
    return scores


def _is_mean(values: list[float], result: float) -> bool:
    return math.isclose(sum(values) / len(values), result, rel_tol=1e-6, abs_tol=1e-9)
