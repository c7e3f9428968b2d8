"""How likely the replies of rows are to a model: sums of negative log-likelihoods."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.chat import IGNORED
from luthier.evaluate.rows import EvaluationRow
from luthier.metrics import MetricScores
from luthier.metrics.bootstrap import SumStatistics

# What a model makes of a set of rows.

LOSS, PERPLEXITY = "loss", "perplexity"


@dataclass(frozen=True)
class ModelScores:
    """The losses and replies of one model."""

    losses: NDArray[np.float64]
    """(rows, 2): the summed loss of each row, and over how many tokens, words or labels."""
    replies: list[str]
    """Its answers to the rows that ask something, in order."""
    scored: MetricScores
    """The metrics of these."""
    has_perplexity: bool = True
    """Whether the loss is a negative log-likelihood of tokens."""

    def samples(self) -> dict[str, "Sequence[float] | SumStatistics"]:
        """What is resampled for each number, by name; those that have nothing for each row not."""
        statistics: dict[str, Sequence[float] | SumStatistics] = {
            LOSS: SumStatistics(self.losses, _mean)
        }
        if self.has_perplexity:
            statistics[PERPLEXITY] = SumStatistics(self.losses, lambda sums: np.exp(_mean(sums)))
        for name in self.scored.values:
            sample = self.scored.sample(name)
            if sample is not None:
                statistics[name] = sample
        return statistics

    def of_rows(self) -> NDArray[np.float64]:
        """The mean loss of each row, shape (rows,)."""
        return self.losses[:, 0] / self.losses[:, 1].clip(min=1)


def _mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The loss of a draw; one without a token has none."""
    mean: NDArray[np.float64] = sums[:, 0] / np.maximum(sums[:, 1], 1)
    return mean


# Rows of about one length side by side.

TOKENS = 2048
"""Tokens that go through the model at once, padding and all; at least one row."""


def batches_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """The numbers of rows in batches, the longest first, each of about as many tokens."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    batches, start = [], 0
    while start < len(order):
        size = max(1, TOKENS // max(1, lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def compute_losses(
    model: Any, items: Sequence[EvaluationRow], on_rows: Callable[[int], None] = lambda rows: None
) -> NDArray[np.float64]:
    """Each row's negative log-likelihood (nats) and its measured tokens: shape (rows, 2).

    A row's sequences are summed. The first token of a sequence has nothing to be predicted from,
    but in an encoder-decoder model, where all tokens of a target count. `on_rows` is told of
    sequences that are done.
    """
    import torch

    numbered = [(row, *sequence) for row, item in enumerate(items) for sequence in item.sequences]
    losses = _of_targets if model.config.is_encoder_decoder else _of_sequences
    sums = np.zeros((len(items), 2))
    with torch.inference_mode():
        for batch in batches_by_length([max(len(ids), len(labels)) for _, ids, labels in numbered]):
            rows = [numbered[number] for number in batch]
            batch_losses = losses(
                model, [ids for _, ids, _ in rows], [labels for *_, labels in rows]
            )
            for (row, *_), *sum_and_count in zip(rows, *batch_losses, strict=True):
                sums[row] += sum_and_count
            on_rows(len(batch))
    return sums


def _of_sequences(model: Any, ids: Any, labels: Any) -> tuple[list[float], list[int]]:
    """The summed loss of each sequence and how many tokens are in it."""
    batch = _padded(ids, model.device)
    logits = model(**batch, use_cache=False).logits
    return _summed(logits[:, :-1], _filled(labels, IGNORED)[:, 1:])


def _of_targets(model: Any, sources: Any, targets: Any) -> tuple[list[float], list[int]]:
    """The same of targets behind their sources."""
    labels = _filled(targets, IGNORED)
    logits = model(**_padded(sources, model.device), labels=labels.to(model.device)).logits
    return _summed(logits, labels)


def _summed(logits: Any, labels: Any) -> tuple[list[float], list[int]]:
    """The cross entropy at each place that is measured, summed over each row."""
    import torch
    from torch.nn.functional import cross_entropy

    targets = labels.to(logits.device)
    measured = targets != IGNORED
    # Only what is measured becomes float32: over a large vocabulary the rest would not fit.
    each = cross_entropy(logits[measured].float(), targets[measured], reduction="none")
    spread = torch.zeros(targets.shape, dtype=torch.float64, device=each.device)
    spread[measured] = each.double()
    return spread.sum(dim=1).tolist(), measured.sum(dim=1).tolist()


def _padded(rows: Sequence[Sequence[int]], device: Any) -> dict[str, Any]:
    """Ids side by side, and where they are."""
    mask = _filled([[1] * len(row) for row in rows], 0)
    return {"input_ids": _filled(rows, 0).to(device), "attention_mask": mask.to(device)}


def _filled(rows: Sequence[Sequence[int]], blank: int) -> Any:
    import torch

    table = torch.full((len(rows), max(map(len, rows))), blank, dtype=torch.long)
    for number, row in enumerate(rows):
        table[number, : len(row)] = torch.tensor(row, dtype=torch.long)
    return table
