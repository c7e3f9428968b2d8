"""Which forms the columns of rows fit, and which of these says most."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from luthier.data.formats.columns import Columns, MissingColumn, inside
from luthier.data.formats.conversations import Example
from luthier.data.formats.registry import (
    FORMAT_VARIANTS,
    SEEN,
    VERSION,
    Evidence,
    ExampleType,
    FormatVariant,
    Sample,
    Slot,
)
from luthier.data.rows import Row, RowError

KNOWN = frozenset(name for form in FORMAT_VARIANTS for slot in form.needs for name in slot.names)
"""Names that columns of other formats than plain text have."""


@dataclass(frozen=True)
class Fit:
    """A form, the columns that it would read, and how well their values fit."""

    form: FormatVariant
    names: dict[str, str]
    """Our names of the needed columns -> the source's."""
    evidence: Evidence
    columns: frozenset[str]
    """All columns that it would read, the optional ones too."""

    @cached_property
    def needed(self) -> frozenset[str]:
        """The columns that it cannot do without."""
        return frozenset(self.names.values())

    @property
    def key(self) -> tuple[int, tuple[str, ...]]:
        """What makes two fits the same reading."""
        return FORMAT_VARIANTS.index(self.form), tuple(self.names.values())


@dataclass(frozen=True)
class Group:
    """Rows with the same columns."""

    columns: tuple[str, ...]
    rows: list[Row]


def grouped(rows: Iterable[Row]) -> list[Group]:
    """The rows by their columns, in the order in which these first come."""
    groups: dict[frozenset[str], Group] = {}
    for row in rows:
        key = frozenset(row.fields)
        if key not in groups:
            groups[key] = Group(tuple(row.fields), [])
        groups[key].rows.append(row)
    return list(groups.values())


def fits(group: Group, forms: Sequence[FormatVariant], mapping: Mapping[str, str]) -> list[Fit]:
    """Every way in which forms could read these rows, with the columns that the user mapped."""
    found = []
    for form in forms:
        choices = [list(_choices(slot, group, mapping, form)) for slot in form.needs]
        for columns in product(*choices):
            if len(set(columns)) == len(columns):
                found.append(_fit(form, columns, group, mapping))
    return found


def _fit(
    form: FormatVariant, columns: Sequence[str], group: Group, mapping: Mapping[str, str]
) -> Fit:
    """One form with one choice of columns."""
    names = {slot.ours: column for slot, column in zip(form.needs, columns, strict=True)}
    aliased = frozenset(o for o, column in names.items() if column != o and o not in mapping)
    evidence = form.judge(Sample(group.rows, names, aliased))
    optional = {c for slot in form.optional for c in _choices(slot, group, mapping, form)}
    return Fit(form, names, evidence, frozenset(columns) | optional)


def _choices(
    slot: Slot, group: Group, mapping: Mapping[str, str], form: FormatVariant
) -> Iterator[str]:
    """The columns that a slot could mean: the mapped one, else our own name, else others."""
    if slot.ours in mapping:
        column = mapping[slot.ours]
        if any(inside(row.fields, column)[0] for row in group.rows[:SEEN]):
            yield column
        return
    taken = set(mapping.values())
    named = [name for name in slot.names if name in group.columns and name not in taken]
    if slot.ours in named:
        yield slot.ours
    elif named:
        yield from named
    elif form.type == "text":
        yield from only_text(group)


def only_text(group: Group) -> list[str]:
    """The one column of text, where the others hold at most numbers."""
    kinds = {name: {type(row.fields[name]) for row in group.rows[:SEEN]} for name in group.columns}
    texts = [name for name, types in kinds.items() if types <= {str, type(None)} and str in types]
    plain: set[type[Any]] = {str, int, float, bool, type(None)}
    is_plain = all(types <= plain for types in kinds.values())
    name = texts[0] if len(texts) == 1 and is_plain else ""
    is_document = name and name not in KNOWN and not name.lower().endswith(("id", "name", "label"))
    return [name] if is_document else []


def strongest(found: Sequence[Fit]) -> list[Fit]:
    """The fits that no other fit explains better."""
    likely = [fit for fit in found if fit.evidence]
    return [fit for fit in likely if not any(_beats(other, fit) for other in likely)]


def _beats(fit: Fit, other: Fit) -> bool:
    """Whether a fit makes another one needless: it reads its columns and more, or any but text."""
    if fit is other or fit.evidence is not Evidence.YES:
        return False
    if "text" in (fit.form.type, other.form.type):
        return other.form.type == "text" and fit.form.type != "text"
    if fit.needed == other.needed:
        return FORMAT_VARIANTS.index(fit.form) < FORMAT_VARIANTS.index(other.form)
    return other.needed <= fit.columns and len(fit.needed) >= len(other.needed)


# A row format that was found: it reads rows.

__all__ = ["Example", "RowFormat"]


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a source are read."""

    form: FormatVariant
    columns: Columns
    unused: tuple[str, ...] = ()
    """Columns of the source that are not read."""

    @property
    def type(self) -> str:
        """What `dataset.type` calls it, such as `sharegpt`."""
        return self.form.type

    @property
    def example_type(self) -> ExampleType:
        """What its examples are, such as `conversation`."""
        return self.form.example_type

    def read(self, row: Row) -> Example:
        """One row as an example; RowError says what is wrong with it."""
        try:
            return self.form.read(row, self.columns)
        except MissingColumn as error:
            raise RowError(f"{error}{self._other(row)}") from None

    def settings(self) -> dict[str, Any]:
        """Everything that decides the examples, for JSON."""
        return {
            # This key decides the names of entries in the cache: it keeps its old name.
            "shape": self.type,
            "columns": dict(sorted(self.columns.names.items())),
            "system": self.columns.system,
            "version": VERSION,
        }

    def _other(self, row: Row) -> str:
        """The words for a row whose columns are those of another type."""
        found = strongest(fits(Group(tuple(row.fields), [row]), FORMAT_VARIANTS, {}))
        others = [fit.form.type for fit in found if fit.form.type != self.type]
        if not others:
            return ""
        return f"; these are the columns of {others[0]}, and the source is read as {self.type}"
