"""The plots of a run: its loss or reward over the steps, and how long its sequences are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.batching.token_rows import TokenRows
from luthier.storage.atomic import replace_file

if TYPE_CHECKING:
    from luthier.data.prepare import PreparedData


MIN_SMOOTHED_POINTS = 50
"""With fewer points a smoothed line would only lag behind."""

TEXT_COLOR, TRAIN_COLOR, EVAL_COLOR, FAINT_COLOR = "#222222", "#2f6db3", "#d1495b", "#9bb8d9"
_SUBTITLE_COLOR = "#777777"
_MARK_ROOM = 0.065
"""The share of a plot's height that the label of a mark takes."""
_MAX_BINS = 40
# Sources with a bar of their own; the smallest of more share the last one.
_MAX_BARS = 20


@dataclass(frozen=True)
class DataNumbers:
    """What `plot_data` shows of an epoch."""

    lengths: NDArray[Any]
    """Tokens of each sequence, shape (sequences,)."""
    trained_tokens: int
    max_length: int | None = None
    """`chat.max_length`."""
    sources: Mapping[str, int] = field(default_factory=dict)
    """Rows of an epoch from each of several sources; one source or none gives no bars."""
    images: int = 0
    """Images in these sequences."""


def collect_data_numbers(prepared: "PreparedData", max_length: int | None) -> DataNumbers:
    """Return the numbers of a run's training rows; of a stream, which is not known ahead, none."""
    counts = prepared.train_counts
    rows = prepared.train
    lengths = rows.lengths if isinstance(rows, TokenRows) else np.empty(0, np.int32)
    return DataNumbers(lengths, counts.trained_tokens, max_length, counts.sources, counts.images)


def plot_loss(metrics: list[dict[str, Any]], title: str, path: Path) -> bool:
    """Draw training and held-out loss against the step as a PNG; False where there is no loss.

    `metrics` are the rows of `metrics.jsonl`, `title` names the run. Of a run that has rewards,
    these are drawn: its loss says nothing by itself.
    """
    name = "reward" if any("reward" in row for row in metrics) else "loss"
    train = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
    held_out = [
        (row["step"], row[f"eval_{name}"]) for row in metrics if row.get(f"eval_{name}") is not None
    ]
    if not train and not held_out:
        return False
    figure = new_figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        _draw_train(axes, train)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color=EVAL_COLOR, ms=4, clip_on=False)
    points = train + held_out
    axes.set_title(literal_label(f"{title}: {name}"), loc="left", color=TEXT_COLOR)
    axes.set_xlabel("step")
    if name == "reward":
        axes.set_ylabel("mean reward of completions")
    else:
        # Preferences have losses of pairs, classes those of rows.
        names = {key for row in metrics for key in row}
        is_by_token = "mean_token_accuracy" in names and "rewards/margins" not in names
        axes.set_ylabel("loss per trained token (nats)" if is_by_token else "loss")
    axes.set_ylim(*_value_limits([value for _, value in points], name))
    steps = [step for step, _ in points]
    axes.set_xlim(0, max(1, *steps))
    _whole_steps(axes)
    style_axes(axes)
    lines = [("training", train, TRAIN_COLOR), (f"eval_{name}", held_out, EVAL_COLOR)]
    _label_ends(axes, [(label, *line[-1], color) for label, line, color in lines if line])
    save_figure(figure, path)
    return True


def _value_limits(values: list[float], name: str) -> tuple[float, float]:
    """Return the ends of the axis of a loss or reward: from zero, unless that would flatten it."""
    low, high = min(values), max(values)
    # A hundredth of the value is noise, and would fill the axis.
    span = max(high - low, 0.01 * abs(high), 1e-6)
    if name == "loss" and low >= 0 and high - low > 0.3 * high:
        return 0, high + 0.06 * span
    middle = (low + high) / 2
    return middle - 0.6 * span, middle + 0.6 * span


