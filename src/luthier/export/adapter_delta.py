"""What an adapter changes of each weight of its base: LoRA in all its variants.

W + s B A (Hu et al., https://arxiv.org/abs/2106.09685) with s = alpha / r, or alpha / sqrt(r) for
rsLoRA; DoRA (Liu et al., https://arxiv.org/abs/2402.09353) scales each output to its trained
length. Layers and rows that train whole take the place of the base's. LoRA of a parameter that
stacks experts (peft's `target_parameters`) has a B A for each of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.library_settings import QuantizationSettings
from luthier.export.model_layout import ModelLayout, NeedsMemoryMerge
from luthier.model.model_files import read_adapter_config

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"
_BY_ITSELF = (
    *("layer_replication", "megatron_config", "use_qalora", "alora_invocation_tokens"),
    *("velora_config", "monteclora_config", "mica", "kasa_config", "arrow_config", "use_bdlora"),
)  # fmt: skip
"""Settings of LoRA that make something else of it."""


@dataclass
class AdapterDelta:
    """What becomes of one weight of the base."""

    a: "Tensor | None" = None
    b: "Tensor | None" = None
    scale: float = 1.0
    lengths: "Tensor | None" = None
    """DoRA's trained length of each output."""
    whole: "Tensor | None" = None
    """In place of the base's."""
    added: "Tensor | None" = None
    """On top of the base's: a bias of LoRA's B."""
    rows: list[int] = field(default_factory=list)
    values: "Tensor | None" = None
    """In place of these rows of the base's."""
    transposed: bool = False
    embeds: bool = False
    experts: int = 0
    """How many matrices the weight stacks along its first axis; 0 for a plain matrix."""

    def on(self, base: "Tensor") -> "Tensor":
        """Return the weight with the change, in float32; `base` is float32 and stays as it is."""
        import torch

        # At most one of the three is set; what is left after them is LoRA itself.
        if self.whole is not None:
            return self.whole.to(torch.float32)
        if self.added is not None:
            return base + self.added
        if self.values is not None:
            return base.index_copy(0, torch.tensor(self.rows), self.values)
        assert self.a is not None and self.b is not None
        is_turned = self.transposed or self.embeds
        left, right = (self.a.T, self.b.T) if is_turned else (self.b, self.a)
        # In one step, without another matrix as large as the weight.
        merged = torch.addmm(base, left, right, alpha=self.scale)
        if self.lengths is None:
            return merged
        # DoRA measures each output over its inputs, which are the first axis of a transposed layer.
        outputs = 0 if self.transposed else 1
        factor = self.lengths / torch.linalg.vector_norm(merged, dim=outputs)
        return merged * (factor[None, :] if self.transposed else factor[:, None])

    def of_expert(self, number: int) -> "AdapterDelta":
        """Return the change of one expert's matrix."""
        if self.whole is not None:
            return AdapterDelta(whole=self.whole[number])
        assert self.a is not None and self.b is not None
        # The layout of peft 0.21 (`ParamWrapper.get_delta_weight`): in A the experts follow one
        # another, each with its ranks; in B each rank has the experts next to one another.
        a = self.a.reshape(self.experts, -1, self.a.shape[1])[number]
        b = self.b.reshape(self.b.shape[0], -1, self.experts)[:, :, number]
        return AdapterDelta(a, b, self.scale, transposed=self.transposed)


@dataclass(frozen=True)
class LoraWeights:
    """The changes of one adapter by the names of the base's weights, and how much they count."""

    folder: Path
    changes: dict[str, AdapterDelta]
    weight: float = 1.0


def read_adapter(folder: Path, layout: "ModelLayout", weight: float = 1.0) -> LoraWeights:
    """Read an adapter; raises NeedsMemoryMerge where it is no plain LoRA."""
    from safetensors.torch import load_file

    config = read_adapter_config(folder) or {}
    _refuse_special_adapters(config)
    tensors = load_file(folder / "adapter_model.safetensors")
    changes = _collect_changes(tensors, config, layout)
    if any(name not in layout.shapes for name in changes):
        tensors, config = _convert_old_names(folder, tensors, layout)
        changes = _collect_changes(tensors, config, layout)
    for name, change in changes.items():
        # A layer that the base lacks would be dropped without a word further on.
        if name not in layout.shapes:
            raise NeedsMemoryMerge(f"the base has no weight {name}")
        _check_expert_shapes(name, change, layout.shapes[name])
    return LoraWeights(folder, changes, weight)


