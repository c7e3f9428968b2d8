"""An artefact's weights on this machine, with its adapter, ready to answer."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.errors import UserError
from luthier.model import adapter_base
from luthier.model.artefact import ADAPTER, Artefact
from luthier.model.machine import Machine
from luthier.model.weights import load_model
from luthier.storage.sizes import head_of

WEIGHTS = "adapter_model.safetensors"

LABELS = "labels.json"
"""The file beside a classifier's or tagger's adapter that names its labels."""

CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
"""The class of transformers that picks the model's, by what it does."""


def load_tuned(
    artefact: Artefact,
    machine: Machine,
    tokenizer: Any,
    quantization: Mapping[str, Any] | None = None,
    **own: Any,
) -> Any:
    """Return the model with its adapter, in evaluation mode, none of it training.

    `quantization`: fields of `BitsAndBytesConfig`; None for what the artefact was trained in.
    `own`: further arguments of `from_pretrained`. Raises UserError where the adapter does not go on
    its base.
    """
    if artefact.adapter is not None and not (artefact.adapter / WEIGHTS).is_file():
        raise UserError(f"{artefact.word}: {artefact.adapter} has no {WEIGHTS}.")
    packed = artefact.quantization if quantization is None else quantization
    own = {**label_settings(artefact), **own}
    model: Any = load_model(
        artefact.base, dict(packed), machine, kind=CLASSES[artefact.task], **own
    )
    if artefact.adapter is not None:
        _grow(model, tokenizer)
        model = with_adapter(model, artefact)
    model.requires_grad_(False)
    return model.eval()


def label_settings(artefact: Artefact) -> dict[str, Any]:
    """What the base of an adapter must be told of its labels, as arguments of `from_pretrained`."""
    if artefact.adapter is None or not (artefact.adapter / LABELS).is_file():
        return {"num_labels": 1} if artefact.is_reward else {}
    found: dict[str, Any] = json.loads((artefact.adapter / LABELS).read_text("utf-8"))
    # JSON has names for keys, and from_pretrained takes arguments as they are.
    return found | {"id2label": {int(key): name for key, name in found["id2label"].items()}}


def with_adapter(model: Any, artefact: Artefact) -> Any:
    """Return the base with the artefact's adapter on it, its weights as they were saved.

    Raises UserError where the adapter does not go on this base.
    """
    from peft import PeftModel

    folder = artefact.adapter
    assert folder is not None
    try:
        with warnings.catch_warnings():
            # Missing weights are looked for below, and are an error.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            tuned = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(_other_base(artefact, folder, _first_line(error))) from error
    _check_whole(artefact, folder, tuned)
    return tuned


def _grow(model: Any, tokenizer: Any) -> None:
    """Make room for tokens that the training added; their rows come with the adapter."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(highest + 1, mean_resizing=False)


def _check_whole(artefact: Artefact, folder: Path, tuned: Any) -> None:
    """Raise UserError unless the layers in the adapter's file are those that the base has."""
    from peft import get_peft_model_state_dict

    file = folder / WEIGHTS
    saved = {name for name in head_of(file).tensors if ".lora_" in name}
    have = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    placed = {name for name in have if ".lora_" in name}
    if saved - placed:
        why = f"it has no layer for {min(saved - placed)}"
        raise UserError(_other_base(artefact, folder, why))
    if placed - saved:
        why = f"the adapter has no weights for {min(placed - saved)}"
        raise UserError(_other_base(artefact, folder, why))


def _other_base(artefact: Artefact, folder: Path, why: str) -> str:
    adapter = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    return adapter_base.other_base(artefact.word, adapter, artefact.base.path, why)


def _first_line(error: Exception) -> str:
    """The most telling line of an error of torch's or peft's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "size mismatch" in line), lines[0] if lines else "?")
