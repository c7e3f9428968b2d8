"""New tokens, and single rows of the embeddings that train beside an adapter.

Where input and output embeddings are one matrix, their rows train as one. The row of a new token
starts at the mean of the others, so that at first the token is like any: Hewitt,
https://nlp.stanford.edu/~johnhew/vocab-expansion.html
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from luthier.config.library_settings import LoraSettings
from luthier.errors import UserError, format_override
from luthier.model.adapter_targets import layer_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.config.schema import ModelConfig

TOKEN_ROW_SETTINGS = {"lora": "trainable_token_indices", "adalora": "trainable_token_indices"}
"""Adapter methods that train single rows -> the setting of peft that names the rows."""


def add_tokens(tokenizer: "PreTrainedTokenizerBase", config: "ModelConfig") -> None:
    """Add the configured tokens to a tokenizer.

    Raises UserError for one that is a token already: nothing would be new.
    """
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    for key, texts in _configured_tokens(config):
        for text in texts:
            if text in vocabulary:
                raise UserError(
                    f"{key}: {text!r} is a token of this tokenizer already "
                    f"(id {vocabulary[text]}). Remove it; to train its row beside an adapter: "
                    f"{format_override('lora.trainable_token_indices', [text])}."
                )
        is_special = key == "model.add_special_tokens"
        new: Any = [AddedToken(text, normalized=False, special=is_special) for text in texts]
        tokenizer.add_tokens(new, special_tokens=is_special)


def new_token_ids(tokenizer: "PreTrainedTokenizerBase", config: "ModelConfig") -> list[int]:
    """Return the ids of the configured new tokens in a tokenizer that has them."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[text] for _, texts in _configured_tokens(config) for text in texts]


def initialize_new_rows(model: Any, new: Sequence[int], seed: int) -> None:
    """Give new tokens a row of the embeddings, at the mean of the rows that were there.

    The embeddings grow only where they have no row left over; tied ones stay tied. What is drawn
    comes from `seed`. `model` has no adapter yet.
    """
    import torch

    if not new:
        return
    # Many models have spare rows, because sizes are rounded up for the hardware.
    rows = count_embedding_rows(model)
    spare = [number for number in new if number < rows]
    if spare:
        _fill_with_mean(model, spare)
    if max(new) >= rows:
        devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            model.resize_token_embeddings(max(new) + 1, mean_resizing=True)


def _fill_with_mean(model: Any, spare: Sequence[int]) -> None:
    """Set spare rows, which the model's makers left at anything, to the mean of those before."""
    import torch

    first = min(spare)
    for side in (model.get_input_embeddings(), model.get_output_embeddings()):
        if side is not None:
            # In float32, because sums of many rows in 16 bits would be off. The second time on tied
            # embeddings gives the same rows again.
            with _gather_slices(side.weight):
                weight = side.weight.data
                mean = weight[:first].mean(dim=0, dtype=torch.float32)
                weight[list(spare)] = mean.to(weight.dtype)