def add_deltas(base: "Tensor", changes: list[tuple[AdapterDelta, float]]) -> "Tensor":
    """Return a weight (float32) with all changes, each counted by its number."""
    # One change that counts whole needs no copy of the base, and no subtraction that rounds.
    if len(changes) == 1 and changes[0][1] == 1.0:
        return changes[0][0].on(base)
    total = base.clone()
    for change, weight in changes:
        total += weight * (change.on(base) - base)
    return total


def _collect_changes(
    tensors: "Mapping[str, Tensor]", config: Mapping[str, Any], layout: "ModelLayout"
) -> dict[str, AdapterDelta]:
    changes: dict[str, AdapterDelta] = {}
    for key, value in tensors.items():
        # peft saves adapters in the format they trained in; sums of bfloat16 would lose their small
        # terms.
        _enter_tensor(changes, key.removeprefix(PREFIX), value.float(), config, layout)
    return changes


def _convert_old_names(
    folder: Path, tensors: "dict[str, Tensor]", layout: "ModelLayout"
) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """Return an adapter from before transformers 5, which named each expert, as peft reads it."""
    from peft import PeftConfig
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
        convert_peft_config_for_transformers,
    )

    config = PeftConfig.from_pretrained(str(folder))
    convert_peft_config_for_transformers(config, layout.model, None)
    converted = convert_peft_adapter_state_dict_for_transformers(layout.model, config, tensors)
    return converted, config.to_dict()


def _check_expert_shapes(name: str, change: AdapterDelta, shape: tuple[int, ...]) -> None:
    """Raise NeedsMemoryMerge for LoRA of experts that the base does not have."""
    if not change.experts or change.a is None or change.b is None:
        return
    outputs = shape[:0:-1] if change.transposed else shape[1:]
    if change.a.shape[0] % change.experts or (change.b.shape[0], change.a.shape[1]) != outputs:
        raise NeedsMemoryMerge(f"{name} has another shape than what the adapter changes")


def _refuse_special_adapters(config: Mapping[str, Any]) -> None:
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise NeedsMemoryMerge(f"it is of the type {peft_type}")
    special = [name for name in _BY_ITSELF if config.get(name)]
    if special:
        raise NeedsMemoryMerge(f"it uses {special[0]}")


def _enter_tensor(
    changes: dict[str, AdapterDelta],
    key: str,
    value: "Tensor",
    config: Mapping[str, Any],
    layout: "ModelLayout",
) -> None:
    """Enter one saved tensor into the change of the weight that it belongs to."""
    layer, weight_name = _split_key(key)
    if weight_name == "whole":
        changes.setdefault(layer, AdapterDelta()).whole = value
        return
    if weight_name == "rows":
        change = changes.setdefault(f"{layer}.weight", AdapterDelta())
        change.values, change.rows = value, _find_trained_rows(layer, config)
        return
    if weight_name == "lora_B.bias":
        scale = _lora_scale(layer, config, None)
        changes.setdefault(f"{layer}.bias", AdapterDelta()).added = value * scale
        return
    # LoRA of a convolution has kernels, and its product is another one than B A.
    if value.ndim > 2:
        raise NeedsMemoryMerge(f"{layer} is a convolution")
    name = _find_parameter(layer, config, layout)
    layer = layer.replace(".base_layer", "")
    change = changes.setdefault(name or f"{layer}.weight", AdapterDelta())
    shape = layout.shapes.get(name or "", ())
    change.experts = shape[0] if len(shape) == 3 else 0
    # What peft wraps as a parameter it takes as (outputs, inputs), unless experts say otherwise.
    change.transposed = layer in layout.transposed and (name is None or change.experts > 0)
    if weight_name in ("lora_A.weight", "lora_embedding_A"):
        # The rank is A's first axis, which holds also where rank_pattern gives the layer its own.
        rank = value.shape[0] // (change.experts or 1)
        change.a, change.scale = value, _lora_scale(name or layer, config, rank)
        change.embeds = weight_name == "lora_embedding_A"
    elif weight_name in ("lora_B.weight", "lora_embedding_B"):
        change.b = value
    else:
        change.lengths = value