def _whole_steps(axes: Any) -> None:
    """Put ticks at whole steps alone."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _plain_numbers(axes.xaxis)


def _label_ends(axes: Any, ends: list[tuple[str, float, float, str]]) -> None:
    """Write the name and the last value of each line beside its end: `(name, x, y, color)`."""
    low, high = axes.get_ylim()
    places = sorted(((y - low) / (high - low), name, y, color) for name, _, y, color in ends)
    place = -math.inf
    for height, name, y, color in places:
        # Two lines of text need their room, however near the ends are.
        place = max(height, place + 0.07)
        axes.annotate(
            f"{name} {y:.4g}",
            (1.015, place),
            xycoords="axes fraction",
            va="center",
            color=color,
            fontsize=10,
            annotation_clip=False,
        )


def plot_data(numbers: DataNumbers, title: str, path: Path) -> bool:
    """Draw lengths and mixture as a PNG; False, and no file, where there is no sequence."""
    if not len(numbers.lengths):
        return False
    bars = _rank_sources(numbers.sources)
    bars_height = 0.3 * len(bars) + 0.7 if len(bars) > 1 else 0.0
    figure = new_figure(figsize=(8, 4.5 + bars_height), layout="constrained")
    heights = [4.5, bars_height] if bars_height else [4.5]
    axes = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    _draw_lengths(axes[0], numbers, title)
    if bars_height:
        _draw_sources(axes[1], bars)
    save_figure(figure, path)
    return True


def bin_edges(lengths: NDArray[Any]) -> tuple[NDArray[Any], bool]:
    """Return the edges of a histogram's bars, and whether they are set by ratio, not distance."""
    low, high = int(lengths.min()), int(lengths.max())
    is_log = high > 20 * max(low, 1)
    if is_log:
        edges = np.unique(np.round(np.geomspace(max(low, 1), high + 1, _MAX_BINS + 1)))
        return edges - 0.5, True
    # Lengths that are all alike are a bar that can be seen behind its mark.
    step = max(-(-(high + 1 - low) // _MAX_BINS), high // 100)
    return np.arange(low, high + 2 * step, step) - step / 2, False


def new_figure(**options: Any) -> Any:
    """Return an empty matplotlib figure that needs no screen."""
    # Not by pyplot, whose backend is the choice of who has called luthier, such as a notebook.
    from matplotlib.figure import Figure

    return Figure(dpi=130, **options)


def style_axes(axes: Any, grid: str = "both") -> None:
    """Draw a faint grid (of `x`, `y` or `both`) behind the data, and no frame at top and right."""
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def literal_label(text: str) -> str:
    """Return a text for a plot as it stands: matplotlib takes `$...$` for a formula."""
    return text.replace("$", r"\$")


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as a PNG, complete or not at all, and close it; return its path."""
    from matplotlib import pyplot

    try:
        with replace_file(path) as temporary:
            figure.savefig(temporary, format="png")
    finally:
        # pyplot keeps every figure that is not closed, for as long as the process lives.
        pyplot.close(figure)
    return path


def _draw_train(axes: Any, train: list[tuple[int, float]]) -> None:
    """Draw the training's values; a smoothed line too where there are enough of them."""
    if len(train) < MIN_SMOOTHED_POINTS:
        axes.plot(*zip(*train, strict=True), "o-", color=TRAIN_COLOR, lw=2, ms=6, clip_on=False)
        return
    axes.plot(*zip(*train, strict=True), color=FAINT_COLOR, lw=1)
    smooth = _smooth([loss for _, loss in train])
    axes.plot([step for step, _ in train], smooth, color=TRAIN_COLOR, lw=2)


def _smooth(values: list[float], weight: float = 0.8) -> list[float]:
    """Return the moving average, corrected for its start (Kingma & Ba 2015, section 3)."""
    average, out = 0.0, []
    for n, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**n))
    return out


def _draw_lengths(axes: Any, numbers: DataNumbers, title: str) -> None:
    """Draw the histogram of lengths with its marks."""
    lengths = numbers.lengths
    edges, is_log = bin_edges(lengths)
    counts, _, _ = axes.hist(lengths, bins=edges, color=TRAIN_COLOR, rwidth=0.94)
    if is_log:
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, edges)
    else:
        _widen_axis(axes, edges)
        axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("tokens of a sequence")
    marks = _find_marks(axes, numbers)
    top = 0.94 - _MARK_ROOM * len(marks)
    _scale_counts(axes, counts, top)
    _draw_marks(axes, marks, top)
    tokens = int(lengths.sum(dtype=np.int64))
    noun = "training sequence" if len(lengths) == 1 else "training sequences"
    axes.set_title(literal_label(f"{title}: {len(lengths):,} {noun}"), loc="left", color=TEXT_COLOR)
    images = f", {numbers.images:,} images" if numbers.images else ""
    about = f"{tokens:,} tokens, {numbers.trained_tokens / tokens:.0%} trained{images}"
    axes.set_title(about, loc="right", color=_SUBTITLE_COLOR, fontsize=9)
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    style_axes(axes, "y")


