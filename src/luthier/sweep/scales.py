"""How the values of a parameter lie on a line: as numbers, by ratio, or as names side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luthier.sweep.trials import shown_value

_BY_RATIO, _BY_RATIO_OF_MEASURES = 8.0, 20.0
_FEW = 6


@dataclass(frozen=True)
class Scale:
    """Places for texts, and what stands beside the line."""

    places: NDArray[np.float64]
    """Where each text lies, shape (texts,)."""
    ticks: tuple[float, ...]
    labels: tuple[str, ...]
    is_log: bool = False

    @property
    def shares(self) -> NDArray[np.float64]:
        """The places from 0 to 1."""
        return shares(np.log10(self.places) if self.is_log else self.places)

    @property
    def tick_shares(self) -> list[float]:
        """The ticks on the same line from 0 to 1."""
        both = np.concatenate([self.places, np.array(self.ticks)])
        both = np.log10(both) if self.is_log else both
        low, high = both[: len(self.places)].min(), both[: len(self.places)].max()
        spread = high - low or 1.0
        return [float((one - low) / spread) for one in both[len(self.places) :]]


def scale(texts: Sequence[str]) -> Scale:
    """The scale of a parameter with these values, one for each trial."""
    numbers = [_number(text) for text in texts]
    if any(number is None for number in numbers):
        return _names(texts)
    places = np.array(numbers, dtype=np.float64)
    is_log = bool(places.min() > 0 and places.max() >= _BY_RATIO * places.min())
    different = sorted(set(places.tolist()))
    if len(different) > _FEW:
        middle = (
            float(np.sqrt(different[0] * different[-1]))
            if is_log
            else sum(different) / len(different)
        )
        different = [different[0], middle, different[-1]]
    return Scale(places, tuple(different), tuple(f"{one:.4g}" for one in different), is_log)


def of_numbers(values: Sequence[float]) -> Scale:
    """The scale of measures."""
    places = np.array(values, dtype=np.float64)
    low, high = float(places.min()), float(places.max())
    is_log = low > 0 and high >= _BY_RATIO_OF_MEASURES * low
    ticks = (low, high) if low < high else (low,)
    return Scale(places, ticks, tuple(f"{one:.4g}" for one in ticks), is_log)


def shares(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values from 0 for the least to 1 for the greatest; all alike lie in the middle."""
    low, high = values.min(), values.max()
    return np.full(len(values), 0.5) if low == high else (values - low) / (high - low)


def _names(texts: Sequence[str]) -> Scale:
    names = sorted(set(texts))
    places = np.array([names.index(text) for text in texts], dtype=np.float64)
    return Scale(places, tuple(range(len(names))), tuple(shown_value(name) for name in names))


def _number(text: str) -> float | None:
    try:
        return float(text.strip("'\""))
    except ValueError:
        return None
