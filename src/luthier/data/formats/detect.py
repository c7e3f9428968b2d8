"""What is said when columns show no row format, or more than one."""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from luthier.config.schema import SourceConfig
from luthier.data.formats.columns import Columns, is_absent
from luthier.data.formats.match import Fit, Group, RowFormat, fits, grouped, strongest
from luthier.data.formats.registry import COMPLETION, FORMAT_VARIANTS, PROMPT, FormatVariant
from luthier.data.rows import Row, excerpt
from luthier.errors import UserError

SHOWN = 3
"""Nearest types that an error shows."""


@dataclass(frozen=True)
class Asked:
    """What the row format is looked for in."""

    config: SourceConfig
    rows: Sequence[Row]
    source: str
    key: str
    """The group of the config, such as `dataset`."""

    @cached_property
    def present(self) -> list[str]:
        """The columns of the rows, in order."""
        return list(dict.fromkeys(name for row in self.rows for name in row.fields))

    @property
    def seen(self) -> list[str]:
        """The columns and the first row, as lines."""
        first = self.rows[0]
        return [
            f"  columns: {', '.join(self.present) or 'none'}",
            f"  first row ({first.where}): {excerpt(first.fields)}",
        ]


_HINTS: tuple[tuple[set[str], str], ...] = (
    (
        {"completions", "labels"},
        "A label for each step of a completion (stepwise supervision) trains a process reward "
        "model, and luthier trains none, so it does not read this format.",
    ),
    (
        {"translation"},
        "Name the two languages: {key}.columns={{source: translation.en, "
        "target: translation.de}}, with the names that the first row shows.",
    ),
)
NO_TEXT = frozenset({"image", "images", "video", "videos", "audio", "audios"})


def unknown(asked: Asked, forms: Sequence[FormatVariant]) -> str:
    """The words for columns that fit no row format, or not the one that the config names."""
    wanted = "show no format that luthier reads"
    if asked.config.type != "auto":
        wanted = f"do not show the type {asked.config.type}"
    return "\n".join(
        [
            f"dataset: the columns of {asked.source} {wanted}.",
            *asked.seen,
            *_nearest(asked, forms),
            *_hints(asked),
            *(_alike(asked, forms) or [_advice(asked)]),
        ]
    )


def _hints(asked: Asked) -> list[str]:
    """What is known about columns that luthier does not read."""
    present = set(asked.present)
    hints = [text.format(key=asked.key) for columns, text in _HINTS if columns <= present]
    prompts = [name for name in PROMPT.names if name in present]
    if prompts and not present & {*COMPLETION.names, "chosen", "completions"}:
        hints += [
            f"If {prompts[0]!r} is a prompt, it has no reply: there is nothing to train.",
            "A model that learns from its own answers (trainer=grpo, rloo) takes prompts alone: "
            f"{asked.key}.type=prompt",
        ]
    if present & NO_TEXT:
        hints.append("Only text is read, no images, video or audio.")
    return hints


def _nearest(asked: Asked, forms: Sequence[FormatVariant]) -> list[str]:
    """The types of which most is there, and what they lack; a named type in any case."""
    lines: dict[str, tuple[float, str]] = {}
    for form in forms:
        if form.type == "prompt" != asked.config.type:
            continue  # it has to be named
        share, line = _lack(asked, form)
        if (share or asked.config.type != "auto") and share > lines.get(form.type, (-1.0,))[0]:
            lines[form.type] = (share, line)
    ranked = sorted(lines.values(), key=lambda entry: -entry[0])
    return [line for _, line in ranked[:SHOWN]]


def _lack(asked: Asked, form: FormatVariant) -> tuple[float, str]:
    """The share of a form's columns that is there, and the words for what is not."""
    has, lacks = [], []
    for slot in form.needs:
        names = [asked.config.columns.get(slot.ours, ""), *slot.names]
        column = next((name for name in names if name in asked.present), None)
        if column is not None:
            has.append(column if column == slot.ours else f"{column} (as {slot.ours})")
        else:
            others = [name for name in slot.names if name != slot.ours]
            known = f" (or {', '.join(others)})" if others else ""
            lacks.append(f"{slot.ours}{known}")
    held = f"has {', '.join(has)}" if has else "has none of its columns"
    lacking = f"lacks {' and '.join(lacks)}" if lacks else "but their values are of another form"
    return len(has) / len(form.needs), f"  {form.type}: {held}, {lacking}"


