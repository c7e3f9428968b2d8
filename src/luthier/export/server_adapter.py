"""An adapter under the names that other servers read, with one scale for all of its layers.

peft 0.21 holds the adapters of a layer's experts in one tensor, under names of its own. vLLM reads
these for models whose checkpoints hold the experts in one tensor too (`is_3d_moe_weight`), and for
all others the names of a checkpoint's own files, an adapter for each expert
(https://github.com/vllm-project/vllm/pull/42242). And it knows one rank and one alpha, whatever
`rank_pattern` and `alpha_pattern` say.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import UserError
from luthier.export import write_card
from luthier.export.model_layout import base_folder
from luthier.export.weight_files import WeightFiles
from luthier.model.adapter_keys import EXPERT_WEIGHT, PREFIX, WRAPPED, open_adapter
from luthier.model.artifact import Artifact
from luthier.model.experts import Experts, find_experts
from luthier.model.load import read_model_config
from luthier.model.model_class import build_empty_model
from luthier.model.model_files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    read_adapter_config,
)
from luthier.model.processor import copy_processor_files, find_processor_files
from luthier.storage.output_folder import describe_written, output_folder
from luthier.storage.sizes import read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

FORMS = ("vllm", "per-expert")
"""What `--adapter-for` takes: what vLLM reads of this model by itself, or always one adapter for
each expert, as vLLM does with --enable-mixed-moe-lora-format."""
_EXPERT_NAME = re.compile(r".+\.(?P<number>\d+)\.[^.]+\.weight$")
_SPECIAL = (
    *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication"),
    *("megatron_config", "use_qalora", "alora_invocation_tokens", "velora_config", "arrow_config"),
    *("monteclora_config", "kasa_config", "use_bdlora", "mica"),
)
"""Settings of LoRA by which an adapter is more than a product of two matrices for each layer."""


@dataclass(frozen=True)
class LoraFactors:
    """An adapter of one linear map: B A times `scale` is added to a weight of [outputs, inputs]."""

    a: "Tensor"
    """[rank, inputs]; of experts in one tensor [experts, rank, inputs]."""
    b: "Tensor"
    """[outputs, rank]; of experts in one tensor [experts, outputs, rank]."""
    scale: float

    @property
    def rank(self) -> int:
        """Return the rank."""
        return int(self.a.shape[-2])


@dataclass(frozen=True)
class ServerAdapter:
    """What is written: tensors by name, and the configuration beside them."""

    tensors: "dict[str, Tensor]"
    config: dict[str, Any]
    is_changed: bool
    """Whether anything differs from the adapter that it was made of."""


def export_adapter(artifact: Artifact, target: Path, form: str, say: Callable[[str], None]) -> None:
    """Write an adapter for a server into `target`; `form` is one of `FORMS`.

    Raises UserError for an adapter that servers do not read as it is, or read already.
    """
    from safetensors.torch import save_file

    made = build_server_adapter(artifact, form)
    if not made.is_changed:
        raise UserError(
            f"{artifact.name}: this adapter is read by vLLM as it is: its layers have the names of "
            f"the model's files, and one rank and scale.\nServe it from its folder: "
            f"{artifact.adapter}."
        )
    assert artifact.adapter is not None
    with output_folder(target) as aside:
        save_file(made.tensors, aside / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
        write_card.write_config(aside / ADAPTER_CONFIG_FILE, made.config)
        write_card.copy_tokenizer_files(artifact.adapter, aside)
        copy_processor_files(find_processor_files(artifact.base), aside)
        chat_format = write_card.chat_format_of(artifact)
        base = base_folder(artifact)
        write_card.copy_generation_config(base, artifact.adapter, aside, chat_format)
    say(f"adapter   {len(made.tensors)} tensors of rank {made.config['r']} for {form}")
    if artifact.quantization.bits is not None:
        say(
            "note      it was trained on quantized weights, which a server does not have: a merge "
            "(without --adapter-for) gives the logits that it was trained to"
        )
    say(describe_written(target))


def build_server_adapter(artifact: Artifact, form: str) -> ServerAdapter:
    """Return an adapter under a server's names; see `export_adapter`."""
    assert artifact.adapter is not None
    architecture = read_model_config(artifact.base)
    model = build_empty_model(architecture, artifact.task)
    layers = {layer.name: layer for layer in find_experts(model)}
    with open_adapter(artifact.adapter, model) as folder:
        config = read_adapter_config(folder) or {}
        _refuse_special_adapter(artifact, config)
        # peft changes the model that it puts an adapter on, so it gets one of its own.
        adapted = build_empty_model(architecture, artifact.task)
        factors = _read_factors(artifact, folder, adapted, layers)
    _add_missing_projections(factors, layers)
    has_experts = any(layer in layers for layer, _ in factors)
    per_expert = has_experts and (form == "per-expert" or _has_expert_files(base_folder(artifact)))
    folds = len({(each.rank, each.scale) for each in factors.values()}) > 1
    written = _write_names(factors, layers, _CheckpointNames(model), per_expert, folds)
    tensors = {
        f"{PREFIX}{name}.lora_{matrix}.weight": value.contiguous().clone()
        for name, pair in written.items()
        for matrix, value in zip("AB", pair, strict=True)
    }
    header = read_safetensors_header(artifact.adapter / ADAPTER_WEIGHTS_FILE).tensors
    saved = {name: tuple(entry["shape"]) for name, entry in header.items()}
    leaves = sorted({name.rpartition(".")[2] for name in written}) if per_expert else None
    made = _make_config(config, factors, layers, leaves, folds)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return ServerAdapter(tensors, made, folds or shapes != saved)


