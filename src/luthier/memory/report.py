"""A plan as a table for people."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.memory import optimizers
from luthier.memory.advice import Advice
from luthier.memory.estimate import RETURN_FREED_BLOCKS, Estimate, keeps_freed_blocks
from luthier.memory.plan import MemoryPlan
from luthier.memory.workload import FREE_SHARE, Workload, format_parameter_count, format_size

_NAMES = {
    "none": "one process",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}
_ORDER = (
    "weights", "reference", "teacher", "adapters", "trained", "master", "optimizer", "gathered",
    "gradients", "gradient", "activations", "output", "backward", "update",
)  # fmt: skip
_MOMENTS = {"step": "in forward and backward", "update": "when the weights are changed"}


def print_plan(found: MemoryPlan, advice: list[Advice], console: Console | None = None) -> None:
    """Print what is planned, its parts, whether it fits, and what to change."""
    console = console or Console(highlight=False)
    console.print(Text(f"{found.name}: memory of one training step", style="bold"))
    for name, text in _heading(found).items():
        console.print(Text(f"{name:<10}{text}"), soft_wrap=True)
    console.print()
    console.print(_parts(found))
    for line in _notes(found):
        console.print(Text(line, style="dim"), soft_wrap=True)
    _show_verdict(console, found)
    _show_advice(console, found, advice)


def _heading(found: MemoryPlan) -> dict[str, str]:
    work = found.workload
    precision = f"{work.autocast} autocast" if work.autocast else found.dtype
    kept = _kept(work)
    mask = " with a mask" if work.masked else ""
    machine = found.hardware
    own = "" if machine.kind == "cuda" else f", {format_size(machine.memory)} free now"
    number = f"{machine.count} x " if machine.count > 1 and machine.kind == "cuda" else ""
    size, trained = format_parameter_count(found.parameters), format_parameter_count(found.trained)
    rows = f"{work.rows} rows of {work.length:,} tokens"
    return {
        "model": f"{found.model}, {size} parameters, {trained} train",
        "step": f"{rows}, {precision}, {found.attention}{mask}, {kept}, {work.optimizer}",
        "machine": f"{number}{machine.name}{own}",
    }


def _kept(work: Workload) -> str:
    if work.checkpointing is None:
        return "activations offloaded" if work.offload else "activations kept"
    every = work.checkpointing.every_n_layers
    some = f" in one of {every} layers" if every > 1 else ""
    return f"activations computed again{some} (checkpointing)"


def _parts(found: MemoryPlan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    for estimate in found.estimates:
        table.add_column(sharding_label(estimate), justify="right", no_wrap=True)
    sizes = [{part.name: part.bytes for part in each.parts} for each in found.estimates]
    for name in sorted({name for size in sizes for name in size}, key=_place):
        cells = [format_size(size[name]) if name in size else "" for size in sizes]
        # A row that is below a MiB everywhere says nothing.
        if any(cell not in ("", "0 MiB") for cell in cells):
            table.add_row(name, *cells)
    table.add_section()
    table.add_row("together", *(format_size(each.total) for each in found.estimates), style="bold")
    table.add_row("room", *(format_size(each.room) for each in found.estimates))
    table.add_row("left", *(_left(each) for each in found.estimates))
    return table


def _place(name: str) -> tuple[int, str]:
    """Weights first, then what stays beside them, then what comes and goes."""
    first = name.split()[0]
    return (_ORDER.index(first) if first in _ORDER else len(_ORDER), name)


def sharding_label(estimate: Estimate) -> str:
    """The name of a sharding and its processes."""
    sharding = estimate.sharding
    name = _NAMES[sharding.kind]
    return name if sharding.processes == 1 else f"{name} x {sharding.processes}"


def _left(estimate: Estimate) -> Text:
    left = estimate.room - estimate.total
    return Text(format_size(left), style="green" if estimate.fits else "bold red")


def _notes(found: MemoryPlan) -> list[str]:
    best, work = found.best, found.workload
    notes = [
        f"The most is held {_MOMENTS[best.moment]}; {FREE_SHARE:.0%} of the machine are left free. "
        "Evaluation and generated replies are not counted."
    ]
    if best.elsewhere:
        notes.append(
            f"{format_size(best.elsewhere)} of the optimizer are paged: on the GPU while there is "
            "room, else in main memory."
        )
    if not optimizers.find_optimizer(work.optimizer).known:
        notes.append(f"trainer.args.optim={work.optimizer}: two float32 states are assumed.")
    if found.hardware.kind == "cpu" and keeps_freed_blocks():
        notes.append(f"Nothing is lost in the heap with {RETURN_FREED_BLOCKS} before the command.")
    return [*notes, *work.assumptions]


def _show_verdict(console: Console, found: MemoryPlan) -> None:
    if found.fits:
        console.print(Text(f"\nfits: {sharding_label(found.best)}", style="bold green"))
    else:
        console.print(Text("\ndoes not fit", style="bold red"))


def _show_advice(console: Console, found: MemoryPlan, advice: list[Advice]) -> None:
    if not advice:
        return
    console.print(
        Text("\nwhat could be faster" if found.fits else "\nwhat to change", style="bold")
    )
    for each in advice:
        sign, style = ("✓", "green") if each.fits else ("✗", "red")
        line = (
            Text("  ")
            .append(sign, style=style)
            .append(f" {format_size(each.total):>10}  {each.change}")
        )
        console.print(line.append(f"  ({each.price})", style="dim"), soft_wrap=True)
