"""What a run prints: its data before the first step, its results after the last."""

import shlex
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from luthier.config.library_settings import LoraSettings, QuantizationSettings
from luthier.data.batching.packing import pack_rows
from luthier.data.batching.settings import BatchingSettings
from luthier.data.batching.token_rows import TokenRows
from luthier.data.prepare import PreparedData, SplitCounts
from luthier.data.streaming import TokenRowStream
from luthier.model.adapter_targets import bypassed_layer_suffixes
from luthier.model.expert_adapters import describe_experts
from luthier.model.experts import describe_unpacked_experts, unpacked_expert_bytes
from luthier.model.load import describe_packing
from luthier.model.model_class import find_text_modules
from luthier.record.checkpoints import ROLLOUTS_FILE
from luthier.storage.atomic import write_jsonl
from luthier.terminal import make_console

console = make_console()


def print_line(text: str) -> None:
    """Print one line."""
    # Escaped, since rich takes `[...]` in a path or an error for markup; `soft_wrap`, since it
    # would break lines at 80 columns where the output is a file.
    console.print(escape(text), soft_wrap=True)


def print_model(
    model: Any, machine: Any, quantization: QuantizationSettings, lora: LoraSettings
) -> None:
    """Print how large the model is, how many of its parameters train, and if its experts do."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, trains in sizes if trains)
    text_config = model.config.get_text_config()
    attention = getattr(text_config, "_attn_implementation", None) or machine.attention
    form = ", quantized" if quantization.is_enabled else ""
    if quantization.dequantize:
        form = ", dequantized"
    print_line(
        f"model     {type(model).__name__}, {trained / 1e6:.2f} M parameters train, "
        f"on {machine.device} in {machine.dtype}{form}, "
        f"attention {attention}"
    )
    if parts := _describe_other_parts(model):
        print_line(f"{'':10}{parts}")
    bypassed = bypassed_layer_suffixes(model) if hasattr(model, "peft_config") else []
    if bypassed:
        print_line(f"          no adapter on {', '.join(bypassed)}: kernels would pass it by")
    if getattr(model, "is_quantized", False):
        packing = describe_packing(model)
        if packing is not None:
            print_line(f"{'':10}{packing}")
        unpacked = describe_unpacked_experts(unpacked_expert_bytes(model))
        if unpacked is not None:
            print_line(f"{'':10}{unpacked}")
    experts = describe_experts(model, lora)
    if experts is not None:
        print_line(f"experts   {experts}")


def _describe_other_parts(model: Any) -> str:
    """Return which of a model's parts train, and which are frozen; empty for a text model."""
    text = find_text_modules(model)
    names: dict[bool, list[str]] = {True: [], False: []}
    if any(p.requires_grad and name in text for name, p in model.named_parameters()):
        names[True].append("its text part")
    for name in text.others:
        part = model.get_submodule(name)
        trains = any(parameter.requires_grad for parameter in part.parameters())
        names[trains].append(f"{name.removeprefix('base_model.model.')}{_count_layers(part)}")
    if not text.others:
        return ""
    verb = "trains" if len(names[True]) == 1 else "train"
    frozen = f"; frozen: {', '.join(names[False])}" if names[False] else ""
    return f"{', '.join(names[True])} {verb}{frozen}"


def _count_layers(part: Any) -> str:
    """Return how many layers a tower has, such as ` (27 layers)`; empty for other modules."""
    import torch

    stacks = [m for m in part.modules() if isinstance(m, torch.nn.ModuleList)]
    layers = max(map(len, stacks), default=0)
    return f" ({layers} {'layer' if layers == 1 else 'layers'})" if layers else ""


def print_data(prepared: PreparedData, answers: str = "") -> None:
    """Print how many rows, tokens and trained tokens there are, and what was dropped.

    `answers` says what trains, where that is not tokens of the rows.
    """
    splits = {"train": prepared.train_counts} if isinstance(prepared.train, TokenRows) else {}
    if isinstance(prepared.train, TokenRowStream):
        print_line(
            "train     a stream: "
            + ", ".join(p.source.label for p in prepared.train.opened.values())
        )
    for key, found in prepared.unread_keys.items():
        keys = ", ".join(f"{name} ({n:,} {'row' if n == 1 else 'rows'})" for name, n in found)
        print_line(f"not read  keys of messages in {key}: {keys}")
    for key, source in prepared.sources.items():
        left_out, read_rows = source.left_out_by_map
        if left_out:
            print_line(f"map       {key}.map left out {left_out:,} of {read_rows:,} rows")
    splits |= {name or "held out": counts for name, counts in prepared.eval_counts.items()}
    for name, counts in splits.items():
        print_line(f"{name:<9} {format_counts(counts, answers)}")
    if prepared.train_counts.sources:
        shares = prepared.train_counts.sources
        total = sum(shares.values())
        print_line(
            "mixture   "
            + ", ".join(f"{name} {n:,} rows ({n / total:.0%})" for name, n in shares.items())
        )


