"""What the weight files say of a model's embeddings, read without loading the model.

A base model has rows for special tokens that no text of its training held: they are zero, equal to
each other, or as short as the rows that stand for no token at all. A chat template made of such
tokens teaches an adapter little, because the rows are frozen beside it. Land and Bartolo
(https://arxiv.org/abs/2405.05417) find under-trained tokens by the same norms.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model import gguf, source
from luthier.storage.sizes import read_safetensors_header

_LAYERS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared")
"""What transformers' models call their input embeddings."""
_FORMATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_ZERO = 1e-16
"""The largest number of a row that counts as zero, as unsloth's `fix_untrained_tokens` has it."""
_SAMPLED_ROWS = 2000
"""Ordinary rows whose lengths are compared with."""
_LOW_SHARE = 0.01
"""The share of ordinary rows that may be as short as an untrained one."""


@dataclass(frozen=True)
class StoredEmbeddings:
    """The matrix of input embeddings in a weight file."""

    file: Path
    number_format: str
    """The format of its numbers, by the name that safetensors has for it."""
    start: int
    """The first byte of the matrix in the file."""
    shape: tuple[int, int]
    """Tokens, and the numbers of each."""

    def rows(self, numbers: Sequence[int]) -> NDArray[np.float32]:
        """Return these rows, shape (len(numbers), width)."""
        matrix = np.memmap(
            self.file, _FORMATS[self.number_format], "r", self.start, shape=self.shape
        )
        rows = matrix[list(numbers)]
        if self.number_format == "BF16":
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32)


def find_weights_folder(config: ModelConfig) -> Path | None:
    """Return the folder with a model's safetensors files; None where it is not on this machine.

    Of a GGUF file it is the folder that it was converted into, once a model was loaded from it.
    """
    try:
        file = source.find_gguf_file(config.path)
        folder = source.local_folder(config) if file is None else gguf.converted_folder(file)
    # ValueError: a path that a function of the user's own loads is no name of a repository.
    except (UserError, OSError, ValueError):
        return None
    return folder if folder is not None and folder.is_dir() else None


def count_parameters(folder: Path) -> int | None:
    """Return how many numbers the weight files hold; None where there are none to read."""
    try:
        headers = [read_safetensors_header(file) for file in sorted(folder.glob("*.safetensors"))]
    except UserError:
        return None
    shapes = [tensor["shape"] for header in headers for tensor in header.tensors.values()]
    return sum(map(math.prod, shapes)) or None


def find_embeddings(folder: Path) -> StoredEmbeddings | None:
    """Return the input embeddings in the weight files of a folder; None where there are none.

    None also for a damaged file and for packed numbers, which what loads the model reads.
    """
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            header = read_safetensors_header(file)
        except UserError:
            return None
        for name, tensor in header.tensors.items():
            is_embedding = name.endswith(".weight") and name.split(".")[-2] in _LAYERS
            if is_embedding and len(tensor["shape"]) == 2 and tensor["dtype"] in _FORMATS:
                start = header.start + tensor["data_offsets"][0]
                rows, width = tensor["shape"]
                found.append(StoredEmbeddings(file, tensor["dtype"], start, (rows, width)))
    # Encoders and towers may have a smaller one of their own.
    return max(found, key=lambda each: each.shape[0], default=None)


def find_untrained_tokens(
    embeddings: StoredEmbeddings, tokens: Sequence[int], vocabulary: int
) -> list[int]:
    """Return those of the tokens whose rows no training has moved.

    `vocabulary` is the number of ids that stand for a token; rows behind them are compared with.
    """
    tokens = sorted({token for token in tokens if token < embeddings.shape[0]})
    if not tokens:
        return []
    rows = embeddings.rows(tokens)
    norms = np.linalg.norm(rows, axis=1)
    is_untrained = np.abs(rows).max(axis=1) <= _ZERO
    is_untrained |= _has_equal(rows)
    is_untrained |= norms <= _untrained_norm(embeddings, vocabulary)
    return [token for token, untrained in zip(tokens, is_untrained, strict=True) if untrained]


def _has_equal(rows: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return True for the rows that equal another one, number by number."""
    _, group, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    equal: NDArray[np.bool_] = counts[group.reshape(-1)] > 1
    return equal


def _untrained_norm(embeddings: StoredEmbeddings, vocabulary: int) -> float:
    """Return the length up to which a row is as short as rows without a token; -1 if none is.

    Rows without a token tell only where nearly all ordinary rows are longer.
    """
    spare = _spread(range(vocabulary, embeddings.shape[0]))
    if len(spare) < 2:
        return -1.0
    longest = float(np.linalg.norm(embeddings.rows(spare), axis=1).max()) * 1.05
    ordinary = np.linalg.norm(embeddings.rows(_spread(range(vocabulary))), axis=1)
    return longest if (ordinary <= longest).mean() <= _LOW_SHARE else -1.0


def _spread(numbers: range) -> list[int]:
    """Return at most `_SAMPLED_ROWS` of the numbers, evenly spread."""
    return list(numbers[:: max(1, len(numbers) // _SAMPLED_ROWS)])


def template_token_ids(tokenizer: Any, templates: Sequence[str]) -> Iterator[int]:
    """Yield the ids of the tokenizer's added tokens that these chat templates write."""
    for token, number in tokenizer.get_added_vocab().items():
        if any(token in template for template in templates):
            yield number
