"""Adapters in float32 on any base, drawn from a seed: LoRA and peft's other methods by name."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from luthier.config.methods import ADAPTERS, method_of, problems, splits
from luthier.errors import UserError
from luthier.model import adapter_start, token_rows
from luthier.model.adapter_heads import trained_whole
from luthier.model.adapter_precision import train_in_float32
from luthier.model.adapter_targets import ALL_LINEAR, check_names, last_names

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OWN = ("method", "plus_ratio", "loftq_config")
"""Settings that are none of peft's, or that luthier reads itself."""

_PLANNED = 2**31
"""AdaLoRA's steps until the training says how many they are (`adapter_training`)."""


def add_adapter(
    model: "PreTrainedModel",
    lora: dict[str, Any],
    seed: int,
    task_type: str = "CAUSAL_LM",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    unquantized: Callable[[], Any] | None = None,
) -> "PeftModel":
    """Freeze `model` and wrap it with a fresh adapter: the same seed, the same weights.

    `lora` holds `method` (LoRA if there is none) and fields of that method's config in peft;
    `task_type` is what the model does, as peft calls it: the head of a classifier (`SEQ_CLS`,
    `TOKEN_CLS`) trains whole and is saved with the adapter. `tokenizer` is for tokens that are
    named by their text, and `unquantized` gives the model's weights as they were, for LoftQ.
    Trained weights are float32; frozen ones keep their number formats. Gradients also reach the
    embeddings' output: gradient checkpointing needs it. Raises UserError for settings that peft
    refuses or cannot do on these weights, and for a name that matches no layer.
    """
    base: Any = model
    _check(base, lora)
    settings = _settings(base, lora, task_type, tokenizer)
    base.requires_grad_(False)
    wrapped = _wrap(base, method_of(lora), settings, seed)
    train_in_float32(wrapped)
    token_rows.let_heads_read(base)
    if lora.get("init_lora_weights") == "loftq":
        if unquantized is None:
            raise UserError("lora.init_lora_weights=loftq needs the weights before quantization.")
        adapter_start.make_up(wrapped, unquantized(), seed)
    if splits(lora):
        adapter_start.remember(wrapped)
    # Its other rows never change; and peft would ask the hub for the base's config at each save.
    wrapped.save_pretrained = partial(wrapped.save_pretrained, save_embedding_layers=False)
    base.enable_input_require_grads()
    return wrapped


def packed_bits(model: Any) -> int | None:
    """4 or 8 for a model whose layers bitsandbytes packs, None for others."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            return 4
        if isinstance(layer, Linear8bitLt):
            return 8
    return None


def _check(model: Any, lora: dict[str, Any]) -> None:
    for mistake in problems(lora, packed_bits(model)):
        raise UserError(f"{mistake.key}: {mistake.text}")


def _settings(
    model: Any, lora: dict[str, Any], task_type: str, tokenizer: Any | None
) -> dict[str, Any]:
    """The fields of peft's config; what is null takes its own default."""
    facts = ADAPTERS[method_of(lora)]
    settings: dict[str, Any] = {"target_modules": ALL_LINEAR} if facts.all_linear else {}
    settings |= {"task_type": task_type}
    settings |= {name: value for name, value in lora.items() if value is not None}
    for name in OWN:
        settings.pop(name, None)
    if settings.get("init_lora_weights") == "loftq":
        # A saved adapter that says so would be drawn again where it is loaded.
        settings["init_lora_weights"] = True
    if settings.get("layers_to_transform") is not None and settings["target_modules"] == ALL_LINEAR:
        settings["target_modules"] = last_names(model)  # peft takes numbers with a list alone
    check_names(model, settings, task_type)
    settings |= trained_whole(model, settings, facts.config)
    return token_rows.settle(model, method_of(lora), settings, tokenizer)


def _wrap(model: Any, method: str, settings: dict[str, Any], seed: int) -> Any:
    """Let peft put the adapter in; it draws from `seed`, and nobody else's numbers move."""
    import torch
    from peft import get_peft_model

    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return get_peft_model(model, _peft_config(method, settings))
    except (ValueError, TypeError, ImportError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"lora: {error}") from error


def _peft_config(method: str, settings: dict[str, Any]) -> "PeftConfig":
    import peft
    from peft.tuners.adalora import AdaLoraConfig

    if method == "adalora":
        return AdaLoraConfig(**{"total_step": _PLANNED} | settings)
    make: Any = getattr(peft, ADAPTERS[method].config)
    return make(**settings)
