"""The tensors of a batch, written out by hand."""

import numpy as np
import pytest
import torch

from luthier.data.batching.collators import (
    FlatteningCollator,
    PackingCollator,
    PaddingCollator,
    uses_flattening,
)
from luthier.data.batching.token_rows import Document

X = -100
PAD = 0


def row(*ids, labels=None):
    """A document that trains all its tokens, or as `labels` says."""
    return Document(np.array(ids, dtype=np.int32), np.array(labels or ids, dtype=np.int32))


A, B, C = row(5, 6, 7), row(8, 9, labels=[X, 9]), row(4, 3, 2, 1, labels=[4, X, 2, 1])


def plain(batch):
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def test_padded_rows():
    assert plain(PaddingCollator(PAD)([(A,), (B,), ()])) == {
        "input_ids": [[5, 6, 7], [8, 9, PAD], [PAD, PAD, PAD]],
        "labels": [[X, 6, 7], [X, 9, X], [X, X, X]],
        # The row that only fills up sees itself, for attention over nothing is not a number.
        "attention_mask": [[1, 1, 1], [1, 1, 0], [1, 0, 0]],
        "tokens": [3, 2, 0],
    }


def test_packed_rows():
    assert plain(PackingCollator(PAD)([(A, B), (C,), ()])) == {
        "input_ids": [[5, 6, 7, 8, 9], [4, 3, 2, 1, PAD], [PAD] * 5],
        "labels": [[X, 6, 7, X, 9], [X, X, 2, 1, X], [X] * 5],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0], [0, 1, 2, 3, 4]],
        "tokens": [5, 4, 0],
    }


def test_flat_rows():
    assert plain(FlatteningCollator(PAD)([(A, B), (C,), ()])) == {
        "input_ids": [[5, 6, 7, 8, 9, 4, 3, 2, 1]],
        "labels": [[X, 6, 7, X, 9, X, X, 2, 1]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2, 3]],
        "seq_idx": [[0, 0, 0, 1, 1, 2, 2, 2, 2]],
        "cu_seq_lens_q": [0, 3, 5, 9],
        "cu_seq_lens_k": [0, 3, 5, 9],
        "max_length_q": 4,
        "max_length_k": 4,
        "tokens": [9],
    }


def test_flat_rows_are_padded_by_a_document():
    batch = plain(FlatteningCollator(PAD, multiple_of=4)([(A, B)]))
    assert batch["input_ids"] == [[5, 6, 7, 8, 9, PAD, PAD, PAD]]
    assert batch["position_ids"] == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["cu_seq_lens_q"] == [0, 3, 5, 8]
    assert batch["tokens"] == [5]


WIDTHS = [
    ("the longest row", PaddingCollator(PAD), [(A,), (B,)], (2, 3)),
    ("a multiple", PaddingCollator(PAD, multiple_of=8), [(A,), (B,)], (2, 8)),
    ("always the same", PaddingCollator(PAD, pad_to=6), [(B,)], (1, 6)),
    ("the same and a multiple", PaddingCollator(PAD, pad_to=6, multiple_of=4), [(B,)], (1, 8)),
    ("packed, always the same", PackingCollator(PAD, pad_to=7), [(A, B)], (1, 7)),
    ("flat, as many as all rows", FlatteningCollator(PAD, pad_to=7), [(A, B), (C,)], (1, 14)),
    ("never so few that nothing is predicted", PaddingCollator(PAD), [(row(5),)], (1, 2)),
    ("nor where a batch only fills up", PackingCollator(PAD), [(), ()], (2, 2)),
    ("nor where a flat batch does", FlatteningCollator(PAD), [()], (1, 2)),
]


@pytest.mark.parametrize(
    ("layout", "rows", "shape"), [case[1:] for case in WIDTHS], ids=[case[0] for case in WIDTHS]
)
def test_widths(layout, rows, shape):
    batch = layout(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == shape
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    "layout", [PaddingCollator(PAD, 3), PackingCollator(PAD, 3), FlatteningCollator(PAD, 3)]
)
def test_a_row_that_is_too_long(layout):
    with pytest.raises(ValueError, match="4 tokens do not fit into 3"):
        layout([(C,)])


def test_a_reply_that_ends_with_the_padding_token_trains_it():
    batch = plain(PaddingCollator(pad_token_id=7)([(A,), (row(1, 2, 3, 4),)]))
    assert batch["labels"][0] == [X, 6, 7, X]
    assert batch["attention_mask"][0] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("attention", "flat"),
    [
        ("eager", False), ("sdpa", False), ("flex_attention", False),
        ("flash_attention_2", True), ("flash_attention_3", True),
        ("kernels-community/flash-attn2", True), ("kernels-community/vllm-flash-attn3", True),
    ],
)  # fmt: skip
def test_the_attention_decides_whether_rows_are_flattened(attention, flat):
    assert uses_flattening(attention) is flat
