"""Compare two models on the same rows, or sum up one: intervals, and rows won and lost."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.evaluate.likelihood import LOSS, ModelScores
from luthier.evaluate.rows import EvaluationRows
from luthier.infer.questions import turn_text
from luthier.metrics.bootstrap import bootstrap_interval, compare_paired
from luthier.terminal import make_block, print_table, printable

EXAMPLES = 3
"""Rows won, and rows lost, that are shown."""


@dataclass(frozen=True)
class Comparison:
    """The numbers and rows of one evaluation set, for one model or for two."""

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
    worst: list[dict[str, Any]]
    """Of one model alone: the rows that it does worst on."""

    def plain(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold."""
        return asdict(self)


def compare_outcomes(
    items: EvaluationRows,
    base: ModelScores | None,
    tuned: ModelScores,
    better: Mapping[str, bool | None],
    level: float,
) -> Comparison:
    """Put the numbers of a set together.

    `better`: for each metric whether higher is better, None where it is neither; rows are judged by
    the first that tells the two apart. `level`: of confidence, such as 0.95.
    """
    samples = tuned.samples()
    numbers: dict[str, dict[str, Any]] = {}
    if base is None:
        numbers = {
            name: {"tuned": asdict(bootstrap_interval(each, level))}
            for name, each in samples.items()
        }
    else:
        others = base.samples()
        for name, sample in samples.items():
            # Paired: both models answered the same rows, so drawing rows together removes the
            # spread between easy and hard ones from the difference.
            interval = compare_paired(others[name], sample, level)
            numbers[name] = {
                "base": asdict(interval.first), "tuned": asdict(interval.second),
                "difference": asdict(interval.difference),
                "higher": interval.higher, "lower": interval.lower,
            }  # fmt: skip
    # Corpus metrics (a BLEU over all replies) have no value for a single row to draw from.
    numbers |= _bare(base, tuned, set(numbers))
    judged_by, rows = _judged(items, base, tuned, better) if base else _ranked(items, tuned, better)
    ranked = sorted(rows, key=lambda row: -row["gain"]) if base else []
    return Comparison(
        items.name, len(items.rows), len(tuned.replies), items.left_out, numbers, judged_by,
        wins=[row for row in ranked[:EXAMPLES] if row["gain"] > 0],
        losses=[row for row in ranked[::-1][:EXAMPLES] if row["gain"] < 0],
        worst=[] if base else rows[:EXAMPLES],
    )  # fmt: skip


def _bare(
    base: ModelScores | None, tuned: ModelScores, sampled: set[str]
) -> dict[str, dict[str, Any]]:
    """Return the numbers that have no value for each row, and so no interval."""
    numbers: dict[str, dict[str, Any]] = {}
    for name, value in tuned.scored.values.items():
        if name not in sampled:
            numbers[name] = {"tuned": {"value": value}}
            if base is not None:
                numbers[name] |= {
                    "base": {"value": base.scored.values[name]},
                    "difference": {"value": value - base.scored.values[name]},
                }
    return numbers


def _judged(
    items: EvaluationRows, base: ModelScores, tuned: ModelScores, better: Mapping[str, bool | None]
) -> tuple[str, list[dict[str, Any]]]:
    """Return what rows are judged by, and how much better the tuned model is on each.

    It is the first metric that tells the two apart, else the likelihood.
    """
    for name, is_higher in better.items():
        before, after = (scores.scored.rows.get(name) for scores in (base, tuned))
        if before is not None and after is not None and is_higher is not None:
            sign = 1 if is_higher else -1
            gains = [
                None if new is None or old is None else sign * (new - old)
                for old, new in zip(before, after, strict=True)
            ]
            # A metric that is equal on every row says nothing of which rows changed: the next may.
            if any(gains):
                return name, _asked_rows(items, {"gain": gains}, base, tuned)
    rows = [
        {"where": item.where, "gain": float(old - new), "base": float(old), "tuned": float(new)}
        for item, old, new in zip(items.rows, base.of_rows(), tuned.of_rows(), strict=True)
    ]
    return LOSS, rows


def _ranked(
    items: EvaluationRows, tuned: ModelScores, better: Mapping[str, bool | None]
) -> tuple[str, list[dict[str, Any]]]:
    """Return what rows are judged by, and the rows of one model, the worst first.

    It is the first metric that tells rows apart, else the likelihood. Rows with the best score of
    all are left out.
    """
    losses = tuned.of_rows().tolist()
    for name, is_higher in better.items():
        scores = tuned.scored.rows.get(name)
        # A metric that is the same on all rows ranks nothing.
        known = {score for score in scores or () if score is not None}
        if scores is not None and is_higher is not None and len(known) > 1:
            loss_of = {id(row): loss for row, loss in zip(items.rows, losses, strict=True)}
            question_losses = [loss_of[id(row)] for row, _ in items.asked]
            rows = _asked_rows(items, {"score": scores, "loss": question_losses}, None, tuned)
            sign, best = (1, max(known)) if is_higher else (-1, min(known))
            rows = [row for row in rows if row["score"] != best]
            # Among equal scores, such as exact_match 0, the least likely reply is the worst.
            return name, sorted(rows, key=lambda row: (sign * row["score"], -row["loss"]))
    rows = [
        {"where": item.where, "loss": loss} for item, loss in zip(items.rows, losses, strict=True)
    ]
    return LOSS, sorted(rows, key=lambda row: -row["loss"])


