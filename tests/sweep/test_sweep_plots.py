"""The plots of a sweep: which are drawn, on which scales, and what the importance says."""

import math
import sys

import pytest
from matplotlib import image

from luthier.sweep.objective import Objective
from luthier.sweep.plots import (
    draw_plots,
    importance_hint,
    measure_importance,
    scale_objective,
    scale_parameter,
)
from luthier.sweep.trials import Trial

LOSS = Objective("eval_loss", maximize=False)
SECONDS = Objective("training_seconds", maximize=False)
SCORE = Objective("exact_match", maximize=True)
RATE, RANK = "trainer.args.learning_rate", "lora.r"

SCALES = {
    "numbers in their order, not that of their letters": (
        ["8", "16", "16"], [8, 16, 16], ("8", "16"), False, True,
    ),
    "a log scale from a factor of eight": (
        ["1e-4", "8e-4"], [1e-4, 8e-4], ("0.0001", "0.0008"), True, True,
    ),
    "no log scale with a zero": (["0", "100"], [0, 100], ("0", "100"), False, True),
    "more than six numbers by their ends and their middle": (
        ["1", "2", "3", "4", "5", "50", "100"], [1, 2, 3, 4, 5, 50, 100], ("1", "10", "100"),
        True, False,
    ),
    "names in the order of their letters": (
        ["cosine", "linear", "cosine"], [0, 1, 0], ("cosine", "linear"), False, True,
    ),
    "lists and quotes": (["[q_proj]", "'a b'"], [1, 0], ("a b", "[q_proj]"), False, True),
    "one name among numbers": (["null", "1.0"], [1, 0], ("1.0", "null"), False, True),
    "infinity has no place on a line": (["inf", "1.0"], [1, 0], ("1.0", "inf"), False, True),
}  # fmt: skip


@pytest.mark.parametrize(
    "texts, positions, labels, is_log, is_discrete", SCALES.values(), ids=SCALES
)
def test_scales_of_parameters(texts, positions, labels, is_log, is_discrete):
    scale = scale_parameter(texts)
    assert scale.positions.tolist() == positions
    assert (scale.labels, scale.is_log, scale.is_discrete) == (labels, is_log, is_discrete)


OBJECTIVES = {
    "near each other": ([1.5, 2.0], ("1.5", "2"), False),
    "a factor of twenty": ([0.1, 2.0], ("0.1", "2"), True),
    "all alike": ([1.5, 1.5], ("1.5",), False),
    "alike in four digits": ([10.8120, 10.8124], ("10.812", "10.8124"), False),
}


@pytest.mark.parametrize("values, labels, is_log", OBJECTIVES.values(), ids=OBJECTIVES)
def test_scales_of_objectives(values, labels, is_log):
    scale = scale_objective(values)
    assert (scale.labels, scale.is_log) == (labels, is_log)


FRACTIONS = {
    "numbers": (["1", "2", "3"], [0.0, 0.5, 1.0]),
    "ratios": (["0.001", "0.0001", "0.00001"], [1.0, 0.5, 0.0]),
    "names": (["small", "default", "small"], [1.0, 0.0, 1.0]),
    "all alike": (["7", "7"], [0.5, 0.5]),
    "names in quotes": (["'b'", "'a'"], [1.0, 0.0]),
}


@pytest.mark.parametrize("texts, fractions", FRACTIONS.values(), ids=FRACTIONS)
def test_the_drawn_line_runs_from_zero_to_one(texts, fractions):
    scale = scale_parameter(texts)
    assert scale.to_fractions(scale.positions) == pytest.approx(fractions)


def test_a_label_stands_where_the_lines_go():
    scale = scale_parameter(["1e-4", "1e-2", "1e-3"])
    assert scale.to_fractions(scale.ticks) == pytest.approx([0, 0.5, 1])
    alike = scale_objective([1.5, 1.5])
    assert alike.to_fractions(alike.ticks).tolist() == [0.5]


def finished(values, params, names=(RATE, RANK)):
    """Return finished trials with these values of their objectives, and these parameters."""
    return [
        Trial(number, dict(zip(names, texts, strict=True)), "finished", dict(measured))
        for number, (measured, texts) in enumerate(zip(values, params, strict=True))
    ]


