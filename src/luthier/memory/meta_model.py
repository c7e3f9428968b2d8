"""A run's model as shapes alone, quantized and with adapters, and a list of its weights.

The model is built on torch's meta device, so that no weights are loaded. Within a FakeTensorMode it
gets weights that look like a CPU's and hold nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from luthier.config.library_settings import LoraSettings
from luthier.config.methods import METHODS
from luthier.config.schema import ModelConfig, RunConfig
from luthier.errors import UserError
from luthier.metrics.rewards import ModelReward, read_reward_settings
from luthier.model import quantized
from luthier.model.adapters import add_adapter
from luthier.model.device import VARLEN_ATTENTION, Machine
from luthier.model.experts import find_experts
from luthier.model.load import insert_quantized_layers, read_model_config
from luthier.model.model_class import build_empty_model
from luthier.model.reward_artifact import find_reward_artifact
from luthier.model.trainable import freeze_parameters

if TYPE_CHECKING:
    import torch

_FLASH_KERNELS = ("flash", "flex", VARLEN_ATTENTION)
"""Parts of the names of attention kernels that keep the tensors which torch's own keeps."""
_SETTINGS_WITH_VALUES = ("trainable_token_indices", "token_indices", "loftq_config")
"""Settings of adapters that need the values of weights, or a tokenizer."""


def build_meta_model(config: RunConfig, machine: Machine, full_dtype: str = "float32") -> Any:
    """Return the run's model on torch's meta device, as training would get it.

    A model that trains whole is in `full_dtype`, others in the machine's format with adapters in
    float32; layers are bitsandbytes' own where the run quantizes. Raises UserError where the
    model's config.json cannot be had, or cannot be built from.
    """
    if config.quantization.is_enabled and config.lora.use_dora:
        raise UserError(
            "plan: lora.use_dora=true on quantized weights is not counted: peft needs the weights "
            "themselves for it. Plan with lora.use_dora=false; DoRA needs more than that."
        )
    dtype = machine.dtype if config.lora.is_enabled else full_dtype
    architecture = read_model_config(config.model)
    quantization = _bnb_settings(config, architecture)
    task = METHODS[config.trainer.base_method].task
    model = _empty_model(config.model, architecture, task, dtype, machine.attention)
    if quantization:
        settings = {"bnb_4bit_compute_dtype": machine.dtype} | quantization
        # Columns that int8 keeps in 16 bits depend on values, and are few.
        settings["llm_int8_threshold"] = 0.0
        insert_quantized_layers(model, settings).postprocess_model(model)
    if config.lora.is_enabled:
        return add_adapter(model, _without_values(config.lora), config.seed, task)
    freeze_parameters(model, config.model.train, config.model.freeze)
    return model


def teacher_bytes(config: RunConfig, machine: Machine) -> int:
    """Return the bytes of the model that a run learns from; 0 if there is none."""
    if config.trainer.teacher is None:
        return 0
    teacher_fields = {"path": config.trainer.teacher, "revision": None, "tokenizer": None}
    teacher = config.model.model_copy(update=teacher_fields)
    architecture = read_model_config(teacher)
    model = _empty_model(teacher, architecture, "CAUSAL_LM", machine.dtype, machine.attention)
    return sum(p.numel() * p.itemsize for p in model.parameters())


def reward_model_bytes(config: RunConfig, machine: Machine) -> int:
    """Return the bytes of the models among a run's rewards; 0 if there is none."""
    from torch.nn import Linear

    total = 0
    for reward in read_reward_settings(config.trainer.rewards):
        if not isinstance(reward, ModelReward):
            continue
        artifact = find_reward_artifact(reward)
        dtype = reward.dtype or artifact.base.dtype
        dtype = machine.dtype if dtype == "auto" else dtype
        architecture = read_model_config(artifact.base)
        architecture.num_labels = 1
        model = _empty_model(artifact.base, architecture, "SEQ_CLS", dtype, "sdpa")
        trained_bits = artifact.quantization.bits if artifact.quantization.is_enabled else None
        bits = {"nf4": 4, "int8": 8, "none": None}.get(reward.quantization, trained_bits)
        for name, layer in model.named_modules():
            is_packed = bits is not None and isinstance(layer, Linear) and name != "score"
            for weight in layer.parameters(recurse=False):
                total += weight.numel() * (bits or 0) // 8 if is_packed else weight.nbytes
    return total


