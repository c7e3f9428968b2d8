"""The picture of a run: its loss over the steps."""

import json
from pathlib import Path
from typing import Any

FEW = 50
"""Points below which a smoothed line would only lag behind."""

INK, TRAIN, EVAL, FAINT = "#222222", "#2f6db3", "#d1495b", "#9bb8d9"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, oldest first; none where the file is missing."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def plot_loss(metrics: list[dict[str, Any]], title: str, path: Path) -> bool:
    """Draw training and held-out loss against the step as a PNG; False where there is no loss."""
    train = [(row["step"], row["loss"]) for row in metrics if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in metrics if "eval_loss" in row]
    if not train and not held_out:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=130)
    if train:
        _draw_train(axes, train)
    if held_out:
        label = f"held-out loss, at last {held_out[-1][1]:.3g}"
        axes.plot(*zip(*held_out, strict=True), "o-", color=EVAL, ms=4, label=label)
    _dress(axes, title, [loss for _, loss in train + held_out])
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    pyplot.close(figure)
    temporary.replace(path)
    return True


def _draw_train(axes: Any, train: list[tuple[int, float]]) -> None:
    label = f"training loss, at last {train[-1][1]:.3g}"
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


def _dress(axes: Any, title: str, losses: list[float]) -> None:
    axes.set_title(title, loc="left", color=INK)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per trained token (nats)")
    if 0 < min(losses) < max(losses) / 20:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.margins(x=0.06)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
