"""How a dataset is put together: the mixture, equal rows, and what is held out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from luthier.config.schema import EvalConfig
from luthier.data.fingerprints import Prints
from luthier.inspect.rules import EXAMPLES, RuleExample

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """What an epoch sees of one source."""

    rows: int
    """Its different rows that train."""
    epoch: int
    """The same as often as an epoch sees them."""
    tokens: int
    trained_tokens: int

    @property
    def repeats(self) -> float:
        """How many times an epoch sees a row."""
        return self.epoch / self.rows if self.rows else 0.0


@dataclass
class Equals:
    """Training rows that equal an earlier one, with the first of them."""

    rows: int = 0
    examples: list[RuleExample] = field(default_factory=list)


@dataclass(frozen=True)
class Overlap:
    """What training shares with an evaluation set."""

    rows: int
    """The rows of the set."""
    equal: int
    """Rows left out of training because they equal one of the set."""
    similar: int
    """Rows that train and differ from one of the set only in case, space or Unicode form."""


def equals(prints: Prints, places: Sequence[str], known: Prints | None = None) -> Equals:
    """Find the rows that equal an earlier one.

    `prints` tells which are equal, `places` where each row stands. `known`: other fingerprints;
    rows that equal an earlier one by these too are not counted.
    """
    first = _firsts(prints)
    repeated = first != np.arange(len(prints))
    if known is not None:
        repeated &= _firsts(known) == np.arange(len(known))
    rows = np.flatnonzero(repeated)
    shown = rows[:EXAMPLES].tolist()
    examples = [RuleExample(places[row], f"equals {places[first[row]]}") for row in shown]
    return Equals(len(rows), examples)


def how_held_out(config: EvalConfig, seed: int) -> str:
    """How rows are held out of the training sources, in words; empty where none are."""
    if config.share is None and config.count is None:
        return ""
    if config.by == "hash":
        return f"a share of {config.share:g} of the different rows, each by its own hash"
    what = f"a share of {config.share:g}" if config.share is not None else f"{config.count:,}"
    return f"{what} of the different rows, drawn with seed {seed}"


def _firsts(prints: Prints) -> Positions:
    """For each row the first one that equals it."""
    _, first, group = np.unique(prints, return_index=True, return_inverse=True)
    return first[group]
