"""Measure how likely rows are to a model, as sums of negative log-likelihoods."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.chat import IGNORED
from luthier.evaluate.rows import EvaluationRow
from luthier.infer.prompt_images import PromptImage
from luthier.metrics import MetricScores
from luthier.metrics.bootstrap import SumStatistics

if TYPE_CHECKING:
    from luthier.infer.generate import ImagePromptInputs

# The results of one model on one set, in the form that the bootstrap draws from.

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

    def samples(self) -> dict[str, "Sequence[float | None] | SumStatistics"]:
        """What is resampled for each number, by name; those that have nothing for each row not."""
        statistics: dict[str, Sequence[float | None] | SumStatistics] = {
            LOSS: SumStatistics(self.losses, _mean)
        }
        if self.has_perplexity:
            # Each draw sums losses and tokens over its rows first: the mean of rows' perplexities
            # would weigh a short row as much as a long one.
            statistics[PERPLEXITY] = SumStatistics(self.losses, lambda sums: np.exp(_mean(sums)))
        for name in self.scored.values:
            sample = self.scored.sample(name)
            if sample is not None:
                statistics[name] = sample
        return statistics

    def of_rows(self) -> NDArray[np.float64]:
        """The mean loss of each row, shape (rows,)."""
        # A row without a measured token has the loss 0 and must not divide by it.
        return self.losses[:, 0] / self.losses[:, 1].clip(min=1)


def _mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean loss of each draw; that of a draw without a token is 0."""
    mean: NDArray[np.float64] = sums[:, 0] / np.maximum(sums[:, 1], 1)
    return mean


# The losses themselves, computed in batches of rows of about one length.

TOKENS = 2048
"""Tokens that go through the model at once, padding and all; at least one row."""


def batches_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Return the numbers of rows in batches of about as many tokens, the longest rows first."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    batches, start = [], 0
    while start < len(order):
        # The first of a batch is its longest, so its length times the rows bounds the batch.
        size = max(1, TOKENS // max(1, lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


MakeImageInputs = Callable[[Sequence[Sequence[PromptImage]]], "ImagePromptInputs | None"]
"""Makes the inputs for the images of some sequences: `LLM.image_inputs`."""


def compute_losses(
    model: Any,
    items: Sequence[EvaluationRow],
    on_rows: Callable[[int], None] = lambda rows: None,
    image_inputs: MakeImageInputs = lambda images: None,
) -> NDArray[np.float64]:
    """Each row's negative log-likelihood (nats) and its measured tokens: shape (rows, 2).

    A row's sequences are summed. The first token of a sequence has nothing to be predicted from,
    but in an encoder-decoder model, where all tokens of a target count. `on_rows` is told of
    sequences that are done. `image_inputs` makes what the model takes for images.
    """
    import torch

    numbered = [(row, sequence) for row, item in enumerate(items) for sequence in item.sequences]
    lengths = [max(len(each.ids), len(each.labels)) for _, each in numbered]
    sums = np.zeros((len(items), 2))
    with torch.inference_mode():
        for batch in batches_by_length(lengths):
            sequences = [numbered[number][1] for number in batch]
            ids, labels = [each.ids for each in sequences], [each.labels for each in sequences]
            if model.config.is_encoder_decoder:
                batch_losses = _of_targets(model, ids, labels)
            else:
                make = image_inputs([each.images for each in sequences])
                batch_losses = _of_sequences(model, ids, labels, make)
            for number, *sum_and_count in zip(batch, *batch_losses, strict=True):
                sums[numbered[number][0]] += sum_and_count
            on_rows(len(batch))
    return sums


def _of_sequences(
    model: Any, ids: Any, labels: Any, make: "ImagePromptInputs | None"
) -> tuple[list[float], list[int]]:
    """Return the summed loss of each sequence and how many tokens are in it."""
    # The logits at a position predict the next token, so labels are shifted by one.
    batch = _padded(ids, model.device)
    if make is not None:
        inputs = make(range(len(ids)), batch["input_ids"].cpu())
        batch |= {name: value.to(model.device) for name, value in inputs.items()}
    logits = model(**batch, use_cache=False).logits
    return _summed(logits[:, :-1], _filled(labels, IGNORED)[:, 1:])


def _of_targets(model: Any, sources: Any, targets: Any) -> tuple[list[float], list[int]]:
    """Return the same for targets behind their sources."""
    # The model shifts the labels itself to make its decoder's inputs; logits and labels align.
    labels = _filled(targets, IGNORED)
    logits = model(**_padded(sources, model.device), labels=labels.to(model.device)).logits
    return _summed(logits, labels)


def _summed(logits: Any, labels: Any) -> tuple[list[float], list[int]]:
    """Return the cross entropy summed over the measured positions of each row, and their count."""
    import torch
    from torch.nn.functional import cross_entropy

    targets = labels.to(logits.device)
    measured = targets != IGNORED
    # Only measured positions become float32: 2048 positions by 150,000 tokens of vocabulary would
    # take over a gigabyte. Sums are in float64, so that long rows lose no digits.
    each = cross_entropy(logits[measured].float(), targets[measured], reduction="none")
    spread = torch.zeros(targets.shape, dtype=torch.float64, device=each.device)
    spread[measured] = each.double()
    return spread.sum(dim=1).tolist(), measured.sum(dim=1).tolist()


def _padded(rows: Sequence[Sequence[int]], device: Any) -> dict[str, Any]:
    """Return ids padded to one length, and the mask of where they are."""
    mask = _filled([[1] * len(row) for row in rows], 0)
    return {"input_ids": _filled(rows, 0).to(device), "attention_mask": mask.to(device)}


def _filled(rows: Sequence[Sequence[int]], blank: int) -> Any:
    import torch

    table = torch.full((len(rows), max(map(len, rows))), blank, dtype=torch.long)
    for number, row in enumerate(rows):
        table[number, : len(row)] = torch.tensor(row, dtype=torch.long)
    return table
