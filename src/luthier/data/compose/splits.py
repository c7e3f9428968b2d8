"""Which rows are held out from training; rows of equal content never stand on both sides."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luthier.config.schema import EvalConfig
from luthier.data.compose.chance import Words, scattered
from luthier.data.compose.prints import Prints
from luthier.errors import UserError

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Positions of the training and of the held-out rows, both in the rows' own order."""

    train: Positions
    heldout: Positions
    equal: int
    """Rows on neither side, because a held-out row equals them."""


@dataclass(frozen=True)
class Apart:
    """Positions of the rows that train beside held-out rows from elsewhere."""

    train: Positions
    equal: dict[str, int]
    """Rows left out of training because a row of that held-out set equals them, by its name."""


def hold_out(prints: Prints, config: EvalConfig, seed: int) -> Split:
    """Hold a share or a count of the different rows out; all others train.

    `by: draw` ranks the rows by a hash of their content and the seed and takes the first, so the
    count is exact, the order of the file does not matter, and added rows move few others across.
    `by: hash` holds a row out if its own hash falls in the share, so added rows move none, and the
    count is near the share only. Raises UserError where nothing would be left on either side.
    """
    if config.by == "hash" and config.share is None:
        raise UserError(_hash_needs_a_share(config))
    if config.share is None and config.count is None:
        return Split(np.arange(len(prints)), np.empty(0, np.int64), 0)
    different, first, group = np.unique(prints, return_index=True, return_inverse=True)
    ranks = _ranks(different, seed)
    held = _in_share(ranks, config) if config.by == "hash" else _drawn(ranks, config)
    train = np.flatnonzero(~held[group])
    heldout = np.sort(first[held])
    _check_both_sides(len(train), len(heldout), len(different), config)
    return Split(train, heldout, len(prints) - len(train) - len(heldout))


def apart(prints: Prints, heldout: Mapping[str, Prints]) -> Apart:
    """Train on the rows that equal no held-out row; `heldout` has the config's key of each set.

    A row that stands in several sets is counted for each. Raises UserError if none is left.
    """
    inside = {key: np.isin(prints, held) for key, held in heldout.items()}
    train = np.ones(len(prints), dtype=bool)
    for mask in inside.values():
        train &= ~mask
    if not train.any():
        raise UserError(
            f"{' and '.join(inside)} {'hold' if len(inside) > 1 else 'holds'} every training row "
            "too, which leaves none to train on. Hold out rows that are not in dataset.path."
        )
    return Apart(np.flatnonzero(train), {key: int(mask.sum()) for key, mask in inside.items()})


def _drawn(ranks: Words, config: EvalConfig) -> NDArray[np.bool_]:
    """The first rows by rank: the count, or the share rounded and at least one."""
    wanted = config.count or max(1, round((config.share or 0) * len(ranks)))
    if wanted >= len(ranks):
        raise UserError(_none_to_train(wanted, len(ranks), config))
    held = np.zeros(len(ranks), dtype=bool)
    held[np.argsort(ranks, kind="stable")[:wanted]] = True
    return held


def _in_share(ranks: Words, config: EvalConfig) -> NDArray[np.bool_]:
    """The rows whose rank, as a part of all 64-bit numbers, is below the share."""
    return ranks < np.uint64(int((config.share or 0) * 2**64))


def _ranks(prints: Prints, seed: int) -> Words:
    """A number for each fingerprint, evenly spread over 64 bits, that hangs on it and the seed."""
    words = prints.view("<u8").reshape(-1, 2)
    return scattered(scattered(words[:, 0], "held out", seed) ^ words[:, 1], "held out")


def _check_both_sides(train: int, heldout: int, different: int, config: EvalConfig) -> None:
    """UserError if one side is empty, which a draw by hash can give."""
    if not heldout:
        raise UserError(
            f"dataset.eval.share={config.share} with dataset.eval.by=hash holds out none of "
            f"{different} different rows. Hold out a larger share, or set dataset.eval.by=draw."
        )
    if not train:
        raise UserError(_none_to_train(heldout, different, config))


def _none_to_train(wanted: int, different: int, config: EvalConfig) -> str:
    key = "count" if config.count else "share"
    return (
        f"dataset.eval.{key}={config.count or config.share} holds out {wanted} of "
        f"{different} different rows and leaves none to train on. Hold out fewer."
    )


def _hash_needs_a_share(config: EvalConfig) -> str:
    if config.count is None:
        return "dataset.eval.by=hash needs the share to hold out, such as dataset.eval.share=0.05."
    return (
        f"dataset.eval.count={config.count} cannot be held out with dataset.eval.by=hash, which "
        "looks at each row by itself. Give a share, or set dataset.eval.by=draw."
    )