def _refuse_special_adapter(artifact: Artifact, config: dict[str, Any]) -> None:
    """Raise UserError for an adapter that is more than two matrices for each layer."""
    special = [name for name in _SPECIAL if config.get(name)]
    reason = f"it uses {special[0]}" if special else ""
    if config.get("peft_type") != "LORA":
        reason = f"it is of the type {config.get('peft_type')}"
    elif config.get("bias") not in (None, "none"):
        reason = "it trained biases"
    if reason:
        raise UserError(
            f"{artifact.name}: servers add plain LoRA to a model, and this adapter is more: "
            f"{reason}.\nWithout --adapter-for, luthier merge makes a model that any server loads."
        )


# What an adapter adds to each layer, by peft's own reading of its configuration.


def _read_factors(
    artifact: Artifact, folder: Path, model: Any, layers: dict[str, Experts]
) -> dict[tuple[str, str], LoraFactors]:
    """Return the matrices by layer and parameter; the parameter of a linear layer is `weight`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from safetensors.torch import load_file

    tensors = load_file(folder / ADAPTER_WEIGHTS_FILE)
    with torch.device("meta"):
        adapted: Any = get_peft_model(model, LoraConfig.from_pretrained(folder))
    factors = {}
    for name, module in adapted.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        pair = [tensors.pop(f"{name}.lora_{matrix}.weight", None) for matrix in "AB"]
        layer = name.removeprefix(PREFIX).replace(WRAPPED, "")
        if pair[0] is None or pair[1] is None:
            raise UserError(f"{artifact.name}: the adapter has no weights for {layer}.")
        a, b = pair
        scale = module.scaling["default"]
        if not isinstance(module, ParamWrapper):
            if a.ndim > 2:
                raise UserError(f"{artifact.name}: {layer} is a convolution, which servers refuse.")
            factors[layer, "weight"] = LoraFactors(a, b, scale)
            continue
        if module.num_experts > 1:
            a = a.reshape(module.num_experts, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, module.num_experts).permute(2, 0, 1)
            # peft 0.21 takes matrices for [outputs, inputs] where the module does not say what they
            # are (Llama 4), and then its A and B have changed places (vllm#52194).
            if module._did_swap_in_out_features and layers[layer].is_transposed:
                a, b = b.transpose(1, 2), a.transpose(1, 2)
        factors[layer, module.parameter_name] = LoraFactors(a, b, scale)
    if tensors:
        raise UserError(
            f"{artifact.name}: the model has no layer for {min(tensors)}: servers have none either."
        )
    return factors


def _add_missing_projections(
    factors: dict[tuple[str, str], LoraFactors], layers: dict[str, Experts]
) -> None:
    """Add zeros for the matrices of adapted experts that have no adapter: vLLM wants all of them.

    vLLM takes the only adapter of such a layer for that of `down_proj`, whichever it is.
    """
    adapted = {layer: each for (layer, _), each in factors.items() if layer in layers}
    for layer, other in adapted.items():
        for parameter, (count, rows, columns) in layers[layer].shapes.items():
            inputs, outputs = (rows, columns) if layers[layer].is_transposed else (columns, rows)
            if (layer, parameter) not in factors:
                a = other.a.new_zeros(count, other.rank, inputs)
                b = other.b.new_zeros(count, outputs, other.rank)
                factors[layer, parameter] = LoraFactors(a, b, other.scale)


# Names.


class _CheckpointNames:
    """What the layers of a model are called in the files of its checkpoints."""

    def __init__(self, model: Any) -> None:
        """Take a model on the meta device, without an adapter."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        self.model = model
        self.modules = dict(model.named_modules())
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        # As transformers 5.23 has it when it saves; it would collect them anew for every name.
        conversions = [each for each in conversions if not isinstance(each, PrefixChange)]
        model._weight_conversions = conversions or None

    def revert(self, name: str, value: "Tensor") -> "dict[str, Tensor]":
        """Return a weight as it is saved: one or several tensors by name."""
        from transformers.core_model_loading import revert_weight_conversion

        if self.model._weight_conversions is None:
            return {name: value}
        saved: dict[str, Tensor] = revert_weight_conversion(self.model, {name: value})
        return saved

    def module_name(self, layer: str) -> str:
        """Return the name of a linear layer in the files."""
        import torch

        names = list(self.revert(f"{layer}.weight", torch.zeros(2, 2)))
        # A layer that the files hold in one tensor with others keeps the model's own name.
        is_layer = len(names) == 1 and names[0].endswith(".weight")
        return names[0].removesuffix(".weight") if is_layer else layer

    def expert_rows(self, layer: Experts, parameter: str) -> "Iterator[tuple[str, int, Tensor]]":
        """Yield the name of each matrix of an expert, the expert's number, and its outputs.

        The outputs are the rows of the adapter's B that belong to that matrix.
        """
        import torch

        count, rows, columns = layer.shapes[parameter]
        outputs = torch.arange(columns if layer.is_transposed else rows)
        shape = (1, 1, -1) if layer.is_transposed else (1, -1, 1)
        numbers = outputs.reshape(shape).repeat(count, 1, 1)
        # transformers takes a weight apart as it saves it; the rows show what went where.
        saved = self.revert(f"{layer.name}.{parameter}", numbers)
        matches = {name: _EXPERT_NAME.match(name) for name in saved}
        if all(matches.values()):
            for name, match in matches.items():
                assert match is not None
                yield name.removesuffix(".weight"), int(match["number"]), saved[name].flatten()
            return
        # Files with all experts in one tensor: the names that servers have for one of them.
        names = [parameter]
        splits = [outputs]
        if "gate_up" in parameter:
            names = [parameter.replace("gate_up", part) for part in ("gate", "up")]
            # gpt-oss has a row of the one behind a row of the other.
            is_joined = getattr(self.modules[layer.name], "is_concatenated", True)
            half = len(outputs) // 2
            splits = (
                [outputs[:half], outputs[half:]] if is_joined else [outputs[::2], outputs[1::2]]
            )
        for number in range(count):
            for name, split in zip(names, splits, strict=True):
                yield f"{layer.name}.{number}.{name}", number, split


