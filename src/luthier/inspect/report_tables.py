"""The numbers that the check found, as tables and bars."""

from collections.abc import Iterable, Mapping

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.inspect.composition import Share
from luthier.inspect.lengths import histogram, quantiles
from luthier.inspect.sides import Side

_BAR = 36
_ALWAYS = ("rows", "sequences", "documents", "windows", "tokens", "dropped")
"""What one looks for first: it is shown even where it is nought."""


def _table(columns: Iterable[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def counts(sides: list[Side], has_chats: bool) -> Table:
    """What each side makes; `has_chats`: not all of it is plain text."""
    table = _table(side.name for side in sides)
    columns = [_column(side, has_chats) for side in sides]
    for label in dict.fromkeys(label for column in columns for label in column):
        cells = [column.get(label, "0") for column in columns]
        if label in _ALWAYS or any(cell != "0" for cell in cells):
            table.add_row(label, *cells)
    return table


def _column(side: Side, has_chats: bool) -> dict[str, str]:
    share = f" ({side.trained_tokens / side.tokens:.0%})" if side.tokens else ""
    found = quantiles(side.lengths.tolist())
    names = ("min", "median", "p90", "p99", "max")
    numbers = {
        "dropped": side.dropped,
        "stop the training": side.stops,
        "not shown whole": side.lossy,
        "cut": side.cut_rows,
        "turns cut off": side.cut_turns,
        "several sequences": side.split,
        "several windows": side.windows,
        **side.left_out,
    }
    return {
        "rows" if has_chats else "documents": f"{side.rows:,}",
        "sequences" if has_chats else "windows": f"{len(side.lengths):,}",
        "tokens": f"{side.tokens:,}",
        "trained": f"{side.trained_tokens:,}{share}",
        **{f"{name} length": f"{found[name]:,}" if found else "" for name in names},
        **{name: f"{value:,}" for name, value in numbers.items()},
    }


def is_mixed(shares: Mapping[str, Share]) -> bool:
    """Whether an epoch is anything but every row of one source once."""
    return len(shares) > 1 or any(share.epoch != share.rows for share in shares.values())


def mixture(shares: Mapping[str, Share]) -> Table:
    """What an epoch sees of each source."""
    table = _table(["rows", "times", "an epoch", "share", "tokens", "share of tokens"])
    rows = sum(share.rows for share in shares.values())
    epoch = sum(share.epoch for share in shares.values())
    tokens = sum(share.tokens for share in shares.values())
    for name, share in shares.items():
        of_rows, of_tokens = share.epoch / max(epoch, 1), share.tokens / max(tokens, 1)
        numbers = (f"{share.rows:,}", f"{share.repeats:.3g}", f"{share.epoch:,}", f"{of_rows:.1%}")
        table.add_row(name, *numbers, f"{share.tokens:,}", f"{of_tokens:.1%}")
    table.add_row("all", f"{rows:,}", "", f"{epoch:,}", "", f"{tokens:,}", "")
    return table


def show_lengths(console: Console, side: Side) -> None:
    """Print how long the sequences of a side are."""
    bars = histogram(side.lengths.tolist())
    if not bars:
        return
    console.print(Text("\nlengths of the train sequences, in tokens", style="bold"))
    most = max(count for *_, count in bars)
    names = [f"{start:,}–{end - 1:,}" if end else f"{start:,} or more" for start, end, _ in bars]
    width = max(map(len, names))
    for name, (*_, count) in zip(names, bars, strict=True):
        bar = "█" * max(round(_BAR * count / most), count > 0)
        line = Text(f"  {name:>{width}}  ").append(f"{bar:<{_BAR}}", style="#4caf57")
        console.print(line.append(f"  {count:,}"), soft_wrap=True)