def _alike(asked: Asked, forms: Sequence[FormatVariant]) -> list[str]:
    """Columns whose names are nearly those of a row format."""
    slots = [slot for form in forms for slot in form.needs]
    known = {name for slot in slots for name in slot.names}
    lines = []
    for column in asked.present:
        near = difflib.get_close_matches(column, known, n=1, cutoff=0.75)
        if near and column not in known:
            ours = next(slot.ours for slot in slots if near[0] in slot.names)
            mapping = _written({**asked.config.columns, ours: column})
            lines.append(f"{column!r} looks like {near[0]!r}: {asked.key}.columns={mapping}")
    return lines


def _advice(asked: Asked) -> str:
    """What to do where nothing else can be said."""
    return (
        f"Map its columns, our names first, such as {asked.key}.columns={{prompt: ..., "
        "completion: ...}; docs/formats.md has all types."
    )


def several(asked: Asked, found: Sequence[Fit]) -> str:
    """The words for columns that fit several readings equally well."""
    types = [fit.form.type for fit in found]
    lines, settings = [], []
    for fit in found:
        alone = types.count(fit.form.type) == 1
        setting = f"type={fit.form.type}" if alone else f"columns={_written(fit.names)}"
        settings.append(f"{asked.key}.{setting}")
        lines.append(f"  {fit.form.type} would read {', '.join(fit.names.values())}")
    return "\n".join(
        [
            f"dataset: the columns of {asked.source} can be read in {len(found)} ways.",
            *asked.seen,
            *lines,
            f"Say which one is meant: {' or '.join(settings)}",
        ]
    )


def several_columns(asked: Asked, ours: str, columns: Sequence[str]) -> str:
    """The words for several columns that could be the same optional one."""
    settings = " or ".join(f"{asked.key}.columns={{{ours}: {column}}}" for column in columns)
    return "\n".join(
        [
            f"dataset: {asked.source} has {' and '.join(columns)}, and {ours} is one of them.",
            *asked.seen,
            f"Say which one is meant: {settings}",
        ]
    )


def left_out(asked: Asked, fit: Fit, column: str) -> str:
    """The words for a column that a question is about and no one mapped."""
    prompt, reply = fit.names["prompt"], fit.names["completion"]
    joined = _written({"instruction": prompt, "input": column, "output": reply})
    return "\n".join(
        [
            f"dataset: {asked.source} has {column!r} beside {prompt!r} and {reply!r}, and reading "
            "only these two would leave it out.",
            *asked.seen,
            f"To put its text below the {prompt}: {asked.key}.columns={joined}",
            f"To leave it out: {asked.key}.type={fit.form.type}",
        ]
    )


def unknown_key(asked: Asked, name: str, ours: Sequence[str]) -> str:
    """The words for a key of `columns` that is none of our names."""
    of_type = "" if asked.config.type == "auto" else f" for the type {asked.config.type}"
    return (
        f"{asked.key}.columns has the key {name!r}{_near(name, ours)}. Its keys are our names"
        f"{of_type}, {', '.join(ours)}; its values are the dataset's own."
    )


def unknown_column(asked: Asked, name: str, column: str) -> str:
    """The words for a value of `columns` that is no column of the source."""
    return (
        f"{asked.key}.columns maps {name} to {column!r}, and {asked.source} has no such column"
        f"{_near(column, asked.present)}. It has: {', '.join(asked.present)}."
    )


def unfitting_keys(asked: Asked, names: Sequence[str]) -> str:
    """The words for keys of `columns` that belong to different types."""
    return (
        f"{asked.key}.columns maps {' and '.join(names)}, and no type has all of these. "
        "docs/formats.md says which type has which columns."
    )


