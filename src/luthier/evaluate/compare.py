"""Numbers of one model with their intervals, or of two on the same rows; rows won and lost."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from luthier.evaluate.items import Items
from luthier.evaluate.measure import LOSS, PERPLEXITY, Outcome
from luthier.metrics import Metric
from luthier.metrics.bootstrap import interval, paired

EXAMPLES = 3
"""Rows won, and rows lost, that are shown."""


@dataclass(frozen=True)
class Result:
    """What came out of one set."""

    name: str
    rows: int
    asked: int
    """Rows that were answered."""
    left_out: dict[str, int]
    numbers: dict[str, dict[str, Any]]
    """By name: `base` and `tuned`, each with `value`, `low` and `high`; `difference`, tuned minus
    base; `higher` and `lower`, the share of draws in which tuned is. One model alone is `tuned`."""
    judged_by: str
    """The number by which rows are won or lost."""
    wins: list[dict[str, Any]]
    losses: list[dict[str, Any]]

    def plain(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


def result(
    items: Items, base: Outcome | None, tuned: Outcome, metrics: Sequence[Metric], level: float
) -> Result:
    """Put the numbers of a set together; `level`: of confidence, such as 0.95."""
    samples = tuned.samples()
    numbers: dict[str, dict[str, Any]] = {}
    if base is None:
        numbers = {name: {"tuned": asdict(interval(each, level))} for name, each in samples.items()}
    else:
        others = base.samples()
        for name, sample in samples.items():
            found = paired(others[name], sample, level)
            numbers[name] = {
                "base": asdict(found.first), "tuned": asdict(found.second),
                "difference": asdict(found.difference),
                "higher": found.higher, "lower": found.lower,
            }  # fmt: skip
    numbers |= _bare(base, tuned, set(numbers))
    judged_by, rows = _judged(items, base, tuned, metrics) if base else (LOSS, [])
    ranked = sorted(rows, key=lambda row: -row["gain"])
    return Result(
        items.name, len(items.rows), len(tuned.replies), items.left_out, numbers, judged_by,
        wins=[row for row in ranked[:EXAMPLES] if row["gain"] > 0],
        losses=[row for row in ranked[::-1][:EXAMPLES] if row["gain"] < 0],
    )  # fmt: skip


def _bare(base: Outcome | None, tuned: Outcome, known: set[str]) -> dict[str, dict[str, Any]]:
    """Numbers of which nothing is known for each row: no interval is drawn."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in tuned.scored.values.items():
        if name not in known:
            found[name] = {"tuned": {"value": value}}
            if base is not None:
                found[name] |= {
                    "base": {"value": base.scored.values[name]},
                    "difference": {"value": value - base.scored.values[name]},
                }
    return found


def _judged(
    items: Items, base: Outcome, tuned: Outcome, metrics: Sequence[Metric]
) -> tuple[str, list[dict[str, Any]]]:
    """How much better the tuned model is on each row.

    By the first metric that tells the two apart, or by the likelihood.
    """
    for metric in metrics:
        before, after = (one.scored.rows.get(metric.name) for one in (base, tuned))
        if before is not None and after is not None and metric.greater_is_better is not None:
            sign = 1 if metric.greater_is_better else -1
            gains = [sign * (new - old) for old, new in zip(before, after, strict=True)]
            if any(gains):
                return metric.name, _asked_rows(items, base, tuned, gains)
    per_token = [one.nats[:, 0] / one.nats[:, 1].clip(min=1) for one in (base, tuned)]
    rows = [
        {"where": item.where, "gain": float(old - new), "base": float(old), "tuned": float(new)}
        for item, old, new in zip(items.rows, *per_token, strict=True)
    ]
    return LOSS, rows


def _asked_rows(
    items: Items, base: Outcome, tuned: Outcome, gains: list[float]
) -> list[dict[str, Any]]:
    asked = [item for item in items.rows if item.question is not None]
    return [
        {
            "where": item.where, "gain": gain, "prompt": item.question.messages[-1]["content"],
            "expected": item.question.expected, "base": old, "tuned": new,
        }
        for item, gain, old, new in zip(asked, gains, base.replies, tuned.replies, strict=True)
        if item.question is not None
    ]  # fmt: skip


def is_better_low(name: str, metrics: Sequence[Metric]) -> bool | None:
    """Whether a number is better the lower it is; None for one that is neither good nor bad."""
    if name in (LOSS, PERPLEXITY):
        return True
    for metric in metrics:
        if name == metric.name or name.startswith(f"{metric.name}/"):
            return None if metric.greater_is_better is None else not metric.greater_is_better
    return None
