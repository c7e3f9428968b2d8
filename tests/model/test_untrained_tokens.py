"""Tokens that a model's own training never changed, by the embeddings in its weight files."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from luthier.model.untrained_tokens import (
    count_parameters,
    find_embeddings,
    find_untrained_tokens,
)

VOCABULARY, ROWS, WIDTH = 600, 640, 16


def trained_rows(spare=0.02):
    """Rows of trained tokens of length about 4, and rows without a token that are far shorter."""
    rows = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    rows[VOCABULARY:] *= spare
    return rows


def save(folder, rows, name="model.embed_tokens.weight"):
    head = np.zeros((2, 3), np.float32)
    save_file({"a.weight": head, name: rows}, folder / "model.safetensors")
    return folder


def zero(rows):
    rows[7] = 0


def equal(rows):
    rows[7] = rows[9]


def short(rows):
    rows[7] *= 0.02


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        pytest.param(None, [], id="trained"),
        pytest.param(zero, [7], id="zero"),
        pytest.param(equal, [7, 9], id="equal to another"),
        pytest.param(short, [7], id="as short as rows without a token"),
    ],
)
@pytest.mark.parametrize("number_format", ["float32", "float16"])
def test_untrained_rows_are_found(tmp_path, spoil, found, number_format):
    rows = trained_rows()
    if spoil is not None:
        spoil(rows)
    stored = find_embeddings(save(tmp_path, rows.astype(number_format)))
    assert find_untrained_tokens(stored, [9, 7, 3, 7], VOCABULARY) == found


def test_rows_without_a_token_tell_nothing_where_they_are_as_long_as_others(tmp_path):
    rows = trained_rows(spare=1)
    rows[7] *= 0.5
    stored = find_embeddings(save(tmp_path, rows))
    assert find_untrained_tokens(stored, [7], VOCABULARY) == []


def test_rows_in_bfloat16_are_read_as_they_are(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_tensors

    rows = torch.from_numpy(trained_rows()).to(torch.bfloat16)
    save_tensors({"wte.weight": rows}, tmp_path / "model.safetensors")
    stored = find_embeddings(tmp_path)
    assert stored.shape == (ROWS, WIDTH)
    assert stored.rows([5, 610]).tolist() == rows[[5, 610]].float().tolist()


@pytest.mark.parametrize(
    "name", ["vision.embeddings.position_embedding.weight", "model.layers.0.weight"]
)
def test_other_matrices_are_no_embeddings_of_tokens(tmp_path, name):
    assert find_embeddings(save(tmp_path, trained_rows(), name)) is None


def test_a_folder_without_weights_has_none(tmp_path):
    assert find_embeddings(tmp_path) is None
    assert count_parameters(tmp_path) is None


def test_parameters_are_counted_by_the_headers(tmp_path):
    assert count_parameters(save(tmp_path, trained_rows())) == ROWS * WIDTH + 6
