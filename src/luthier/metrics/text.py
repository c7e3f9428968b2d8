"""Metrics of plain text: equality, containment, shared words, length."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Collection
from typing import Literal

from luthier.metrics.metric import RowMetric

Ignored = Literal["case", "space", "punctuation", "articles"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def normalise(text: str, ignore: Collection[Ignored]) -> str:
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

    ignore: tuple[Ignored, ...] = ()
    """What else makes no difference."""

    def row(self, prediction: str, reference: str) -> float:
        """1 if they are equal."""
        return float(normalise(prediction, self.ignore) == normalise(reference, self.ignore))


class NormalisedMatch(ExactMatch):
    """The share of replies equal to the reference but for case, white space and punctuation."""

    ignore: tuple[Ignored, ...] = ("case", "space", "punctuation")


class Contains(RowMetric):
    """The share of replies in which the reference stands."""

    ignore: tuple[Ignored, ...] = ()
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
        said, wanted = _squad_words(prediction), _squad_words(reference)
        if not said or not wanted:
            return float(said == wanted)
        return 2 * (Counter(said) & Counter(wanted)).total() / (len(said) + len(wanted))


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
