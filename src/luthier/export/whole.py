"""Adapters into a base by peft itself, for what cannot be merged tensor by tensor.

The whole model is in memory, in float32.
"""

from pathlib import Path
from typing import Any

from luthier.errors import UserError
from luthier.export.layout import Layout
from luthier.export.loaded import base_of, grow
from luthier.export.packing import as_trained
from luthier.export.tensors import SHARD_BYTES
from luthier.model.artifact import Artefact


def merge(
    artefact: Artefact,
    adapters: list[tuple[Path, float]],
    layout: Layout | None,
    dtype: str | None,
    folder: Path,
) -> str:
    """Merge and save the model with its configuration into `folder`; returns its number format.

    `layout` names the layers that were packed in training; None where none is to be packed.
    `dtype` None keeps the base's. Raises UserError where the method has no merge.
    """
    import torch

    model = base_of(artefact, {})
    own = str(getattr(model.config, "dtype", None) or "float32").removeprefix("torch.")
    if layout is not None:
        _pack(model, layout, artefact.quantization)
    grow(model, adapters)
    merged = _merged(model, artefact, adapters)
    chosen = dtype or (own if artefact.base.dtype == "auto" else artefact.base.dtype)
    merged.to(getattr(torch, chosen))
    merged.config.dtype = chosen
    merged.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    return chosen


def _pack(model: Any, layout: Layout, quantization: dict[str, Any]) -> None:
    """Round the weights of the layers that were packed in training as they were."""
    layers = dict(model.named_modules())
    for name in layout.packed:
        weight = layers[name].weight
        weight.data = as_trained(weight.data, quantization, name in layout.transposed)


def _merged(model: Any, artefact: Artefact, adapters: list[tuple[Path, float]]) -> Any:
    from peft import PeftModel

    names = [f"a{number}" for number in range(len(adapters))]
    try:
        wrapped: Any = PeftModel.from_pretrained(model, adapters[0][0], adapter_name=names[0])
        for name, (folder, _) in zip(names[1:], adapters[1:], strict=True):
            wrapped.load_adapter(folder, name)
        if len(names) > 1 or adapters[0][1] != 1.0:
            raise UserError(
                f"{artefact.word}: only LoRA of linear layers and embeddings is added up or "
                "weighted; merge this adapter alone, with weight 1."
            )
        return wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        raise UserError(
            f"{artefact.word}: peft cannot merge this adapter into its base: {error}\n"
            "It is served as an adapter: luthier push RUN."
        ) from error