def _near(name: str, choices: Sequence[str]) -> str:
    """A question that names the choice most like a name, if one is."""
    near = difflib.get_close_matches(name, choices, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _written(mapping: Mapping[str, str]) -> str:
    """A mapping as the command line takes it."""
    return "{" + ", ".join(f"{ours}: {column}" for ours, column in mapping.items()) + "}"


# Finding the row format of a source: named in the config, or shown by the columns of its rows.

BESIDE = ("context", "contexts", "passage", "document", "documents", "choices", "options")
"""Columns that a question cannot be answered without."""
_SPOKEN = ("conversation", "preference", "unpaired")


def detect_format(
    config: SourceConfig, rows: Sequence[Row], source: str, key: str = "dataset"
) -> RowFormat:
    """The row format that the config names, or the one that the first rows of a source show.

    Where rows differ, the format of most of them; the others are bad rows to it. `source` and `key`
    name the source and its group of the config (`dataset.sources.mine`) in errors. Raises UserError
    for columns that fit no format, or several equally well, and for a mapping of unknown names.
    """
    if not rows:
        raise UserError(f"dataset: {source} has no row that can be read, so it shows no format.")
    asked = Asked(config, rows, source, key)
    forms = [form for form in FORMAT_VARIANTS if config.type in ("auto", form.type)]
    _check_mapping(config.columns, forms, asked)
    forms = [form for form in forms if config.columns.keys() <= set(form.ours)]
    found = _voted(grouped(rows), forms, config)
    if not found:
        raise UserError(unknown(asked, forms))
    if len(found) > 1:
        raise UserError(several(asked, found))
    if config.type == "auto" and not config.columns.keys() & found[0].names.keys():
        _check_left_out(found[0], asked)
    return _row_format(found[0], asked)


def _check_mapping(
    mapping: Mapping[str, str], forms: Sequence[FormatVariant], asked: Asked
) -> None:
    """Refuse names in `columns` that are neither ours nor the source's."""
    ours = list(dict.fromkeys(name for form in forms for name in form.ours))
    for name, column in mapping.items():
        if name not in ours:
            raise UserError(unknown_key(asked, name, ours))
        if column not in asked.present and column.partition(".")[0] not in asked.present:
            raise UserError(unknown_column(asked, name, column))
    if not any(mapping.keys() <= set(form.ours) for form in forms):
        raise UserError(unfitting_keys(asked, list(mapping)))


def _voted(
    groups: Sequence[Group], forms: Sequence[FormatVariant], config: SourceConfig
) -> list[Fit]:
    """The reading that fits most rows; several where these rows fit each of them."""
    votes: Counter[tuple[int, tuple[str, ...]]] = Counter()
    found = [_fitting(group, forms, config) for group in groups]
    for group, ways in zip(groups, found, strict=True):
        for fit in ways:
            votes[fit.key] += len(group.rows)
    most = max(votes.values(), default=0)
    winners = ([fit for fit in ways if votes[fit.key] == most] for ways in found)
    return next(filter(None, winners), [])


def _fitting(group: Group, forms: Sequence[FormatVariant], config: SourceConfig) -> list[Fit]:
    """The readings of rows with equal columns; a named type needs no evidence."""
    found = fits(group, forms, config.columns)
    best = strongest(found)
    return best or ([] if config.type == "auto" else found[:1])


def _check_left_out(fit: Fit, asked: Asked) -> None:
    """Refuse to leave out, unasked, what a question is about."""
    aliases = [column for ours, column in fit.names.items() if column != ours]
    if fit.form.type != "prompt_completion" or not aliases:
        return
    for column in BESIDE:
        if any(not is_absent(row.fields.get(column)) for row in asked.rows):
            raise UserError(left_out(asked, fit, column))


def _row_format(fit: Fit, asked: Asked) -> RowFormat:
    """The row format of a reading: its needed columns, and those that may stand beside them."""
    config = asked.config
    if config.system is not None and fit.form.example_type not in _SPOKEN:
        raise UserError(
            f"{asked.key}.system is for conversations, and {asked.source} is read as "
            f"{fit.form.type}. Remove it."
        )
    names, later = dict(fit.names), {}
    for slot in fit.form.optional:
        here = [name for name in slot.names if name in asked.present and name not in fit.needed]
        chosen = [config.columns[slot.ours]] if slot.ours in config.columns else here
        if len(chosen) > 1 and slot.ours not in chosen:
            raise UserError(several_columns(asked, slot.ours, chosen))
        if chosen:
            names[slot.ours] = slot.ours if slot.ours in chosen else chosen[0]
        else:
            later[slot.ours] = slot.names
    used = {column for name in names.values() for column in (name, name.partition(".")[0])}
    unused = tuple(column for column in asked.present if column not in used)
    return RowFormat(fit.form, Columns(names, later, config.system), unused)
