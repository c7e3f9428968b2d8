"""How much each parameter mattered: fANOVA where it can be had, else what it explains alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from luthier.sweep.objective import Objective
from luthier.sweep.scales import scale
from luthier.sweep.trials import Trial

FEWEST = 4
"""Trials below which nothing is said."""
_GROUPS = 4
_FANOVA = ("optuna", "sklearn")


@dataclass(frozen=True)
class Importance:
    """The share of each parameter, from 0 to 1, and how it was measured."""

    method: str
    shares: dict[str, float]


def importance(
    trials: Sequence[Trial], keys: Sequence[str], objective: Objective
) -> Importance | None:
    """The importance of parameters for an objective, over finished trials that have a value of it.

    fANOVA (Hutter et al. 2014) with Optuna and scikit-learn; otherwise the correlation ratio
    (Pearson 1905): the share of the variance that lies between groups of trials with the same
    value, or a quarter of all values. None for fewer than four trials, or values all alike.
    """
    values = np.array([trial.values[objective.name] for trial in trials])
    varied = [key for key in keys if len({trial.params[key] for trial in trials}) > 1]
    if len(trials) < FEWEST or not varied or np.ptp(values) == 0:
        return None
    if all(find_spec(name) is not None for name in _FANOVA):
        return Importance("fANOVA", _fanova(trials, varied, values))
    ratios = {key: explained([trial.params[key] for trial in trials], values) for key in varied}
    return Importance("variance explained by each alone", ratios)


def explained(texts: Sequence[str], values: NDArray[np.float64]) -> float:
    """The share of the variance of `values` that lies between groups of equal or near texts."""
    places = scale(texts).places
    different = np.unique(places)
    if len(different) > _GROUPS and len(different) > len(values) // 2:
        edges = np.quantile(places, np.linspace(0, 1, _GROUPS + 1)[1:-1])
        places = np.searchsorted(edges, places, side="right").astype(np.float64)
        different = np.unique(places)
    mean, whole = values.mean(), ((values - values.mean()) ** 2).sum()
    groups = [values[places == one] for one in different]
    between = sum(len(group) * (group.mean() - mean) ** 2 for group in groups)
    return float(between / whole)


def _fanova(
    trials: Sequence[Trial], keys: Sequence[str], values: NDArray[np.float64]
) -> dict[str, float]:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    space: dict[str, BaseDistribution] = {}
    places: dict[str, list[float | str]] = {}
    for key in keys:
        texts = [trial.params[key] for trial in trials]
        line = scale(texts)
        is_named = line.labels == tuple(sorted(set(texts)))
        if is_named:
            space[key] = CategoricalDistribution(sorted(set(texts)))
            places[key] = list(texts)
        else:
            low, high = float(line.places.min()), float(line.places.max())
            space[key] = FloatDistribution(low, high, log=line.is_log)
            places[key] = [float(one) for one in line.places]
    for number, value in enumerate(values):
        params = {key: places[key][number] for key in keys}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=space, value=float(value))
        )
    return dict(get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0)))