@contextmanager
def _gather_slices(weight: Any) -> Iterator[None]:
    """Have a weight whole within the block, also one that ZeRO-3 sliced while loading.

    All processes enter the block; what the first one leaves in the weight is sliced again.
    """
    if not hasattr(weight, "ds_shape"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(weight, modifier_rank=0):
        yield


def count_embedding_rows(model: Any) -> int:
    """Return how many tokens a model has embeddings for, also where its weights are sliced.

    Under ZeRO-3 a weight that was sliced while loading has the shape (0,) until it is gathered.
    """
    weight = model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def unify_token_rows(
    model: Any, method: str, settings: dict[str, Any], tokenizer: Any | None
) -> dict[str, Any]:
    """Return the settings with tokens by their ids, and with tied embeddings that stay tied.

    Raises UserError for a text that is no token, an id beyond the embeddings, and whole embeddings
    that the method would tear apart.
    """
    for key in ("trainable_token_indices", "token_indices"):
        if settings.get(key) is not None:
            ids = _token_ids(f"lora.{key}", settings[key], tokenizer, model)
            settings = settings | {key: ids}
    sides = (model.get_input_embeddings(), model.get_output_embeddings())
    modules = settings.get("modules_to_save") or ()
    if not has_tied_embeddings(model) or not any(
        _is_saved_whole(layer_name(model, side), modules) for side in sides
    ):
        return settings
    if method not in TOKEN_ROW_SETTINGS:
        raise UserError(
            "lora.modules_to_save: input and output embeddings are one matrix in this model, and "
            f"peft would train a copy for one side with lora.method={method}. Use method=lora, or "
            "leave the embeddings out."
        )
    # peft 0.21 would otherwise train a copy of one side, and the two would part.
    return {"ensure_weight_tying": True} | settings


def has_tied_embeddings(model: Any) -> bool:
    """Tell whether input and output embeddings are one matrix."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def add_new_rows_to_settings(model: Any, lora: LoraSettings, new: Sequence[int]) -> dict[str, Any]:
    """Return the settings of an adapter that trains the rows of new tokens, input and output.

    Embeddings that train whole (`modules_to_save`) train their new rows anyway. Raises UserError
    where the rows would stay as they are.
    """
    output = model.get_output_embeddings()
    names = [layer_name(model, model.get_input_embeddings())]
    if output is not None and not has_tied_embeddings(model):
        names.append(layer_name(model, output))
    layers = [name for name in names if not _is_saved_whole(name, lora.modules_to_save)]
    if not new or not layers:
        return lora
    key = TOKEN_ROW_SETTINGS.get(lora.method)
    if key is None:
        raise UserError(
            f"model.add_tokens: the rows of new tokens do not train with lora.method="
            f"{lora.method}. Use method=lora, or train the embeddings whole: "
            f"{format_override('lora.modules_to_save', layers)}."
        )
    rows_setting = lora.get(key) or {}
    rows = rows_setting if isinstance(rows_setting, dict) else {layers[0]: rows_setting}
    return lora | {key: rows | {name: [*rows.get(name, ()), *new] for name in layers}}


def share_rows_with_heads(model: Any) -> None:
    """Let losses that read the weight and bias of an output layer find both where its rows train.

    peft's wrapper for single rows has no `bias` of its own, and the losses ask for one. Raises
    UserError for an output layer with a bias, which peft leaves out then.
    """
    from peft.utils.other import TrainableTokensWrapper

    output = model.get_output_embeddings()
    if isinstance(output, TrainableTokensWrapper):
        if output.original_module.bias is not None:
            raise UserError(
                "lora.trainable_token_indices: this model's output layer has a bias, which peft "
                "leaves out where single rows train. Train it whole: lora.modules_to_save."
            )
        output.bias = None


def _configured_tokens(config: "ModelConfig") -> tuple[tuple[str, list[str]], ...]:
    """Return the new tokens by the key of the config that names them."""
    return (
        ("model.add_tokens", config.add_tokens),
        ("model.add_special_tokens", config.add_special_tokens),
    )


def _is_saved_whole(name: str, modules_to_save: Sequence[str]) -> bool:
    """Tell whether a layer trains whole: peft takes every layer whose name ends so."""
    return any(name.endswith(ending) for ending in modules_to_save)


def _token_ids(key: str, tokens: Any, tokenizer: Any | None, model: Any) -> Any:
    """Return tokens by their ids; `tokens` is a list, or a dict of lists by layer."""
    if isinstance(tokens, dict):
        return {name: _token_ids(key, each, tokenizer, model) for name, each in tokens.items()}
    rows = count_embedding_rows(model)
    ids = sorted({_token_id(key, token, tokenizer) for token in tokens})
    # Ids beyond the vocabulary are fine as long as they have a row.
    for number in ids:
        if not 0 <= number < rows:
            raise UserError(f"{key}: {number} is not a token; ids go from 0 to {rows - 1}.")
    return ids


def _token_id(key: str, token: int | str, tokenizer: Any | None) -> int:
    """Return the id of a token that is given by its id or its text."""
    if isinstance(token, int):
        return token
    if tokenizer is None:
        raise UserError(f"{key}: {token!r} is a text, and there is no tokenizer. Give its id.")
    vocabulary = tokenizer.get_vocab()
    if token in vocabulary:
        return int(vocabulary[token])
    # A text with characters that the tokenizer writes in another way, such as a space.
    ids: list[int] = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        pieces = " ".join(repr(piece) for piece in tokenizer.convert_ids_to_tokens(ids))
        raise UserError(
            f"{key}: {token!r} is {len(ids)} tokens ({pieces}), not one. To make it one: "
            f"{format_override('model.add_tokens', [token])}."
        )
    return ids[0]
