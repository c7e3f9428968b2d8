"""What a check finds, as tables for people and as JSON values for machines."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.config.methods import EXAMPLE_TYPES
from luthier.inspection.batch_fill import BatchFill, BatchLayout, can_pack, histogram, quantiles
from luthier.inspection.readers import shorten_location
from luthier.inspection.rules import Rule, RuleExample
from luthier.inspection.statistics import (
    DuplicateRows,
    Finding,
    HeldOutOverlap,
    RowOutcomes,
    SourceShare,
    SplitStats,
    describe_hold_out,
)
from luthier.inspection.survey import Survey
from luthier.model.tokenizer import describe_padding
from luthier.terminal import make_console, pluralize, print_table

_EQUAL = {
    "exact": "equal to an earlier row",
    "normalised": "different from an earlier row in case, white space or Unicode form only",
}
Lines = Iterator[str]
"""Lines of a section; one that is set in by two more spaces belongs to the line before it."""


def source_lines(survey: Survey) -> Lines:
    """Where the rows are from, what they look like, and what is not read of them."""
    stops = survey.material.config.dataset.on_bad_row == "error"
    for account in survey.accounts:
        yield from _source_values(account, stops, survey.unread_keys(account))


def _source_values(account: RowOutcomes, stops: bool, keys: Mapping[str, int]) -> Lines:
    opened = account.opened
    config, row_format = opened.config, opened.row_format
    label = shorten_location(opened.source.label)
    images = pluralize(len(account.different_images), "different image")
    yield (
        f"{opened.key}: {label}, type {row_format.type}, {pluralize(len(account), 'row')}"
        f"{f', {images}' if account.different_images else ''}"
    )
    if row_format.unused:
        yield f"  columns that are not read: {', '.join(row_format.unused)}"
    if keys:
        counts = ", ".join(f"{name} ({pluralize(count, 'row')})" for name, count in keys.items())
        yield f"  keys of messages that are not read: {counts}"
    if config.map is not None:
        left_out, read_rows = opened.source.left_out
        yield f"  map {config.map} leaves out {left_out:,} of {pluralize(read_rows, 'row')}"
    if config.filter is not None:
        yield f"  filter {config.filter} leaves out {pluralize(account.bad.filtered, 'row')}"
    if config.train_on is not None:
        yield f"  train_on {config.train_on}"
    if account.bad.rows:
        yield f"  cannot be read, {'stops the training' if stops else 'dropped'}: " + pluralize(
            len(account.bad.rows), "row"
        )


def duplicate_lines(survey: Survey) -> Lines:
    """Training rows that equal an earlier one."""
    equal, setting = survey.summary.equals(), survey.material.config.dataset.deduplicate
    if not equal["exact"].rows and not equal["normalised"].rows:
        yield "no training row equals another one"
        return
    left_out = {"none": (), "exact": ("exact",), "normalised": ("exact", "normalised")}[setting]
    for equality, description in _EQUAL.items():
        if equal[equality].rows:
            outcome = "left out" if equality in left_out else "kept"
            head = f"{description}: {pluralize(equal[equality].rows, 'row')}, {outcome}"
            yield from _equals(equal[equality], f"{head} (dataset.deduplicate={setting})")


def _equals(duplicates: DuplicateRows, head: str) -> Lines:
    yield head
    for example in duplicates.examples:
        yield f"  {example.place} {example.words}"
    if duplicates.rows > len(duplicates.examples):
        yield f"  ... and {duplicates.rows - len(duplicates.examples):,} more"


def held_out_lines(survey: Survey) -> Lines:
    """How rows are held out, and what training shares with them."""
    config = survey.material.config
    if how := describe_hold_out(config.dataset.eval, config.seed):
        yield how
    for name, overlap in survey.summary.overlaps().items():
        yield f"{name}: {pluralize(overlap.rows, 'row')}{_overlap(overlap)}"


def _overlap(overlap: HeldOutOverlap) -> str:
    description = ""
    if overlap.equal:
        rows = pluralize(overlap.equal, "row")
        description += f"; left out of training because they equal one of them: {rows}"
    if overlap.similar:
        description += (
            f"; train although they differ from one of them in case, white space or Unicode form "
            f"only: {pluralize(overlap.similar, 'row')}"
        )
    return description or "; no training row equals one of them"


_MOST_LABELS = 20


def label_lines(survey: Survey) -> Lines:
    """How often each verdict, class or tag trains, in each source."""
    for account in survey.accounts:
        total = sum(account.labels.values())
        if not total:
            continue
        yield f"{account.opened.key}: {pluralize(len(account.labels), 'different label')}"
        for label, count in account.labels.most_common(_MOST_LABELS):
            yield f"  {label}: {count:,} ({count / total:.1%})"
        if len(account.labels) > _MOST_LABELS:
            yield f"  ... and {pluralize(len(account.labels) - _MOST_LABELS, 'more label')}"


def missing_rule_lines(survey: Survey) -> Lines:
    """Which rules say nothing of these rows, and why."""
    types = dict.fromkeys(account.opened.row_format.example_type for account in survey.accounts)
    if not survey.looks_at_chats:
        rows = " and ".join(EXAMPLE_TYPES[example_type] for example_type in types)
        yield f"BOS, stop tokens and prompts are checked in conversations; these rows are {rows}."
    elif survey.method.task == "SEQ_CLS":
        yield (
            "Labels and stop tokens are not checked: the score of a whole conversation trains, "
            "and none of its tokens."
        )


def batch_lines(fill: BatchFill, can_pack: bool = True) -> Lines:
    """How full the batches of an epoch are on one device: as configured, and the other way."""
    padded, packed = _padded(fill.padded, fill.strategy), _packed(fill.packed)
    if fill.packing:
        yield packed
        yield f"  without trainer.args.packing: {padded}"
    else:
        yield padded
        if can_pack:
            yield f"  with trainer.args.packing=true: {packed}"


def _packed(layout: BatchLayout | None) -> str:
    if layout is None:
        return "packing needs chat.max_length"
    return (
        f"{pluralize(layout.rows, 'row')} of {layout.length:,} tokens, {layout.efficiency:.1%} full"
    )


def _padded(layout: BatchLayout, strategy: str) -> str:
    width = "the longest" if layout.length is None else f"{layout.length:,} tokens"
    order = ", grouped by length" if strategy == "group_by_length" else ""
    rows = pluralize(layout.rows, "row")
    return (
        f"{rows}, {layout.batch_size} in a batch{order}, padded to {width}: "
        f"{1 - layout.efficiency:.1%} of tokens are padding"
    )


def token_lines(survey: Survey) -> Lines:
    """What the tokenizer is, and how it pads."""
    tokenizer = survey.material.tokenizer
    yield f"{len(tokenizer):,} tokens; {describe_padding(tokenizer)}"


def warning_lines(survey: Survey) -> Lines:
    """What usually ruins such a training, each with the overrides that mend it."""
    for warning in survey.warnings:
        yield f"{warning.key}: {warning.text}"
        if warning.fix:
            yield f"  {warning.fix}"


_BAR = 36
_ALWAYS = ("rows", "sequences", "documents", "windows", "tokens", "dropped")
"""What one looks for first: it is shown even where it is nought."""


def _table(columns: Iterable[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def split_table(
    sides: list[SplitStats], is_documents: bool = False, trained_values: str = ""
) -> Table:
    """What each side makes.

    `is_documents`: all of it is plain text. `trained_values`: what trains in place of tokens.
    """
    table = _table(side.name for side in sides)
    columns = [_column(side, is_documents, trained_values) for side in sides]
    for label in dict.fromkeys(label for column in columns for label in column):
        cells = [column.get(label, "0") for column in columns]
        if label in _ALWAYS or any(cell != "0" for cell in cells):
            table.add_row(label, *cells)
    return table


def _column(side: SplitStats, is_documents: bool, trained_values: str) -> dict[str, str]:
    share = f" ({side.trained_tokens / side.tokens:.0%})" if side.tokens else ""
    images_share = f" ({side.image_tokens / side.tokens:.0%})" if side.image_tokens else ""
    lengths = quantiles(side.lengths)
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
        "documents" if is_documents else "rows": f"{side.rows:,}",
        "windows" if is_documents else "sequences": f"{len(side.lengths):,}",
        "tokens": f"{side.tokens:,}",
        trained_values or "trained": f"{side.trained_tokens:,}{'' if trained_values else share}",
        "images": f"{side.images:,}",
        "tokens of images": f"{side.image_tokens:,}{images_share}",
        **{f"{name} length": f"{lengths[name]:,}" if lengths else "" for name in names},
        **{name: f"{value:,}" for name, value in numbers.items()},
    }


def is_mixed(shares: Mapping[str, SourceShare]) -> bool:
    """Whether an epoch is anything but every row of one source once."""
    return len(shares) > 1 or any(share.epoch != share.rows for share in shares.values())


def mixture_table(shares: Mapping[str, SourceShare]) -> Table:
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


def print_lengths(console: Console, side: SplitStats) -> None:
    """Print how long the sequences of a side are."""
    bars = histogram(side.lengths)
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


_WIDTH = 4
"""Sides that stand beside each other in one table."""
_OUTCOMES = {
    "stops": "stops the training",
    "dropped": "dropped",
    "lossy": "trained, but not all of its text is shown",
    "tied": "trained without a preference",
    "cut": "cut",
    "windows": "cut into windows",
    "split": "several sequences",
}
_HARMLESS = ("windows", "split")
"""Outcomes of which one example is enough."""


def print_report(survey: Survey) -> None:
    """Print what the sources are, what they make, what was found, and the rules."""
    console = make_console()
    title = f"{survey.material.name}: the whole dataset"
    if survey.limit is not None:
        title = f"{survey.material.name}: the first {survey.limit:,} rows of each source"
    console.print(Text(title, style="bold"))
    _show_lines(console, "sources", source_lines(survey))
    sides = survey.summary.sides
    for start in range(0, len(sides), _WIDTH):
        console.print()
        columns = sides[start : start + _WIDTH]
        values = survey.method.trained_values if survey.train.trained_tokens else ""
        print_table(console, split_table(columns, survey.reads_documents, values))
    mix, shares = survey.material.config.dataset.mix, survey.summary.mixture
    if is_mixed(shares):
        console.print(Text(f"\nmixture of an epoch (dataset.mix={mix})", style="bold"))
        print_table(console, mixture_table(shares))
    _show_lines(console, "labels", label_lines(survey))
    _show_lines(console, "equal rows", duplicate_lines(survey))
    _show_lines(console, "evaluation", held_out_lines(survey))
    print_lengths(console, survey.train)
    if survey.batches is not None:
        lines = batch_lines(survey.batches, can_pack(survey.material.config))
        _show_lines(console, "batches of an epoch, on one device", lines)
    for account in survey.accounts:
        for finding in sorted(
            account.findings.values(), key=lambda f: list(_OUTCOMES).index(f.outcome)
        ):
            _show_finding(console, account, finding)
    _show_boundaries(console, survey)
    _show_lines(console, "tokenizer", token_lines(survey))
    _show_lines(console, "warnings", warning_lines(survey))
    console.print(Text("\nrules", style="bold"))
    for rule in survey.rules:
        print_rule(console, rule, _remark(survey, rule))
    for line in missing_rule_lines(survey):
        console.print(Text(f"  {line}", style="dim"), soft_wrap=True)
    _show_end(console, survey)


def _show_lines(console: Console, head: str, lines: Iterable[str]) -> None:
    """Print a section, if there is anything in it."""
    for number, line in enumerate(lines):
        if not number:
            console.print(Text(f"\n{head}", style="bold"))
        dim = "dim" if line.startswith("  ") else ""
        console.print(Text(f"  {line}", style=dim), soft_wrap=True)


def _show_finding(console: Console, account: RowOutcomes, finding: Finding) -> None:
    of = f"{pluralize(finding.rows, 'row')} of {account.opened.key}"
    head = f"\n{_OUTCOMES[finding.outcome]}: {of}, {finding.reason}"
    console.print(Text(head, style="bold"), soft_wrap=True)
    examples = finding.examples[: 1 if finding.outcome in _HARMLESS else None]
    for example in examples:
        print_example(console, example)
    if finding.rows > len(examples):
        console.print(f"  ... and {finding.rows - len(examples):,} more")


def print_example(console: Console, example: RuleExample) -> None:
    """Print a place, what is to be seen there, and its tokens."""
    console.print(Text(f"  {example.place}: {example.words}"), soft_wrap=True)
    width = max(map(len, example.tokens), default=0)
    for name, tokens in example.tokens.items():
        console.print(Text(f"    {name:<{width}}  {tokens}", style="dim"), soft_wrap=True)


def _show_boundaries(console: Console, survey: Survey) -> None:
    boundaries, sample = survey.comparison.boundaries, _of_all(survey)
    if not boundaries.rows:
        return
    other = "segments" if boundaries.chosen == "served" else "served"
    console.print(Text("\nboundaries", style="bold"))
    if not boundaries.differ:
        count = f"{boundaries.rows:,} {boundaries.unit}"
        line = f"  served and segments give the same tokens in all {count}"
        console.print(f"{line}{sample}", soft_wrap=True)
        return
    console.print(
        f"  chosen: {boundaries.chosen}; {other} gives other tokens in {boundaries.differ:,} of "
        f"{boundaries.rows:,} {boundaries.unit}{sample}. The first:",
        soft_wrap=True,
    )
    if boundaries.first is not None:
        print_example(console, boundaries.first)


def print_rule(console: Console, rule: Rule, remark: str) -> None:
    """Print a rule, how often it was checked, and the first places where it breaks."""
    sign, style = ("✗", "bold red") if rule.broken else ("✓", "green")
    unit = rule.unit
    if rule.checked == 1:
        unit = "reply" if unit == "replies" else unit.removesuffix("s")
    count = f"{rule.checked:,} {unit}"
    if rule.broken:
        count = f"{rule.broken:,} of {count} break the rule"
    line = Text("  ").append(sign, style=style).append(f" {rule.text:<42}  {count}")
    console.print(line.append(remark, style="dim"), soft_wrap=True)
    for example in rule.examples:
        print_example(console, example)


def _remark(survey: Survey, rule: Rule) -> str:
    """How much of the dataset a rule was held against, where it was not all of it."""
    return _of_all(survey) if rule is survey.comparison.prompts else ""


def _of_all(survey: Survey) -> str:
    """The words for a sample; none where all rows were compared."""
    compared, of = survey.comparison.boundaries.rows, survey.comparison.of
    unit = survey.comparison.boundaries.unit
    return "" if compared == of else f", a sample: {compared:,} of {of:,} {unit}"


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
        line = f"\nTraining stops: {survey.error}"
        console.print(Text(line, style="bold red"), soft_wrap=True)
    if not len(survey.train.lengths):
        console.print("\nThere is nothing to train on.", style="bold red")
        return
    broken = sum(rule.broken > 0 for rule in survey.rules)
    are = "is" if broken == 1 else "are"
    line = f"{broken} of {len(survey.rules)} rules {are} broken" if broken else "every rule holds"
    if count := len(survey.warnings):
        line += f"; {pluralize(count, 'warning')}"
    console.print(Text(f"\n{line}", style="bold red" if broken else "bold green"))


def report_as_json(survey: Survey) -> dict[str, Any]:
    """The survey as plain values."""
    comparison = survey.comparison
    main = [side for side in survey.summary.sides if side.name in ("train", "held out")]
    sets = [side for side in survey.summary.sides if side not in main]
    return {
        "name": survey.material.name,
        "holds": survey.holds,
        "error": survey.error,
        "limit": survey.limit,
        "sources": {
            account.opened.key: _source_sentence(account)
            | {"unread_keys": survey.unread_keys(account)}
            for account in survey.accounts
        },
        "mixture": _mixture(survey),
        "duplicates": _duplicates(survey),
        "held_out": _held_out(survey),
        "sides": {side.name.replace(" ", "_"): _side(side) for side in main},
        "sets": {side.name: _side(side) for side in sets},
        "batches": asdict(survey.batches) if survey.batches is not None else None,
        "padding": describe_padding(survey.material.tokenizer),
        "warnings": [warning._asdict() for warning in survey.warnings],
        "rules": [asdict(rule) for rule in survey.rules],
        "prompts": {
            "compared_rows": comparison.boundaries.rows,
            "of_rows": comparison.of,
            "turns": comparison.prompts.checked,
            "differ": comparison.prompts.broken,
        },
        "boundaries": asdict(comparison.boundaries),
    }


def _source_sentence(account: RowOutcomes) -> dict[str, Any]:
    opened = account.opened
    return {
        "label": opened.source.label,
        "type": opened.row_format.type,
        "kind": opened.row_format.example_type,
        "rows": len(account),
        "unused_columns": list(opened.row_format.unused),
        "map": opened.config.map,
        "left_out_by_map": opened.source.left_out[0],
        "filter": opened.config.filter,
        "filtered_out": account.bad.filtered,
        "bad_rows": len(account.bad.rows),
        "different_images": len(account.different_images),
        "train_on": opened.config.train_on,
        "labels": dict(account.labels.most_common()),
        "findings": [_finding_values(finding) for finding in account.findings.values()],
    }


def _finding_values(finding: Finding) -> dict[str, Any]:
    values = asdict(finding)
    return {"fate": values.pop("outcome"), **values}


def _mixture(survey: Survey) -> dict[str, Any]:
    shares = survey.summary.mixture
    total = sum(share.epoch for share in shares.values())
    return {
        "mix": survey.material.config.dataset.mix,
        "rows": total,
        "sources": {
            name: {
                **asdict(share),
                "repeats": round(share.repeats, 4),
                "share": round(share.epoch / total, 4) if total else None,
            }
            for name, share in shares.items()
        },
    }


def _duplicates(survey: Survey) -> dict[str, Any]:
    equal = {name: asdict(equal) for name, equal in survey.summary.equals().items()}
    return {
        "deduplicate": survey.material.config.dataset.deduplicate,
        "left_out": survey.train.left_out.get("duplicate", 0),
        **equal,
    }


def _held_out(survey: Survey) -> dict[str, Any]:
    config = survey.material.config
    return {
        "how": describe_hold_out(config.dataset.eval, config.seed) or None,
        "sets": {name: asdict(found) for name, found in survey.summary.overlaps().items()},
    }


def _side(side: SplitStats) -> dict[str, Any]:
    counts = {name: value for name, value in vars(side).items() if name not in ("name", "lengths")}
    lengths = side.lengths.tolist()
    return {
        **counts,
        "sequences": len(lengths),
        "tokens": side.tokens,
        "trained_share": round(side.trained_tokens / side.tokens, 4) if side.tokens else None,
        "lengths": quantiles(lengths),
        "histogram": [
            {"from": start, "below": end, "sequences": count}
            for start, end, count in histogram(lengths)
        ],
    }
