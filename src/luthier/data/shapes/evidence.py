"""What the values of a column say about a row's shape, where its name alone does not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from luthier.data.rows import Row
from luthier.data.shapes.columns import inside
from luthier.data.shapes.pairs import verdict
from luthier.data.shapes.sharegpt import ROLES, spelling
from luthier.data.shapes.values import as_list

SEEN = 50
"""Rows whose values are looked at."""


class Evidence(IntEnum):
    """How well the values of the columns fit a form."""

    NO = 0
    MAYBE = 1
    """They fit, and what they would be otherwise fits as well."""
    YES = 2


@dataclass(frozen=True)
class Sample:
    """Rows with equal columns, and which of these columns a form would read."""

    rows: Sequence[Row]
    names: Mapping[str, str]
    """Our names -> the source's."""
    aliased: frozenset[str]
    """Our names that stand for a column of another name which nobody mapped."""

    def values(self, ours: str) -> list[Any]:
        """The values of a column that are not null."""
        column = self.names[ours]
        found = (inside(row.fields, column)[1] for row in self.rows[:SEEN])
        return [value for value in found if value is not None]


def certain(sample: Sample) -> Evidence:
    """The names of the columns say enough."""
    return Evidence.YES


def named_only(sample: Sample) -> Evidence:
    """Nothing shows that there is to be no more: the config has to say so."""
    return Evidence.NO


def messages(sample: Sample) -> Evidence:
    """Items with a role; a column of another name than ours must show them."""
    return _spelling(sample, "messages", "role")


def turns(sample: Sample) -> Evidence:
    """Items with from; a column of another name than ours must show them."""
    return _spelling(sample, "conversations", "from")


def _spelling(sample: Sample, ours: str, key: str) -> Evidence:
    found = next(filter(None, map(spelling, sample.values(ours))), None)
    if found is None:
        return Evidence.NO if ours in sample.aliased else Evidence.YES
    return Evidence.YES if found == key else Evidence.NO


def spoken(sample: Sample) -> Evidence:
    """Prompt and completion: lists in a column of another name must be messages."""
    held = [value for ours in sample.aliased for value in sample.values(ours)]
    strange = (isinstance(value, list | dict) and not spelling(value) for value in held)
    return Evidence.NO if any(strange) else Evidence.YES


def open_messages(sample: Sample) -> Evidence:
    """Messages that are the prompt of two replies: they do not end with a reply themselves."""
    values = sample.values("messages")
    if not any(map(spelling, values)):
        return Evidence.NO
    return Evidence.NO if all(map(_ends_with_reply, values)) else Evidence.YES


def _ends_with_reply(value: Any) -> bool:
    last = (as_list(value) or [None])[-1]
    speaker = last.get("role", last.get("from")) if isinstance(last, dict) else None
    return isinstance(speaker, str) and ROLES.get(speaker.lower()) == "assistant"


def judged(sample: Sample) -> Evidence:
    """Labels that are verdicts; 0 and 1 may be the numbers of two classes as well."""
    labels = sample.values("label")
    if not labels or any(verdict(label) is None for label in labels):
        return Evidence.NO
    said = all(
        isinstance(label, bool) or str(label).lower() in ("true", "false") for label in labels
    )
    return Evidence.YES if said or sample.names["label"] == "kto_tag" else Evidence.MAYBE


def judged_messages(sample: Sample) -> Evidence:
    """Verdicts beside messages of either spelling."""
    if not any(map(spelling, sample.values("messages"))):
        return Evidence.NO
    return judged(sample)


def lists(sample: Sample) -> Evidence:
    """Lists in all needed columns."""
    seen = [value for ours in sample.names for value in sample.values(ours)]
    return Evidence.YES if seen and all(map(as_list, seen)) else Evidence.NO