GRID = [(rate, rank) for rate in ("1e-4", "1e-3") for rank in ("8", "16", "32")]
LOSSES = [
    {"eval_loss": 2.0 - 0.1 * n, "training_seconds": 10.0 + n, "exact_match": n / 9}
    for n in range(6)
]
ALIKE = [{"eval_loss": 1.5}] * 6
NAN = [{"eval_loss": math.nan}, *LOSSES[1:]]
TWO = ["parameters", "parallel"]
THREE = [*TWO, "importance"]

DRAWN = {
    "a grid": (finished(LOSSES, GRID), [LOSS], THREE),
    "two objectives": (finished(LOSSES, GRID), [LOSS, SECONDS], [*THREE, "front"]),
    "three objectives": (finished(LOSSES, GRID), [LOSS, SECONDS, SCORE], [*THREE, "front"]),
    "a loss that is NaN once": (finished(NAN, GRID), [LOSS], THREE),
    "losses below a billionth": (
        finished([{"eval_loss": 1e-10 * n} for n in range(6)], GRID), [LOSS], THREE,
    ),
    "all alike: nothing to explain": (finished(ALIKE, GRID), [LOSS], TWO),
    "one objective all alike": (
        finished([{**row, "training_seconds": 1.0} for row in LOSSES], GRID),
        [LOSS, SECONDS], [*THREE, "front"],
    ),
    "one parameter explains all": (
        finished(LOSSES, [(str(n),) for n in range(6)], (RANK,)), [LOSS], TWO,
    ),
    "a second parameter that does not vary": (
        finished(LOSSES, [(str(n), "8") for n in range(6)]), [LOSS], TWO,
    ),
    "three trials are too few for an importance": (finished(LOSSES[:3], GRID[:3]), [LOSS], TWO),
    "a single trial": (finished(LOSSES[:1], GRID[:1]), [LOSS], []),
    "names, lists and infinity": (
        finished(LOSSES, [(modules, norm) for modules in ("all-linear", "[q_proj]", "'a b'")
                          for norm in ("inf", "1")], ("lora.target_modules", "max_grad_norm")),
        [LOSS], THREE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("trials, objectives, names", DRAWN.values(), ids=DRAWN)
def test_what_is_drawn(tmp_path, trials, objectives, names):
    plots = draw_plots(trials, objectives, tmp_path)
    paths = [plot.path for plot in plots]
    assert [path.stem for path in paths] == names
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    for path in paths:
        pixels = image.imread(path)
        assert pixels.std() > 0.01, "an empty picture"
    for plot in plots:
        assert plot.svg.startswith("<svg") and "width=" not in plot.svg.split(">")[0]
        assert "var(--ink)" in plot.svg and "#222222" not in plot.svg and "<!--" not in plot.svg
    assert importance_hint(trials, objectives) is None


def test_trials_without_a_result_are_not_drawn(tmp_path):
    trials = finished(LOSSES[:3], GRID[:3])
    trials[0].state, trials[1].state = "failed", "pruned"
    assert draw_plots(trials, [LOSS], tmp_path) == []


def test_a_log_scale_counts_by_its_decades():
    """The loss falls between 1e-5 and 1e-4, which is a hundredth of the numbers up to 1e-2.

    The rank moves it by half as much; weighed by plain numbers, the rank would be all.
    """
    rates = [1e-5 * 10 ** (3 * n / 11) for n in range(12)]
    points = [(repr(rate), rank) for rate in rates for rank in ("8", "16")]
    values = [
        {"eval_loss": (1.0 if float(rate) < 1e-4 else 0.0) + (0.3 if rank == "8" else 0.0)}
        for rate, rank in points
    ]
    shares = measure_importance(finished(values, points), LOSS)
    assert list(shares) == [RATE, RANK]
    assert shares[RATE] > 0.8
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "module, words",
    [
        ("optuna", "importance.png needs optuna. Install it: pip install 'luthier[sweep]'."),
        ("sklearn", "importance.png needs scikit-learn. Install it: pip install"),
    ],
)
def test_without_a_package_the_other_plots_are_drawn(tmp_path, monkeypatch, module, words):
    monkeypatch.setitem(sys.modules, module, None)
    trials = finished(LOSSES, GRID)
    plots = draw_plots(trials, [LOSS, SECONDS], tmp_path)
    assert [plot.path.stem for plot in plots] == [*TWO, "front"]
    assert importance_hint(trials, [LOSS]).startswith(words)
    assert importance_hint(finished(ALIKE, GRID), [LOSS]) is None
