"""The plots of a sweep as PNG files: parameters, parallel coordinates, importance, Pareto front.

They need matplotlib alone; only the numbers of the importance come from Optuna. The plots of
`optuna.visualization.matplotlib` (Optuna 5.0.0) were rendered beside these and show less: each
function below says what they lack. They would also take the plots from sweeps without Optuna.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luthier.record.plots import (
    EVAL_COLOR,
    TEXT_COLOR,
    TRAIN_COLOR,
    literal_label,
    save_figure,
    style_axes,
)
from luthier.sweep.objective import Objective
from luthier.sweep.trials import (
    Trial,
    best_trial,
    completed_trials,
    format_distinct,
    format_value,
    short_names,
)

_LOG_RATIO_OF_PARAMETERS = 8.0
"""A parameter is drawn on a log scale if its greatest value is so many times its least."""
_LOG_RATIO_OF_OBJECTIVES = 20.0
_MOST_DISCRETE_NUMBERS = 6
"""Up to so many different numbers of a parameter have a tick each."""
_FEWEST_FOR_IMPORTANCE = 4
"""Finished trials below which no importance is measured."""
_IMPORTANCE_PACKAGES = {"optuna": "optuna", "sklearn": "scikit-learn"}
"""What fANOVA needs: names to import, and names to install."""
_PANEL_COLUMNS = 3
_WIDTH = 10.5
"""Inches of every plot, so that each fills the width of the page with letters of one size."""
_BEHIND_TEXT = {"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.8}


class Plot(NamedTuple):
    """A plot of a sweep: a PNG file, and the same picture for a page."""

    path: Path
    svg: str
    """An SVG element as wide as its container, in the colours of `luthier.web_page`."""


def draw_plots(
    trials: Sequence[Trial], objectives: Sequence[Objective], folder: Path
) -> list[Plot]:
    """Draw every plot that these trials allow into `folder` as PNG files, and return the plots.

    Only finished trials with a finite value of every objective are drawn: a trial that failed, was
    pruned or ended in NaN has none. Fewer than two of them give no plot.
    """
    finished = completed_trials(trials, objectives)
    if len(finished) < 2:
        return []
    import matplotlib

    # Machines that train have no display, and the default backend may look for one.
    matplotlib.use("Agg")
    plots = [
        _plot_parameters(finished, objectives, folder / "parameters.png"),
        _plot_parallel_coordinates(finished, objectives, folder / "parallel.png"),
    ]
    explained = _objectives_to_explain(finished, objectives)
    if explained and not _missing_packages():
        plots.append(_plot_importance(finished, explained, folder / "importance.png"))
    if len(objectives) > 1:
        plots.append(_plot_pareto_front(finished, objectives, folder / "front.png"))
    return plots


def importance_hint(trials: Sequence[Trial], objectives: Sequence[Objective]) -> str | None:
    """Return which packages `draw_plots` lacks for the importance, and how they are installed.

    None means that nothing is lacking, or that these trials allow no importance anyway.
    """
    missing = _missing_packages()
    if not missing or not _objectives_to_explain(completed_trials(trials, objectives), objectives):
        return None
    them = "it" if len(missing) == 1 else "them"
    return (
        f"importance.png needs {' and '.join(missing)}. Install {them}: pip install "
        "'luthier[sweep]'. The same command then draws it, and trains no finished trial again."
    )


def measure_importance(trials: Sequence[Trial], objective: Objective) -> dict[str, float]:
    """Return the share of each varied parameter in what moves an objective: Optuna's fANOVA.

    The shares (Hutter et al. 2014) lie between 0 and 1 and add up to 1; the key of the most
    important parameter comes first. `trials` are finished ones that have a finite value of the
    objective; it must not be the same in all of them.
    """
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    distributions: dict[str, optuna.distributions.BaseDistribution] = {}
    columns: dict[str, list[float]] = {}
    for key in _varied_keys(trials):
        scale = scale_parameter([trial.params[key] for trial in trials])
        if scale.is_discrete:
            columns[key] = scale.positions.tolist()
            distributions[key] = CategoricalDistribution(sorted(set(columns[key])))
        else:
            # Optuna 5.0.0 hands fANOVA a log scale as plain numbers (`transform_log=False`): of
            # 1e-5 to 1e-2, nine tenths of the weight lie above 1e-3. The drawn line weighs evenly.
            columns[key] = scale.to_fractions(scale.positions).tolist()
            distributions[key] = FloatDistribution(0.0, 1.0)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    values = np.array([trial.values[objective.name] for trial in trials])
    # scikit-learn 1.9.1 splits no leaf of a variance below 2e-16: of losses around 1e-9 Optuna then
    # raises "Encountered zero total variance in all trees". A share has no unit.
    values = (values - values.min()) / np.ptp(values)
    for row, value in enumerate(values.tolist()):
        params = {key: column[row] for key, column in columns.items()}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=value)
        )
    # Not Optuna's default: PED-ANOVA asks for five trials in the best tenth (its docstring), so for
    # fifty in all, and gives equal shares where an objective is the same in all trials.
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(share) for key, share in shares.items()}


@dataclass(frozen=True)
class Scale:
    """Where the values of the trials lie on an axis, and what the axis says beside them."""

    positions: NDArray[np.float64]
    """One for each trial, shape (trials,): the number itself, or the rank of a name."""
    ticks: tuple[float, ...]
    """Positions that have a label."""
    labels: tuple[str, ...]
    is_log: bool = False
    is_discrete: bool = False
    """Whether every value has a tick: names, or a few different numbers."""

    def to_fractions(self, positions: ArrayLike) -> NDArray[np.float64]:
        """Map positions to the drawn line, which runs from 0 at the least to 1 at the greatest.

        Where all trials have the same position, it lies in the middle.
        """
        line, ends = self._line(positions), self._line(self.positions)
        low, high = ends.min(), ends.max()
        return np.full(len(line), 0.5) if low == high else (line - low) / (high - low)

    def _line(self, positions: ArrayLike) -> NDArray[np.float64]:
        numbers = np.asarray(positions, dtype=np.float64)
        return np.log10(numbers) if self.is_log else numbers


def scale_parameter(texts: Sequence[str]) -> Scale:
    """Return the scale of a parameter from its values as typed, one for each trial.

    Finite numbers lie on a line, or on a log scale where they span a factor of eight; if one value
    is no number, all are names, side by side in alphabetic order.
    """
    numbers = [_finite_number(text) for text in texts]
    if any(number is None for number in numbers):
        names = sorted(set(texts))
        ranks = np.array([names.index(text) for text in texts], dtype=np.float64)
        labels = tuple(literal_label(format_value(name)) for name in names)
        return Scale(ranks, tuple(range(len(names))), labels, is_discrete=True)
    positions = np.array(numbers, dtype=np.float64)
    ticks = sorted(set(positions.tolist()))
    low, high = ticks[0], ticks[-1]
    is_log = low > 0 and high >= _LOG_RATIO_OF_PARAMETERS * low
    is_discrete = len(ticks) <= _MOST_DISCRETE_NUMBERS
    if not is_discrete:
        ticks = [low, math.sqrt(low * high) if is_log else sum(ticks) / len(ticks), high]
    return Scale(positions, tuple(ticks), tuple(f"{n:.4g}" for n in ticks), is_log, is_discrete)


def scale_objective(values: Sequence[float]) -> Scale:
    """Return the scale of an objective from its values, one finite number for each trial."""
    positions = np.array(values, dtype=np.float64)
    low, high = float(positions.min()), float(positions.max())
    ticks = (low, high) if low < high else (low,)
    is_log = low > 0 and high >= _LOG_RATIO_OF_OBJECTIVES * low
    return Scale(positions, ticks, tuple(format_distinct(ticks, 4)), is_log)


def _finite_number(text: str) -> float | None:
    """Return the number that a value is, or None for a name; `inf` and `nan` have no position."""
    try:
        number = float(text.strip("'\""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _missing_packages() -> list[str]:
    """Return the packages that the importance needs and that are not installed."""
    return [name for module, name in _IMPORTANCE_PACKAGES.items() if find_spec(module) is None]


def _objectives_to_explain(
    trials: Sequence[Trial], objectives: Sequence[Objective]
) -> list[Objective]:
    """Return the objectives that differ between trials, if there is an importance to measure.

    Of fewer than four trials it would be noise, and a parameter that varies alone explains all.
    """
    if len(trials) < _FEWEST_FOR_IMPORTANCE or len(_varied_keys(trials)) < 2:
        return []
    return [
        objective
        for objective in objectives
        if len({trial.values[objective.name] for trial in trials}) > 1
    ]


def _varied_keys(trials: Sequence[Trial]) -> list[str]:
    """Return the keys of the parameters that differ between these trials."""
    keys = _parameter_names(trials)
    return [key for key in keys if len({trial.params[key] for trial in trials}) > 1]


def _parameter_names(trials: Sequence[Trial]) -> dict[str, str]:
    """Return the keys that the sweep varies, each with its short name."""
    keys = dict.fromkeys(key for trial in trials for key in trial.params)
    return {key: literal_label(name) for key, name in short_names(keys)}


def _plot_parameters(trials: list[Trial], objectives: Sequence[Objective], path: Path) -> Plot:
    """Plot each parameter against each objective, the best trials in red.

    Optuna's `plot_slice` draws one objective, never on a log scale, and does not mark the best
    trial; all panels stand in one row, where the names of categories overlap.
    """
    names = _parameter_names(trials)
    pairs = [(key, objective) for objective in objectives for key in names]
    figure, panels = _make_panels(len(pairs))
    best_trials = best_trial(trials, objectives)
    for axes, (key, objective) in zip(panels, pairs, strict=True):
        scale = scale_parameter([trial.params[key] for trial in trials])
        values = [trial.values[objective.name] for trial in trials]
        axes.scatter(scale.positions, values, color=TRAIN_COLOR, s=26, alpha=0.8)
        for trial in best_trials:
            row = trials.index(trial)
            axes.scatter(scale.positions[row], values[row], color=EVAL_COLOR, s=46, zorder=3)
        if scale.is_log:
            axes.set_xscale("log")
            # On a log scale matplotlib labels minor ticks too, over the labels of the values.
            axes.xaxis.set_minor_formatter(lambda value, position: "")
        if len(scale.ticks) <= _MOST_DISCRETE_NUMBERS:
            axes.set_xticks(scale.ticks, scale.labels)
            axes.margins(x=0.12)
        if scale_objective(values).is_log:
            axes.set_yscale("log")
        else:
            # Of values near each other matplotlib would label the differences from one of them.
            axes.ticklabel_format(axis="y", useOffset=False, style="plain")
        axes.set_xlabel(names[key])
        axes.set_ylabel(literal_label(objective.name))
        _style_axes(axes)
    marked = "the best trial" if len(best_trials) == 1 else "the trials that none beats"
    figure.suptitle(f"{len(trials)} finished trials; red: {marked}", color=TEXT_COLOR, fontsize=10)
    return _save_plot(figure, path)


def _plot_parallel_coordinates(
    trials: list[Trial], objectives: Sequence[Objective], path: Path
) -> Plot:
    """Plot one line for each trial through its parameters to its objectives.

    Optuna's `plot_parallel_coordinate` has a fixed width and draws lines over the labels, so that
    six parameters cannot be read; it draws the worst trials nearly white, has no log scale for
    objectives, and calls several of them "Objective 0" and "Objective 1".
    """
    from matplotlib import pyplot

    names = _parameter_names(trials)
    scales = [(names[key], scale_parameter([t.params[key] for t in trials])) for key in names]
    for objective in objectives:
        name = literal_label(objective.name)
        scales.append((name, scale_objective([t.values[objective.name] for t in trials])))
    figure, axes = pyplot.subplots(
        figsize=(max(_WIDTH, 2.1 * len(scales)), 4.4), dpi=130, layout="constrained"
    )
    heights = np.stack([scale.to_fractions(scale.positions) for _, scale in scales])
    first = objectives[0]
    goodness = heights[len(names)] if first.maximize else 1 - heights[len(names)]
    best_rows = {trials.index(trial) for trial in best_trial(trials, objectives)}
    # The best lines are drawn last and lie on top.
    for row in np.argsort(goodness, kind="stable"):
        color = EVAL_COLOR if row in best_rows else TRAIN_COLOR
        width, alpha = 1 + 1.6 * goodness[row], 0.25 + 0.75 * goodness[row]
        axes.plot(range(len(scales)), heights[:, row], color=color, lw=width, alpha=alpha)
    for column, (_, scale) in enumerate(scales):
        axes.axvline(column, color=TEXT_COLOR, lw=0.8)
        for height, label in zip(scale.to_fractions(scale.ticks), scale.labels, strict=True):
            axes.annotate(
                *(label, (column, height), (4, 0)), textcoords="offset points", fontsize=8,
                va="center", color=TEXT_COLOR, bbox=_BEHIND_TEXT,
            )  # fmt: skip
    axes.set_xticks(range(len(scales)), [name for name, _ in scales])
    axes.set_yticks([])
    # The labels of the last axis stand to its right.
    axes.set_xlim(-0.02 * len(scales), len(scales) - 1 + 0.05 * len(scales))
    direction = "higher" if first.maximize else "lower"
    marked = "the best trial" if len(best_rows) == 1 else "the trials that none beats"
    axes.set_title(
        f"one line per trial, thicker for a {direction} {literal_label(first.name)}; red: {marked}",
        loc="left",
        color=TEXT_COLOR,
        fontsize=10,
    )
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="x", length=0)
    return _save_plot(figure, path)


def _plot_importance(trials: list[Trial], objectives: Sequence[Objective], path: Path) -> Plot:
    """Plot how much each parameter explains of each objective.

    Optuna's `plot_param_importances` names neither the method nor the number of trials. With
    several objectives it writes the order of the last one beside the bars of all (Optuna 5.0.0),
    so that the others have wrong names.
    """
    from matplotlib import pyplot

    names = _parameter_names(trials)
    height = 0.42 * len(names) + 1.1
    figure, grid = pyplot.subplots(
        len(objectives), 1, figsize=(_WIDTH, height * len(objectives)), dpi=130, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, objective in zip(grid[:, 0], objectives, strict=True):
        shares = sorted(measure_importance(trials, objective).items(), key=lambda item: item[1])
        lengths = [share for _, share in shares]
        bars = axes.barh([names[key] for key, _ in shares], lengths, color=TRAIN_COLOR)
        labels = [f"{share:.0%}" for share in lengths]
        axes.bar_label(bars, labels, padding=4, color=TEXT_COLOR, fontsize=9)
        axes.set_xlim(0, 1.08)
        axes.xaxis.set_major_formatter(lambda value, position: f"{value:.0%}")
        title = f"importance for {literal_label(objective.name)}: fANOVA, {len(trials)} trials"
        axes.set_title(title, loc="left", color=TEXT_COLOR, fontsize=10)
        _style_axes(axes)
    return _save_plot(figure, path)


def _plot_pareto_front(trials: list[Trial], objectives: Sequence[Objective], path: Path) -> Plot:
    """Plot each pair of objectives against each other, with the trials that no other beats in all.

    Optuna's `plot_pareto_front` does not say which direction is better, draws three objectives as
    one fixed view of a cube, and refuses four.
    """
    pairs = list(combinations(objectives, 2))
    figure, panels = _make_panels(len(pairs))
    front = best_trial(trials, objectives)
    # Only two objectives make a line: with more, a trial of the front may lie anywhere in a panel.
    marker = "o-" if len(objectives) == 2 else "o"
    for axes, pair in zip(panels, pairs, strict=True):
        points = [
            [trial.values[axis_objective.name] for axis_objective in pair] for trial in trials
        ]
        best_points = sorted(
            [trial.values[axis_objective.name] for axis_objective in pair] for trial in front
        )
        axes.scatter(*zip(*points, strict=True), color=TRAIN_COLOR, s=30, label="finished trials")
        label = "beaten by no other"
        axes.plot(*zip(*best_points, strict=True), marker, color=EVAL_COLOR, label=label)
        axes.ticklabel_format(useOffset=False, style="plain")
        for objective, set_label in zip(pair, (axes.set_xlabel, axes.set_ylabel), strict=True):
            better = "more" if objective.maximize else "less"
            set_label(f"{literal_label(objective.name)} ({better} is better)")
        _style_axes(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False)
    return _save_plot(figure, path)


def _make_panels(count: int) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, `count` of them in rows of up to three."""
    from matplotlib import pyplot

    columns = min(_PANEL_COLUMNS, count)
    rows = -(-count // columns)
    height = 4.2 if count == 1 else 3.2 * rows
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(_WIDTH, height), dpi=130, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count])


_PAGE_COLORS = {
    TEXT_COLOR: "var(--ink)",
    "#000000": "var(--ink)",
    "#ffffff": "var(--card)",
    TRAIN_COLOR: "var(--s1)",
    EVAL_COLOR: "var(--s2)",
}
"""Colours of the PNG files, and what a page has in their place."""


def _save_plot(figure: Any, path: Path) -> Plot:
    """Write a figure as a PNG, and return it with its SVG."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    # Of the file only the element: no XML head, no metadata, and no texts, whose letters are drawn.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    for color, page_color in _PAGE_COLORS.items():
        svg = svg.replace(color, page_color)
    return Plot(save_figure(figure, path), svg)


def _style_axes(axes: Any) -> None:
    """Style a panel, whose labels are small since several share a figure."""
    style_axes(axes)
    axes.tick_params(labelsize=8)