def _asked_rows(
    items: EvaluationRows,
    numbers: Mapping[str, Sequence[float | None]],
    base: ModelScores | None,
    tuned: ModelScores,
) -> list[dict[str, Any]]:
    """Return what was asked and has these numbers, each with them and the replies to it."""
    rows = []
    for position, ((item, question), reply) in enumerate(
        zip(items.asked, tuned.replies, strict=True)
    ):
        values = {name: each[position] for name, each in numbers.items()}
        if None in values.values():
            continue
        turn = "" if question.is_last else f", message {len(question.messages) + 1}"
        row = {"where": item.where + turn, **values}
        row |= {
            "prompt": turn_text(question.messages[-1]),
            "expected": question.expected_text,
        }
        if base is not None:
            row["base"] = base.replies[position]
        rows.append(row | {"tuned": reply})
    return rows


_FEW_ROWS = 10
"""Below this number a bootstrap over rows draws nearly the same rows each time."""

# Tables for the terminal; `--json` and `-o` hold the same numbers as plain values.


def print_comparison(result: Comparison, console: Console, against: str = "base") -> None:
    """Print the numbers of a set, and rows won and lost; `against`: the other model's name."""
    left = ", ".join(f"{count:,} {why}" for why, count in result.left_out.items())
    rows_word = "row" if result.rows == 1 else "rows"
    head = f"{result.name}: {result.rows:,} {rows_word}" + (f"; left out: {left}" if left else "")
    if result.asked and result.asked != result.rows:
        head += f"; {result.asked:,} answered"
    console.print(Text(f"\n{head}", style="bold"))
    print_table(console, comparison_values(result.numbers, against))
    if result.rows < _FEW_ROWS:
        console.print(f"{result.rows} {rows_word}: too few for intervals that can be trusted.")
    # Two models have rows won and lost; one alone has its worst. The other lists are empty.
    groups = (("won", result.wins), ("lost", result.losses), ("worst", result.worst))
    for name, rows in groups:
        if rows:
            console.print(Text(f"\n{name}, by {result.judged_by}", style="bold"))
            _print_examples(rows, against, console)


def comparison_values(numbers: dict[str, dict[str, Any]], against: str = "base") -> Table:
    """Return a table with a row for each number, and its interval in brackets."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    is_pair = any("base" in number for number in numbers.values())
    table.add_column("", no_wrap=True)
    for name in (against, "tuned", "difference", "sure") if is_pair else ("tuned",):
        table.add_column(name, justify="right", no_wrap=True)
    for name, number in numbers.items():
        cells = [format_interval(number.get(column)) for column in ("base", "tuned", "difference")]
        sure = max(number["higher"], number["lower"]) if "higher" in number else None
        # The share of draws in which the tuned model is better, or worse: whichever is larger.
        certain = "" if sure is None else f"{sure:.1%}"
        table.add_row(name, *([*cells, certain] if is_pair else [cells[1]]))
    return table


def format_interval(number: dict[str, Any] | None) -> str:
    """Return a value, and below it its interval, such as `[0.20, 0.33]`."""
    if number is None:
        return ""
    if "low" not in number:
        return f"{number['value']:.4g}"
    return f"{number['value']:.4g}\n[{number['low']:.4g}, {number['high']:.4g}]"


def _print_examples(rows: list[dict[str, Any]], against: str, console: Console) -> None:
    """Print a block for each row: where it is, what was asked, the replies, what was expected."""
    last = "expected" if "expected" in rows[0] else "loss"
    for row in rows:
        texts = {
            against if name == "base" else name: _short(row[name])
            for name in ("prompt", "base", "tuned", last)
            if name in row
        }
        lines = make_block(_place(row["where"]), texts, console.width)
        console.print(Text("\n".join(lines)), soft_wrap=True)


def _place(where: str) -> str:
    """Return a row's file, relative to here or by its name alone, and its line."""
    file, colon, line = where.rpartition(":")
    path = Path(file)
    if not path.is_absolute():
        return where
    # Paths from here can be opened as they stand; others would fill the column.
    here = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(path.name)
    return f"{here}{colon}{line}"


def _short(value: Any, limit: int = 160) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else printable(" ".join(str(value).split()))
    return text if len(text) <= limit else text[:limit] + " ..."
