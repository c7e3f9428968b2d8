"""The picture of a run's data: how long its sequences are, and where they are from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.batching.token_rows import TokenRows
from luthier.record.checkpoints import read_step_log

if TYPE_CHECKING:
    from luthier.data.prepare import PreparedData


# The picture of a run: its loss, or its reward, over the steps.

MIN_SMOOTHED_POINTS = 50
"""Points below which a smoothed line would only lag behind."""

TEXT_COLOR, TRAIN_COLOR, EVAL_COLOR, FAINT_COLOR = "#222222", "#2f6db3", "#d1495b", "#9bb8d9"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, oldest first; none where the file is missing."""
    return read_step_log(path)


def plot_loss(metrics: list[dict[str, Any]], title: str, path: Path) -> bool:
    """Draw training and held-out loss against the step as a PNG; False where there is no loss.

    Of a run that has rewards, these are drawn: its loss says nothing by itself.
    """
    name = "reward" if any("reward" in row for row in metrics) else "loss"
    train = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
    held_out = [
        (row["step"], row[f"eval_{name}"]) for row in metrics if row.get(f"eval_{name}") is not None
    ]
    if not train and not held_out:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=130)
    if train:
        _draw_train(axes, train, name)
    if held_out:
        label = f"held-out {name}, at last {held_out[-1][1]:.3g}"
        axes.plot(*zip(*held_out, strict=True), "o-", color=EVAL_COLOR, ms=4, label=label)
    _dress_loss_plot(axes, title, name, [value for _, value in train + held_out])
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    pyplot.close(figure)
    temporary.replace(path)
    return True


def _draw_train(axes: Any, train: list[tuple[int, float]], name: str) -> None:
    label = f"training {name}, at last {train[-1][1]:.3g}"
    if len(train) < MIN_SMOOTHED_POINTS:
        axes.plot(*zip(*train, strict=True), color=TRAIN_COLOR, lw=2, label=label)
        return
    axes.plot(*zip(*train, strict=True), color=FAINT_COLOR, lw=1, label=label)
    smooth = _smooth([loss for _, loss in train])
    axes.plot([step for step, _ in train], smooth, color=TRAIN_COLOR, lw=2, label="smoothed")


def _smooth(values: list[float], weight: float = 0.8) -> list[float]:
    """The exponential moving average, corrected for its start (Kingma & Ba 2015, section 3)."""
    average, out = 0.0, []
    for n, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**n))
    return out


def _dress_loss_plot(axes: Any, title: str, name: str, values: list[float]) -> None:
    axes.set_title(title, loc="left", color=TEXT_COLOR)
    axes.set_xlabel("step")
    is_loss = name == "loss"
    axes.set_ylabel("loss per trained token (nats)" if is_loss else "mean reward of completions")
    if is_loss and 0 < min(values) < max(values) / 20:
        axes.set_yscale("log")
    elif is_loss:
        axes.set_ylim(bottom=0)
    axes.margins(x=0.06)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)


BAR, MARK, LIMIT, SOFT = "#2f6db3", "#222222", "#d1495b", "#777777"
_MAX_BINS = 40
_MAX_BARS = 20
"""Sources with a bar of their own; the smallest of more share the last one."""


@dataclass(frozen=True)
class DataNumbers:
    """What the picture shows of an epoch."""

    lengths: NDArray[Any]
    """Tokens of each sequence, shape (sequences,)."""
    trained_tokens: int
    max_length: int | None = None
    """`chat.max_length`."""
    sources: Mapping[str, int] = field(default_factory=dict)
    """Rows of an epoch from each of several sources; one source or none gives no bars."""


def collect_data_numbers(prepared: "PreparedData", max_length: int | None) -> DataNumbers:
    """The numbers of a run's training rows; of a stream, which is not known ahead, none."""
    counts = prepared.train_counts
    rows = prepared.train
    lengths = rows.lengths if isinstance(rows, TokenRows) else np.empty(0, np.int32)
    return DataNumbers(lengths, counts.trained_tokens, max_length, counts.sources)


def plot_data(numbers: DataNumbers, title: str, path: Path) -> bool:
    """Draw lengths and mixture as a PNG; False, and no file, where there is no sequence."""
    if not len(numbers.lengths):
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = _rank_sources(numbers.sources)
    below = 0.3 * len(bars) + 0.7 if len(bars) > 1 else 0.0
    figure = pyplot.figure(figsize=(8, 4.5 + below), dpi=130, layout="constrained")
    heights = [4.5, below] if below else [4.5]
    axes = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    _draw_lengths(axes[0], numbers, title)
    if below:
        _draw_sources(axes[1], bars)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    pyplot.close(figure)
    temporary.replace(path)
    return True


def _draw_lengths(axes: Any, numbers: DataNumbers, title: str) -> None:
    lengths = numbers.lengths
    edges, is_log = bin_edges(lengths)
    counts, _, _ = axes.hist(lengths, bins=edges, color=BAR, rwidth=0.94)
    if is_log:
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, edges)
    else:
        _widen_axis(axes, edges)
        axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("tokens of a sequence")
    _scale_counts(axes, counts)
    _draw_marks(axes, numbers)
    tokens = int(lengths.sum(dtype=np.int64))
    axes.set_title(title, loc="left", color=TEXT_COLOR)
    share = f"{numbers.trained_tokens / tokens:.0%} trained"
    about = f"{len(lengths):,} sequences, {tokens:,} tokens, {share}"
    axes.set_title(about, loc="right", color=SOFT, fontsize=9)
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    _dress_data_plot(axes, "y")


