"""How likely the replies of rows are to a model: sums of negative log-likelihoods."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.chat import IGNORED
from luthier.evaluate.items import Item

TOKENS = 2048
"""Tokens that go through the model at once, padding and all; at least one sequence."""


def likelihoods(
    model: Any, items: Sequence[Item], on_rows: Callable[[int], None] = lambda rows: None
) -> NDArray[np.float64]:
    """Each row's negative log-likelihood (nats) and its measured tokens: shape (rows, 2).

    A row's sequences are summed. The first token of a sequence has nothing to be predicted from.
    `on_rows` is told of rows that are done.
    """
    import torch

    numbered = [(row, *one) for row, item in enumerate(items) for one in item.sequences]
    order = sorted(numbered, key=lambda entry: -len(entry[1]))
    sums = np.zeros((len(items), 2))
    with torch.inference_mode():
        for batch in _batches(order):
            losses, counts = _losses(model, [entry[1:] for entry in batch])
            for (row, *_), loss, count in zip(batch, losses, counts, strict=True):
                sums[row] += loss, count
            on_rows(len(batch))
    return sums


def _batches(order: list[Any]) -> list[list[Any]]:
    """Sequences of falling length in batches of about as many tokens."""
    batches, start = [], 0
    while start < len(order):
        size = max(1, TOKENS // len(order[start][1]))
        batches.append(order[start : start + size])
        start += size
    return batches


def _losses(model: Any, rows: list[Any]) -> tuple[list[float], list[int]]:
    """The summed loss of each sequence and how many tokens are in it."""
    import torch
    from torch.nn.functional import cross_entropy

    width = len(rows[0][0])
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for number, (tokens, wanted) in enumerate(rows):
        ids[number, : len(tokens)] = torch.tensor(tokens)
        labels[number, : len(tokens)] = torch.tensor(wanted)
        mask[number, : len(tokens)] = 1
    device = model.device
    ids, mask, labels = ids.to(device), mask.to(device), labels.to(device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    targets = labels[:, 1:].to(logits.device)
    measured = targets != IGNORED
    # Only what is measured becomes float32: over a large vocabulary the rest would not fit.
    each = cross_entropy(logits[:, :-1][measured].float(), targets[measured], reduction="none")
    spread = torch.zeros(targets.shape, dtype=torch.float64, device=each.device)
    spread[measured] = each.double()
    return spread.sum(dim=1).tolist(), measured.sum(dim=1).tolist()
