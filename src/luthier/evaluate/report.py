"""What an evaluation found, as tables for people."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.evaluate.compare import Result
from luthier.infer.stream import shown


def show(result: Result, console: Console, against: str = "base") -> None:
    """Print the numbers of a set, and rows won and lost; `against`: the other model's name."""
    left = ", ".join(f"{count:,} {why}" for why, count in result.left_out.items())
    head = f"{result.name}: {result.rows:,} rows" + (f"; left out: {left}" if left else "")
    if result.asked and result.asked != result.rows:
        head += f"; {result.asked:,} answered"
    console.print(Text(f"\n{head}", style="bold"))
    console.print(numbers(result.numbers, against))
    parts = (("won", result.wins), ("lost", result.losses), ("worst", result.worst))
    for name, rows in parts:
        if rows:
            console.print(Text(f"\n{name}, by {result.judged_by}", style="bold"))
            console.print(_examples(rows, against))


def numbers(found: dict[str, dict[str, Any]], against: str = "base") -> Table:
    """A row for each number, with its interval in brackets."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    is_pair = any("base" in number for number in found.values())
    table.add_column("", no_wrap=True)
    for name in (against, "tuned", "difference", "sure") if is_pair else ("tuned",):
        table.add_column(name, justify="right", no_wrap=True)
    for name, number in found.items():
        cells = [cell(number.get(part)) for part in ("base", "tuned", "difference")]
        sure = max(number["higher"], number["lower"]) if "higher" in number else None
        certain = "" if sure is None else f"{sure:.1%}"
        table.add_row(name, *([*cells, certain] if is_pair else [cells[1]]))
    return table


def cell(number: dict[str, Any] | None) -> str:
    """A value, and below it its interval, such as `[0.20, 0.33]`."""
    if number is None:
        return ""
    if "low" not in number:
        return f"{number['value']:.4g}"
    return f"{number['value']:.4g}\n[{number['low']:.4g}, {number['high']:.4g}]"


def _examples(rows: list[dict[str, Any]], against: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, show_edge=False, pad_edge=False)
    last = "expected" if "expected" in rows[0] else "loss"
    names = [name for name in ("where", "prompt", "base", "tuned", last) if name in rows[0]]
    for name in names:
        table.add_column(against if name == "base" else name, overflow="fold", ratio=1)
    for row in rows:
        texts = (_place(row[name]) if name == "where" else _short(row[name]) for name in names)
        table.add_row(*map(Text, texts))
    return table


def _place(where: str) -> str:
    """A row's file and line; the file from here on, or by its name alone where it is elsewhere."""
    file, colon, line = where.rpartition(":")
    path = Path(file)
    if not path.is_absolute():
        return where
    here = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(path.name)
    return f"{here}{colon}{line}"


def _short(value: Any, limit: int = 160) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else shown(" ".join(str(value).split()))
    return text if len(text) <= limit else text[:limit] + " ..."
