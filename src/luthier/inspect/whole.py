"""The sources of a dataset put together: sides, mixture, equal rows, what is held out."""

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.config.schema import RunConfig
from luthier.data.fingerprints import Prints
from luthier.data.select import Selection
from luthier.errors import UserError
from luthier.inspect.account import Account
from luthier.inspect.composition import Equals, Overlap, Share, equals
from luthier.inspect.division import Positions, by_source, divide
from luthier.inspect.material import side_name
from luthier.inspect.sides import Part, Side, side_of


class Whole:
    """What the rows of all sources make together."""

    def __init__(
        self, config: RunConfig, trained: dict[str, Account], evaluated: dict[str, Account]
    ) -> None:
        """`trained`: the training sources by name; `evaluated`: the others by config key."""
        self._config = config
        self._trained = trained
        self._evaluated = evaluated
        self.error: str | None = None
        """Why training stops before its first step, if it does."""
        self._usable = _joined(account.sequences > 0 for account in trained.values())
        self.selection = self._select()

    @property
    def equality(self) -> str:
        """How rows are compared: `exact` or `normalised`."""
        return "normalised" if self._config.dataset.deduplicate == "normalised" else "exact"

    @cached_property
    def sides(self) -> list[Side]:
        """The training side, and each evaluation set."""
        rows = by_source(self._trained, self._with_unusable(self.selection.train))
        epoch = by_source(self._trained, self.selection.epoch)
        parts = [Part(self._trained[name], rows[name], epoch[name]) for name in rows]
        sides = [side_of("train", parts, self.selection.other)]
        if len(self.selection.heldout):
            sides.append(self._drawn())
        for key, account in self._evaluated.items():
            everything = np.arange(len(account))
            sides.append(side_of(side_name(key), [Part(account, everything, everything)]))
        return sides

    @cached_property
    def mixture(self) -> dict[str, Share]:
        """What an epoch sees of each source, by name."""
        rows = by_source(self._trained, self.selection.train)
        epoch = by_source(self._trained, self.selection.epoch)
        shares = {}
        for name, account in self._trained.items():
            tokens, trained = account.tokens(epoch[name])
            shares[name] = Share(
                rows=len(rows[name]),
                epoch=len(epoch[name]),
                tokens=int(tokens.sum(dtype=np.int64)),
                trained_tokens=int(trained.sum(dtype=np.int64)),
            )
        return shares

    def equals(self) -> dict[str, Equals]:
        """Rows that equal an earlier one: `exact`, and `normalised` for those that only look so."""
        rows = np.flatnonzero(self._usable)
        places = [place for account in self._trained.values() for place in account.places]
        places = [places[row] for row in rows.tolist()]
        exact, normalised = (self._prints(kind)[rows] for kind in ("exact", "normalised"))
        return {
            "exact": equals(exact, places),
            "normalised": equals(normalised, places, exact),
        }

    def overlaps(self) -> dict[str, Overlap]:
        """What training shares with each evaluation set, by the set's name."""
        held = {side_name(key): account for key, account in self._evaluated.items()}
        found = {name: self._overlap(account) for name, account in held.items()}
        if len(self.selection.heldout):
            found = {"held out": self._overlap(None)} | found
        return found

    def _select(self) -> Selection:
        """The selection of a training; where that stops, all rows that can train."""
        rows = np.flatnonzero(self._usable)
        everything = Selection(rows, rows[:0], rows, {}, {})
        if not len(rows):
            return everything
        empty = [key for key, part in self._evaluated.items() if not (part.sequences > 0).any()]
        if empty:
            self.error = f"{empty[0]}: none of its rows gives anything to evaluate on."
        trained, evaluated = (
            {key: part.seen() for key, part in parts.items() if key not in empty}
            for parts in (self._trained, self._evaluated)
        )
        try:
            return divide(self._config.dataset, self._config.seed, trained, evaluated)
        except UserError as error:
            self.error = str(error)
            return everything

    def _with_unusable(self, rows: Positions) -> Positions:
        """The rows that train, and those that make no sequence, which no side has."""
        return np.union1d(rows, np.flatnonzero(~self._usable))

    def _drawn(self) -> Side:
        """The rows that are held out of the training sources."""
        rows = by_source(self._trained, self.selection.heldout)
        parts = [Part(self._trained[name], chosen, chosen) for name, chosen in rows.items()]
        return side_of("held out", parts)

    def _overlap(self, account: Account | None) -> Overlap:
        """What training shares with a set; None: with the rows held out of its own sources."""
        held = self.selection.heldout
        candidates = np.setdiff1d(np.flatnonzero(self._usable), held)
        rows = len(held) if account is None else int((account.sequences > 0).sum())

        def inside(kind: str) -> NDArray[np.bool_]:
            own = self._prints(kind)
            other = own[held] if account is None else account.prints(kind)
            return np.isin(own[candidates], other)

        equal = inside(self.equality)
        trains = np.isin(candidates, self.selection.train)
        similar = inside("normalised") & ~equal & trains
        return Overlap(rows, int(equal.sum()), int(similar.sum()))

    def _prints(self, kind: str) -> Prints:
        """The fingerprints of all training rows."""
        return _joined(account.prints(kind) for account in self._trained.values())


def _joined(parts: Any) -> Any:
    return np.concatenate(list(parts))
