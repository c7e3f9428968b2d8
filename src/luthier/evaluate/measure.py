"""One model that writes, measured on one set: perplexity, and the metrics of its replies."""

from collections.abc import Sequence
from typing import Any

from luthier.evaluate.items import Items
from luthier.evaluate.likelihood import likelihoods
from luthier.evaluate.outcome import Outcome
from luthier.infer.llm import LLM
from luthier.metrics import Measured, Metric, Reply, score_replies


def measure(llm: LLM, items: Items, metrics: Sequence[Metric], given: dict[str, Any]) -> Outcome:
    """Measure a loaded model as it answers now.

    `metrics`: none for the perplexity alone. `given`: settings of generation, and `batch_size`.
    Raises UserError where a metric fails and for rows that the model cannot read.
    """
    from tqdm import tqdm

    total = sum(len(item.sequences) for item in items.rows)
    with tqdm(total=total, desc="likelihood", leave=False, disable=None) as bar:
        losses = likelihoods(llm.model, items.rows, bar.update)
    asked = [item for item in items.rows if item.question is not None] if metrics else []
    if not asked:
        return Outcome(losses, [], Measured({}))
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
    return Outcome(losses, texts, score_replies(metrics, replies))
