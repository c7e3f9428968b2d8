"""Which rows are held out from training; rows of equal content never stand on both sides."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from luthier.config.schema import EvalSplitConfig
from luthier.data.formats import Conversation
from luthier.errors import UserError


@dataclass(frozen=True)
class Split:
    """Positions of the training and the held-out rows, and the rows left out of training."""

    train: list[int]
    heldout: list[int]
    equal: int
    """Training rows that were left out because a held-out row equals them."""


def fingerprint(conversation: Conversation) -> str:
    """A SHA-256 of what a conversation says, the same in any process and on any machine."""
    text = json.dumps(conversation, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def draw(rows: Sequence[Conversation], config: EvalSplitConfig, seed: int) -> Split:
    """Hold a share or a count of different rows out; all others train.

    Rows are ranked by a hash of their content and the seed, so the order of the file does not
    matter, and a few added rows move few others across.
    """
    prints = [fingerprint(row) for row in rows]
    first = {print_: index for index, print_ in reversed(list(enumerate(prints)))}
    wanted = config.count or max(1, round((config.share or 0) * len(first)))
    ranked = sorted(first, key=lambda print_: _rank(print_, seed))
    held = set(ranked[:wanted])
    train = [index for index, print_ in enumerate(prints) if print_ not in held]
    if not train or wanted > len(first):
        key = "count" if config.count else "share"
        raise UserError(
            f"dataset.eval.{key}={config.count or config.share} holds out {wanted} of "
            f"{len(first)} different rows and leaves none to train on. Hold out fewer."
        )
    heldout = sorted(first[print_] for print_ in held)
    return Split(train, heldout, len(rows) - len(train) - len(heldout))


def apart(rows: Sequence[Conversation], heldout: Sequence[Conversation], name: str) -> Split:
    """Train on the rows that equal none of the held-out rows, which come from `name`."""
    held = {fingerprint(row) for row in heldout}
    train = [index for index, row in enumerate(rows) if fingerprint(row) not in held]
    if not train:
        raise UserError(
            f"dataset.{name} holds every training row too, which leaves none to train on. "
            "Hold out rows that are not in dataset.path."
        )
    return Split(train, list(range(len(heldout))), len(rows) - len(train))


def _rank(print_: str, seed: int) -> bytes:
    """The place of a row in the draw."""
    return hashlib.sha256(f"{seed}:{print_}".encode()).digest()
