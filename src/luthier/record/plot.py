"""The picture of a run: its loss, or its reward, over the steps."""

from pathlib import Path
from typing import Any

from luthier.record.journal import read_lines

FEW = 50
"""Points below which a smoothed line would only lag behind."""

INK, TRAIN, EVAL, FAINT = "#222222", "#2f6db3", "#d1495b", "#9bb8d9"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, oldest first; none where the file is missing."""
    return read_lines(path)


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
        axes.plot(*zip(*held_out, strict=True), "o-", color=EVAL, ms=4, label=label)
    _dress_loss_plot(axes, title, name, [value for _, value in train + held_out])
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    pyplot.close(figure)
    temporary.replace(path)
    return True


def _draw_train(axes: Any, train: list[tuple[int, float]], name: str) -> None:
    label = f"training {name}, at last {train[-1][1]:.3g}"
    if len(train) < FEW:
        axes.plot(*zip(*train, strict=True), color=TRAIN, lw=2, label=label)
        return
    axes.plot(*zip(*train, strict=True), color=FAINT, lw=1, label=label)
    smooth = _smooth([loss for _, loss in train])
    axes.plot([step for step, _ in train], smooth, color=TRAIN, lw=2, label="smoothed")


def _smooth(values: list[float], weight: float = 0.8) -> list[float]:
    """The exponential moving average, corrected for its start (Kingma & Ba 2015, section 3)."""
    average, out = 0.0, []
    for n, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**n))
    return out


def _dress_loss_plot(axes: Any, title: str, name: str, values: list[float]) -> None:
    axes.set_title(title, loc="left", color=INK)
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
