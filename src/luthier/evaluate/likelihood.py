"""How likely the replies of rows are to a model: sums of negative log-likelihoods."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.chat import IGNORED
from luthier.evaluate.batching import by_length
from luthier.evaluate.items import Item


def likelihoods(
    model: Any, items: Sequence[Item], on_rows: Callable[[int], None] = lambda rows: None
) -> NDArray[np.float64]:
    """Each row's negative log-likelihood (nats) and its measured tokens: shape (rows, 2).

    A row's sequences are summed. The first token of a sequence has nothing to be predicted from,
    but in an encoder-decoder model, where all tokens of a target count. `on_rows` is told of
    sequences that are done.
    """
    import torch

    numbered = [(row, *one) for row, item in enumerate(items) for one in item.sequences]
    losses = _of_targets if model.config.is_encoder_decoder else _of_sequences
    sums = np.zeros((len(items), 2))
    with torch.inference_mode():
        for batch in by_length([max(len(ids), len(labels)) for _, ids, labels in numbered]):
            rows = [numbered[number] for number in batch]
            found = losses(model, [ids for _, ids, _ in rows], [labels for *_, labels in rows])
            for (row, *_), *sum_and_count in zip(rows, *found, strict=True):
                sums[row] += sum_and_count
            on_rows(len(batch))
    return sums


def _of_sequences(model: Any, ids: Any, labels: Any) -> tuple[list[float], list[int]]:
    """The summed loss of each sequence and how many tokens are in it."""
    given = _padded(ids, model.device)
    logits = model(**given, use_cache=False).logits
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
