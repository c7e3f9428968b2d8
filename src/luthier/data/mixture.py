"""Several sources as one epoch: how many rows of each, which, and in which order."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from luthier.config.schema import SourceConfig
from luthier.data.examples import source_key
from luthier.data.seeded_random import RowNumbers, seeded_order
from luthier.errors import UserError


@dataclass(frozen=True)
class Mixture:
    """The rows of an epoch."""

    order: RowNumbers
    """Row numbers in the sources laid end to end, in the order in which they are named; a row that
    is seen twice stands here twice."""
    counts: dict[str, int]
    """Rows of the epoch from each source."""


def mix_sources(
    sizes: Mapping[str, int],
    sources: Mapping[str, SourceConfig],
    mix: Literal["concatenate", "interleave"],
    seed: int,
) -> Mixture:
    """Return the epoch that sources of these sizes (in rows, by name) give.

    `concatenate`: all rows of one source after the other, each source `repeats` times; 2.5 is all
    rows twice and a seeded half of them. `interleave`: the shares that `weight` says, spread
    evenly; no row stands twice, and the source that is scarcest for its weight is seen whole.
    Raises UserError for settings of the other kind and for a source that gives no row.
    """
    _check_settings(sizes, sources, mix)
    starts = np.cumsum([0, *sizes.values()])[:-1]
    if mix == "concatenate":
        rows_of_sources = [
            _repeat_rows(size, sources[name].repeats, seed, name) for name, size in sizes.items()
        ]
    else:
        rows_of_sources = _draw_by_weight(sizes, sources, seed)
    counts = {name: len(rows) for name, rows in zip(sizes, rows_of_sources, strict=True)}
    _check_counts(counts, sizes, sources, mix)
    order = np.concatenate(
        [start + rows for start, rows in zip(starts, rows_of_sources, strict=True)]
    )
    return Mixture(
        order if mix == "concatenate" else order[interleave_evenly(list(counts.values()))], counts
    )


def interleave_evenly(counts: list[int]) -> RowNumbers:
    """Return the order in which groups of these sizes, laid end to end, alternate most evenly.

    Item k of a group of n stands at (k + 1/2) / n of the way (Inman and Bulfin, "Sequencing JIT
    mixed-model assembly lines", Management Science 37, 1991). Where a group has the share p of all
    and there are m groups, any first rows hold p of that group to within (1 + m p) / 2 rows.
    """
    positions = [(np.arange(count) + 0.5) / count for count in counts]
    # Stable, so that of equal places the source that is named first comes first.
    return np.argsort(np.concatenate(positions), kind="stable")


def _repeat_rows(size: int, repeats: float, seed: int, name: str) -> RowNumbers:
    """Return all rows as many whole times as `repeats` holds, then a seeded part of them, in
    order."""
    # Rounded to rows first: 1.1 * 10 is 11.000000000000002 in floating point.
    full_passes, rest = divmod(round(repeats * size), max(size, 1))
    last_pass = np.sort(seeded_order(size, "repeats", seed, name)[:rest])
    return np.concatenate([np.tile(np.arange(size), full_passes), last_pass])


def _draw_by_weight(
    sizes: Mapping[str, int], sources: Mapping[str, SourceConfig], seed: int
) -> list[RowNumbers]:
    """Return for each source its share of rows, drawn and put in order by the seed.

    The source with the fewest rows for its weight gives all of them and so sets the others' counts.
    """
    weights = {name: sources[name].weight or 1.0 for name in sizes}
    # The scarcest source for its weight is seen whole and sets the counts of the others.
    scarce = min(sizes, key=lambda name: sizes[name] / weights[name])
    counts = {
        name: min(size, round(sizes[scarce] * weights[name] / weights[scarce]))
        for name, size in sizes.items()
    }
    return [
        seeded_order(size, "weight", seed, name)[: counts[name]] for name, size in sizes.items()
    ]


def _check_settings(
    sizes: Mapping[str, int], sources: Mapping[str, SourceConfig], mix: str
) -> None:
    """Raise UserError for a source without rows, and for a weight or repeats where they say
    nothing."""
    for name, size in sizes.items():
        key, source = source_key(name, sources), sources[name]
        if not size:
            raise UserError(f"{key} has no row left to train on. Remove it, or check its filter.")
        if mix == "concatenate" and source.weight is not None:
            raise UserError(
                f"{key}.weight={source.weight:g} has no effect with dataset.mix=concatenate, which "
                "takes all rows. Set dataset.mix=interleave, or give repeats instead."
            )
        if mix == "interleave" and source.repeats != 1:
            raise UserError(
                f"{key}.repeats={source.repeats:g} has no effect with dataset.mix=interleave, "
                "which shows no row twice. Set dataset.mix=concatenate, or give a weight instead."
            )
    _check_weights(sources, mix)


def _check_weights(sources: Mapping[str, SourceConfig], mix: str) -> None:
    """Raise UserError if some sources of an interleaved mixture have a weight and others do not."""
    without = [name for name, source in sources.items() if source.weight is None]
    if mix == "interleave" and 0 < len(without) < len(sources):
        raise UserError(
            f"{source_key(without[0], sources)} has no weight, and other sources have one. Give "
            "each source a weight, or none of them for equal shares."
        )


def _check_counts(
    counts: Mapping[str, int],
    sizes: Mapping[str, int],
    sources: Mapping[str, SourceConfig],
    mix: str,
) -> None:
    """Raise UserError for a source whose setting is so small that none of its rows is seen."""
    setting = "repeats" if mix == "concatenate" else "weight"
    for name, count in counts.items():
        if not count:
            value = getattr(sources[name], setting)
            raise UserError(
                f"{source_key(name, sources)}.{setting}={value:g} takes none of its {sizes[name]} "
                "rows. Give it more, or take the source out."
            )
