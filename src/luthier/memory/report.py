"""A memory plan as a table in the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.memory import optimizers
from luthier.memory.advice import Advice
from luthier.memory.estimate import RETURN_FREED_BLOCKS, Estimate, keeps_freed_blocks
from luthier.memory.plan import MemoryPlan
from luthier.memory.workload import FREE_SHARE, format_parameter_count, format_size
from luthier.model.experts import describe_unpacked_experts
from luthier.terminal import make_console, print_table

_SHARDING_NAMES = {
    "none": "one process",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}
_ROW_ORDER = (
    "weights", "reference", "teacher", "reward", "adapters", "trained", "master", "optimizer",
    "gathered", "gradients", "gradient", "activations", "output", "backward", "update",
)  # fmt: skip
_MOMENT_NAMES = {
    "step": "during the forward/backward pass",
    "update": "when the optimizer updates weights",
}


def print_plan(plan: MemoryPlan, advice: list[Advice], console: Console | None = None) -> None:
    """Print a plan item by item, whether it fits, and the changes that would help."""
    console = console or make_console()
    console.print(Text(f"{plan.name}: memory of one training step", style="bold"))
    for name, text in _heading(plan).items():
        console.print(Text(f"{name:<10}{text}"), soft_wrap=True)
    console.print()
    print_table(console, _memory_table(plan))
    for line in _notes(plan):
        console.print(Text(line, style="dim"), soft_wrap=True)
    if plan.fits:
        console.print(Text(f"\nfits: {sharding_label(plan.best)}", style="bold green"))
    else:
        console.print(Text("\ndoes not fit", style="bold red"))
    if advice:
        heading = "\nwhat could be faster" if plan.fits else "\nwhat to change"
        console.print(Text(heading, style="bold"))
    for change in advice:
        sign, style = ("✓", "green") if change.fits else ("✗", "red")
        line_text = Text("  ").append(sign, style=style)
        line_text.append(f" {format_size(change.total):>10}  {change.change}")
        line_text.append(f"  ({change.price})", style="dim")
        console.print(line_text, soft_wrap=True)


def sharding_label(estimate: Estimate) -> str:
    """Return the heading of an estimate's column: the sharding and its number of processes."""
    sharding = estimate.sharding
    name = _SHARDING_NAMES[sharding.kind]
    return name if sharding.processes == 1 else f"{name} x {sharding.processes}"


def _heading(plan: MemoryPlan) -> dict[str, str]:
    """Return the lines above the table: model, step and machine."""
    work, hardware = plan.workload, plan.hardware
    if work.checkpointing is None:
        activations = "activations offloaded" if work.offload else "no gradient checkpointing"
    else:
        every = work.checkpointing.every_n_layers
        layers = f" in one of {every} layers" if every > 1 else ""
        activations = f"gradient checkpointing{layers}"
    rows = f"{work.rows} rows of {work.length:,} tokens"
    precision = f"{work.autocast} autocast" if work.autocast else plan.dtype
    mask = " with a mask" if work.masked else ""
    if hardware.kind == "cuda":
        machine = f"{hardware.count} x {hardware.name}" if hardware.count > 1 else hardware.name
    else:
        machine = f"{hardware.name}, {format_size(hardware.memory)} free now"
    sizes = [format_parameter_count(count) for count in (plan.parameters, plan.trained)]
    longest = {}
    if plan.longest_allowed is not None:
        tokens, size = plan.longest_allowed
        planned = f"your longest row has {work.length:,} tokens: {format_size(plan.best.total)}"
        longest = {"rows": f"{planned}; rows of {tokens:,} tokens would need {format_size(size)}"}
    return {
        "model": f"{plan.model}, {sizes[0]} parameters, {sizes[1]} train",
        "step": f"{rows}, {precision}, {plan.attention}{mask}, {activations}, {work.optimizer}",
        **longest,
        "machine": machine,
    }


def _memory_table(plan: MemoryPlan) -> Table:
    """Return a table with a row for each item and a column for each sharding."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    for estimate in plan.estimates:
        table.add_column(sharding_label(estimate), justify="right", no_wrap=True)
    columns = [{item.name: item.bytes for item in estimate.parts} for estimate in plan.estimates]
    for name in sorted({name for column in columns for name in column}, key=_row_position):
        cells = [format_size(column[name]) if name in column else "" for column in columns]
        # A row that is below a MiB everywhere says nothing.
        if any(cell not in ("", "0 MiB") for cell in cells):
            table.add_row(name, *cells)
    table.add_section()
    totals = [format_size(estimate.total) for estimate in plan.estimates]
    table.add_row("total", *totals, style="bold")
    table.add_row("available", *(format_size(estimate.room) for estimate in plan.estimates))
    left = [
        Text(
            format_size(estimate.room - estimate.total),
            style="green" if estimate.fits else "bold red",
        )
        for estimate in plan.estimates
    ]
    table.add_row("left", *left)
    return table


def _row_position(name: str) -> tuple[int, str]:
    """Return the sort key of a row: weights first, then lasting items, then momentary ones."""
    first = name.split()[0]
    return (_ROW_ORDER.index(first) if first in _ROW_ORDER else len(_ROW_ORDER), name)


def _notes(plan: MemoryPlan) -> list[str]:
    """Return the sentences below the table: what the numbers leave out or assume."""
    best, work = plan.best, plan.workload
    notes = [
        f"Memory peaks {_MOMENT_NAMES[best.moment]}. {FREE_SHARE:.0%} is kept in reserve. "
        "Evaluation and generated replies are not counted."
    ]
    if best.elsewhere:
        notes.append(
            f"{format_size(best.elsewhere)} of the optimizer are paged: on the GPU while there is "
            "room, else in main memory."
        )
    if not optimizers.find_optimizer(work.optimizer).is_known:
        notes.append(f"optimizer {work.optimizer}: two float32 states are assumed.")
    if plan.hardware.kind == "cpu" and keeps_freed_blocks():
        notes.append(f"To avoid the heap overhead, run with {RETURN_FREED_BLOCKS}.")
    if plan.packing is not None:
        notes.append(f"{plan.packing}.")
    unpacked = describe_unpacked_experts(plan.unpacked_experts)
    if unpacked is not None:
        notes.append(unpacked)
    return [*notes, *work.assumptions]
