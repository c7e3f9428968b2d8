"""What a run says in the terminal: its data before the first step, its results after the last."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from luthier.data import Counts

console = Console(highlight=False)


def say(text: str) -> None:
    """Print one line."""
    console.print(escape(text), soft_wrap=True)


def show_model(model: Any, machine: Any, quantization: dict[str, Any]) -> None:
    """Say how large the model is and what of it trains."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, trains in sizes if trains)
    say(
        f"model     {type(model).__name__}, {trained / 1e6:.2f} M parameters train, "
        f"on {machine.device} in {machine.dtype}{', quantized' if quantization else ''}, "
        f"attention {machine.attention}"
    )


def show_data(sides: dict[str, Counts]) -> None:
    """Say how many rows, tokens and trained tokens there are, and what was dropped."""
    for name, part in sides.items():
        dropped = ", ".join(f"{n} dropped: {why}" for why, n in part.dropped.items())
        share = part.trained_tokens / max(part.tokens, 1)
        say(
            f"{name:<9} {part.rows:,} rows, {part.sequences:,} sequences, "
            f"longest {part.longest:,}, "
            f"{part.tokens:,} tokens, {part.trained_tokens:,} trained ({share:.0%})"
            f"{'; ' + dropped if dropped else ''}"
        )


def show_replies(rows: list[dict[str, Any]], limit: int) -> None:
    """Print replies before and after training side by side with what was expected."""
    if not rows or not limit:
        return
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, title="Held-out rows", title_justify="left")
    for heading in ("prompt", "before", "after", "expected"):
        table.add_column(heading, overflow="fold", ratio=1)
    for row in rows[:limit]:
        cells = (row["prompt"], row["before"], row["after"], row["expected"])
        table.add_row(*(escape(_short(str(cell))) for cell in cells))
    console.print(table)


def show_results(record: dict[str, Any], folder: Path) -> None:
    """Print what came out, and where it lies."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, pair in record["results"].items():
        table.add_row(
            name.replace("_", " "), *(_number(name, pair.get(k)) for k in ("before", "after"))
        )
    console.print(table)
    peak = "  ".join(f"{where} {gib} GiB" for where, gib in record["peak_memory_gib"].items())
    trained = record["training_seconds"]
    say(f"\ntime      {record['seconds']:.0f} s, of which training {trained:.0f} s")
    say(f"memory    {peak} at the peak")
    say(f"written   {folder}: model/ loss.png metrics.jsonl replies.jsonl run.json config.yaml")


def _number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if name == "exact_match" else f"{value:.4f}"


def _short(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[:limit] + " ..."
