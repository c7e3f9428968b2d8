"""Which rows of the sources train and which are held out, as training has it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from luthier.config.schema import DatasetConfig
from luthier.data.examples import BadRows, Opened, Placed, train_sources
from luthier.data.fingerprints import Prints, as_prints, fingerprint, normalised
from luthier.data.select import Selection, select, starts_of
from luthier.inspect.material import Material

Positions = NDArray[np.int64]
Chosen = list[tuple[Opened, Positions]]
"""Rows of several sources, each with where they stand in it."""


@dataclass(frozen=True)
class Seen:
    """A source as far as the division asks: what its rows equal, and how much they make."""

    prints: Prints
    """What tells whether two rows are equal."""
    normalised_prints: Prints
    """The same, but for case, white space and Unicode form."""
    sequences: NDArray[Any]
    """How many sequences each row makes; a row that makes none is on no side."""

    def __len__(self) -> int:
        return len(self.prints)


def divide(
    config: DatasetConfig, seed: int, trained: Mapping[str, Seen], evaluated: Mapping[str, Seen]
) -> Selection:
    """Leave out equal rows, hold rows out and mix the others; rows are numbered over all sources.

    Raises UserError as training does where nothing is left on a side.
    """
    # Of an encoded source, `select` takes no more than a `Seen` has.
    parts, sets = cast(Any, trained), cast(Any, evaluated)
    return select(config, train_sources(config), parts, sets, seed)


def by_source(sizes: Mapping[str, Any], rows: Positions) -> dict[str, Positions]:
    """Rows numbered over all sources as the rows of each, in the same order.

    `sizes`: the sources by name, each as long as it has rows.
    """
    starts = starts_of(cast(Any, sizes))
    return {
        name: rows[(rows >= start) & (rows < start + len(part))] - start
        for (name, part), start in zip(sizes.items(), starts, strict=False)
    }


def rows_of(material: Material, which: str) -> Chosen:
    """The rows of one side.

    `which`: `train`, `held out` for rows held out of the training sources, or the config key of an
    evaluation set. All rows count as if each made a sequence. Raises UserError for rows that cannot
    be read, where the config does not drop them.
    """
    config = material.config.dataset
    if which in material.evaluated:
        opened = material.evaluated[which]
        return [(opened, np.arange(len(_seen(opened, config))))]
    trained = {name: _seen(opened, config) for name, opened in material.trained.items()}
    evaluated = {key: _seen(opened, config) for key, opened in material.evaluated.items()}
    chosen = divide(config, material.config.seed, trained, evaluated)
    rows = by_source(trained, chosen.train if which == "train" else chosen.heldout)
    return [(material.trained[name], positions) for name, positions in rows.items()]


def pick(opened: Opened, positions: Positions) -> Iterator[Placed]:
    """The examples at these positions of a source, in its order; read no further than the last."""
    wanted = set(positions.tolist())
    if not wanted:
        return
    last = max(wanted)
    for number, row in enumerate(opened.examples(BadRows())):
        if number in wanted:
            yield row
        if number == last:
            return


def _seen(opened: Opened, config: DatasetConfig) -> Seen:
    """A source whose rows are only read."""
    bad = BadRows()
    # The division asks for one kind of them.
    print_of = normalised if config.deduplicate == "normalised" else fingerprint
    prints = as_prints(print_of(row.example) for row in opened.examples(bad))
    if config.on_bad_row == "error":
        bad.raise_if_any(opened)
    return Seen(prints, prints, np.ones(len(prints), np.int32))