def find_transformer_layers(model: Any) -> dict[str, "torch.nn.Module"]:
    """Return the transformer layers by name: sharding gathers them one at a time."""
    from peft import PeftModel

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    layer_classes = set(base._no_split_modules or ())
    return {
        name: layer
        for name, layer in model.named_modules()
        if type(layer).__name__ in layer_classes
    }


def _empty_model(
    model: ModelConfig, architecture: Any, task: str, dtype: str, attention: str
) -> Any:
    """Return the model on the meta device; raises UserError where transformers cannot build it."""
    import torch

    # Flash attention need not be installed here: torch's own keeps the same tensors.
    is_flash = any(name in attention for name in _FLASH_KERNELS)

    # A head that scores texts asks for a padding token as soon as a batch has two rows.
    # Configs of some types (CodeGen, CPM-Ant, RWKV) have no such field.
    text_config = architecture.get_text_config()
    if getattr(text_config, "pad_token_id", None) is None:
        text_config.pad_token_id = 0
    try:
        empty = build_empty_model(
            architecture,
            task,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa" if is_flash else attention,
            trust_remote_code=model.trust_remote_code,
        )
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(
            f"model.path={model.path}: the plan cannot build this model from its config.json: "
            f"{error}"
        ) from error
    empty.config.use_cache = False
    return empty


def _bnb_settings(config: RunConfig, architecture: Any) -> dict[str, Any]:
    """Return bitsandbytes' settings, of the run or of a model that comes quantized; empty for none.

    Takes the mark of a model that comes quantized off `architecture`.
    """
    saved = quantized.read_quantization_config(config.model)
    if saved is None:
        return config.quantization
    # With the mark transformers takes the empty model for one whose weights are quantized.
    quantized.remove_quantization_mark(architecture)
    if config.quantization.dequantize:
        return {}
    method = quantized.quantization_method(saved)
    if method != "bitsandbytes":
        raise UserError(
            f"model.path={config.model.path}: the model comes quantized "
            f"({method}), and the plan counts only what bitsandbytes "
            "packs. Plan for the model that it was made from, with quantization=nf4 or int8."
        )
    return saved


def _without_values(lora: LoraSettings) -> dict[str, Any]:
    """Return an adapter's settings with weights that are drawn: shapes have no values to start at.

    Single tokens that train are left out: a few rows.
    """
    # LoftQ, PiSSA and their like start at values; the shapes are those of a drawn start.
    settings = {name: value for name, value in lora.items() if name not in _SETTINGS_WITH_VALUES}
    if isinstance(lora.init_lora_weights, str):
        settings["init_lora_weights"] = True
    return settings


SECOND_BLOCK = 256
"""The number of scales that share a second scale under bitsandbytes' double quantization.

`quantize_4bit`, https://github.com/bitsandbytes-foundation/bitsandbytes
"""


@dataclass(frozen=True)
class Weight:
    """One parameter of a model: how many numbers, in which format, and whether it trains."""

    name: str
    elements: int
    """The count of numbers, also where several share a byte."""
    shape: tuple[int, ...]
    stored: int
    """Bytes, with the scales and tables of a quantized parameter."""
    format: str
    """bfloat16, float32, nf4, fp4, int8, ..."""
    trains: bool
    layer: str
    """The name of its transformer layer; empty outside of them."""
    embeds: bool
    """Whether it is the table of an embedding layer."""
    is_expert: bool = False
    """Whether it holds one matrix for each expert."""

    @property
    def is_quantized(self) -> bool:
        """Whether it is stored in other numbers than products are computed with."""
        return self.format in ("nf4", "fp4", "int8")


