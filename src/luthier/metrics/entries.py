"""The grammar of a list of metrics or rewards: names, or one name each with its settings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from luthier.errors import choice, nearest, value

Built = TypeVar("Built", bound=BaseModel)


class Wrong(Exception):
    """Something wrong with one entry, in words."""


@dataclass(frozen=True)
class Entry:
    """One metric or reward as it was written."""

    name: str
    settings: dict[str, Any]


def entries(given: object) -> Iterator[Entry | Wrong]:
    """What a list says, one by one; what is no entry, as the words for it."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        yield Wrong(f"{value(given)} is not a list. Write [{given}].")
        return
    for item in given:
        try:
            yield _entry(item)
        except Wrong as wrong:
            yield wrong


def _entry(item: object) -> Entry:
    if isinstance(item, str) and item.strip():
        return Entry(item.strip(), {})
    if not isinstance(item, Mapping) or not item:
        raise Wrong(
            f"{value(item)} is not a name, or a name with its settings: {{name: {{key: value}}}}."
        )
    (name, settings), *more = item.items()
    if more:
        raise Wrong(
            f"{value(dict(item))} has several keys. One entry is {{{name}: {{key: value}}}}: in "
            f"a block, settings stand below `- {name}:`, four spaces further than its dash."
        )
    if not isinstance(settings, Mapping | None):
        raise Wrong(f"{name}: {value(settings)} is not a mapping of settings to values.")
    return Entry(str(name), {str(key): setting for key, setting in (settings or {}).items()})


def unknown(name: str, known: Sequence[str], what: str, others: str) -> Wrong:
    """The words for a name that is none of these; `others` are what may be written besides."""
    close = nearest(name, known)
    guess = f" Did you mean {close}?" if close else ""
    return Wrong(
        f"there is no {what} {name!r}.{guess} Built in: {', '.join(known)}. Others: {others}."
    )


def build(cls: type[Built], entry: Entry, fields: Mapping[str, Any], known: Sequence[str]) -> Built:
    """An entry as the model of its settings; raises Wrong, in words.

    `fields` are what the model takes of them, `known` all settings that may be written.
    """
    try:
        return cls.model_validate(dict(fields))
    except ValidationError as error:
        words = [_words(found, entry.name, cls, known) for found in error.errors(include_url=False)]
        raise Wrong(" ".join(words)) from error


def _words(error: ErrorDetails, name: str, cls: type[BaseModel], known: Sequence[str]) -> str:
    setting, given = str(error["loc"][0]) if error["loc"] else "", value(error["input"])
    if error["type"] == "missing":
        return f"{name} needs {setting}: write {{{name}: {{{setting}: ...}}}}."
    if error["type"] == "extra_forbidden":
        return f"{name} has no setting {setting!r}. {choice(setting, set(known))}"
    if error["type"] == "value_error":
        return f"{name}: {error['ctx']['error']}"
    if error["type"] == "literal_error":
        options = choice(str(error["input"]), _options(cls.model_fields[setting].annotation))
        return f"{name}.{setting}: {given} is not an option. {options}"
    return f"{name}.{setting}: {given} does not fit: {error['msg'].replace('Input ', 'it ')}."


def _options(annotation: Any) -> Iterator[str]:
    """The texts that an annotation allows."""
    for part in get_args(annotation):
        if isinstance(part, str):
            yield part
        else:
            yield from _options(part)
