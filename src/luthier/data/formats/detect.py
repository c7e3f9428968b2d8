"""Detects the row format of a source: the one that its config names, or that its columns fit.

The first rows are put into groups with equal columns, and each variant of each format is matched
with each group. A match that another one explains better is left out, and the match of most rows
wins. Where none is left, or several, the error of `detection_errors` shows the columns and what to
set.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from luthier.config.schema import SourceConfig
from luthier.data.formats import detection_errors
from luthier.data.formats.columns import (
    ColumnMapping,
    MissingColumnError,
    NoTextReplyError,
    find_value,
    is_empty_cell,
)
from luthier.data.formats.conversations import Example
from luthier.data.formats.image_parts import (
    TYPED_PLACEHOLDER,
    RefusedColumnError,
    TypedPlaceholderError,
    list_refused_columns,
)
from luthier.data.formats.labelled import parse_number
from luthier.data.formats.registry import (
    FORMAT_VARIANTS,
    FORMAT_VERSION,
    SAMPLED_ROWS,
    ColumnSample,
    DetectionInput,
    Evidence,
    ExampleType,
    FormatColumn,
    FormatMatch,
    FormatVariant,
)
from luthier.data.rows import Row, RowError
from luthier.errors import UserError, format_override

CONTEXT_COLUMNS = (
    "context", "contexts", "passage", "document", "documents", "choices", "options",
)  # fmt: skip
"""Columns that a question cannot be answered without."""
_WITH_MESSAGES = ("conversation", "preference", "unpaired")
"""Types of examples that have messages, and so may have a system prompt and images."""
_NEEDED_COLUMN_NAMES = frozenset(
    name for variant in FORMAT_VARIANTS for column in variant.needed for name in column.aliases
)
"""The names that columns of other formats than plain text have."""


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a source are read."""

    variant: FormatVariant
    columns: ColumnMapping
    unused: tuple[str, ...] = ()
    """Columns of the source that are not read."""
    key: str = "dataset"
    """The group of the config that it stands under, for messages."""

    @property
    def type(self) -> str:
        """What `dataset.type` calls it, such as `sharegpt`."""
        return self.variant.type

    @property
    def example_type(self) -> ExampleType:
        """What its examples are, such as `conversation`."""
        return self.variant.example_type

    def read(self, row: Row) -> Example:
        """Return a row as an example; RowError says what is wrong with it."""
        try:
            return self.variant.read(row, self.columns)
        except MissingColumnError as error:
            raise RowError(f"{error}{self._describe_other_type(row)}") from None
        except NoTextReplyError as error:
            setting = format_override(f"{self.key}.json_replies", True)
            raise RowError(f"{error}. To train it as JSON text, set {setting}") from None
        except TypedPlaceholderError as error:
            setting = format_override(f"{self.key}.image_placeholder", TYPED_PLACEHOLDER)
            raise RowError(f"{error}. If each marks an image, set {setting}") from None
        except RefusedColumnError as error:
            setting = format_override(f"{self.key}.remove_columns", [error.column])
            raise RowError(f"{error}. To leave it out, set {setting}") from None

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the examples, for JSON."""
        return {
            # The settings decide the names of entries in the cache: this key keeps its old name.
            "shape": self.type,
            "columns": dict(sorted(self.columns.source_names.items())),
            "system": self.columns.system,
            "version": FORMAT_VERSION,
            "json_replies": self.columns.json_replies,
            "number_labels": self.columns.number_labels,
            "image_placeholder": self.columns.image_placeholder,
            "refused": list(self.columns.refused),
        }

    def _describe_other_type(self, row: Row) -> str:
        """Return words on the other type whose columns a row has; an empty text where none."""
        group = RowGroup(tuple(row.fields), [row])
        matches = _best_matches(_match_variants(group, FORMAT_VARIANTS, {}))
        others = [match.variant.type for match in matches if match.variant.type != self.type]
        if not others:
            return ""
        return f"; these are the columns of {others[0]}, and the source is read as {self.type}"


@dataclass(frozen=True)
class RowGroup:
    """Rows with the same columns."""

    columns: tuple[str, ...]
    rows: list[Row]


def detect_format(
    config: SourceConfig,
    rows: Sequence[Row],
    source: str,
    key: str = "dataset",
    text_cells: bool = False,
) -> RowFormat:
    """Return the row format that the config names, or that the first rows of a source show.

    Where rows differ, the format of most of them wins; the others are bad rows to it. `source` and
    `key` name the source and its group of the config (`dataset.sources.mine`) in errors.
    `text_cells`: all its values are text, as in CSV. Raises UserError for columns that fit no
    format, or several equally well, and for a mapping of unknown names.
    """
    if not rows:
        raise UserError(f"dataset: {source} has no row that can be read, so it shows no format.")
    rows = _remove_columns(config, rows, source, key)
    detection = DetectionInput(config, rows, source, key)
    variants = [v for v in FORMAT_VARIANTS if config.type in ("auto", v.type)]
    _check_mapping(config.columns, variants, detection)
    variants = [v for v in variants if config.columns.keys() <= set(v.column_names)]
    # Only behind the checks above: a misspelt mapping would fit nothing, and the error would blame
    # the columns.
    matches = _vote(_group_by_columns(rows), variants, config)
    if not matches:
        raise UserError(detection_errors.describe_no_format(detection, variants))
    if len(matches) > 1:
        raise UserError(detection_errors.describe_several_formats(detection, matches))
    if config.type == "auto" and not config.columns.keys() & matches[0].source_names.keys():
        _check_context_columns(matches[0], detection)
    return _row_format(matches[0], detection, text_cells)


def _remove_columns(
    config: SourceConfig, rows: Sequence[Row], source: str, key: str
) -> Sequence[Row]:
    """Return the rows without the columns that the config leaves out."""
    if not config.remove_columns:
        return rows
    removed = frozenset(config.remove_columns)
    columns = list(dict.fromkeys(name for row in rows for name in row.fields))
    for name in config.remove_columns:
        if name not in columns:
            raise UserError(
                detection_errors.describe_unknown_removed_column(key, name, source, columns)
            )
    return [
        Row({name: value for name, value in row.fields.items() if name not in removed}, row.where)
        for row in rows
    ]


def _check_mapping(
    mapping: Mapping[str, str], variants: Sequence[FormatVariant], detection: DetectionInput
) -> None:
    """Refuse names in `columns` that are neither ours nor the source's."""
    our_names = list(dict.fromkeys(name for v in variants for name in v.column_names))
    for name, column in mapping.items():
        if name not in our_names:
            raise UserError(detection_errors.describe_unknown_key(detection, name, our_names))
        # `translation.en` is the field `en` of the column `translation`.
        if not {column, column.partition(".")[0]} & {*detection.columns}:
            raise UserError(detection_errors.describe_unknown_column(detection, name, column))
    if not any(mapping.keys() <= set(variant.column_names) for variant in variants):
        raise UserError(detection_errors.describe_unfitting_keys(detection, list(mapping)))


