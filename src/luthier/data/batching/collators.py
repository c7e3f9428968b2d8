"""From training rows to the tensors of one batch.

Every batch has `input_ids`, `labels` and `tokens` (how many tokens of each row are no padding; for
counting, not for the model). A document's first label is ignored everywhere: nothing of the
document comes before it, and in a packed row it would be predicted from the document before.
Padding stands on the right and is known by its place, never by the padding token, which may also
end a reply.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.data.batching.token_rows import IGNORE_INDEX, Array, Document, TrainingRow

if TYPE_CHECKING:
    import torch

Batch = dict[str, Any]

MIN_WIDTH = 2
"""The fewest columns of a batch: one would leave nothing to predict, and empty tensors."""


@dataclass(frozen=True)
class _TokenCollator:
    """Holds what the layouts share."""

    pad_token_id: int
    pad_to: int | None = None
    """The tokens of each row; None for as many as the longest one has."""
    multiple_of: int | None = None
    """Widths are rounded up to a multiple of this."""
    with_columns: bool = False
    """Whether a batch has `columns`, those of each of its documents in a list, and `documents`
    (int64, the shape of `input_ids`): which of them a token is of, -1 in the padding."""


class PaddingCollator(_TokenCollator):
    """Lays out one document a row, padded on the right, with an attention mask by length.

    Gives `input_ids`, `labels`, `attention_mask` (int64, shape (rows, width)) and `tokens`.
    """

    def __call__(self, rows: Sequence[TrainingRow]) -> Batch:
        """Lay out rows of one document each; ValueError for one longer than `pad_to`."""
        used = _token_counts(rows)
        batch = _pad_documents(rows, self.pad_token_id, _batch_width(used, self))
        own = _document_columns(rows, batch["input_ids"].shape[1]) if self.with_columns else {}
        mask = np.arange(batch["input_ids"].shape[1]) < used[:, None]
        # Attention over nothing at all is not a number.
        mask[:, 0] = True
        mask = mask.astype(np.int64)
        return to_tensors(batch | {"attention_mask": mask, "tokens": used}) | own


class PackingCollator(_TokenCollator):
    """Lays out several documents a row, for attention that tells them apart by their positions.

    Gives `input_ids`, `labels`, `position_ids` (int64, shape (rows, width)) and `tokens`. Positions
    begin at 0 with each document, and the padding is a document of its own. There is no attention
    mask: with one, even of ones alone, transformers no longer looks for documents.
    """

    def __call__(self, rows: Sequence[TrainingRow]) -> Batch:
        """Lay out rows of any number of documents; ValueError for one longer than `pad_to`."""
        used = _token_counts(rows)
        width = _batch_width(used, self)
        positions = [
            _position_ids([*map(_length, row), width - in_use])
            for row, in_use in zip(rows, used.tolist(), strict=True)
        ]
        batch = _pad_documents(rows, self.pad_token_id, width)
        own = _document_columns(rows, width) if self.with_columns else {}
        return to_tensors(batch | {"position_ids": np.stack(positions), "tokens": used}) | own


class FlatteningCollator(_TokenCollator):
    """Lays out all documents of a batch in one row, for attention kernels of variable length.

    Gives `input_ids`, `labels`, `position_ids` (int64, shape (1, tokens)), `cu_seq_lens_q` and `_k`
    (int32, where each document begins, and the end), `max_length_q` and `_k` (int), `seq_idx`
    (int32, the document of each token, for the convolutions of linear attention) and `tokens`.
    Padding, where any is asked for, is a document of its own.
    """

    def __call__(self, rows: Sequence[TrainingRow]) -> Batch:
        """Lay out rows of any number of documents; ValueError for more than `pad_to` a row."""
        documents = tuple(document for row in rows for document in row)
        used = _token_counts([documents])
        width = _batch_width(used, self, rows=len(rows))
        lengths = [*map(_length, documents), width - int(used[0])]
        # Without padding the last length is 0, and a boundary that stands twice would be a document
        # of no tokens to the kernels.
        ends = np.cumsum([0, *(length for length in lengths if length)], dtype=np.int32)
        sizes = np.diff(ends)
        batch = _pad_documents([documents], self.pad_token_id, width) | {
            "position_ids": _position_ids(lengths)[None],
            "seq_idx": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends.copy(),
            "tokens": used,
        }
        longest = int(sizes.max())
        own = _document_columns([documents], width) if self.with_columns else {}
        return to_tensors(batch) | {"max_length_q": longest, "max_length_k": longest} | own


def uses_flattening(attention: str) -> bool:
    """Tell whether packed rows are flattened for an attention implementation of transformers.

    Flash attention, also from a hub kernel, takes documents of variable length in one row. All
    others would compute every pair of tokens of the whole batch, so they keep rows.
    """
    return "flash" in attention


def _token_counts(rows: Sequence[TrainingRow]) -> Array:
    """Return how many tokens each row has, int64."""
    return np.array([sum(map(_length, row)) for row in rows], dtype=np.int64)


def _batch_width(used: Array, layout: _TokenCollator, rows: int = 1) -> int:
    """Return how wide the batch is; `rows` that are laid side by side share it."""
    longest = int(used.max())
    width = max(longest, MIN_WIDTH) if layout.pad_to is None else layout.pad_to * rows
    if longest > width:
        raise ValueError(f"{longest} tokens do not fit into {width}")
    multiple = layout.multiple_of or 1
    # `//` rounds down, so the negative number is rounded away from zero: up.
    return -(-width // multiple) * multiple


def _pad_documents(rows: Sequence[TrainingRow], pad_token_id: int, width: int) -> dict[str, Array]:
    """Return the ids and labels of the rows, padded."""
    ids = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORE_INDEX, dtype=np.int64)
    # A document's first label stays IGNORE_INDEX: nothing of the document comes before it.
    for line, row in enumerate(rows):
        start = 0
        for document in row:
            stop = start + _length(document)
            ids[line, start:stop] = document.input_ids
            labels[line, start + 1 : stop] = document.labels[1:]
            start = stop
    return {"input_ids": ids, "labels": labels}


def _document_columns(rows: Sequence[TrainingRow], width: int) -> Batch:
    """Return `documents` and `columns` of a batch; see `_TokenCollator.with_columns`."""
    import torch

    documents = np.full((len(rows), width), -1, dtype=np.int64)
    columns: list[Mapping[str, Any]] = []
    for line, row in enumerate(rows):
        start = 0
        for document in row:
            stop = start + _length(document)
            documents[line, start:stop] = len(columns)
            columns.append(document.columns or {})
            start = stop
    return {"documents": torch.from_numpy(documents), "columns": columns}


def _position_ids(lengths: Iterable[int]) -> Array:
    return np.concatenate([np.arange(length) for length in lengths])


def _length(document: Document) -> int:
    return len(document.input_ids)


def to_tensors(batch: Mapping[str, Array]) -> "dict[str, torch.Tensor]":
    """Return the arrays of a batch as tensors that share their memory."""
    import torch

    return {name: torch.from_numpy(array) for name, array in batch.items()}