def _has_expert_files(base: Path) -> bool:
    """Return whether a checkpoint's files hold a tensor for each expert."""
    return any(EXPERT_WEIGHT.search(name) for name in WeightFiles(base).entries)


def _write_names(
    factors: dict[tuple[str, str], LoraFactors],
    layers: dict[str, Experts],
    names: _CheckpointNames,
    per_expert: bool,
    folds: bool,
) -> "dict[str, tuple[Tensor, Tensor]]":
    """Return A and B by the names of a server; with `folds`, B has the scale in it."""
    written = {}
    for (layer, parameter), each in factors.items():
        b = each.b * each.scale if folds else each.b
        if each.a.ndim == 2:
            written[names.module_name(layer)] = (each.a, b)
        elif per_expert:
            for name, number, outputs in names.expert_rows(layers[layer], parameter):
                written[name] = (each.a[number], b[number][outputs])
        else:
            # peft nests its wrappers: the last parameter's is the outermost.
            order = list(layers[layer].shapes)
            depth = len(order) - 1 - order.index(parameter)
            flat = (each.a.flatten(0, 1), b.permute(1, 2, 0).flatten(1))
            written[layer + WRAPPED * depth] = flat
    return written


def _make_config(
    config: dict[str, Any],
    factors: dict[tuple[str, str], LoraFactors],
    layers: dict[str, Experts],
    leaves: list[str] | None,
    folds: bool,
) -> dict[str, Any]:
    """Return the adapter_config.json; `leaves` name the modules where each expert has its own."""
    rank = max(each.rank for each in factors.values())
    scale = 1.0 if folds else next(iter(factors.values())).scale
    is_rslora = bool(config.get("use_rslora")) and not folds
    alpha = scale * (math.sqrt(rank) if is_rslora else rank)
    # Servers and peft take a whole number; what a root of two leaves behind the point is rounding.
    alpha = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha
    made = config | {"r": rank, "lora_alpha": alpha, "use_rslora": is_rslora, "lora_dropout": 0.0}
    made |= {"rank_pattern": {}, "alpha_pattern": {}}
    if leaves is not None:
        return made | {"target_modules": leaves, "target_parameters": None}
    parameters = list(config.get("target_parameters") or ())
    for layer, parameter in factors:
        name = f"{layer}.{parameter}"
        is_named = any(f".{name}".endswith(f".{target}") for target in parameters)
        if layer in layers and not is_named:
            parameters.append(name)
    return made | {"target_parameters": parameters or None}