def format_counts(counts: SplitCounts, answers: str) -> str:
    """Return the counts of one split as one line."""
    dropped = ", ".join(f"{n:,} {why}" for why, n in counts.dropped.items())
    trained = answers or f"trained ({counts.trained_tokens / max(counts.tokens, 1):.0%})"
    # Completions that the model writes while it trains are not there yet.
    trains = (
        "" if answers and not counts.trained_tokens else f", {counts.trained_tokens:,} {trained}"
    )
    cut = f"; {counts.cut_rows:,} cut to chat.max_length" if counts.cut_rows else ""
    lossy = f"; {counts.lossy_rows:,} not shown whole by the template" if counts.lossy_rows else ""
    images = f", {counts.images:,} images" if counts.images else ""
    return (
        f"{counts.rows:,} rows, {counts.sequences:,} sequences, longest {counts.longest:,}, "
        f"{counts.tokens:,} tokens{images}{trains}"
        f"{cut}{lossy}{'; left out: ' + dropped if dropped else ''}"
    )


def print_packing(prepared: PreparedData, batching: BatchingSettings) -> None:
    """Print how full the rows are that several sequences share."""
    if not batching.packing or batching.length is None or not isinstance(prepared.train, TokenRows):
        return
    packed = pack_rows(prepared.train.lengths, batching.length, None)
    print_line(
        f"packing   {len(prepared.train):,} sequences in {len(packed):,} rows of "
        f"{batching.length:,} tokens, {packed.efficiency:.1%} full"
    )


def write_dropped(prepared: PreparedData, folder: Path) -> None:
    """Write the rows that were left out or are not whole, with the reasons, beside the run."""
    if prepared.reports:
        write_jsonl(folder / "dropped.jsonl", prepared.reports)
        print_line(
            f"          {len(prepared.reports):,} rows with a problem: {folder / 'dropped.jsonl'}"
        )


def print_replies(rows: list[dict[str, Any]], limit: int) -> None:
    """Print replies before and after training side by side with what was expected."""
    if not rows or not limit:
        return
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, title="Held-out rows", title_justify="left")
    for heading in ("prompt", "before", "after", "expected"):
        table.add_column(heading, overflow="fold", ratio=1)
    for row in rows[:limit]:
        cells = (row["prompt"], row["before"], row["after"], row["expected"])
        table.add_row(*(escape(_shorten(str(cell))) for cell in cells))
    console.print(table)


def print_results(record: dict[str, Any], folder: Path) -> None:
    """Print the results of a finished run from its record, and where its files are."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    # The records of older versions have less.
    results, seconds = record.get("results", {}), record.get("seconds")
    for name, pair in results.items():
        table.add_row(
            name,
            *(_format_result(name, pair.get(k)) for k in ("before", "after")),
        )
    if results:
        console.print(table)
    if seconds is not None:
        trained = record.get("training_seconds", 0.0)
        print_line(f"\ntime      {seconds:.0f} s, of which training {trained:.0f} s")
    peak = record.get("peak_memory_gib", {}).items()
    if peak:
        sizes = "  ".join(f"{where} {gib} GiB" for where, gib in peak)
        print_line(f"memory    {sizes} at the peak")
    print_line(
        f"written   {folder}: model/ loss.png metrics.jsonl replies.jsonl run.json config.yaml"
    )
    if (folder / ROLLOUTS_FILE).is_file():
        print_line(f"rollouts  luthier show {shlex.quote(str(folder))} --rollouts")


def _format_result(name: str, value: float | None) -> str:
    """Return a result as text; an empty one where nothing was measured."""
    if value is None:
        return ""
    return f"{value:.1%}" if name == "exact_match" else f"{value:.4f}"


def _shorten(text: str, limit: int = 160) -> str:
    """Return a text as one line, cut where it is longer than `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[:limit] + " ..."
