"""Points of a space: all of a grid, or some drawn at random, the same at every start."""

import itertools
import math
import random
from typing import Protocol

from luthier.sweep.space import Axis, Space
from luthier.sweep.trials import Trial

Point = dict[str, str]
_PATIENCE = 1000
"""Draws in a row that may repeat earlier points before a space is taken for exhausted."""


class Strategy(Protocol):
    """Which points a sweep tries, one after the other."""

    total: int
    """How many trials there will be."""

    def next(self, trials: list[Trial]) -> Point | None:
        """The point of the next trial; None where there is no further one."""

    def is_bad(self, trial: Trial, step: int, value: float) -> bool:
        """Whether a trial should end here, by what it measured at a step."""

    def tell(self, trial: Trial) -> None:
        """Hear what came out of a trial."""


class Points:
    """A list that is known ahead."""

    def __init__(self, points: list[Point]) -> None:
        self.points = points
        self.total = len(points)

    def next(self, trials: list[Trial]) -> Point | None:
        """The next point that no trial has."""
        return self.points[len(trials)] if len(trials) < len(self.points) else None

    def is_bad(self, trial: Trial, step: int, value: float) -> bool:
        """Never: every point is tried to its end."""
        return False

    def tell(self, trial: Trial) -> None:
        """Nothing depends on it."""


def grid(space: Space) -> list[Point]:
    """Every combination, the last axis running fastest."""
    keys = [axis.key for axis in space.axes]
    rows = itertools.product(*(axis.values for axis in space.axes))
    return [dict(zip(keys, row, strict=True)) for row in rows]


def at_random(space: Space, count: int, seed: int) -> list[Point]:
    """So many different points, fewer where the space has no more; a longer list begins alike."""
    dice = random.Random(seed)
    found: dict[tuple[str, ...], Point] = {}
    repeated = 0
    while len(found) < min(count, space.size) and repeated < _PATIENCE:
        point = {axis.key: draw(axis, dice) for axis in space.axes}
        repeated = repeated + 1 if tuple(point.values()) in found else 0
        found.setdefault(tuple(point.values()), point)
    return list(found.values())


def draw(axis: Axis, dice: random.Random) -> str:
    """One value of an axis: each as likely as another, on its own scale."""
    if axis.values:
        return dice.choice(axis.values)
    if axis.whole and not axis.log:
        return str(dice.randint(round(axis.low), round(axis.high)))
    if not axis.log:
        return axis.number(_short(dice.uniform(axis.low, axis.high)))
    low, high = math.log(axis.low), math.log(axis.high)
    drawn = math.exp(dice.uniform(low, high))
    return axis.number(_short(min(max(drawn, axis.low), axis.high)))


def _short(drawn: float) -> float:
    """Six digits: what can be typed again."""
    return float(f"{drawn:.6g}")
