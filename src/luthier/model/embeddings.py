"""Single rows of the embeddings: tokens that train beside an adapter, and new ones.

Where input and output embeddings are one matrix, their rows train as one.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from luthier.config.library_settings import LoraSettings
from luthier.errors import UserError
from luthier.model.adapter_targets import layer_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.config.schema import ModelConfig

TOKEN_ROW_SETTINGS = {"lora": "trainable_token_indices", "adalora": "trainable_token_indices"}
"""The setting of each method that trains single rows beside its adapter."""


def unify_token_rows(
    model: Any, method: str, settings: dict[str, Any], tokenizer: Any | None
) -> dict[str, Any]:
    """Return the settings with tokens by their ids, and with tied embeddings that stay tied.

    Raises UserError for a text that is no token, an id beyond the embeddings, and whole embeddings
    that the method would tear apart.
    """
    for key in ("trainable_token_indices", "token_indices"):
        if settings.get(key) is not None:
            ids = _ids_of(f"lora.{key}", settings[key], tokenizer, model)
            settings = settings | {key: ids}
    if not has_tied_embeddings(model) or not _names_embeddings(model, settings):
        return settings
    if method not in TOKEN_ROW_SETTINGS:
        raise UserError(
            "lora.modules_to_save: input and output embeddings are one matrix in this model, and "
            f"peft would train a copy for one side with lora.method={method}. Use method=lora, or "
            "leave the embeddings out."
        )
    return {"ensure_weight_tying": True} | settings


def has_tied_embeddings(model: Any) -> bool:
    """Whether input and output embeddings are one matrix."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def add_new_rows_to_settings(model: Any, lora: LoraSettings, new: Sequence[int]) -> dict[str, Any]:
    """Return the settings of an adapter that trains the rows of new tokens, input and output.

    Embeddings that train whole (`modules_to_save`) train their new rows anyway. Raises UserError
    where the rows would stay as they are.
    """
    places = [name for name in _embeddings(model) if not _trains_whole(name, lora.modules_to_save)]
    if not new or not places:
        return lora
    key = TOKEN_ROW_SETTINGS.get(lora.method)
    if key is None:
        raise UserError(
            f"model.add_tokens: the rows of new tokens do not train with lora.method="
            f"{lora.method}. Use method=lora, or train the embeddings whole: "
            f"lora.modules_to_save=[{', '.join(places)}]."
        )
    given = lora.get(key) or {}
    rows = given if isinstance(given, dict) else {places[0]: given}
    return lora | {key: rows | {name: [*rows.get(name, ()), *new] for name in places}}


def share_rows_with_heads(model: Any) -> None:
    """Let losses that read an output layer's weight and bias find both where rows of it train.

    Raises UserError for an output layer with a bias, which peft leaves out then.
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


def _embeddings(model: Any) -> list[str]:
    """The names of the input embeddings and of output embeddings with a matrix of their own."""
    output = model.get_output_embeddings()
    names = [layer_name(model, model.get_input_embeddings())]
    return (
        names
        if output is None or has_tied_embeddings(model)
        else [*names, layer_name(model, output)]
    )


def _trains_whole(name: str, modules: Sequence[str]) -> bool:
    # peft takes every layer whose name ends so.
    return any(name.endswith(module) for module in modules)


def _names_embeddings(model: Any, settings: dict[str, Any]) -> bool:
    sides = (model.get_input_embeddings(), model.get_output_embeddings())
    modules = settings.get("modules_to_save") or ()
    return any(_trains_whole(layer_name(model, side), modules) for side in sides)


def _ids_of(key: str, given: Any, tokenizer: Any | None, model: Any) -> Any:
    if isinstance(given, dict):
        return {name: _ids_of(key, tokens, tokenizer, model) for name, tokens in given.items()}
    rows = model.get_input_embeddings().weight.shape[0]
    ids = sorted({_id_of(key, token, tokenizer) for token in given})
    for number in ids:
        if not 0 <= number < rows:
            raise UserError(f"{key}: {number} is not a token; ids go from 0 to {rows - 1}.")
    return ids


def _id_of(key: str, token: int | str, tokenizer: Any | None) -> int:
    if isinstance(token, int):
        return token
    if tokenizer is None:
        raise UserError(f"{key}: {token!r} is a text, and there is no tokenizer. Give its id.")
    known = tokenizer.get_vocab().get(token)
    if known is not None:
        return int(known)
    ids: list[int] = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        pieces = " ".join(repr(piece) for piece in tokenizer.convert_ids_to_tokens(ids))
        raise UserError(
            f"{key}: {token!r} is {len(ids)} tokens ({pieces}), not one. To make it one: "
            f"model.add_tokens=['{token}']."
        )
    return ids[0]


# Tokens that a run adds to the vocabulary: known to the tokenizer, with a row in the
# embeddings.
#
# A new row starts at the mean of the others, so that at first the token is like any: Hewitt,
# https://nlp.stanford.edu/~johnhew/vocab-expansion.html


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


def new_token_ids(tokenizer: "PreTrainedTokenizerBase", config: "ModelConfig") -> list[int]:
    """The ids of the configured tokens in a tokenizer that has them."""
    known = tokenizer.get_vocab()
    return [known[text] for _, texts in _asked(config) for text in texts]


def initialize_new_rows(model: Any, new: Sequence[int], seed: int) -> None:
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
