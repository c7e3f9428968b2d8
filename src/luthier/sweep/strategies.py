"""Which points a sweep tries: a grid, points drawn at random, or those that Optuna asks for.

Optuna's study lies in the sweep's folder; it also says which trial is not worth its time.
"""

import inspect
import itertools
import math
import random
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from luthier.errors import Mistake, UserError, nearest_option, suggest_options
from luthier.storage.typed_files import DamagedFileError, load_json_lines
from luthier.sweep.objective import Objective, PruningSignal
from luthier.sweep.settings import Named, OptunaSettings
from luthier.sweep.space import SearchAxis, SearchSpace
from luthier.sweep.trials import Trial

if TYPE_CHECKING:
    import optuna

# Points that are known ahead: all of a grid, or some drawn at random, the same at every start.

Point = dict[str, str]
_PATIENCE = 1000
"""Draws in a row that may repeat earlier points before a space is taken for exhausted."""


class Strategy(Protocol):
    """Which points a sweep tries, one after the other."""

    total: int
    """How many trials there will be."""

    def next(self, trials: list[Trial]) -> Point | None:
        """Return the point of the next trial; None where there is no further one."""

    def is_bad(self, trial: Trial, step: int, value: float) -> bool:
        """Return whether a trial should end here, by what it measured at a step."""

    def tell(self, trial: Trial) -> None:
        """Hear what came out of a trial."""


class PointList:
    """A list that is known ahead."""

    def __init__(self, points: list[Point]) -> None:
        self.points = points
        self.total = len(points)

    def next(self, trials: list[Trial]) -> Point | None:
        """Return the next point that no trial has."""
        return self.points[len(trials)] if len(trials) < len(self.points) else None

    def is_bad(self, trial: Trial, step: int, value: float) -> bool:
        """Never: every point is tried to its end."""
        return False

    def tell(self, trial: Trial) -> None:
        """Nothing depends on it."""


def grid_points(space: SearchSpace) -> list[Point]:
    """Return every combination, the last axis running fastest."""
    keys = [axis.key for axis in space.axes]
    rows = itertools.product(*(axis.values for axis in space.axes))
    return [dict(zip(keys, row, strict=True)) for row in rows]


def random_points(space: SearchSpace, count: int, seed: int) -> list[Point]:
    """Draw `count` different points, or all of a smaller space; a longer list begins alike."""
    dice = random.Random(seed)
    points: dict[tuple[str, ...], Point] = {}
    repeated = 0
    while len(points) < min(count, space.size) and repeated < _PATIENCE:
        # Every axis is drawn, whether or not the point is new: a longer list then begins alike.
        point = {axis.key: draw_points(axis, dice) for axis in space.axes}
        repeated = repeated + 1 if tuple(point.values()) in points else 0
        points.setdefault(tuple(point.values()), point)
    return list(points.values())


def draw_points(axis: SearchAxis, dice: random.Random) -> str:
    """Return one value of an axis: each as likely as another, on its own scale."""
    if axis.values:
        return dice.choice(axis.values)
    if axis.whole and not axis.log:
        return str(dice.randint(round(axis.low), round(axis.high)))
    if not axis.log:
        return axis.number(_round_digits(dice.uniform(axis.low, axis.high)))
    low, high = math.log(axis.low), math.log(axis.high)
    # exp(log(x)) may miss a bound by its last digit and lie outside the axis.
    drawn = math.exp(dice.uniform(low, high))
    return axis.number(_round_digits(min(max(drawn, axis.low), axis.high)))


def _round_digits(drawn: float) -> float:
    """Return the number with six digits, so that it can be typed again."""
    return float(f"{drawn:.6g}")


# Points that depend on what came out: Optuna. It is imported where it is used, since a sweep over a
# grid works without it.

_SAMPLERS = {
    "tpe": "TPESampler",
    "random": "RandomSampler",
    "nsgaii": "NSGAIISampler",
    "nsgaiii": "NSGAIIISampler",
    "cmaes": "CmaEsSampler",
    "qmc": "QMCSampler",
    "gp": "GPSampler",
}
_PRUNERS = {
    "none": "NopPruner",
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
    "successive_halving": "SuccessiveHalvingPruner",
    "hyperband": "HyperbandPruner",
    "threshold": "ThresholdPruner",
}
_PACKAGES = {"cmaes": ("cmaes",), "qmc": ("scipy",), "gp": ("scipy", "torch")}


def check_strategy(settings: OptunaSettings) -> list[Mistake]:
    """Return what is wrong with the sampler and the pruner, or that Optuna is missing."""
    if find_spec("optuna") is None:
        text = "optuna is not installed. Install it: pip install 'luthier[sweep]'."
        return [Mistake("hydra/sweeper", text)]
    results = [_make_component("sampler", settings.sampler, _SAMPLERS, {"seed": 0})]
    results += [_make_component("pruner", settings.pruner, _PRUNERS, {})]
    return [result for result in results if isinstance(result, Mistake)]


def has_pruner(settings: OptunaSettings) -> bool:
    """Return whether bad trials are to be ended early."""
    return _split_setting(settings.pruner)[0] != "none"


def _split_setting(setting: Named) -> tuple[str, dict[str, Any]]:
    if isinstance(setting, str):
        return setting, {}
    rest = {key: option for key, option in setting.items() if key != "name"}
    return str(setting.get("name")), rest