def fill_fake_weights(model: Any) -> None:
    """Give a model on the meta device weights within the running FakeTensorMode.

    They look like a CPU's, have the real shapes and formats, quantized ones with their scales, and
    hold nothing.
    """
    import bitsandbytes as bnb
    import torch

    fakes: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            # Tied weights stay one.
            if id(parameter) not in fakes:
                fakes[id(parameter)] = _fake_parameter(parameter)
            module._parameters[name] = fakes[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        if isinstance(module, bnb.nn.Linear8bitLt):
            _fill_int8(module)


def list_weights(model: Any) -> tuple[Weight, ...]:
    """List the weights of a filled model."""
    import torch

    layers = sorted(find_transformer_layers(model), key=len, reverse=True)
    scales = {id(module.weight): module.state.SCB for module in _int8_layers(model)}
    tables = {
        id(layer.weight) for layer in model.modules() if isinstance(layer, torch.nn.Embedding)
    }
    experts = {name for group in find_experts(model) for name in group.parameter_names}
    weights = [
        _describe_weight(
            name, parameter, layers, scales.get(id(parameter)), id(parameter) in tables
        )
        for name, parameter in model.named_parameters()
    ]
    return tuple(replace(weight, is_expert=weight.name in experts) for weight in weights)


def iterate_tensors(model: Any) -> Iterator["torch.Tensor"]:
    """Yield all tensors that a filled model keeps: weights with scales and tables, and buffers."""
    for parameter in model.parameters():
        yield parameter
        yield from _scale_tensors(parameter)
    for module in _int8_layers(model):
        yield module.state.SCB
    yield from model.buffers()


def _fake_parameter(parameter: Any) -> Any:
    """Return a parameter without content for one on the meta device."""
    import bitsandbytes as bnb
    import torch

    if isinstance(parameter, bnb.nn.Params4bit):
        return _fake_4bit(parameter)
    is_int8 = isinstance(parameter, bnb.nn.Int8Params)
    data = torch.empty(parameter.shape, dtype=torch.int8 if is_int8 else parameter.dtype)
    return torch.nn.Parameter(data, requires_grad=parameter.requires_grad)


def _fake_4bit(parameter: Any) -> Any:
    """Return a 4-bit parameter: two numbers in a byte, and a scale (or its code) for each block."""
    import torch
    from bitsandbytes.functional import QuantState

    blocks = -(-parameter.numel() // parameter.blocksize)
    nested = None
    if parameter.compress_statistics:
        scales_of_scales = torch.empty(-(-blocks // SECOND_BLOCK))
        nested = QuantState(
            scales_of_scales, code=torch.empty(256), blocksize=SECOND_BLOCK, dtype=torch.float32
        )
    storage = parameter.quant_storage
    packed = torch.empty((-(-parameter.numel() // (2 * storage.itemsize)), 1), dtype=storage)
    fake: Any = torch.nn.Parameter(packed, requires_grad=False)
    fake.quant_state = QuantState(
        torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=parameter.shape,
        code=torch.empty(16),
        blocksize=parameter.blocksize,
        quant_type=parameter.quant_type,
        dtype=parameter.dtype,
        offset=torch.empty(()) if nested else None,
        state2=nested,
    )
    return fake


def _fill_int8(module: Any) -> None:
    """Put the numbers of an 8-bit layer into its state, as its first forward would."""
    import torch

    # bitsandbytes 0.50 keeps both attributes of the weight until then.
    module.state.CB = module.weight.data
    module.state.SCB = torch.empty(module.weight.shape[0])
    module.weight.CB = module.weight.SCB = None


def _int8_layers(model: Any) -> Iterator[Any]:
    import bitsandbytes as bnb

    return (layer for layer in model.modules() if isinstance(layer, bnb.nn.Linear8bitLt))


def _scale_tensors(parameter: Any) -> list["torch.Tensor"]:
    """Return the scales and tables of a 4-bit parameter; none for others."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    second = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *second]


def _describe_weight(
    name: str, parameter: Any, layers: list[str], int8: Any, embeds: bool
) -> Weight:
    """Return the description of a parameter; `int8` are the scales of an 8-bit one, or None."""
    state = getattr(parameter, "quant_state", None)
    dtype = str(parameter.dtype).removeprefix("torch.")
    shape = tuple(parameter.shape if state is None else state.shape)
    scales = _scale_tensors(parameter) + ([int8] if int8 is not None else [])
    return Weight(
        name=name,
        elements=math.prod(shape),
        shape=shape,
        stored=sum(tensor.numel() * tensor.itemsize for tensor in [parameter, *scales]),
        format=dtype if state is None else state.quant_type,
        trains=parameter.requires_grad,
        layer=next((layer for layer in layers if name.startswith(f"{layer}.")), ""),
        embeds=embeds,
    )
