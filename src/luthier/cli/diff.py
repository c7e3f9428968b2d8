"""`luthier diff RUN RUN`: what differs between two runs, group by group."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from luthier.cli.arguments import CommandLine
from luthier.config.renamed_settings import read_recorded_config
from luthier.record.config_diff import NEUTRAL_KEYS, differing_keys, flatten_config
from luthier.record.record import read_metrics, read_record
from luthier.record.run_dir import find_run
from luthier.storage.typed_files import has_entry
from luthier.terminal import make_console

COMMAND_LINE = CommandLine(
    "diff",
    "luthier diff RUN RUN\n\nSays what differs between two runs: their config, data, versions, "
    "hardware, launch, code\nand results. Ends with 0 where nothing does, and with 1 where "
    "something does, as diff has it.",
    (),
    "  luthier diff runs/quickstart/default runs/quickstart/r-8-d7702c\n",
)
Lines = list[tuple[str, str, str]]
"""What differs: its name, and both values."""
_CODE = ("commit", "dirty", "diff")
# A key that one record lacks and the other holds as null is no difference between two runs: older
# versions did not write it.
_NOTHING = ("(absent)", "None")


def run(arguments: list[str]) -> int:
    """Print what differs. Raises UserError where a run is not there."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    from luthier.errors import UserError

    typed = COMMAND_LINE.parse(arguments).overrides
    if len(typed) != 2:
        raise UserError("`luthier diff` needs two runs: luthier diff runs/A/default runs/B/default")
    a, b = map(find_run, typed)
    groups = compare(a, b)
    print_groups(groups, a, b)
    # As with diff(1): 0 where both are the same, 1 where something differs.
    return int(any(lines for _, lines in groups))


def compare(a: Path, b: Path) -> list[tuple[str, Lines]]:
    """Return what differs between two runs, in groups; a group that is the same has no lines."""
    record_a, other = read_record(a), read_record(b)

    def of(*names: str) -> Lines:
        selected = [{name: record.get(name) for name in names} for record in (record_a, other)]
        return _lines(*selected)

    return [
        ("config", _config(a, b)),
        ("data and model", of("data", "tokenizer", "model", "teacher", "rewards")),
        ("versions", of("versions")),
        ("hardware", of("hardware")),
        ("launch", of("launch")),
        ("code", _code(record_a, other)),
        ("results", [*of("results"), *first_step(a, b)]),
    ]


def print_groups(groups: Iterable[tuple[str, Lines]], a: Path, b: Path) -> None:
    """Print the groups that differ, and name those that do not."""
    from rich.markup import escape

    console = make_console()
    console.print(f"{escape(str(a))} -> {escape(str(b))}", soft_wrap=True)
    for heading, lines in groups:
        if lines:
            console.print(f"\n[bold]{heading}[/bold]")
        for name, value, other in lines:
            console.print(f"  {escape(f'{name}: {value} -> {other}')}", soft_wrap=True)
    same = [heading for heading, lines in groups if not lines]
    if same:
        console.print(f"\nthe same: {', '.join(same)}")


def _lines(values: dict[str, Any], other: dict[str, Any]) -> Lines:
    differences = ((key, str(a), str(b)) for key, a, b in differing_keys(values, other))
    return [
        (key.partition(".")[2] or key, a, b)
        for key, a, b in differences
        if a not in _NOTHING or b not in _NOTHING
    ]


def _config(a: Path, b: Path) -> Lines:
    configs = []
    for folder in (a, b):
        path = folder / "config.yaml"
        resolved = read_recorded_config(path) if has_entry(path) else {}
        # Neutral keys, such as output_dir, differ between any two runs and change no number.
        configs.append({key: value for key, value in resolved.items() if key not in NEUTRAL_KEYS})
    return [(key, str(old), str(other)) for key, old, other in differing_keys(*configs)]


def _code(values: dict[str, Any], other: dict[str, Any]) -> Lines:
    """Return the commits that differ, and changes on top of them that do."""
    states = [flatten_config(record.get("git") or {}) for record in (values, other)]
    names = sorted({name for state in states for name in state if name.endswith(_CODE)})
    pairs = ((name, *(str(state.get(name)) for state in states)) for name in names)
    return [(name, a, b) for name, a, b in pairs if a != b]


TIMES = ("_runtime", "_per_second", "_time", "memory_gib")
"""The endings of metrics of seconds and memory, which differ from run to run."""


def steps(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics without what is measured of the machine."""
    return [
        {k: v for k, v in row.items() if not k.endswith(TIMES) and "/time" not in k}
        for row in read_metrics(folder)
    ]


def first_step(a: Path, b: Path) -> Lines:
    """Return the first metric of the first step in which the two differ; no line if none does."""
    ours, theirs = steps(a), steps(b)
    # The shorter of the two ends the comparison of rows; a different number of rows is its own
    # difference, reported below.
    for metrics, other in zip(ours, theirs, strict=False):
        for key in sorted(metrics.keys() | other.keys()):
            value, their_value = metrics.get(key), other.get(key)
            # A loss that became NaN in both is the same: NaN is the one value unequal to itself.
            both_nan = value != value and their_value != their_value
            if value != their_value and not both_nan:
                where = f"first difference, at step {metrics['step']}: {key}"
                return [(where, str(value), str(their_value))]
    if len(ours) != len(theirs):
        return [("lines of metrics", str(len(ours)), str(len(theirs)))]
    return []