def _make_component(
    role: str, setting: Named, classes: Mapping[str, str], more: dict[str, Any]
) -> Any:
    """Return the sampler or pruner with its settings, or the mistake in them."""
    import optuna

    key = f"hydra.sweeper.{role}"
    name, rest = _split_setting(setting)
    if name not in classes:
        return Mistake(key, f"there is no {role} {name!r}. {suggest_options(name, classes)}")
    missing = [package for package in _PACKAGES.get(name, ()) if find_spec(package) is None]
    if missing:
        return Mistake(key, f"{name} needs {missing[0]}. Install it: pip install {missing[0]}.")
    module = optuna.samplers if role == "sampler" else optuna.pruners
    optuna_class = getattr(module, classes[name])
    wrong = _find_wrong_setting(optuna_class, rest, key)
    if wrong:
        return wrong
    with warnings.catch_warnings():
        # Optuna 5.0.0 warns of each experimental sampler, and users who name one know which it is.
        warnings.simplefilter("ignore")
        try:
            return optuna_class(**rest, **more)
        except (TypeError, ValueError) as error:
            return Mistake(key, f"{name}: {error}")


def _find_wrong_setting(
    optuna_class: Callable[..., Any], rest: dict[str, Any], key: str
) -> Mistake | None:
    parameters = [name for name in inspect.signature(optuna_class).parameters if name != "seed"]
    for name in rest:
        if name == "seed":
            return Mistake(key, "the seed is hydra.sweeper.seed. Remove it here.")
        if name not in parameters:
            near = nearest_option(name, parameters)
            hint = f"Did you mean {near}?" if near else f"Settings: {', '.join(parameters)}."
            return Mistake(key, f"{optuna_class.__name__} has no setting {name!r}. {hint}")
    return None


_STUDY_ADVICE = "Put it back from a copy, or search anew in another output_dir=..."


class OptunaStrategy:
    """A study in a sweep's folder, which goes on where it was."""

    def __init__(
        self,
        path: Path,
        space: SearchSpace,
        settings: OptunaSettings,
        objectives: tuple[Objective, ...],
        watched: PruningSignal | None,
    ) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A journal is one file that is only appended to: it needs no database and survives kill -9.
        load_json_lines(path, dict[str, Any], _STUDY_ADVICE)
        try:
            backend = JournalFileBackend(str(path))
            self._study: optuna.Study = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend),
                study_name="sweep",
                directions=[objective.direction for objective in objectives],
                load_if_exists=True,
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise DamagedFileError(
                f"{path}: optuna cannot read it ({problem}).\n{_STUDY_ADVICE}"
            ) from error
        before = len(self._study.trials)
        # With the seed of the start it would draw the points of the start again.
        self._study.sampler = _make_component(
            "sampler", settings.sampler, _SAMPLERS, {"seed": settings.seed + before}
        )
        self._study.pruner = _make_component("pruner", settings.pruner, _PRUNERS, {})
        self._space, self._objectives, self._watched = space, objectives, watched
        self.total = settings.n_trials
        self._refuse_other_directions(path)

    def _refuse_other_directions(self, path: Path) -> None:
        there = [direction.name.lower() for direction in self._study.directions]
        if there != [direction.direction for direction in self._objectives]:
            raise UserError(
                f"hydra.sweeper.objective: {path} holds a study that wants to "
                f"{' and '.join(there)}. Choose another output_dir=..."
            )

    def next(self, trials: list[Trial]) -> Point | None:
        """Return a point that this study was not asked for before."""
        drawn_count = len(self._study.trials)
        if drawn_count > len(trials):
            # The point was drawn, and the sweep ended before its trial was written.
            return self._make_point(self._study.trials[len(trials)].params)
        if drawn_count >= self.total:
            return None
        drawn = self._study.ask({axis.name: _make_distribution(axis) for axis in self._space.axes})
        return self._make_point(drawn.params)

    def _make_point(self, params: Mapping[str, Any]) -> Point:
        return {
            axis.key: axis.number(params[axis.name]) if _is_number(axis) else params[axis.name]
            for axis in self._space.axes
        }

    def is_bad(self, trial: Trial, step: int, value: float) -> bool:
        """Tell the pruner what was measured at a step, and ask it."""
        if self._watched is None or not math.isfinite(value):
            return False
        handle = self._open_trial(trial)
        if step in self._study.trials[trial.number].intermediate_values:
            # A trial that went on from a checkpoint logs its steps again; Optuna 5.0.0 would warn
            # that it ignores the value.
            return False
        handle.report(-value if self._watched.opposite else value, step)
        return handle.should_prune()

    def _open_trial(self, trial: Trial) -> "optuna.Trial":
        import optuna

        # Optuna 5.0.0 has no public way to take up a trial that an earlier process asked for;
        # `_trial_id` is the number that its storage gave it.
        return optuna.Trial(self._study, self._study.trials[trial.number]._trial_id)

    def tell(self, trial: Trial) -> None:
        """Tell the study what came out, unless it knows."""
        from optuna.trial import TrialState

        if self._study.trials[trial.number].state.is_finished() or not trial.is_ended:
            return
        values = [trial.values.get(objective.name, math.nan) for objective in self._objectives]
        if trial.state == "pruned":
            self._study.tell(trial.number, state=TrialState.PRUNED)
        # Optuna takes no NaN for a value: a trial without a number counts as failed for the study.
        elif trial.state == "failed" or not all(map(math.isfinite, values)):
            self._study.tell(trial.number, state=TrialState.FAIL)
        else:
            self._study.tell(trial.number, values)


def _is_number(axis: SearchAxis) -> bool:
    return axis.is_interval or axis.step is not None


def _make_distribution(axis: SearchAxis) -> "optuna.distributions.BaseDistribution":
    """Return the axis as Optuna knows it; values that are no range are categories."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if not _is_number(axis):
        return CategoricalDistribution(axis.values)
    if axis.whole:
        step = round(axis.step or 1)
        return IntDistribution(round(axis.low), round(axis.high), log=axis.log, step=step)
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)
