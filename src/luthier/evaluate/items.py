"""The rows that a model is measured on: their tokens, and the questions in them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from luthier.config.methods import ROW_KINDS
from luthier.config.schema import DatasetConfig, RunConfig
from luthier.data.examples import (
    BadRows,
    Opened,
    Placed,
    eval_sources,
    key_of_path,
    open_rows,
    set_name,
    train_sources,
)
from luthier.data.prepare import prepare
from luthier.errors import UserError
from luthier.infer.questions import Question

MAIN = "held out"
"""What the evaluation set without a name is called."""


@dataclass(frozen=True)
class Item:
    """A row to measure on."""

    where: str
    sequences: list[tuple[list[int], list[int]]]
    """Token ids, and labels of the same length: -100 where nothing is measured. For an
    encoder-decoder model the ids of the source, and those of the target."""
    question: Question | None
    """What can be asked of it; None where it has no reply in words."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """For a model with a head: the columns of its token row."""


@dataclass
class Items:
    """The rows of one evaluation set."""

    name: str
    rows: list[Item] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows that make no tokens, by the reason."""

    def leave_out(self, why: str) -> None:
        """Count a row that makes no tokens."""
        self.left_out[why] = self.left_out.get(why, 0) + 1


class Maker(Protocol):
    """Makes items as the training made rows, and leaves out what it would stop at."""

    @property
    def kinds(self) -> Sequence[str]:
        """The kinds of rows that it takes."""
        ...

    def add(self, found: Items, opened: Opened, placed: Iterable[Placed]) -> None:
        """Add the items of rows of one source, which are of such a kind."""
        ...


def of_run(
    config: RunConfig, maker: Maker, limit: int | None, tokenizer: Callable[[], Any]
) -> Iterator[Items]:
    """The evaluation sets of a run, as it held them out.

    `tokenizer` gives the base's own: rows that were drawn from the training rows are drawn again,
    from the cache of the training where it is still there.
    """
    named = eval_sources(config.dataset)
    for key, source in named.items():
        found, opened = Items(set_name(key) or MAIN), open_rows(source, key_of_path(key))
        _add(maker, found, opened, _rows(opened, config.dataset, limit))
        yield found
    if config.dataset.eval.share is not None or config.dataset.eval.count is not None:
        yield _drawn(config, maker, limit, tokenizer())
    elif not named:
        raise UserError(
            "This run held no rows out. Name rows to measure on: luthier evaluate RUN "
            "dataset.path=FILE."
        )


def of_dataset(config: DatasetConfig, maker: Maker, limit: int | None) -> Iterator[Items]:
    """All rows of a dataset, a set for each of its sources."""
    sources = train_sources(config)
    for name, source in sources.items():
        opened = open_rows(source, "dataset" if len(sources) == 1 else f"dataset.sources.{name}")
        found = Items(opened.source.label if len(sources) == 1 else name)
        _add(maker, found, opened, _rows(opened, config, limit))
        yield found


def _drawn(config: RunConfig, maker: Maker, limit: int | None, tokenizer: Any) -> Items:
    """The rows that the run drew from its training rows to hold them out."""
    from luthier.train.methods.encoders import encoders

    found = Items(MAIN)
    prepared = prepare(config.dataset, encoders(config, tokenizer), tokenizer, config.seed)
    for opened, placed in prepared.heldout[""].by_source():
        left = None if limit is None else limit - len(found.rows)
        _add(maker, found, opened, placed[:left])
    return found


def _add(maker: Maker, found: Items, opened: Opened, placed: Iterable[Placed]) -> None:
    """Add rows of one source; UserError for a kind that is not measured of this model."""
    kind = opened.shape.kind
    if kind not in maker.kinds:
        raise UserError(
            f"{opened.source.label}: its rows are {ROW_KINDS[kind]}, and this model is measured on "
            f"{', '.join(ROW_KINDS[one] for one in maker.kinds)}. If they are something else, say "
            "so with dataset.shape."
        )
    maker.add(found, opened, placed)


def _rows(opened: Opened, config: DatasetConfig, limit: int | None) -> list[Placed]:
    """The rows; UserError for bad ones unless they are dropped."""
    bad = BadRows()
    rows = list(islice(opened.examples(bad), limit))
    if config.on_bad_row == "error":
        bad.raise_if_any(opened)
    return rows