def _group_by_columns(rows: Iterable[Row]) -> list[RowGroup]:
    """Return the rows by their columns, in the order in which these first come."""
    groups: dict[frozenset[str], RowGroup] = {}
    for row in rows:
        key = frozenset(row.fields)
        if key not in groups:
            groups[key] = RowGroup(tuple(row.fields), [])
        groups[key].rows.append(row)
    return list(groups.values())


def _vote(
    groups: Sequence[RowGroup], variants: Sequence[FormatVariant], config: SourceConfig
) -> list[FormatMatch]:
    """Return the match that fits most rows; several where these rows fit each of them."""
    # Votes are counted over all groups: rows of one format differ in their optional columns.
    votes: Counter[tuple[int, tuple[str, ...]]] = Counter()
    matches_of_groups = []
    for group in groups:
        matches = _match_variants(group, variants, config.columns, config.json_replies)
        best = _best_matches(matches)
        if config.type != "auto":  # A type that the config names needs no evidence.
            best = best or matches[:1]
        matches_of_groups.append(best)
        for match in best:
            votes[match.vote] += len(group.rows)
    most = max(votes.values(), default=0)
    winners = ([m for m in matches if votes[m.vote] == most] for matches in matches_of_groups)
    return next(filter(None, winners), [])


def _match_variants(
    group: RowGroup,
    variants: Sequence[FormatVariant],
    mapping: Mapping[str, str],
    json_replies: bool = False,
) -> list[FormatMatch]:
    """Return every way in which variants could read these rows.

    `mapping` has the columns that the user mapped: our name -> the source's.
    """
    matches = []
    for variant in variants:
        choices = [list(_choices(needed, group, mapping, variant)) for needed in variant.needed]
        for columns in product(*choices):
            # One column cannot be two of ours, such as a question and its answer.
            if len(set(columns)) == len(columns):
                matches.append(_match(variant, columns, group, mapping, json_replies))
    return matches


