"""One model measured on one set: perplexity, and the metrics of its replies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.evaluate.items import Items
from luthier.evaluate.likelihood import likelihoods
from luthier.infer.llm import LLM
from luthier.metrics import Measured, Metric, Reply, score_replies
from luthier.metrics.bootstrap import Statistics

LOSS, PERPLEXITY = "loss", "perplexity"


@dataclass(frozen=True)
class Outcome:
    """What a model makes of a set."""

    nats: NDArray[np.float64]
    """(rows, 2): negative log-likelihood and measured tokens of each row."""
    replies: list[str]
    """Its answers to the rows that ask something, in order."""
    scored: Measured
    """The metrics of these."""

    def samples(self) -> dict[str, "Sequence[float] | Statistics"]:
        """What is resampled for each number, by name; those that have nothing for each row not."""
        found: dict[str, Sequence[float] | Statistics] = {
            LOSS: Statistics(self.nats, _mean_loss),
            PERPLEXITY: Statistics(self.nats, lambda sums: np.exp(_mean_loss(sums))),
        }
        for name in self.scored.values:
            sample = self.scored.sample(name)
            if sample is not None:
                found[name] = sample
        return found


def measure(llm: LLM, items: Items, metrics: Sequence[Metric], given: dict[str, Any]) -> Outcome:
    """Measure a loaded model as it answers now.

    `metrics`: none for the perplexity alone. `given`: settings of generation, and `batch_size`.
    Raises UserError where a metric fails and for rows that the model cannot read.
    """
    from tqdm import tqdm

    total = sum(len(item.sequences) for item in items.rows)
    with tqdm(total=total, desc="likelihood", leave=False, disable=None) as bar:
        nats = likelihoods(llm.model, items.rows, bar.update)
    asked = [item for item in items.rows if item.question is not None] if metrics else []
    if not asked:
        return Outcome(nats, [], Measured({}))
    questions = [item.question for item in asked if item.question is not None]
    prompts = [{"messages": each.messages, "tools": each.tools} for each in questions]
    with tqdm(total=len(asked), desc="replies", leave=False, disable=None) as bar:
        texts = llm.generate(
            prompts, places=[item.where for item in asked],
            on_replies=lambda number, replies: bar.update(1), **given,
        )  # fmt: skip
    replies = [
        Reply(text, question.expected, question.row)
        for text, question in zip(texts, questions, strict=True)
    ]
    return Outcome(nats, texts, score_replies(metrics, replies))


def _mean_loss(sums: NDArray[Any]) -> NDArray[Any]:
    """Nats per token; a draw without a token has none."""
    mean: NDArray[Any] = sums[:, 0] / np.maximum(sums[:, 1], 1)
    return mean
