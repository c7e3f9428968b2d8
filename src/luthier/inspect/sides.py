"""The sides of a dataset in numbers: what trains in an epoch, and each evaluation set."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from luthier.inspect.account import Account
from luthier.inspect.division import Positions


class Part(NamedTuple):
    """Rows of one source that are on a side."""

    account: Account
    rows: Positions
    """Its different rows, those that make no sequence included."""
    epoch: Positions
    """Its rows as often as an epoch sees them."""


@dataclass(frozen=True)
class Side:
    """What one side of the dataset makes."""

    name: str
    """`train`, `held out`, or the evaluation set's own."""
    rows: int
    lengths: NDArray[np.int32]
    """Tokens of each sequence of an epoch, shape (sequences,)."""
    trained_tokens: int
    dropped: int
    stops: int
    lossy: int
    cut_rows: int
    cut_turns: int
    split: int
    """Conversations that make several sequences."""
    windows: int
    """Documents that are cut into several windows."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows that are on no side, by reason; they are not in `rows`."""

    @property
    def tokens(self) -> int:
        """The tokens of an epoch."""
        return int(self.lengths.sum(dtype=np.int64))


def side_of(name: str, parts: list[Part], left_out: dict[str, int] | None = None) -> Side:
    """Count a side: for each source the rows that are on it."""
    tokens = [part.account.tokens(part.epoch) for part in parts]
    none = np.empty(0, np.int32)
    return Side(
        name=name,
        rows=sum(len(part.rows) for part in parts),
        lengths=np.concatenate([none, *(lengths for lengths, _ in tokens)]),
        trained_tokens=sum(int(trained.sum(dtype=np.int64)) for _, trained in tokens),
        dropped=_count(part.account.fated("dropped")[part.rows] for part in parts),
        stops=_count(part.account.fated("stops")[part.rows] for part in parts),
        lossy=_count(part.account.fated("lossy")[part.rows] for part in parts),
        cut_rows=_count(part.account.cut[part.rows] >= 0 for part in parts),
        cut_turns=sum(int(np.clip(p.account.cut[p.rows], 0, None).sum()) for p in parts),
        split=_several(parts, "conversation"),
        windows=_several(parts, "text"),
        left_out={reason: rows for reason, rows in (left_out or {}).items() if rows},
    )


def _several(parts: list[Part], kind: str) -> int:
    """Rows of this kind that make several sequences."""
    return _count(
        part.account.sequences[part.rows] > 1
        for part in parts
        if part.account.opened.shape.kind == kind
    )


def _count(masks: Iterable[NDArray[np.bool_]]) -> int:
    return sum(int(mask.sum()) for mask in masks)