def _match(
    variant: FormatVariant,
    columns: Sequence[str],
    group: RowGroup,
    mapping: Mapping[str, str],
    json_replies: bool,
) -> FormatMatch:
    """Return the match of a variant with one choice of its needed columns."""
    names = {needed.name: column for needed, column in zip(variant.needed, columns, strict=True)}
    aliased = frozenset(
        ours
        for ours, column in names.items()
        if _without_case(column) != ours and ours not in mapping
    )
    evidence = Evidence.YES
    if variant.weigh is not None:
        evidence = variant.weigh(ColumnSample(group.rows, names, aliased, json_replies))
    optional = {c for o in variant.optional for c in _choices(o, group, mapping, variant)}
    return FormatMatch(variant, names, evidence, frozenset(columns) | optional)


def _choices(
    column: FormatColumn, group: RowGroup, mapping: Mapping[str, str], variant: FormatVariant
) -> Iterator[str]:
    """Yield the columns that may be meant: the mapped one, else our own name, else its aliases."""
    if column.name in mapping:
        mapped = mapping[column.name]
        if any(find_value(row.fields, mapped)[0] for row in group.rows[:SAMPLED_ROWS]):
            yield mapped
        return
    mapped_columns = set(mapping.values())
    ours = _columns_named(column.name, group.columns, mapped_columns)
    others = [
        name
        for alias in column.aliases
        for name in _columns_named(alias, group.columns, mapped_columns)
    ]
    if ours or others:
        yield from ours or others
    elif variant.type == "text":
        yield from _only_text_column(group)


def _columns_named(name: str, columns: Sequence[str], but: Iterable[str] = ()) -> list[str]:
    """Return the column of this name, or those that differ from it in case and outer space alone.

    Spreadsheets have `Question` where datasets have `question`.
    """
    columns = [column for column in columns if column not in but]
    if name in columns:
        return [name]
    return [column for column in columns if _without_case(column) == name]


def _without_case(column: str) -> str:
    """Return a column's name as it is compared with ours."""
    return column.strip().lower()


def _only_text_column(group: RowGroup) -> list[str]:
    """Return the one column of text, where the others hold at most numbers; else an empty list."""
    rows = group.rows[:SAMPLED_ROWS]
    types_of = {name: {type(row.fields[name]) for row in rows} for name in group.columns}
    texts = [n for n, types in types_of.items() if types <= {str, type(None)} and str in types]
    plain: set[type[Any]] = {str, int, float, bool, type(None)}
    if len(texts) != 1 or not all(types <= plain for types in types_of.values()):
        return []
    # The name of an id, a person or a class is no document.
    is_label = texts[0].lower().endswith(("id", "name", "label"))
    return [] if _without_case(texts[0]) in _NEEDED_COLUMN_NAMES or is_label else texts