def _split_key(key: str) -> tuple[str, str]:
    """Return a saved tensor's layer, and which part of the adapter it is."""
    if key.endswith(_ROWS):
        return key.removesuffix(_ROWS), "rows"
    for suffix in ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A",
                 "lora_embedding_B", "lora_magnitude_vector"):  # fmt: skip
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}"), suffix
    if ".lora_" in key:
        raise NeedsMemoryMerge(f"it holds {key}")
    # Layers of modules_to_save, and embeddings that peft saves along with new tokens, have the
    # base's own names.
    return key.replace(".base_layer.", "."), "whole"


def _find_parameter(layer: str, config: Mapping[str, Any], layout: "ModelLayout") -> str | None:
    """Return the parameter that a saved layer changes by `target_parameters`; None for a module.

    peft (0.21, `_inject_parameters`) wraps a module once for each of its parameters, in their
    order: the last one's wrapper is the outermost, and each `.base_layer` leads to the one before.
    """
    targets = config.get("target_parameters") or []
    module = layer.replace(".base_layer", "")
    parameters = [
        name
        for name in layout.shapes
        if name.rpartition(".")[0] == module
        and any(f".{name}".endswith(f".{target}") for target in targets)
    ]
    depth = layer.count(".base_layer") + 1
    if not parameters:
        return None
    if depth > len(parameters):
        raise NeedsMemoryMerge(f"it has more layers on {module} than target_parameters names")
    return parameters[-depth]


def _lora_scale(layer: str, config: Mapping[str, Any], rank: int | None) -> float:
    """alpha / r of a layer, or alpha / sqrt(r), by peft's own reading of the patterns."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r = rank or ranks.get(get_pattern_key(ranks, layer), config["r"])
    alpha = alphas.get(get_pattern_key(alphas, layer), config["lora_alpha"])
    return float(alpha / (math.sqrt(r) if config.get("use_rslora") else r))


def _find_trained_rows(layer: str, config: Mapping[str, Any]) -> list[int]:
    indices = config.get("trainable_token_indices") or []
    # A list is for the input embeddings, a dictionary has a list for each layer by its ending.
    if isinstance(indices, list):
        return list(indices)
    for name, ids in indices.items():
        if f".{layer}".endswith(f".{name}"):
            return list(ids)
    raise NeedsMemoryMerge(f"it does not say which rows of {layer} it trained")


# Weights as an adapter met them in training: packed by bitsandbytes and unpacked again. An adapter
# learns to correct the rounding too, so that on other weights it gives other logits.


def dequantized_as_trained(
    weight: "Tensor", quantization: QuantizationSettings, transposed: bool
) -> "Tensor":
    """Return a layer's weight (float32) as the run's quantization left it.

    `transposed`: whether it is (inputs, outputs); bitsandbytes packs (outputs, inputs).
    """
    matrix = weight.T.contiguous() if transposed else weight
    through = _round_to_4bit if quantization.bits == 4 else _round_to_8bit
    dequantized = through(matrix, quantization)
    return dequantized.T if transposed else dequantized


def _round_to_4bit(weight: "Tensor", quantization: QuantizationSettings) -> "Tensor":
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from transformers import BitsAndBytesConfig

    # Keys that the run left out get the defaults that training had.
    settings: Any = BitsAndBytesConfig.from_dict(dict(quantization))
    packed, state = quantize_4bit(
        weight,
        compress_statistics=settings.bnb_4bit_use_double_quant,
        quant_type=settings.bnb_4bit_quant_type,
        quant_storage=settings.bnb_4bit_quant_storage,
    )
    return dequantize_4bit(packed, state).to(torch.float32)


def _round_to_8bit(weight: "Tensor", quantization: QuantizationSettings) -> "Tensor":
    import torch
    from bitsandbytes.functional import int8_vectorwise_quant

    # bitsandbytes rounds to float16 first; columns of large weights are not kept apart here.
    packed, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
    return packed.to(torch.float32) * (scales.to(torch.float32)[:, None] / 127.0)
