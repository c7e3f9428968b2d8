"""Models in memory: an adapter on its base as it was trained, in float32; a merged folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import UserError
from luthier.export.rows import needed
from luthier.model import quantized
from luthier.model.artifact import Artefact
from luthier.model.device import Machine
from luthier.model.load import CLASSES, label_settings, load_model

if TYPE_CHECKING:
    from torch import Tensor

PLACE = Machine("cpu", "float32", "sdpa")
"""Merging and checking is arithmetic in float32, in main memory."""


def tuned(artefact: Artefact, adapters: list[tuple[Path, float]], packed: bool) -> Any:
    """The base in float32 with its adapters, each scaled by its weight, in evaluation mode.

    `packed`: with the weights packed as in training. Raises UserError where it does not fit into
    memory or the adapter does not fit the base.
    """
    from peft import PeftModel

    quantization = _computed_in_float32(artefact.quantization) if packed else {}
    model = base_of(artefact, quantization)
    grow(model, adapters)
    try:
        wrapped = PeftModel.from_pretrained(model, adapters[0][0], adapter_name="a0")
        for number, (folder, _) in enumerate(adapters[1:], 1):
            wrapped.load_adapter(folder, f"a{number}")
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{artefact.word}: the adapter does not go on its base: {error}") from error
    if len(adapters) > 1:
        wrapped.base_model.set_adapter([f"a{number}" for number in range(len(adapters))])
    for number, (_, weight) in enumerate(adapters):
        if weight != 1.0:
            _scale(wrapped, f"a{number}", weight)
    return wrapped.eval()


def base_of(artefact: Artefact, quantization: dict[str, Any]) -> Any:
    """The base in float32, or packed; one that comes quantized is unpacked.

    Raises UserError where it cannot be unpacked or does not fit into memory.
    """
    own = label_settings(artefact)
    found = quantized.read(artefact.base)
    if found is not None and not quantization:
        own["quantization_config"] = _unpacking(artefact, found)
    kind = CLASSES[artefact.task]
    try:
        model = load_model(artefact.base, quantization, PLACE, kind=kind, **own)
    except MemoryError as error:
        raise UserError(too_large(artefact)) from error
    return model if found is None else quantized.in_one_format(model, PLACE.dtype)


def _unpacking(artefact: Artefact, found: dict[str, Any]) -> Any:
    method = quantized.method_in(found)
    if method not in quantized.FORMATS or quantized.FORMATS[method].whole is None:
        raise UserError(
            f"{artefact.word}: its base {artefact.base.path} comes quantized ({method}), and such "
            "weights cannot take an adapter in.\nName the model that it was made from: "
            "--base ORGANISATION/MODEL --onto original."
        )
    return quantized.unpacking(artefact.base)


def too_large(artefact: Artefact) -> str:
    """What to say where a model does not fit into memory."""
    return (
        f"{artefact.word}: the model in float32 does not fit into this machine's memory.\n"
        "Merging LoRA needs one tensor at a time; it is the check that loads the model: "
        "--no-verify leaves it out."
    )


def grow(model: Any, adapters: list[tuple[Path, float]]) -> None:
    """Give the embeddings the rows that the adapters' new tokens need."""
    rows = max(needed(folder) for folder, _ in adapters)
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def logits(model: Any, prompts: list[list[int]]) -> "list[Tensor]":
    """The logits of each prompt by itself; float32, shape (tokens, vocabulary) or (labels,)."""
    import torch

    found = []
    with torch.inference_mode():
        for ids in prompts:
            given = {"input_ids": torch.tensor([ids])}
            if model.config.is_encoder_decoder:
                given["decoder_input_ids"] = torch.tensor([ids[:8]])
            found.append(model(**given).logits[0].float())
    return found


def _computed_in_float32(quantization: dict[str, Any]) -> dict[str, Any]:
    if not quantization.get("load_in_4bit"):
        return quantization
    return quantization | {"bnb_4bit_compute_dtype": "float32"}


def _scale(model: Any, name: str, weight: float) -> None:
    """Make an adapter count less or more."""
    from peft.tuners.lora.layer import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and name in layer.scaling:
            layer.scaling[name] *= weight
