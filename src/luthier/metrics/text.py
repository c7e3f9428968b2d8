"""Metrics of plain text: equality, containment, shared words, length."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import NonNegativeFloat, field_validator, model_validator

from luthier import patterns
from luthier.errors import UserError, suggest_options
from luthier.metrics.metric import Metric, MetricScores, Prediction, RowMetric, excerpt, mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

IgnoredDifference = Literal["case", "space", "punctuation", "articles"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def normalise(text: str, ignore: Collection[IgnoredDifference]) -> str:
    """The text without what is to be ignored; white space around it always is.

    `case` folds upper into lower, `punctuation` removes it, `articles` removes a, an and the,
    `space` makes one blank of each run of white space.
    """
    if "case" in ignore:
        text = text.casefold()
    if "punctuation" in ignore:
        text = "".join(c for c in text if not _is_punctuation(c))
    if "articles" in ignore:
        text = _ARTICLES.sub(" ", text)
    return " ".join(text.split()) if "space" in ignore else text.strip()


def _is_punctuation(character: str) -> bool:
    return character in _PUNCTUATION or unicodedata.category(character).startswith("P")


class ExactMatch(RowMetric):
    """The share of replies equal to the reference, but for surrounding white space."""

    ignore: tuple[IgnoredDifference, ...] = ()
    """What else makes no difference."""

    def row(self, prediction: str, reference: str) -> float:
        """1 if they are equal."""
        return float(normalise(prediction, self.ignore) == normalise(reference, self.ignore))


class NormalisedMatch(ExactMatch):
    """The share of replies equal to the reference but for case, white space and punctuation."""

    ignore: tuple[IgnoredDifference, ...] = ("case", "space", "punctuation")


class Contains(RowMetric):
    """The share of replies in which the reference stands."""

    ignore: tuple[IgnoredDifference, ...] = ()
    """What makes no difference."""

    def objection(self, reference: str) -> str | None:
        """A reference of which nothing is left stands in every reply."""
        return None if normalise(reference, self.ignore) else "is empty and stands in every reply"

    def row(self, prediction: str, reference: str) -> float:
        """1 if the reference is a part of the reply."""
        return float(normalise(reference, self.ignore) in normalise(prediction, self.ignore))


class TokenF1(RowMetric):
    """The mean F1 of the words that reply and reference share, as SQuAD counts it.

    Lower case, without ASCII punctuation and the articles a, an, the; where either has no words,
    1 if both have none (Rajpurkar et al. 2018, evaluate-v2.0.py).
    """

    def row(self, prediction: str, reference: str) -> float:
        """Twice the shared words over all words."""
        predicted, expected = _squad_words(prediction), _squad_words(reference)
        if not predicted or not expected:
            return float(predicted == expected)
        return (
            2 * (Counter(predicted) & Counter(expected)).total() / (len(predicted) + len(expected))
        )


def _squad_words(text: str) -> list[str]:
    bare = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return _ARTICLES.sub(" ", bare).split()


class Length(RowMetric):
    """The mean length of the replies."""

    greater_is_better: bool | None = None
    unit: Literal["words", "characters"] = "words"
    """What is counted; words are what white space separates."""

    @property
    def needs_reference(self) -> bool:
        """It does not."""
        return False

    def row(self, prediction: str, reference: str) -> float:
        """The length of the reply."""
        return float(len(prediction.split()) if self.unit == "words" else len(prediction.strip()))


# Metrics of a part of the reply: what a pattern finds, or the number that answers.

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
    ignore: tuple[IgnoredDifference, ...] = ()
    """What makes no difference between the two."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            patterns.compile_pattern(pattern)
        except ValueError as error:
            raise ValueError(f"{pattern!r} {error}.") from error
        return pattern

    @model_validator(mode="after")
    def _has_the_group(self) -> Self:
        compiled = patterns.compile_pattern(self.pattern)
        group_names = [*map(str, range(compiled.groups + 1)), *compiled.groupindex]
        if self.group is not None and str(self.group) not in group_names:
            raise ValueError(
                f"the pattern has no group {self.group!r}. "
                f"{suggest_options(str(self.group), group_names)}"
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
            return float(bool(self._matches(prediction, patterns.search)))
        expected = self._wanted(reference)
        if expected is None:
            raise UserError(
                f"metric {self.name}: the reference {self.objection(reference)}: "
                f"{excerpt(reference)}"
            )
        return float(self._found(prediction) == expected)

    def _wanted(self, reference: str) -> str | None:
        if self.extract == "reply":
            return normalise(reference, self.ignore)
        return self._found(reference)

    def _found(self, text: str) -> str | None:
        """What the group holds; None without a match, or where the group took no part in it."""
        matches = [match[_group(self.group)] for match in self._matches(text, patterns.find_all)]
        if not matches:
            return None
        chosen = matches[0 if self.match == "first" else -1]
        return None if chosen is None else normalise(chosen, self.ignore)

    def _matches(self, text: str, search: Callable[[Any, str], Any]) -> Any:
        """Return what a search of the pattern gives; raise UserError where it takes too long."""
        try:
            return search(patterns.compile_pattern(self.pattern), text)
        except TimeoutError:
            raise UserError(
                f"metric {self.name}: a search for {self.pattern!r} takes more than "
                f"{patterns.SEARCH_SECONDS:g} seconds in: {excerpt(text)}\n{patterns.SLOW_ADVICE}"
            ) from None


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
        return "has no number" if find_number(reference, self.marker) is None else None

    def row(self, prediction: str, reference: str) -> float:
        """1 if both numbers are equal."""
        predicted, expected = (
            find_number(prediction, self.marker),
            find_number(reference, self.marker),
        )
        if expected is None:
            raise UserError(
                f"metric {self.name}: the reference has no number: {excerpt(reference)}"
            )
        if predicted is None or not self.tolerance:
            return float(predicted == expected)
        return float(abs(predicted - expected) <= Decimal(str(self.tolerance)))


def find_number(text: str, marker: str | None) -> Decimal | None:
    """The number after the last marker, or else the last number; None where there is none."""
    if marker and marker in text:
        after = _NUMBER.search(text.rpartition(marker)[2])
        if after:
            return _decimal(after)
    numbers = find_numbers(text)
    return numbers[-1] if numbers else None


def find_numbers(text: str) -> list[Decimal]:
    """All numbers of a text, in its order."""
    return [_decimal(match) for match in _NUMBER.finditer(text)]


def _decimal(match: re.Match[str]) -> Decimal:
    digits = match["digits"].replace(",", "") + (match["exponent"] or "")
    return -Decimal(digits) if match[0][0] in "-−–" else Decimal(digits)


# Metrics of replies that name a class: accuracy and macro F1.


class Accuracy(Metric):
    """The share of replies that name the label of the reference."""

    labels: tuple[str, ...] = ()
    """All labels there are; empty: those of the references."""
    anywhere: bool = False
    """Also read a reply that names one label among other words; otherwise it is to be the label,
    but for case, white space and punctuation."""

    def prepare(self, references: Sequence[str]) -> None:
        """References must be labels, and labels must differ by more than case and punctuation."""
        self._known(references)
        super().prepare(references)

    def objection(self, reference: str) -> str | None:
        """A reference that is none of the labels that were given."""
        if not self.labels or _plain(reference) in map(_plain, self.labels):
            return None
        return f"is not one of the labels ({suggest_options(reference.strip(), self.labels)})"

    def measure(self, replies: Sequence[Prediction]) -> MetricScores:
        """The share of right labels, and each of them."""
        rows = [float(predicted == expected) for predicted, expected in self._read(replies)]
        return MetricScores({self.name: mean(rows)}, {self.name: rows})

    def _read(self, replies: Sequence[Prediction]) -> list[tuple[str | None, str]]:
        """The label that each reply names, None where it is none, and the one it should be."""
        labels = self._known([reply.reference for reply in replies])
        return [
            (find_label(reply.prediction, labels, self.anywhere), _plain(reply.reference))
            for reply in replies
        ]

    def _known(self, references: Sequence[str]) -> tuple[str, ...]:
        """All labels as they are compared, in a fixed order."""
        labels = self.labels or sorted({text.strip() for text in references})
        seen: dict[str, str] = {}
        for label in labels:
            other = seen.setdefault(_plain(label), label)
            if other != label:
                raise UserError(
                    f"metric {self.name}: the labels {excerpt(other)} and {excerpt(label)} differ "
                    "by case, white space or punctuation only. Make them one."
                )
        return tuple(seen)


class MacroF1(Accuracy):
    """The mean of the labels' F1 scores: each label counts the same, however rare it is.

    A reply that names no label is a miss for the label it should have named. A label that stands
    neither in a reply nor in a reference counts nothing.
    """

    def measure(self, replies: Sequence[Prediction]) -> MetricScores:
        """The mean of the F1 scores, and the counts that they are made of."""
        import numpy as np

        from luthier.metrics.bootstrap import SumStatistics

        pairs = self._read(replies)
        labels = self._known([reply.reference for reply in replies])
        predicted = np.array(
            [[text == label for label in labels] for text, _ in pairs], dtype=float
        )
        expected = np.array([[text == label for label in labels] for _, text in pairs], dtype=float)
        counts = SumStatistics(np.hstack([predicted * expected, predicted + expected]), macro_f1)
        return MetricScores({self.name: counts.whole()}, statistics={self.name: counts})


def macro_f1(sums: "NDArray[Any]") -> "NDArray[Any]":
    """The mean F1 over labels, for each row of: right by label, then said plus wanted by label."""
    import numpy as np

    right, all_of_it = np.split(sums, 2, axis=1)
    scores = 2 * right / np.maximum(all_of_it, 1)
    return scores.sum(axis=1) / np.maximum((all_of_it > 0).sum(axis=1), 1)


def find_label(text: str, labels: Sequence[str], anywhere: bool) -> str | None:
    """The label that a text is, or with `anywhere` the only one that stands in it."""
    plain = _plain(text)
    if plain in labels or not anywhere:
        return plain if plain in labels else None
    candidates = [label for label in labels if f" {label} " in f" {plain} "]
    # In "card arrival" stands the label "card" too, and is not meant.
    longest = [x for x in candidates if not any(f" {x} " in f" {y} " for y in candidates if y != x)]
    return longest[0] if len(longest) == 1 else None


def _plain(text: str) -> str:
    """A label as it is compared: words in lower case with one blank between."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())
