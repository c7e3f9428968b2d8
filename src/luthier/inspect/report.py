"""What the check found, as tables for people."""

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from luthier.inspect import report_data, report_tables
from luthier.inspect.account import Account, Finding
from luthier.inspect.report_data import rows
from luthier.inspect.rules import Rule, RuleExample
from luthier.inspect.survey import Survey

_WIDTH = 4
"""Sides that stand beside each other in one table."""
_FATES = {
    "stops": "stops the training",
    "dropped": "dropped",
    "lossy": "trains, but is not shown whole",
    "cut": "cut",
    "windows": "cut into windows",
    "split": "several sequences",
}
_HARMLESS = ("windows", "split")
"""Fates of which one example is enough."""


def show(survey: Survey, console: Console | None = None) -> None:
    """Print what the sources are, what they make, what was found, and the rules."""
    console = console or Console(highlight=False)
    title = f"{survey.material.name}: the whole dataset"
    if survey.limit is not None:
        title = f"{survey.material.name}: the first {survey.limit:,} rows of each source"
    console.print(Text(title, style="bold"))
    _show_lines(console, "sources", report_data.sources(survey))
    sides = survey.whole.sides
    for start in range(0, len(sides), _WIDTH):
        console.print()
        console.print(report_tables.counts(sides[start : start + _WIDTH], survey.looks_at_chats))
    mix, shares = survey.material.config.dataset.mix, survey.whole.mixture
    if report_tables.is_mixed(shares):
        console.print(Text(f"\nmixture of an epoch (dataset.mix={mix})", style="bold"))
        console.print(report_tables.mixture(shares))
    _show_lines(console, "equal rows", report_data.duplicates(survey))
    _show_lines(console, "evaluation", report_data.held_out(survey))
    report_tables.show_lengths(console, survey.train)
    if survey.batches is not None:
        lines = report_data.batches(survey.batches)
        _show_lines(console, "batches of an epoch, on one device", lines)
    for account in survey.accounts:
        for finding in sorted(account.findings.values(), key=lambda f: list(_FATES).index(f.fate)):
            _show_finding(console, account, finding)
    _show_boundaries(console, survey)
    console.print(Text("\nrules", style="bold"))
    for rule in survey.rules:
        show_rule(console, rule, _remark(survey, rule))
    _show_end(console, survey)


def _show_lines(console: Console, head: str, lines: Iterable[str]) -> None:
    """Print a section, if there is anything in it."""
    for number, line in enumerate(lines):
        if not number:
            console.print(Text(f"\n{head}", style="bold"))
        dim = "dim" if line.startswith("  ") else ""
        console.print(Text(f"  {line}", style=dim), soft_wrap=True)


def _show_finding(console: Console, account: Account, finding: Finding) -> None:
    of = f"{rows(finding.rows)} of {account.opened.key}"
    head = f"\n{_FATES[finding.fate]}: {of}, {finding.reason}"
    console.print(Text(head, style="bold"), soft_wrap=True)
    shown = finding.examples[: 1 if finding.fate in _HARMLESS else None]
    for example in shown:
        show_example(console, example)
    if finding.rows > len(shown):
        console.print(f"  ... and {finding.rows - len(shown):,} more")


def show_example(console: Console, example: RuleExample) -> None:
    """Print a place, what is to be seen there, and its tokens."""
    console.print(Text(f"  {example.place}: {example.words}"), soft_wrap=True)
    width = max(map(len, example.tokens), default=0)
    for name, shown in example.tokens.items():
        console.print(Text(f"    {name:<{width}}  {shown}", style="dim"), soft_wrap=True)


def _show_boundaries(console: Console, survey: Survey) -> None:
    found, sample = survey.comparison.boundaries, _of_all(survey)
    if not found.rows:
        return
    other = "segments" if found.chosen == "served" else "served"
    console.print(Text("\nboundaries", style="bold"))
    if not found.differ:
        words = f"  served and segments give the same tokens in all {found.rows:,} rows"
        console.print(f"{words}{sample}", soft_wrap=True)
        return
    console.print(
        f"  chosen: {found.chosen}; {other} gives other tokens in {found.differ:,} of "
        f"{found.rows:,} rows{sample}. The first:",
        soft_wrap=True,
    )
    if found.first is not None:
        show_example(console, found.first)


def show_rule(console: Console, rule: Rule, remark: str) -> None:
    """Print a rule, how often it was checked, and the first places where it breaks."""
    sign, style = ("✗", "bold red") if rule.broken else ("✓", "green")
    count = f"{rule.checked:,} {rule.unit}"
    if rule.broken:
        count = f"{rule.broken:,} of {count} break it"
    line = Text("  ").append(sign, style=style).append(f" {rule.text:<42}  {count}")
    console.print(line.append(remark, style="dim"), soft_wrap=True)
    for example in rule.examples:
        show_example(console, example)


def _remark(survey: Survey, rule: Rule) -> str:
    """How much of the dataset a rule was held against, where it was not all of it."""
    return _of_all(survey) if rule is survey.comparison.prompts else ""


def _of_all(survey: Survey) -> str:
    """The words for a sample; none where all rows were compared."""
    compared, of = survey.comparison.boundaries.rows, survey.comparison.of
    return "" if compared == of else f", a sample: {compared:,} of {of:,} rows"


def _show_end(console: Console, survey: Survey) -> None:
    prompts = survey.comparison.prompts
    if survey.looks_at_chats and survey.comparison.boundaries.chosen == "segments":
        console.print(
            f"\nWith boundaries=segments the model must be served from token ids: "
            f"{prompts.broken:,} of {prompts.checked:,} prompts differ from those of "
            "apply_chat_template.",
            soft_wrap=True,
        )
    if survey.error is not None:
        words = f"\nTraining stops: {survey.error}"
        console.print(Text(words, style="bold red"), soft_wrap=True)
    if not len(survey.train.lengths):
        console.print("\nThere is nothing to train on.", style="bold red")
        return
    broken = sum(rule.broken > 0 for rule in survey.rules)
    words = "every rule holds" if not broken else f"{broken} of {len(survey.rules)} rules break"
    console.print(Text(f"\n{words}", style="bold red" if broken else "bold green"))
