"""What the check found, as tables for people."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.inspect.lengths import histogram, quantiles
from luthier.inspect.rules import Example, Rule
from luthier.inspect.survey import Boundaries, Finding, Side, Survey

_BAR = 36
_FATES = {
    "stops": "stops the training",
    "dropped": "dropped",
    "lossy": "trains, but is not shown whole",
    "cut": "cut",
    "split": "several sequences",
}


def show(survey: Survey, console: Console | None = None) -> None:
    """Print the counts, the lengths, what was found, and the rules."""
    console = console or Console(highlight=False)
    title = f"{survey.material.name}: the whole dataset"
    if survey.limit is not None:
        title = f"{survey.material.name}: the first {survey.limit:,} rows of each side"
    console.print(Text(title, style="bold"))
    console.print(_counts(survey.sides))
    _show_lengths(console, survey.sides["train"])
    for name, side in survey.sides.items():
        for finding in sorted(side.findings.values(), key=lambda f: list(_FATES).index(f.fate)):
            _show_finding(console, name, finding)
    _show_boundaries(console, survey.boundaries)
    console.print(Text("\nrules", style="bold"))
    for rule in survey.rules:
        _show_rule(console, rule, _remark(survey, rule))
    _show_end(console, survey)


def _counts(sides: dict[str, Side]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    columns = [_column(side) for side in sides.values()]
    for name in sides:
        table.add_column(name, justify="right")
    for label in columns[0]:
        cells = [column[label] for column in columns]
        # Rows of noughts say nothing, but for what one looks for first.
        if label in ("rows", "sequences", "tokens", "dropped") or any(c != "0" for c in cells):
            table.add_row(label, *cells)
    return table


def _column(side: Side) -> dict[str, str]:
    tokens = sum(side.lengths)
    share = f" ({side.trained_tokens / tokens:.0%})" if tokens else ""
    found = quantiles(side.lengths)
    lengths = {f"{name} length": f"{value:,}" for name, value in found.items()}
    if not found:
        lengths = {f"{name} length": "" for name in ("min", "median", "p90", "p99", "max")}
    numbers = {
        "dropped": side.dropped,
        "stop the training": side.stops,
        "not shown whole": side.lossy,
        "cut": side.cut_rows,
        "turns cut off": side.cut_turns,
        "several sequences": side.split,
        "equal to a held-out row": side.equal,
    }
    return {
        "rows": f"{side.rows:,}",
        "sequences": f"{len(side.lengths):,}",
        "tokens": f"{tokens:,}",
        "trained": f"{side.trained_tokens:,}{share}",
        **lengths,
        **{name: f"{value:,}" for name, value in numbers.items()},
    }


def _show_lengths(console: Console, side: Side) -> None:
    rows = histogram(side.lengths)
    if not rows:
        return
    console.print(Text("\nlengths of the train sequences, in tokens", style="bold"))
    most = max(count for *_, count in rows)
    names = [f"{start:,}–{end - 1:,}" if end else f"{start:,} or more" for start, end, _ in rows]
    width = max(map(len, names))
    for name, (*_, count) in zip(names, rows, strict=True):
        bar = "█" * max(round(_BAR * count / most), count > 0)
        line = Text(f"  {name:>{width}}  ").append(f"{bar:<{_BAR}}", style="#4caf57")
        console.print(line.append(f"  {count:,}"), soft_wrap=True)


def _show_finding(console: Console, side: str, finding: Finding) -> None:
    rows = "row" if finding.rows == 1 else "rows"
    head = f"\n{_FATES[finding.fate]}: {finding.rows:,} {side} {rows}, {finding.reason}"
    console.print(Text(head, style="bold"), soft_wrap=True)
    for example in finding.examples:
        _show_example(console, example)
    if finding.rows > len(finding.examples):
        console.print(f"  ... and {finding.rows - len(finding.examples):,} more")


def _show_example(console: Console, example: Example) -> None:
    console.print(Text(f"  {example.place}: {example.words}"), soft_wrap=True)
    width = max(map(len, example.tokens), default=0)
    for name, shown in example.tokens.items():
        console.print(Text(f"    {name:<{width}}  {shown}", style="dim"), soft_wrap=True)


def _show_boundaries(console: Console, found: Boundaries) -> None:
    other = "segments" if found.chosen == "served" else "served"
    console.print(Text("\nboundaries", style="bold"))
    if not found.differ:
        console.print(f"  served and segments give the same tokens in all {found.rows:,} rows")
        return
    console.print(
        f"  chosen: {found.chosen}; {other} gives other tokens in {found.differ:,} of "
        f"{found.rows:,} rows. The first:",
        soft_wrap=True,
    )
    if found.first is not None:
        _show_example(console, found.first)


def _show_rule(console: Console, rule: Rule, remark: str) -> None:
    sign, style = ("✗", "bold red") if rule.broken else ("✓", "green")
    count = f"{rule.checked:,} {rule.unit}"
    if rule.broken:
        count = f"{rule.broken:,} of {count} break it"
    line = Text("  ").append(sign, style=style).append(f" {rule.text:<42}  {count}")
    console.print(line.append(remark, style="dim"), soft_wrap=True)
    for example in rule.examples:
        _show_example(console, example)


def _remark(survey: Survey, rule: Rule) -> str:
    """How much of the dataset a rule was held against, where it was not all of it."""
    if rule is not survey.prompts or survey.every == 1:
        return ""
    return f", a sample: one row in {survey.every:,} ({survey.compared_rows:,} rows)"


def _show_end(console: Console, survey: Survey) -> None:
    if survey.boundaries.chosen == "segments":
        prompts = survey.prompts
        console.print(
            f"\nWith boundaries=segments the model must be served from token ids: "
            f"{prompts.broken:,} of {prompts.checked:,} prompts differ from those of "
            "apply_chat_template.",
            soft_wrap=True,
        )
    if not survey.sides["train"].lengths:
        console.print("\nThere is nothing to train on.", style="bold red")
        return
    broken = sum(rule.broken > 0 for rule in survey.rules)
    words = "every rule holds" if not broken else f"{broken} of {len(survey.rules)} rules break"
    console.print(Text(f"\n{words}", style="bold red" if broken else "bold green"))