def _scale_counts(axes: Any, counts: NDArray[Any], top: float) -> None:
    """Choose an even scale, or one of ratios, on which the bars end at the share `top`."""
    least, most = counts[counts > 0].min(), counts.max()
    # A bar that is less than a pixel high cannot be seen on an even scale.
    if least < most / 200:
        axes.set_yscale("log")
        axes.set_ylim(0.7, 0.7 * (most / 0.7) ** (1 / top))
        axes.set_ylabel("sequences (log scale)")
    else:
        axes.set_ylim(0, most / top)
        axes.locator_params(axis="y", integer=True)
        axes.set_ylabel("sequences")


def _widen_axis(axes: Any, edges: NDArray[Any]) -> None:
    """Leave room beside the bars, so that a single one is no wall."""
    middle, half = edges.mean(), (edges[-1] - edges[0]) / 2
    half = max(1.08 * half, 4, 0.05 * edges[-1])
    axes.set_xlim(middle - half, middle + half)


def _find_marks(axes: Any, numbers: DataNumbers) -> list[tuple[int, str, str]]:
    """Return what is marked, by its place: where it is, its label and its colour.

    The middle, the 95th percentile, the longest, and `chat.max_length` where the axis reaches it:
    drawn where it is, a far larger one would press the bars together at the left.
    """
    ranked = np.sort(numbers.lengths)
    last = len(ranked) - 1
    names: dict[int, list[str]] = {}
    for name, share in (("median", 0.5), ("95th percentile", 0.95), ("longest", 1.0)):
        names.setdefault(int(ranked[round(share * last)]), []).append(name)
    marks = [(at, f"{', '.join(labels)} {at:,}", TEXT_COLOR) for at, labels in names.items()]
    limit, right = numbers.max_length, axes.get_xlim()[1]
    if limit is not None and limit <= right * (4 if axes.get_xscale() == "log" else 1.5):
        marks.append((limit, f"chat.max_length {limit:,}", EVAL_COLOR))
        axes.set_xlim(right=max(right, limit * 1.04))
    return sorted(marks, key=lambda mark: mark[0])


def _draw_marks(axes: Any, marks: list[tuple[int, str, str]], top: float) -> None:
    """Draw a line and a label for each mark; above the share `top` of the height are no bars.

    Each line ends at its label, and those to the right end lower, so that no label crosses any.
    """
    across = axes.get_xaxis_transform()  # x in tokens, y as a share of the height
    for number, (at, label, color) in enumerate(reversed(marks), start=1):
        height = top + _MARK_ROOM * number
        axes.plot([at, at], [0, height], color=color, lw=1.3, transform=across)
        axes.annotate(
            label,
            (at, height),
            xytext=(5, -4),
            xycoords=across,
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=9,
            annotation_clip=False,
        )


def _rank_sources(sources: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return the sources from the one with the most rows to the one with the fewest."""
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
    drawn = axes.barh(range(len(bars)), counts, color=TRAIN_COLOR, height=0.72)
    axes.set_yticks(range(len(bars)), map(literal_label, names))
    labels = [f"{rows:,} ({rows / total:.1%})" for rows in counts]
    axes.bar_label(drawn, labels, padding=4, fontsize=9, color=TEXT_COLOR)
    axes.invert_yaxis()
    axes.set_xlim(0, max(counts) * 1.22)
    axes.set_xlabel("rows of an epoch")
    axes.tick_params(axis="y", length=0)
    _plain_numbers(axes.xaxis)
    style_axes(axes, "x")


def _log_ticks(axis: Any, edges: NDArray[Any]) -> None:
    """Set ticks at round numbers, as many as there is room for."""
    steps = (1, 2, 5) if edges[-1] < 2000 * edges[0] else (1, 3)
    ticks = [step * 10**power for power in range(10) for step in steps]
    axis.set_ticks([tick for tick in ticks if edges[0] <= tick <= edges[-1]])
    axis.set_ticks([], minor=True)


def _plain_numbers(axis: Any) -> None:
    """Write numbers out, such as 20,000."""
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
