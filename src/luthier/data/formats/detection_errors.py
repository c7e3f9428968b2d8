"""The texts of the errors of `detect`: what the columns of a source are, and what to set."""

import difflib
import re
from collections.abc import Mapping, Sequence

from luthier.data.formats.registry import (
    COMPLETION,
    PROMPT,
    DetectionInput,
    FormatMatch,
    FormatVariant,
)
from luthier.data.rows import excerpt
from luthier.errors import format_override

MAX_TYPES = 3
"""Nearest types that an error shows."""
_HINTS: tuple[tuple[set[str], str], ...] = (
    (
        {"completions", "labels"},
        "A label for each step of a completion (stepwise supervision) trains a process reward "
        "model, and luthier trains none, so it does not read this format.",
    ),
    (
        {"translation"},
        "Name the two languages, as the first row shows them: "
        "{key}.columns.source=translation.en {key}.columns.target=translation.de",
    ),
)
"""Columns -> what is to be said where all of them are there and no format fits."""
_HEADED = re.compile(r"\.(csv|tsv)(\.\w+)?:2$", re.IGNORECASE)
"""The place of a first row that stands below a header."""
_MEDIA_COLUMNS = frozenset({"image", "images", "video", "videos", "audio", "audios"})


def describe_no_format(detection: DetectionInput, variants: Sequence[FormatVariant]) -> str:
    """Return the text for columns that fit no format, or not the one that the config names."""
    problem = "do not say what kind of rows these are"
    if detection.config.type != "auto":
        problem = f"do not show the type {detection.config.type}"
    advice = f"{_example_mapping(detection)} All types of rows: `luthier docs formats`."
    return "\n".join(
        [
            f"dataset: the columns of {detection.source} {problem}.",
            *_describe_source(detection),
            *_nearest_types(detection, variants),
            *_hints(detection),
            *(_misspelt_columns(detection, variants) or [advice]),
        ]
    )


def _example_mapping(detection: DetectionInput) -> str:
    """Return what to set, with the columns of the source itself as an example."""
    texts = [
        name
        for name in detection.columns
        if isinstance(value := detection.rows[0].fields.get(name), str)
        and not value.strip().replace(".", "", 1).isdigit()
    ]
    if len(texts) > 1:
        prompt, reply = texts[:2]
        mapping = _as_settings(detection.key, {"prompt": prompt, "completion": reply})
        advice = f"If {prompt!r} is a prompt and {reply!r} its reply: {mapping}."
        if len(detection.columns) == 2 and _HEADED.search(detection.rows[0].where):
            header = format_override(f"{detection.key}.options.header", ["prompt", "completion"])
            advice += f" If the first line is a row and no header: {header}."
        return advice
    if texts:
        mapping = _as_settings(detection.key, {"text": texts[0]})
        return f"If {texts[0]!r} is a text to train on as it stands: {mapping}."
    mapping = f"{detection.key}.columns.prompt=NAME {detection.key}.columns.completion=NAME"
    return f"Say which column is which: {mapping}."


def _describe_source(detection: DetectionInput) -> list[str]:
    """Return the columns and the first row, as lines."""
    first = detection.rows[0]
    return [
        f"  columns: {', '.join(detection.columns) or 'none'}",
        f"  first row ({first.where}): {excerpt(first.fields)}",
    ]


def _hints(detection: DetectionInput) -> list[str]:
    """Return what is to be said about columns that luthier does not read."""
    columns = set(detection.columns)
    hints = [text.format(key=detection.key) for names, text in _HINTS if names <= columns]
    prompts = [name for name in PROMPT.aliases if name in columns]
    if prompts and not columns & {*COMPLETION.aliases, "chosen", "completions"}:
        hints += [
            f"If {prompts[0]!r} is a prompt, it has no reply: there is nothing to train.",
            "A model that learns from its own answers (trainer=grpo, rloo) takes prompts without "
            f"replies: {detection.key}.type=prompt",
        ]
    replies = [name for name in COMPLETION.aliases if name in columns]
    replies_are_json = replies and any(
        isinstance(row.fields.get(replies[0]), list | dict) for row in detection.rows
    )
    if prompts and replies_are_json:
        hints.append(
            f"If {replies[0]!r} is a reply, this trains it as JSON text: "
            + format_override(f"{detection.key}.json_replies", True)
        )
    if columns & _MEDIA_COLUMNS:
        hints.append(
            "Images are read in a conversation, in a column `images` beside `messages` "
            "(`luthier docs images`); video and audio are not read."
        )
    return hints


def _nearest_types(detection: DetectionInput, variants: Sequence[FormatVariant]) -> list[str]:
    """Return a line for each type of which most is there; for a named type in any case."""
    lines: dict[str, tuple[float, str]] = {}
    is_named = detection.config.type != "auto"
    for variant in variants:
        if variant.type == "prompt" != detection.config.type:
            continue  # It is never detected, and has to be named.
        share, line = _describe_missing(detection, variant)
        if (share or is_named) and share > lines.get(variant.type, (-1.0,))[0]:
            lines[variant.type] = (share, line)
    ranked = sorted(lines.values(), key=lambda ranked_line: -ranked_line[0])
    return [line for _, line in ranked[:MAX_TYPES]]