def _scale_counts(axes: Any, counts: NDArray[Any]) -> None:
    """Choose an even scale, or one of ratios; with room for the legend above the bars."""
    least, most = counts[counts > 0].min(), counts.max()
    # A bar that is less than a pixel high cannot be seen on an even scale.
    if least < most / 200:
        axes.set_yscale("log")
        axes.set_ylim(0.7, most * (most / 0.7) ** 0.3)
        axes.set_ylabel("sequences (log scale)")
    else:
        axes.set_ylim(0, most * 1.35)
        axes.locator_params(axis="y", integer=True)
        axes.set_ylabel("sequences")


def bin_edges(lengths: NDArray[Any]) -> tuple[NDArray[Any], bool]:
    """The edges of a histogram's bars, and whether they are set by ratio and not by distance."""
    low, high = int(lengths.min()), int(lengths.max())
    is_log = high > 20 * max(low, 1)
    if is_log:
        edges = np.unique(np.round(np.geomspace(max(low, 1), high + 1, _MAX_BINS + 1)))
        return edges - 0.5, True
    # Lengths that are all alike are a bar that can be seen behind its mark.
    step = max(-(-(high + 1 - low) // _MAX_BINS), high // 100)
    return np.arange(low, high + 2 * step, step) - step / 2, False


def _widen_axis(axes: Any, edges: NDArray[Any]) -> None:
    """Leave room beside the bars, so that a single one is no wall."""
    middle, half = edges.mean(), (edges[-1] - edges[0]) / 2
    half = max(1.08 * half, 4, 0.05 * edges[-1])
    axes.set_xlim(middle - half, middle + half)


def _draw_marks(axes: Any, numbers: DataNumbers) -> None:
    """Draw where the middle, the 95th percentile, the longest and `chat.max_length` are."""
    ranked = np.sort(numbers.lengths)
    last = len(ranked) - 1
    marks = {
        "median": (int(ranked[round(0.5 * last)]), "-"),
        "95th percentile": (int(ranked[round(0.95 * last)]), "--"),
        "longest": (int(ranked[-1]), ":"),
    }
    for name, (value, style) in marks.items():
        axes.axvline(value, color=MARK, lw=1.3, ls=style, label=f"{name} {value:,}")
    limit, right = numbers.max_length, axes.get_xlim()[1]
    if limit is not None and limit <= right * (4 if axes.get_xscale() == "log" else 1.5):
        axes.axvline(limit, color=LIMIT, lw=1.8, label=f"chat.max_length {limit:,}")
        axes.set_xlim(right=max(right, limit * 1.04))
    elif limit is not None:
        # Drawn where it is, it would press the bars together at the left.
        axes.plot([], color=LIMIT, lw=1.8, label=f"chat.max_length {limit:,} (beyond)")
    axes.legend(
        ncols=2, fontsize=9, loc="upper left", facecolor="white", edgecolor="none", framealpha=1
    )


def _rank_sources(sources: Mapping[str, int]) -> list[tuple[str, int]]:
    """The sources from the one with the most rows to the one with the fewest."""
    ranked = sorted(sources.items(), key=lambda item: -item[1])
    if len(ranked) <= _MAX_BARS:
        return ranked
    rest = ranked[_MAX_BARS - 1 :]
    others = (f"{len(rest)} others", sum(rows for _, rows in rest))
    return [*ranked[: _MAX_BARS - 1], others]


def _draw_sources(axes: Any, bars: list[tuple[str, int]]) -> None:
    """Draw the rows of an epoch from each source."""
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name, _ in bars]
    counts = [rows for _, rows in bars]
    total = sum(counts)
    drawn = axes.barh(range(len(bars)), counts, color=BAR, height=0.72)
    axes.set_yticks(range(len(bars)), names)
    labels = [f"{rows:,} ({rows / total:.1%})" for rows in counts]
    axes.bar_label(drawn, labels, padding=4, fontsize=9, color=TEXT_COLOR)
    axes.invert_yaxis()
    axes.set_xlim(0, max(counts) * 1.22)
    axes.set_xlabel("rows of an epoch")
    axes.tick_params(axis="y", length=0)
    _plain_numbers(axes.xaxis)
    _dress_data_plot(axes, "x")


def _log_ticks(axis: Any, edges: NDArray[Any]) -> None:
    """Ticks at round numbers, as many as there is room for."""
    steps = (1, 2, 5) if edges[-1] < 2000 * edges[0] else (1, 3)
    ticks = [step * 10**power for power in range(10) for step in steps]
    axis.set_ticks([tick for tick in ticks if edges[0] <= tick <= edges[-1]])
    axis.set_ticks([], minor=True)


def _plain_numbers(axis: Any) -> None:
    """Write numbers out, such as 20,000."""
    axis.set_major_formatter(lambda value, place: f"{value:,.0f}")


def _dress_data_plot(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
