"""Metrics of a part of the reply: what a pattern finds, or the number that answers."""

import re
from decimal import Decimal
from typing import Literal, Self

from pydantic import NonNegativeFloat, field_validator, model_validator

from luthier.errors import UserError, choice
from luthier.metrics.metric import RowMetric, excerpt
from luthier.metrics.text import Ignored, normalise

# A minus counts where it does not stand between two operands; commas only between thousands.
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-−–])?\$?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?P<exponent>[eE][-+]?\d{1,3}(?!\d))?"
)


class Regex(RowMetric):
    """The share of replies that match, or that give what the reference gives."""

    pattern: str
    """A regular expression of Python's `re`, searched for in the reply."""
    group: int | str | None = None
    """Compare this group (0 for the whole match); null: only whether the pattern is found."""
    match: Literal["first", "last"] = "first"
    """Which match of several."""
    extract: Literal["both", "reply"] = "both"
    """`reply`: the reference is compared as it is, without searching it."""
    ignore: tuple[Ignored, ...] = ()
    """What makes no difference between the two."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}.") from error
        return pattern

    @model_validator(mode="after")
    def _has_the_group(self) -> Self:
        compiled = re.compile(self.pattern)
        known = [*map(str, range(compiled.groups + 1)), *compiled.groupindex]
        if self.group is not None and str(self.group) not in known:
            raise ValueError(
                f"the pattern has no group {self.group!r}. {choice(str(self.group), known)}"
            )
        return self

    @property
    def needs_reference(self) -> bool:
        """Only where a group is compared."""
        return self.group is not None

    def objection(self, reference: str) -> str | None:
        """A reference in which there is nothing to compare with."""
        if not self.needs_reference or self._wanted(reference) is not None:
            return None
        return f"has no match of {self.pattern!r}"

    def row(self, prediction: str, reference: str) -> float:
        """1 if the pattern is found, and with a group, if it is that of the reference."""
        if self.group is None:
            return float(re.search(self.pattern, prediction) is not None)
        wanted = self._wanted(reference)
        if wanted is None:
            raise UserError(
                f"metric {self.name}: the reference {self.objection(reference)}: "
                f"{excerpt(reference)}"
            )
        return float(self._found(prediction) == wanted)

    def _wanted(self, reference: str) -> str | None:
        if self.extract == "reply":
            return normalise(reference, self.ignore)
        return self._found(reference)

    def _found(self, text: str) -> str | None:
        """What the group holds; None without a match, or where the group took no part in it."""
        found = [match[_group(self.group)] for match in re.finditer(self.pattern, text)]
        if not found:
            return None
        chosen = found[0 if self.match == "first" else -1]
        return None if chosen is None else normalise(chosen, self.ignore)


def _group(group: int | str | None) -> int | str:
    """The group as `re` wants it: a number may have come as text."""
    return int(group) if isinstance(group, str) and group.isdigit() else group or 0


class Number(RowMetric):
    """The share of replies whose answer is the number of the reference.

    It is the first number after the last marker, as in GSM8K (`#### 42`), or where there is no
    marker with a number after it, the last number. 1,234.50 and 1234.5 are the same.
    """

    marker: str | None = "####"
    """What stands before the answer; null: always the last number."""
    tolerance: NonNegativeFloat = 0
    """The largest difference that still counts as equal."""

    def objection(self, reference: str) -> str | None:
        """A reference without a number."""
        return "has no number" if answer(reference, self.marker) is None else None

    def row(self, prediction: str, reference: str) -> float:
        """1 if both numbers are equal."""
        said, wanted = answer(prediction, self.marker), answer(reference, self.marker)
        if wanted is None:
            raise UserError(
                f"metric {self.name}: the reference has no number: {excerpt(reference)}"
            )
        if said is None or not self.tolerance:
            return float(said == wanted)
        return float(abs(said - wanted) <= Decimal(str(self.tolerance)))


def answer(text: str, marker: str | None) -> Decimal | None:
    """The number after the last marker, or else the last number; None where there is none."""
    if marker and marker in text:
        after = _NUMBER.search(text.rpartition(marker)[2])
        if after:
            return _decimal(after)
    found = list(_NUMBER.finditer(text))
    return _decimal(found[-1]) if found else None


def _decimal(match: re.Match[str]) -> Decimal:
    digits = match["digits"].replace(",", "") + (match["exponent"] or "")
    return -Decimal(digits) if match[0][0] in "-−–" else Decimal(digits)