def _describe_missing(detection: DetectionInput, variant: FormatVariant) -> tuple[float, str]:
    """Return the share of a variant's columns that is there, and the line on what is not."""
    has, lacks = [], []
    for needed in variant.needed:
        names = [detection.config.columns.get(needed.name, ""), *needed.aliases]
        column = next((name for name in names if name in detection.columns), None)
        if column is not None:
            has.append(column if column == needed.name else f"{column} (as {needed.name})")
        else:
            others = [name for name in needed.aliases if name != needed.name]
            lacks.append(f"{needed.name} (or {', '.join(others)})" if others else needed.name)
    present = f"has {', '.join(has)}" if has else "has none of its columns"
    missing = f"lacks {' and '.join(lacks)}" if lacks else "but their values are of another form"
    return len(has) / len(variant.needed), f"  {variant.type}: {present}, {missing}"


def _misspelt_columns(detection: DetectionInput, variants: Sequence[FormatVariant]) -> list[str]:
    """Return a line for each column whose name is nearly one that a format has."""
    needed = [column for variant in variants for column in variant.needed]
    names = {name for column in needed for name in column.aliases}
    lines = []
    for column in detection.columns:
        # difflib's own cutoff of 0.6 would take a column `context` for a misspelt `text` (0.73).
        near = difflib.get_close_matches(column, names, n=1, cutoff=0.75)
        if near and column not in names:
            our_name = next(c.name for c in needed if near[0] in c.aliases)
            mapping = _as_settings(detection.key, {**detection.config.columns, our_name: column})
            lines.append(f"{column!r} looks like {near[0]!r}: {mapping}")
    return lines


def describe_several_formats(detection: DetectionInput, matches: Sequence[FormatMatch]) -> str:
    """Return the text for columns that fit several formats equally well."""
    types = [match.variant.type for match in matches]
    lines, settings = [], []
    for match in matches:
        type_ = match.variant.type
        columns = _as_settings(detection.key, match.source_names)
        setting = format_override(f"{detection.key}.type", type_)
        settings.append(setting if types.count(type_) == 1 else columns)
        lines.append(f"  {type_} would read {', '.join(match.source_names.values())}")
    return "\n".join(
        [
            f"dataset: the columns of {detection.source} fit {len(matches)} row formats.",
            *_describe_source(detection),
            *lines,
            f"Choose one: {' or '.join(settings)}",
        ]
    )


def describe_several_columns(
    detection: DetectionInput, our_name: str, columns: Sequence[str]
) -> str:
    """Return the text for several columns that could be the same optional one."""
    settings = " or ".join(_as_settings(detection.key, {our_name: column}) for column in columns)
    return "\n".join(
        [
            f"dataset: {detection.source} has {' and '.join(columns)}, and only one of them can be "
            f"{our_name}.",
            *_describe_source(detection),
            f"Choose one: {settings}",
        ]
    )


def describe_context_column(detection: DetectionInput, match: FormatMatch, column: str) -> str:
    """Return the text for a column that a question is about and no one mapped."""
    prompt, reply = match.source_names["prompt"], match.source_names["completion"]
    joined = _as_settings(detection.key, {"instruction": prompt, "input": column, "output": reply})
    return "\n".join(
        [
            f"dataset: {detection.source} has a column {column!r} besides {prompt!r} and {reply!r}"
            ", and reading only those two would drop it.",
            *_describe_source(detection),
            f"To put its text below the {prompt}: {joined}",
            f"To drop it: {format_override(f'{detection.key}.remove_columns', [column])}",
        ]
    )


def describe_unknown_key(detection: DetectionInput, name: str, our_names: Sequence[str]) -> str:
    """Return the text for a key of `columns` that is none of our names."""
    type_ = detection.config.type
    of_type = "" if type_ == "auto" else f" for the type {type_}"
    return (
        f"{detection.key}.columns has the key {name!r}{_did_you_mean(name, our_names)}. Its keys "
        f"are our names{of_type}, {', '.join(our_names)}; its values are the dataset's own."
    )


def describe_unknown_column(detection: DetectionInput, name: str, column: str) -> str:
    """Return the text for a value of `columns` that is no column of the source."""
    return (
        f"{detection.key}.columns maps {name} to {column!r}, and {detection.source} has no such "
        f"column{_did_you_mean(column, detection.columns)}. It has: "
        f"{', '.join(detection.columns)}."
    )


def describe_unfitting_keys(detection: DetectionInput, names: Sequence[str]) -> str:
    """Return the text for keys of `columns` that belong to different types."""
    return (
        f"{detection.key}.columns maps {' and '.join(names)}, and no type has all of these. "
        "`luthier docs formats` says which type has which columns."
    )


def _did_you_mean(name: str, choices: Sequence[str]) -> str:
    """Return a question that names the choice most like a name; an empty text where none is."""
    near = difflib.get_close_matches(name, choices, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def describe_unknown_removed_column(
    key: str, name: str, source: str, columns: Sequence[str]
) -> str:
    """Return the text for a name in `remove_columns` that is no column of the source."""
    return (
        f"{key}.remove_columns names {name!r}, and {source} has no such column"
        f"{_did_you_mean(name, columns)}. It has: {', '.join(columns)}."
    )


def _as_settings(key: str, mapping: Mapping[str, str]) -> str:
    """Return a mapping of columns as it can be pasted behind a command."""
    return " ".join(
        format_override(f"{key}.columns.{name}", column) for name, column in mapping.items()
    )
