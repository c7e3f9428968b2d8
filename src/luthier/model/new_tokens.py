"""Tokens that a run adds to the vocabulary: known to the tokenizer, with a row in the embeddings.

A new row starts at the mean of the others, so that at first the token is like any: Hewitt,
https://nlp.stanford.edu/~johnhew/vocab-expansion.html
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from luthier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.config.schema import ModelConfig


def add_tokens(tokenizer: "PreTrainedTokenizerBase", config: "ModelConfig") -> None:
    """Add the configured tokens to a tokenizer.

    Raises UserError for one that is a token already: nothing would be new.
    """
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    for key, texts in _asked(config):
        for text in texts:
            if text in known:
                raise UserError(
                    f"{key}: {text!r} is a token of this tokenizer already (id {known[text]}). "
                    "Remove it; to train its row beside an adapter: "
                    f"lora.trainable_token_indices=['{text}']."
                )
        special = key == "model.add_special_tokens"
        new: Any = [AddedToken(text, normalized=False, special=special) for text in texts]
        tokenizer.add_tokens(new, special_tokens=special)


def new_ids(tokenizer: "PreTrainedTokenizerBase", config: "ModelConfig") -> list[int]:
    """The ids of the configured tokens in a tokenizer that has them."""
    known = tokenizer.get_vocab()
    return [known[text] for _, texts in _asked(config) for text in texts]


def make_rows(model: Any, new: Sequence[int], seed: int) -> None:
    """Give new tokens a row of the embeddings, at the mean of the rows that were there.

    The embeddings grow only where they have no row left over; tied ones stay tied. What is drawn
    comes from `seed`. `model` has no adapter yet.
    """
    import torch

    if not new:
        return
    rows = model.get_input_embeddings().weight.shape[0]
    spare = [number for number in new if number < rows]
    if spare:
        _start_at_the_mean(model, spare)
    if max(new) >= rows:
        devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            model.resize_token_embeddings(max(new) + 1, mean_resizing=True)


def _start_at_the_mean(model: Any, spare: Sequence[int]) -> None:
    """Rows beyond the vocabulary hold whatever the model's makers left there."""
    import torch

    first = min(spare)
    for side in (model.get_input_embeddings(), model.get_output_embeddings()):
        if side is not None:
            weight = side.weight.data
            # The second time on tied embeddings gives the same rows again.
            mean = weight[:first].mean(dim=0, dtype=torch.float32)
            weight[list(spare)] = mean.to(weight.dtype)


def _asked(config: "ModelConfig") -> tuple[tuple[str, list[str]], ...]:
    return (
        ("model.add_tokens", config.add_tokens),
        ("model.add_special_tokens", config.add_special_tokens),
    )
