"""Metrics of replies that name a class: accuracy and macro F1."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from luthier.errors import UserError, choice
from luthier.metrics.metric import Measured, Metric, Reply, excerpt, mean

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
        return f"is not one of the labels ({choice(reference.strip(), self.labels)})"

    def measure(self, replies: Sequence[Reply]) -> Measured:
        """The share of right labels, and each of them."""
        rows = [float(said == wanted) for said, wanted in self._read(replies)]
        return Measured({self.name: mean(rows)}, {self.name: rows})

    def _read(self, replies: Sequence[Reply]) -> list[tuple[str | None, str]]:
        """The label that each reply names, None where it is none, and the one it should be."""
        known = self._known([reply.reference for reply in replies])
        return [
            (named(reply.prediction, known, self.anywhere), _plain(reply.reference))
            for reply in replies
        ]

    def _known(self, references: Sequence[str]) -> tuple[str, ...]:
        """All labels as they are compared, in a fixed order."""
        given = self.labels or sorted({text.strip() for text in references})
        seen: dict[str, str] = {}
        for label in given:
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

    def measure(self, replies: Sequence[Reply]) -> Measured:
        """The mean of the F1 scores, and the counts that they are made of."""
        import numpy as np

        from luthier.metrics.bootstrap import Statistics

        pairs = self._read(replies)
        labels = self._known([reply.reference for reply in replies])
        said = np.array([[one == label for label in labels] for one, _ in pairs], dtype=float)
        wanted = np.array([[one == label for label in labels] for _, one in pairs], dtype=float)
        counts = Statistics(np.hstack([said * wanted, said + wanted]), macro_f1)
        return Measured({self.name: counts.whole()}, statistics={self.name: counts})


def macro_f1(sums: "NDArray[Any]") -> "NDArray[Any]":
    """The mean F1 over labels, for each row of: right by label, then said plus wanted by label."""
    import numpy as np

    right, all_of_it = np.split(sums, 2, axis=1)
    scores = 2 * right / np.maximum(all_of_it, 1)
    return scores.sum(axis=1) / np.maximum((all_of_it > 0).sum(axis=1), 1)


def named(text: str, labels: Sequence[str], anywhere: bool) -> str | None:
    """The label that a text is, or with `anywhere` the only one that stands in it."""
    plain = _plain(text)
    if plain in labels or not anywhere:
        return plain if plain in labels else None
    found = [label for label in labels if f" {label} " in f" {plain} "]
    # In "card arrival" stands the label "card" too, and is not meant.
    whole = [x for x in found if not any(f" {x} " in f" {y} " for y in found if y != x)]
    return whole[0] if len(whole) == 1 else None


def _plain(text: str) -> str:
    """A label as it is compared: words in lower case with one blank between."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())
