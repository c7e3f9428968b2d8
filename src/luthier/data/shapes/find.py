"""Finding the shape of a source: named in the config, or shown by the columns of its rows."""

from collections import Counter
from collections.abc import Mapping, Sequence

from luthier.config.schema import SourceConfig
from luthier.data.rows import Row
from luthier.data.shapes import words
from luthier.data.shapes.columns import Columns
from luthier.data.shapes.fitting import Fit, Group, fits, grouped, strongest
from luthier.data.shapes.forms import FORMS, Form
from luthier.data.shapes.shape import Shape
from luthier.data.shapes.values import is_absent
from luthier.errors import UserError

BESIDE = ("context", "contexts", "passage", "document", "documents", "choices", "options")
"""Columns that a question cannot be answered without."""
_SPOKEN = ("conversation", "preference", "unpaired")


def find_shape(
    config: SourceConfig, rows: Sequence[Row], source: str, key: str = "dataset"
) -> Shape:
    """The shape that the config names, or the one that the first rows of a source show.

    Where rows differ, the shape of most of them; the others are bad rows to it. `source` and `key`
    name the source and its group of the config (`dataset.sources.mine`) in errors. Raises UserError
    for columns that fit no shape, or several equally well, and for a mapping of unknown names.
    """
    if not rows:
        raise UserError(f"dataset: {source} has no row that can be read, so it shows no shape.")
    asked = words.Asked(config, rows, source, key)
    forms = [form for form in FORMS if config.shape in ("auto", form.shape)]
    _check_mapping(config.columns, forms, asked)
    forms = [form for form in forms if config.columns.keys() <= set(form.ours)]
    found = _voted(grouped(rows), forms, config)
    if not found:
        raise UserError(words.unknown(asked, forms))
    if len(found) > 1:
        raise UserError(words.several(asked, found))
    if config.shape == "auto" and not config.columns.keys() & found[0].names.keys():
        _check_left_out(found[0], asked)
    return _shape(found[0], asked)


def _check_mapping(mapping: Mapping[str, str], forms: Sequence[Form], asked: words.Asked) -> None:
    """Refuse names in `columns` that are neither ours nor the source's."""
    ours = list(dict.fromkeys(name for form in forms for name in form.ours))
    for name, column in mapping.items():
        if name not in ours:
            raise UserError(words.unknown_key(asked, name, ours))
        if column not in asked.present and column.partition(".")[0] not in asked.present:
            raise UserError(words.unknown_column(asked, name, column))
    if not any(mapping.keys() <= set(form.ours) for form in forms):
        raise UserError(words.unfitting_keys(asked, list(mapping)))


def _voted(groups: Sequence[Group], forms: Sequence[Form], config: SourceConfig) -> list[Fit]:
    """The reading that fits most rows; several where these rows fit each of them."""
    votes: Counter[tuple[int, tuple[str, ...]]] = Counter()
    found = [_fitting(group, forms, config) for group in groups]
    for group, ways in zip(groups, found, strict=True):
        for fit in ways:
            votes[fit.key] += len(group.rows)
    most = max(votes.values(), default=0)
    winners = ([fit for fit in ways if votes[fit.key] == most] for ways in found)
    return next(filter(None, winners), [])


def _fitting(group: Group, forms: Sequence[Form], config: SourceConfig) -> list[Fit]:
    """The readings of rows with equal columns; a named shape needs no evidence."""
    found = fits(group, forms, config.columns)
    best = strongest(found)
    return best or ([] if config.shape == "auto" else found[:1])


def _check_left_out(fit: Fit, asked: words.Asked) -> None:
    """Refuse to leave out, unasked, what a question is about."""
    aliases = [column for ours, column in fit.names.items() if column != ours]
    if fit.form.shape != "prompt_completion" or not aliases:
        return
    for column in BESIDE:
        if any(not is_absent(row.fields.get(column)) for row in asked.rows):
            raise UserError(words.left_out(asked, fit, column))


def _shape(fit: Fit, asked: words.Asked) -> Shape:
    """The shape of a reading: its needed columns, and those that may stand beside them."""
    config = asked.config
    if config.system is not None and fit.form.kind not in _SPOKEN:
        raise UserError(
            f"{asked.key}.system is for conversations, and {asked.source} is read as "
            f"{fit.form.shape}. Remove it."
        )
    names, later = dict(fit.names), {}
    for slot in fit.form.optional:
        here = [name for name in slot.names if name in asked.present and name not in fit.needed]
        chosen = [config.columns[slot.ours]] if slot.ours in config.columns else here
        if len(chosen) > 1 and slot.ours not in chosen:
            raise UserError(words.several_columns(asked, slot.ours, chosen))
        if chosen:
            names[slot.ours] = slot.ours if slot.ours in chosen else chosen[0]
        else:
            later[slot.ours] = slot.names
    used = {column for name in names.values() for column in (name, name.partition(".")[0])}
    unused = tuple(column for column in asked.present if column not in used)
    return Shape(fit.form, Columns(names, later, config.system), unused)
