"""Which rows train and which are held out: duplicates, splits and the mixture, by fingerprints."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luthier.config.schema import DatasetConfig, SourceConfig
from luthier.data.compose.mixture import key_of, mixture
from luthier.data.compose.prints import Prints, duplicates
from luthier.data.compose.splits import apart, hold_out
from luthier.data.encoded import Encoded
from luthier.data.making import DROPPED
from luthier.errors import UserError

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """Rows of the training sources, numbered as if the sources were laid end to end."""

    train: Rows
    """The different rows that train, in the order of the sources."""
    heldout: Rows
    """The rows that are held out of the training sources."""
    epoch: Rows
    """The rows of an epoch in their order; a row that is seen twice stands here twice."""
    sources: dict[str, int]
    """Rows of an epoch by source."""
    other: dict[str, int]
    """Rows on neither side, by reason."""


def select(
    config: DatasetConfig,
    sources: Mapping[str, SourceConfig],
    trained: Mapping[str, Encoded],
    evaluated: Mapping[str, Encoded],
    seed: int,
) -> Selection:
    """Leave out duplicates, hold rows out, and mix what is left.

    Raises UserError where nothing is left to train on or to hold out.
    """
    prints = {name: _prints(part, config) for name, part in trained.items()}
    whole = np.concatenate(list(prints.values()))
    usable = np.concatenate([part.sequences > 0 for part in trained.values()])
    _check_usable(trained, evaluated)
    kept = np.flatnonzero(usable)
    if config.deduplicate != "none":
        kept = kept[duplicates(whole[kept])]
    split = hold_out(whole[kept], config.eval, seed)
    train, equal = kept[split.train], split.equal
    if evaluated:
        held = {key: _prints(part, config)[part.sequences > 0] for key, part in evaluated.items()}
        found = apart(whole[train], held)
        equal += len(train) - len(found.train)
        train = train[found.train]
    _check_each(sources, trained, {"give no sequence": np.flatnonzero(usable),
                                   "equal other rows": kept, "are held out": train})  # fmt: skip
    epoch, counts = _mixed(config, sources, trained, train, seed)
    used = np.unique(epoch)
    other = {
        "duplicate": int(usable.sum()) - len(kept),
        "equal to a held-out row": equal,
        "not in the mixture": len(train) - len(used),
    }
    return Selection(used, kept[split.heldout], epoch, counts, other)


def starts_of(parts: Mapping[str, Encoded]) -> Rows:
    """The number of each source's first row, and behind the last one the number of all."""
    return np.cumsum([0, *map(len, parts.values())])


def _mixed(
    config: DatasetConfig,
    sources: Mapping[str, SourceConfig],
    trained: Mapping[str, Encoded],
    train: Rows,
    seed: int,
) -> tuple[Rows, dict[str, int]]:
    """The rows of an epoch, and how many of each source."""
    bounds = np.searchsorted(train, starts_of(trained))
    sizes = dict(zip(trained, np.diff(bounds).tolist(), strict=True))
    mixed = mixture(sizes, sources, config.mix, seed)
    return train[mixed.order], mixed.counts


def _check_each(
    sources: Mapping[str, SourceConfig], trained: Mapping[str, Encoded], left: Mapping[str, Rows]
) -> None:
    """UserError for a source of which nothing is left, with what became of its rows.

    `left`: the rows that are left behind each step, by what has become of those that went.
    """
    starts = starts_of(trained)
    sizes = [np.diff(starts), *(np.diff(np.searchsorted(rows, starts)) for rows in left.values())]
    for number, name in enumerate(trained):
        counts = [int(size[number]) for size in sizes]
        went = {why: a - b for why, a, b in zip(left, counts, counts[1:], strict=False) if a > b}
        if went and not counts[-1]:
            words = ", ".join(f"{count} {why}" for why, count in went.items())
            raise UserError(
                f"{key_of(name, sources)} has no row left to train on: of its {counts[0]} rows "
                f"{words}. Take the source out, or see to its rows."
            )


def _prints(part: Encoded, config: DatasetConfig) -> Prints:
    """What tells whether two rows are equal, as the config means it."""
    return part.normalised_prints if config.deduplicate == "normalised" else part.prints


def _check_usable(trained: Mapping[str, Encoded], evaluated: Mapping[str, Encoded]) -> None:
    for key, part in evaluated.items():
        if not (part.sequences > 0).any():
            raise UserError(_nothing(key, [part], "to evaluate on"))
    if not any((part.sequences > 0).any() for part in trained.values()):
        raise UserError(_nothing("dataset", list(trained.values()), "to train on"))


def _nothing(key: str, parts: list[Encoded], purpose: str) -> str:
    """The words for rows none of which makes a sequence."""
    total = sum(map(len, parts))
    if not total:
        filtered = sum(part.filtered for part in parts)
        why = f"the filter leaves out all of {filtered}" if filtered else "none could be read"
        return f"{key}: there is no row {purpose}; {why}."
    reasons: dict[str, int] = {}
    for part in parts:
        for reason in part.rows.values(
            "reason", np.flatnonzero(part.rows.column("state") == DROPPED)
        ):
            reasons[reason] = reasons.get(reason, 0) + 1
    words = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
    first = next(part for part in parts if len(part)).places([0])[0]
    return (
        f"{key}: none of the {total} rows gives anything {purpose} ({words}). "
        f"The first one is {first}."
    )
