"""What became of the rows of a dataset, in numbers."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from luthier.data.encoded import Encoded
from luthier.data.making import DROPPED, LOSSY


@dataclass(frozen=True)
class Counts:
    """What became of the rows of one side, in rows, sequences and tokens."""

    rows: int = 0
    """Different rows, those that give no sequence included."""
    sequences: int = 0
    """Sequences of an epoch; one that is repeated counts each time."""
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    """Tokens of the longest sequence."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows that give no sequence, by reason; those that could not be read, are equal to others or
    to a held-out row, or that the mixture leaves out, are not in `rows`."""
    cut_rows: int = 0
    """Rows that lost turns from their front to fit `chat.max_length`."""
    cut_turns: int = 0
    """Trained turns that went with them."""
    lossy_rows: int = 0
    """Rows kept although the template does not show all of their text."""
    sources: dict[str, int] = field(default_factory=dict)
    """Rows of an epoch from each of several sources."""


def counts_of(
    parts: list[tuple[Encoded, NDArray[np.int64]]],
    lengths: NDArray[np.int32],
    tokens: NDArray[np.int32],
    trained: NDArray[np.int32],
    other: dict[str, int],
    sources: dict[str, int] | None = None,
) -> Counts:
    """Count a side: for each source the rows that are on it, and its sequences' tokens.

    `other`: rows that are on no side, by reason.
    """
    dropped: dict[str, int] = {}
    rows = cut_rows = cut_turns = lossy = 0
    for encoded, chosen in parts:
        state, cut = encoded.rows.column("state")[chosen], encoded.rows.column("cut")[chosen]
        for reason in encoded.rows.values("reason", chosen[state == DROPPED]):
            dropped[reason] = dropped.get(reason, 0) + 1
        rows += len(chosen)
        lossy += int((state == LOSSY).sum())
        cut_rows += int((cut >= 0).sum())
        cut_turns += int(cut[cut > 0].sum())
    return Counts(
        rows=rows,
        sequences=len(lengths),
        tokens=int(tokens.sum(dtype=np.int64)),
        trained_tokens=int(trained.sum(dtype=np.int64)),
        longest=int(lengths.max(initial=0)),
        dropped=dropped | {reason: count for reason, count in other.items() if count},
        cut_rows=cut_rows,
        cut_turns=cut_turns,
        lossy_rows=lossy,
        sources=sources or {},
    )
