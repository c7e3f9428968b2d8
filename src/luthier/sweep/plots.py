"""The pictures of a sweep: parameters against the objective, parallel coordinates, importance."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.record.plot import EVAL, INK, TRAIN
from luthier.sweep.importance import importance
from luthier.sweep.objective import Objective
from luthier.sweep.scales import Scale, of_numbers, scale, shares
from luthier.sweep.table import best, complete
from luthier.sweep.trials import Trial, short_names

_COLUMNS = 3
_BEHIND_TEXT = {"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.8}


def draw(trials: Sequence[Trial], objectives: Sequence[Objective], folder: Path) -> list[Path]:
    """Draw all that these trials allow as PNG files; returns them."""
    done = complete(trials, objectives)
    if len(done) < 2:
        return []
    import matplotlib

    matplotlib.use("Agg")
    drawn = [
        _parameters(done, objectives, folder / "parameters.png"),
        _parallel(done, objectives, folder / "parallel.png"),
        _importance(done, objectives, folder / "importance.png"),
    ]
    if len(objectives) > 1:
        drawn.append(_front(done, objectives, folder / "front.png"))
    return [path for path in drawn if path is not None]


def _names(trials: Sequence[Trial]) -> dict[str, str]:
    """The keys that vary, with their short names."""
    keys = dict.fromkeys(key for trial in trials for key in trial.params)
    return dict(short_names(keys))


def _parameters(trials: list[Trial], objectives: Sequence[Objective], path: Path) -> Path:
    """Each parameter against each objective."""
    from matplotlib import pyplot

    names = _names(trials)
    panels = [(key, objective) for objective in objectives for key in names]
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(
        *(rows, columns), figsize=(4.2 * columns, 3.2 * rows), dpi=130, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    leaders = best(trials, objectives)
    for axes, (key, objective) in zip(grid.flat, panels, strict=False):
        line = scale([trial.params[key] for trial in trials])
        values = [trial.values[objective.name] for trial in trials]
        axes.scatter(line.places, values, color=TRAIN, s=26, alpha=0.8)
        for leader in leaders:
            at = trials.index(leader)
            axes.scatter(line.places[at], values[at], color=EVAL, s=46, zorder=3)
        _along(axes, line)
        if of_numbers(values).is_log:
            axes.set_yscale("log")
        axes.set_xlabel(names[key])
        axes.set_ylabel(objective.name)
        _dress(axes)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    what = "the best trial" if len(leaders) == 1 else "the trials that none beats"
    figure.suptitle(f"{len(trials)} finished trials; red: {what}", color=INK, fontsize=10)
    return _save(figure, path)


def _along(axes: Any, line: Scale) -> None:
    """Put the parameter's scale below a panel."""
    if line.is_log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(lambda value, place: "")
    if len(line.ticks) <= 6:
        axes.set_xticks(line.ticks, line.labels)
        axes.margins(x=0.12)


def _parallel(trials: list[Trial], objectives: Sequence[Objective], path: Path) -> Path:
    """One line for each trial through its parameters to what came out."""
    from matplotlib import colormaps, pyplot

    names = _names(trials)
    lines = [(names[key], scale([trial.params[key] for trial in trials])) for key in names]
    for objective in objectives:
        lines.append((objective.name, of_numbers([t.values[objective.name] for t in trials])))
    figure, axes = pyplot.subplots(
        figsize=(max(5.5, 2.1 * len(lines)), 4.4), dpi=130, layout="constrained"
    )
    first = objectives[0]
    goodness = 1 - shares(_comparable(trials, first))
    columns = [line.shares for _, line in lines]
    for at in sorted(range(len(trials)), key=lambda n: goodness[n]):
        colour = colormaps["viridis_r"](0.15 + 0.85 * goodness[at])
        heights = [column[at] for column in columns]
        axes.plot(range(len(lines)), heights, color=colour, lw=1 + 1.6 * goodness[at], alpha=0.85)
    for place, (_, line) in enumerate(lines):
        axes.axvline(place, color=INK, lw=0.8)
        for height, label in zip(line.tick_shares, line.labels, strict=True):
            axes.annotate(
                *(label, (place, height), (4, 0)), textcoords="offset points", fontsize=8,
                va="center", color=INK, bbox=_BEHIND_TEXT,
            )  # fmt: skip
    axes.set_xticks(range(len(lines)), [name for name, _ in lines])
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(lines) - 0.6)
    way = "highest" if first.maximize else "lowest"
    axes.set_title(f"dark and thick: {way} {first.name}", loc="left", color=INK, fontsize=10)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="x", length=0)
    return _save(figure, path)


def _comparable(trials: list[Trial], objective: Objective) -> Any:
    """What to compare by, less being better, on the scale on which it is drawn."""
    import numpy as np

    line = of_numbers([trial.values[objective.name] for trial in trials])
    values = np.log10(line.places) if line.is_log else line.places
    return -values if objective.maximize else values


def _importance(trials: list[Trial], objectives: Sequence[Objective], path: Path) -> Path | None:
    """How much each parameter mattered, for each objective."""
    names = _names(trials)
    found = [(one, importance(trials, list(names), one)) for one in objectives]
    known = [(objective, shown) for objective, shown in found if shown is not None]
    if not known:
        return None
    from matplotlib import pyplot

    height = 0.42 * len(names) + 1.1
    figure, grid = pyplot.subplots(
        len(known), 1, figsize=(7, height * len(known)), dpi=130, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, (objective, shown) in zip(grid[:, 0], known, strict=True):
        ranked = sorted(shown.shares.items(), key=lambda item: item[1])
        bars = axes.barh([names[key] for key, _ in ranked], [one for _, one in ranked], color=TRAIN)
        axes.bar_label(bars, [f"{one:.0%}" for _, one in ranked], padding=4, color=INK, fontsize=9)
        axes.set_xlim(0, 1.08)
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:.0%}")
        title = f"importance for {objective.name}: {shown.method}, {len(trials)} trials"
        axes.set_title(title, loc="left", color=INK, fontsize=10)
        _dress(axes)
    return _save(figure, path)


def _front(trials: list[Trial], objectives: Sequence[Objective], path: Path) -> Path:
    """The first two objectives against each other, and the trials that no other beats."""
    from matplotlib import pyplot

    one, other = objectives[:2]
    figure, axes = pyplot.subplots(figsize=(6, 4.4), dpi=130, layout="constrained")
    points = [(trial.values[one.name], trial.values[other.name]) for trial in trials]
    axes.scatter(*zip(*points, strict=True), color=TRAIN, s=30, label="finished trials")
    front = sorted((t.values[one.name], t.values[other.name]) for t in best(trials, objectives))
    axes.plot(*zip(*front, strict=True), "o-", color=EVAL, label="beaten by no other")
    axes.set_xlabel(f"{one.name} ({'more' if one.maximize else 'less'} is better)")
    axes.set_ylabel(f"{other.name} ({'more' if other.maximize else 'less'} is better)")
    axes.legend(frameon=False)
    _dress(axes)
    return _save(figure, path)


def _dress(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    pyplot.close(figure)
    temporary.replace(path)
    return path
