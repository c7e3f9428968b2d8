"""What a run prints: its data before the first step, its results after the last."""

import math
import shlex
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from rich.markup import escape

from luthier.config.library_settings import LoraSettings, QuantizationSettings
from luthier.config.methods import METHODS
from luthier.config.schema import RunConfig
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
from luthier.terminal import (
    format_count,
    format_number,
    format_table,
    make_block,
    make_console,
    pluralize,
)

console = make_console()
_LISTED_FILES = (
    *("model/", "report.html", "loss.png", "data.png", "replies.jsonl", "rollouts.jsonl"),
    *("dropped.jsonl", "metrics.jsonl", "run.json", "config.yaml", "overrides.yaml"),
    "before.json",
)
"""What a finished run names of its folder, first what a person looks at."""


def print_line(text: str) -> None:
    """Print one line."""
    # Escaped, since rich takes `[...]` in a path or an error for markup; `soft_wrap`, since it
    # would break lines at 80 columns where the output is a file.
    console.print(escape(text), soft_wrap=True)


def print_model(
    model: Any, machine: Any, quantization: QuantizationSettings, lora: LoraSettings
) -> None:
    """Print how large the model is, how many of its parameters train, and if its experts do."""
    text_config = model.config.get_text_config()
    attention = getattr(text_config, "_attn_implementation", None) or machine.attention
    form = ", quantized" if quantization.is_enabled else ""
    if quantization.dequantize:
        form = ", dequantized"
    print_line(
        f"model     {type(model).__name__}, {_describe_trainable(model)}, "
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


def _describe_trainable(model: Any) -> str:
    """Return how many parameters train, and their share where the size of the model is known."""
    trained = sum(_count(p) for p in model.parameters() if p.requires_grad)
    # Other methods than bitsandbytes' hold packed weights in buffers, which tell no number of them.
    packing = getattr(model, "quantization_method", None)
    if getattr(model, "is_quantized", False) and packing != "bitsandbytes":
        return f"{format_count(trained)} parameters train"
    total = sum(_count(parameter) for parameter in model.parameters())
    share = trained / max(total, 1)
    return f"{format_count(trained)} of {format_count(total)} parameters train ({100 * share:.3g}%)"


def _count(parameter: Any) -> int:
    """Return how many numbers a parameter has, also where they are packed or sharded."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:  # bitsandbytes: four bits each, two in a byte
        return int(math.prod(state.shape))
    return int(getattr(parameter, "ds_numel", parameter.numel()))


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
    return f" ({pluralize(layers, 'layer')})" if layers else ""


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
        keys = ", ".join(f"{name} ({pluralize(n, 'row')})" for name, n in found)
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
        texts = [f"{name} {pluralize(n, 'row')} ({n / total:.0%})" for name, n in shares.items()]
        print_line(f"mixture   {', '.join(texts)}")


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
    images = f", {pluralize(counts.images, 'image')}" if counts.images else ""
    return (
        f"{pluralize(counts.rows, 'row')}, {pluralize(counts.sequences, 'sequence')}, "
        f"longest {counts.longest:,}, {pluralize(counts.tokens, 'token')}{images}{trains}"
        f"{cut}{lossy}{'; left out: ' + dropped if dropped else ''}"
    )


def print_packing(prepared: PreparedData, batching: BatchingSettings) -> None:
    """Print how full the rows are that several sequences share."""
    if not batching.packing or batching.length is None or not isinstance(prepared.train, TokenRows):
        return
    packed = pack_rows(prepared.train.lengths, batching.length, None)
    rows = pluralize(len(packed), "row")
    print_line(
        f"packing   {pluralize(len(prepared.train), 'sequence')} in {rows} of "
        f"{batching.length:,} tokens, {packed.efficiency:.1%} full"
    )


def write_dropped(prepared: PreparedData, folder: Path) -> None:
    """Write the rows that were left out or are not whole, with the reasons, beside the run."""
    if prepared.reports:
        write_jsonl(folder / "dropped.jsonl", prepared.reports)
        rows = pluralize(len(prepared.reports), "row")
        print_line(f"          {rows} with a problem: {folder / 'dropped.jsonl'}")


def print_replies(rows: list[dict[str, Any]], limit: int) -> None:
    """Print replies before and after training with what was expected, a block for each row."""
    for number, row in enumerate(rows[:limit], start=1):
        title = f"held-out row {number}{' of ' + row['set'] if 'set' in row else ''}"
        names = ("prompt", "before", "after", "expected")
        texts = {name: _shorten(str(row[name])) for name in names}
        for line in ["", *make_block(title, texts, console.width)]:
            print_line(line)


def print_results(record: dict[str, Any], folder: Path, config: RunConfig) -> None:
    """Print the results of a finished run from its record, its files, and what to do with it."""
    # The records of older versions have less.
    results, seconds = record.get("results", {}), record.get("seconds")
    rows = [
        [name, *(_format_result(name, pair.get(when)) for when in ("before", "after"))]
        for name, pair in results.items()
    ]
    if rows:
        print_line("")
        for line in format_table(["", "before", "after"], rows):
            print_line(line)
    print_line("")
    if seconds is not None:
        trained = record.get("training_seconds", 0.0)
        print_line(f"time      {seconds:,.0f} s, of which training {trained:,.0f} s")
    peak = record.get("peak_memory_gib", {}).items()
    if peak:
        sizes = "  ".join(f"{where} {gib} GiB" for where, gib in peak)
        print_line(f"memory    {sizes} at the peak")
    files = [name for name in _LISTED_FILES if (folder / name).exists()]
    print_line(f"files     {folder}: {' '.join(files)}")
    commands = _next_commands(folder, config)
    for label, command in zip(chain(["next"], repeat("")), commands, strict=False):
        print_line(f"{label:<10}{command}")


def _next_commands(folder: Path, config: RunConfig) -> list[str]:
    """Return the commands that a user is likely to want next."""
    run, method = shlex.quote(str(folder)), METHODS[config.trainer.base_method]
    names = ["chat"] if method.writes_replies and method.trains_on_chats else []
    names.append("evaluate")
    if (folder / "model" / "adapter_config.json").is_file():
        names.append("merge")
    commands = [f"luthier {name} {run}" for name in names]
    if (folder / ROLLOUTS_FILE).is_file():
        commands.append(f"luthier show {run} --rollouts")
    return commands


def _format_result(name: str, value: float | None) -> str:
    """Return a result as text; an empty one where nothing was measured."""
    if value is None:
        return ""
    return f"{value:.1%}" if name.rpartition("/")[2] == "exact_match" else format_number(value)


def _shorten(text: str, limit: int = 320) -> str:
    """Return a text as one line, cut where it is longer than `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[:limit] + " ..."
