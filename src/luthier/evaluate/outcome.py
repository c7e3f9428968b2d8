"""What a model makes of a set of rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luthier.metrics import Measured
from luthier.metrics.bootstrap import Statistics

LOSS, PERPLEXITY = "loss", "perplexity"


@dataclass(frozen=True)
class Outcome:
    """The losses and replies of one model."""

    losses: NDArray[np.float64]
    """(rows, 2): the summed loss of each row, and over how many tokens, words or labels."""
    replies: list[str]
    """Its answers to the rows that ask something, in order."""
    scored: Measured
    """The metrics of these."""
    has_perplexity: bool = True
    """Whether the loss is a negative log-likelihood of tokens."""

    def samples(self) -> dict[str, "Sequence[float] | Statistics"]:
        """What is resampled for each number, by name; those that have nothing for each row not."""
        found: dict[str, Sequence[float] | Statistics] = {LOSS: Statistics(self.losses, _mean)}
        if self.has_perplexity:
            found[PERPLEXITY] = Statistics(self.losses, lambda sums: np.exp(_mean(sums)))
        for name in self.scored.values:
            sample = self.scored.sample(name)
            if sample is not None:
                found[name] = sample
        return found

    def of_rows(self) -> NDArray[np.float64]:
        """The mean loss of each row, shape (rows,)."""
        return self.losses[:, 0] / self.losses[:, 1].clip(min=1)


def _mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The loss of a draw; one without a token has none."""
    mean: NDArray[np.float64] = sums[:, 0] / np.maximum(sums[:, 1], 1)
    return mean
