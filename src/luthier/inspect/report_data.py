"""What the check found of sources, mixture, equal rows and batches, in words."""

from collections.abc import Iterator

from luthier.inspect.account import Account
from luthier.inspect.batches import Batches, Layout
from luthier.inspect.composition import Equals, Overlap, how_held_out
from luthier.inspect.rows import place
from luthier.inspect.survey import Survey

_EQUAL = {
    "exact": "equal to an earlier one",
    "normalised": "like an earlier one but for case, space or Unicode form",
}
Lines = Iterator[str]
"""Lines of a section; one that is set in by two more spaces belongs to the line before it."""


def rows(count: int, what: str = "row") -> str:
    """A number of rows in words."""
    return f"{count:,} {what if count == 1 else what + 's'}"


def sources(survey: Survey) -> Lines:
    """Where the rows are from, what they look like, and what is not read of them."""
    stops = survey.material.config.dataset.on_bad_row == "error"
    for account in survey.accounts:
        yield from _source_values(account, stops)


def _source_values(account: Account, stops: bool) -> Lines:
    opened = account.opened
    config, shape = opened.config, opened.shape
    yield f"{opened.key}: {place(opened.source.label)}, shape {shape.name}, {rows(len(account))}"
    if shape.unused:
        yield f"  columns that are not read: {', '.join(shape.unused)}"
    if config.filter is not None:
        yield f"  filter {config.filter} leaves out {rows(account.bad.filtered)}"
    if config.train_on is not None:
        yield f"  train_on {config.train_on}"
    if account.bad.rows:
        yield f"  cannot be read, {'stops the training' if stops else 'dropped'}: " + rows(
            len(account.bad.rows)
        )


def duplicates(survey: Survey) -> Lines:
    """Training rows that equal an earlier one."""
    found, setting = survey.whole.equals(), survey.material.config.dataset.deduplicate
    if not found["exact"].rows and not found["normalised"].rows:
        yield "no training row equals another one"
        return
    left_out = {"none": (), "exact": ("exact",), "normalised": ("exact", "normalised")}[setting]
    for kind, words in _EQUAL.items():
        if found[kind].rows:
            fate = "left out" if kind in left_out else "kept"
            words = f"{words}: {rows(found[kind].rows)}, {fate} (dataset.deduplicate={setting})"
            yield from _equals(found[kind], words)


def _equals(found: Equals, words: str) -> Lines:
    yield words
    for example in found.examples:
        yield f"  {example.place} {example.words}"
    if found.rows > len(found.examples):
        yield f"  ... and {found.rows - len(found.examples):,} more"


def held_out(survey: Survey) -> Lines:
    """How rows are held out, and what training shares with them."""
    config = survey.material.config
    if how := how_held_out(config.dataset.eval, config.seed):
        yield how
    for name, found in survey.whole.overlaps().items():
        yield f"{name}: {rows(found.rows)}{_overlap(found)}"


def _overlap(found: Overlap) -> str:
    words = ""
    if found.equal:
        words += f"; left out of training, equal to one of them: {rows(found.equal)}"
    if found.similar:
        words += (
            f"; trains, like one of them but for case, space or Unicode form: {found.similar:,}"
        )
    return words or "; no training row is like one of them"


def batches(found: Batches) -> Lines:
    """How full the batches of an epoch are on one device: as configured, and the other way."""
    padded, packed = _padded(found.padded, found.strategy), _packed(found.packed)
    if found.packing:
        yield packed
        yield f"  without trainer.args.packing: {padded}"
    else:
        yield padded
        yield f"  with trainer.args.packing=true: {packed}"


def _packed(layout: Layout | None) -> str:
    if layout is None:
        return "chat.max_length must say how long a row is"
    return f"{rows(layout.rows)} of {layout.length:,} tokens, {layout.efficiency:.1%} full"


def _padded(layout: Layout, strategy: str) -> str:
    width = "the longest" if layout.length is None else f"{layout.length:,} tokens"
    order = ", grouped by length" if strategy == "group_by_length" else ""
    return (
        f"{rows(layout.rows)}, {layout.batch_size} in a batch{order}, padded to {width}: "
        f"{1 - layout.efficiency:.1%} of the places are padding"
    )
