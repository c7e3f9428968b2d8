"""A machine and the tests of its paths as tables in the terminal, 80 columns wide."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.doctor.path_tests import PathResult
from luthier.memory.workload import MIB
from luthier.terminal import make_console, print_table

_STYLES = {"right": "green", "wrong": "bold red", "not here": "dim"}
_TITLES = {
    "machine": "Machine",
    "gpus": "GPUs",
    "torch": "torch",
    "kernels": "Kernels",
    "folders": "Folders",
    "hub": "Hugging Face hub",
    "choice": "What luthier would choose",
}


def print_machine(facts: dict[str, Any], console: Console | None = None) -> None:
    """Print every section of the facts, the versions last but one."""
    console = console or make_console()
    for section, title in _TITLES.items():
        if section == "choice":
            _print_versions(console, facts["versions"])
        console.print(Text(title, style="bold"))
        console.print(_facts_table(facts[section] or {"": "none"}))
        console.print()


def _facts_table(facts: dict[str, Any]) -> Table:
    """Return a table with a name and a value in each row."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=20, no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        label, text = _label_and_text(name, value)
        table.add_row(Text(f"  {label}"), Text(text))
    return table


_UNITS = {"_gib": "GiB", "_billions": "B parameters"}


def _label_and_text(name: str, value: Any) -> tuple[str, str]:
    """Return the label of a fact and its value in words, with its unit."""
    ending = next((ending for ending in _UNITS if name.endswith(ending)), "")
    unit = f" {_UNITS[ending]}" if ending else ""
    label = name.removesuffix(ending).replace("_", " ")
    if isinstance(value, dict):
        if "write_mib_per_second" in value:
            return label, _format_folder(value)
        if "capability" in value:
            return f"GPU {name}", _format_gpu(value)
        return label, ", ".join(f"{key} {_format_value(each)}{unit}" for key, each in value.items())
    return label, f"{_format_value(value)}{unit}"


def _format_value(value: Any) -> str:
    """Return a plain value or a list in words."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _format_folder(folder: dict[str, Any]) -> str:
    """Return where a folder is, the room of its disk, and how fast that is."""
    speed = folder["write_mib_per_second"]
    written = folder["problem"] if speed is None else f"{speed:,} MiB/s written"
    return f"{folder['path']}: {folder['free_gib']:,} GiB free, {written}"


def _format_gpu(gpu: dict[str, Any]) -> str:
    """Return the name of a GPU, its memory, and the number formats that it multiplies."""
    formats = ", ".join(name for name in ("bf16", "fp8") if gpu[name]) or "neither bf16 nor fp8"
    return (
        f"{gpu['name']}, {gpu['memory_gib']:,} GiB ({gpu['free_memory_gib']:,} free), "
        f"compute capability {gpu['capability']}: {formats}"
    )


def _print_versions(console: Console, versions: dict[str, Any]) -> None:
    """Print the versions that differ from those that were tried, and how many do not."""
    same = {name: v for name, v in versions.items() if v["state"] == "as tried"}
    other = {name: v for name, v in versions.items() if v["state"] != "as tried"}
    console.print(Text("Versions", style="bold"))
    rows = {
        name: f"{v['here'] or 'none'}: {v['state']} ({v['tried']})" for name, v in other.items()
    }
    as_tried = ", ".join(f"{name} {v['here']}" for name, v in same.items())
    console.print(_facts_table(rows | {"as tried": as_tried or None}))
    console.print()


def print_path_results(results: list[PathResult], console: Console | None = None) -> None:
    """Print what became of every path, then why some are wrong or not here, and what to do."""
    console = console or make_console()
    console.print(Text("Paths, against float32 on the CPU", style="bold"))
    has_memory = any("peak_bytes" in result.numbers for result in results)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("path", "result"):
        table.add_column(heading, no_wrap=True)
    for heading in ("loss", "gradient", "tokens/s", *(["memory"] if has_memory else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        numbers = result.numbers
        cells = [
            _format_difference(numbers.get("loss_difference")),
            _format_difference(numbers.get("gradient_difference")),
            f"{numbers['tokens_per_second']:,.0f}" if "tokens_per_second" in numbers else "",
        ]
        if has_memory:
            cells.append(_format_memory(numbers))
        state = Text(result.state, style=_STYLES[result.state])
        table.add_row(Text(result.path.name), state, *cells)
    print_table(console, table)
    _print_reasons(console, results)
    wrong = sum(result.state == "wrong" for result in results)
    right = sum(result.state == "right" for result in results)
    if wrong:
        console.print(Text(f"\n{wrong} of {right + wrong} paths are wrong", style="bold red"))
    else:
        console.print(Text(f"\nall {right} paths of this machine are right", style="bold green"))


def _print_reasons(console: Console, results: list[PathResult]) -> None:
    """Print why a path is wrong or not here, and what to do in place of it."""
    for result in results:
        if result.reason is None:
            continue
        line = Text(f"{result.path.name}: ", style="bold").append(result.reason, style="not bold")
        if result.state == "wrong":
            line.append(f". Until it is right: {result.path.advice}.", style="not bold")
        console.print(line)


def _format_difference(share: float | None) -> str:
    """Return a share with one digit; nothing where there is none."""
    return "" if share is None else f"{share:.0e}"


def _format_memory(numbers: dict[str, Any]) -> str:
    """Return the most that a GPU held, of what the plan has."""
    if "peak_bytes" not in numbers:
        return ""
    sizes = [numbers["peak_bytes"], *filter(None, [numbers.get("planned_bytes")])]
    return " of ".join(f"{size / MIB:,.0f}" for size in sizes) + " MiB"