def _best_matches(matches: Sequence[FormatMatch]) -> list[FormatMatch]:
    """Return the matches that no other match explains better."""
    # Without evidence a match is possible, and not likely enough to be taken for granted.
    likely = [match for match in matches if match.evidence]
    return [match for match in likely if not any(_beats(other, match) for other in likely)]


def _beats(match: FormatMatch, other: FormatMatch) -> bool:
    """Tell whether a match makes another needless: it reads its columns and more, or any but text.

    Of two that need the same columns, the one that stands first in the registry is meant.
    """
    if match is other or match.evidence is not Evidence.YES:
        return False
    if "text" in (match.variant.type, other.variant.type):
        return other.variant.type == "text" and match.variant.type != "text"
    if match.needed_columns == other.needed_columns:
        return FORMAT_VARIANTS.index(match.variant) < FORMAT_VARIANTS.index(other.variant)
    needs_as_many = len(match.needed_columns) >= len(other.needed_columns)
    return other.needed_columns <= match.columns and needs_as_many


def _check_context_columns(match: FormatMatch, detection: DetectionInput) -> None:
    """Refuse to leave out what a question is about where nobody said so."""
    aliases = [column for name, column in match.source_names.items() if column != name]
    if match.variant.type != "prompt_completion" or not aliases:
        return
    for column in detection.columns:
        if _without_case(column) in CONTEXT_COLUMNS and any(
            not is_empty_cell(row.fields.get(column)) for row in detection.rows
        ):
            raise UserError(detection_errors.describe_context_column(detection, match, column))


def _row_format(match: FormatMatch, detection: DetectionInput, text_cells: bool) -> RowFormat:
    """Return the row format of a match: its needed columns, and those that may stand beside them.

    Raises UserError for a system prompt where there are no messages, and where two columns could be
    the same optional one.
    """
    config = detection.config
    for setting in ("system", "image_placeholder"):
        is_set = getattr(config, setting) is not None
        if is_set and match.variant.example_type not in _WITH_MESSAGES:
            raise UserError(
                f"{detection.key}.{setting} is for conversations, and {detection.source} is read "
                f"as {match.variant.type}. Remove it."
            )
    source_names, late_names = dict(match.source_names), {}
    for optional in match.variant.optional:
        columns = [
            name
            for alias in optional.aliases
            for name in _columns_named(alias, detection.columns, match.needed_columns)
        ]
        if optional.name in config.columns:
            columns = [config.columns[optional.name]]
        ours = [name for name in columns if _without_case(name) == optional.name][:1]
        if len(columns) > 1 and not ours:
            raise UserError(
                detection_errors.describe_several_columns(detection, optional.name, columns)
            )
        if columns:
            source_names[optional.name] = (ours or columns)[0]
        else:
            late_names[optional.name] = tuple(
                name for name in optional.aliases if name not in config.remove_columns
            )
    # `translation.en` reads the column `translation`, which is then not unused.
    read = {part for name in source_names.values() for part in (name, name.partition(".")[0])}
    unused = tuple(column for column in detection.columns if column not in read)
    mapping = ColumnMapping(
        source_names,
        late_names,
        config.system,
        config.json_replies,
        text_cells and _has_number_labels(match, detection),
        config.image_placeholder,
        list_refused_columns(source_names, config.remove_columns),
    )
    return RowFormat(match.variant, mapping, unused, detection.key)


def _has_number_labels(match: FormatMatch, detection: DetectionInput) -> bool:
    """Return whether every label of the first rows is text that is written as a number."""
    if match.variant.example_type != "classification":
        return False
    column = match.source_names["label"]
    cells = [find_value(row.fields, column)[1] for row in detection.rows]
    labels = [cell for cell in cells if isinstance(cell, str) and cell.strip()]
    return bool(labels) and all(parse_number(label) is not None for label in labels)
