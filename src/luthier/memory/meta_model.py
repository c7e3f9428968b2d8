"""A model as shapes alone: its layers, quantized and with adapters, without a byte of weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.config.library_settings import LoraSettings
from luthier.config.methods import METHODS
from luthier.config.schema import ModelConfig, RunConfig
from luthier.errors import UserError
from luthier.model import gguf, quantized, source
from luthier.model.adapters import add_adapter
from luthier.model.device import Machine
from luthier.model.load import build_empty_model, insert_quantized_layers
from luthier.model.trainable import freeze_parameters

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_KEEP_THE_SAME = ("flash", "flex")
_BY_WEIGHTS = ("trainable_token_indices", "token_indices", "loftq_config")


def build_meta_model(config: RunConfig, machine: Machine, full_dtype: str = "float32") -> Any:
    """Return the run's model on torch's meta device, as training would get it.

    A model that trains whole is in `full_dtype`, others in the machine's format with adapters in
    float32; layers are bitsandbytes' own where the run quantizes. Raises UserError where the
    model's config.json cannot be had, or cannot be built from.
    """
    _refuse_unknown(config)
    dtype = machine.dtype if config.lora.is_enabled else full_dtype
    architecture = read_model_config(config.model)
    packed = _packed(config, architecture)
    task = METHODS[config.trainer.method].task
    model = _empty(config.model, architecture, task, dtype, _attention(machine))
    if packed:
        settings = {"bnb_4bit_compute_dtype": machine.dtype} | packed
        # Columns that int8 keeps in 16 bits depend on values, and are few.
        settings["llm_int8_threshold"] = 0.0
        insert_quantized_layers(model, settings).postprocess_model(model)
    if config.lora.is_enabled:
        return add_adapter(model, _drawn(config.lora), config.seed, task)
    if config.model.train or config.model.freeze:
        freeze_parameters(model, config.model.train, config.model.freeze)
    return model


def read_model_config(model: ModelConfig) -> "PretrainedConfig":
    """Return the model's configuration, from this machine where it is there.

    Raises UserError if it is not and cannot be fetched.
    """
    from transformers import AutoConfig

    file = source.find_gguf_file(model.path)
    try:
        found, _ = AutoConfig.from_pretrained(
            model.path if file is None else gguf.convert_model(file),
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            local_files_only=source.needs_hub(model.path) and source.is_hub_unreachable(),
            return_unused_kwargs=True,
            **model.kwargs,
        )
    except (OSError, ValueError) as error:
        problem = source.explain_hub_error(error, model.path, "model.path")
        raise problem or UserError(
            f"model.path={model.path}: its config.json cannot be read: {error}"
        ) from error
    return found


def teacher_bytes(config: RunConfig, machine: Machine) -> int:
    """Return the bytes of the model that a run learns from; 0 if there is none."""
    if config.trainer.teacher is None:
        return 0
    own = {"path": config.trainer.teacher, "revision": None, "tokenizer": None}
    teacher = config.model.model_copy(update=own)
    architecture, attention = read_model_config(teacher), _attention(machine)
    model = _empty(teacher, architecture, "CAUSAL_LM", machine.dtype, attention)
    return sum(p.numel() * p.itemsize for p in model.parameters())


def find_transformer_layers(model: Any) -> dict[str, "torch.nn.Module"]:
    """The transformer layers by name: what sharding gathers, one at a time."""
    from peft import PeftModel

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    kinds = set(base._no_split_modules or ())
    return {name: part for name, part in model.named_modules() if type(part).__name__ in kinds}


def _empty(model: ModelConfig, architecture: Any, task: str, dtype: str, attention: str) -> Any:
    """The model on the meta device; UserError where transformers cannot make it."""
    import torch

    if architecture.get_text_config().pad_token_id is None:
        architecture.get_text_config().pad_token_id = 0
    try:
        empty = build_empty_model(
            architecture,
            task,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=model.trust_remote_code,
        )
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(
            f"model.path={model.path}: the plan cannot build this model from its config.json: "
            f"{error}"
        ) from error
    empty.config.use_cache = False
    return empty


def _packed(config: RunConfig, architecture: Any) -> dict[str, Any]:
    """How bitsandbytes packs the weights: as the run says, or as the model comes.

    Takes the mark of a model that comes quantized off its configuration.
    """
    comes = quantized.read_quantization_config(config.model)
    if comes is None:
        return config.quantization
    del architecture.quantization_config
    if config.quantization.dequantize:
        return {}
    if quantized.quantization_method(comes) != "bitsandbytes":
        raise UserError(
            f"model.path={config.model.path}: the model comes quantized "
            f"({quantized.quantization_method(comes)}), and the plan counts only what bitsandbytes "
            "packs. Plan for the model that it was made from, with quantization=nf4 or int8."
        )
    return comes


def _refuse_unknown(config: RunConfig) -> None:
    if config.quantization.is_enabled and config.lora.use_dora:
        raise UserError(
            "plan: lora.use_dora=true on quantized weights is not counted: peft needs the weights "
            "themselves for it. Plan with lora.use_dora=false; DoRA needs more than that."
        )


def _attention(machine: Machine) -> str:
    """Flash attention need not be installed here: torch's own keeps the same tensors."""
    kernels = any(name in machine.attention for name in _KEEP_THE_SAME)
    return "sdpa" if kernels else machine.attention


def _drawn(lora: LoraSettings) -> dict[str, Any]:
    """The same adapter with weights that are drawn: shapes have no values to start from.

    Single tokens that train are left out: a few rows.
    """
    kept = {name: value for name, value in lora.items() if name not in _BY_WEIGHTS}
    if isinstance(lora.init_lora_weights, str):
        kept["init_lora_weights"] = True
    return kept


# The weights of a model, one by one: how many, in which format, how many bytes, and who trains.

SECOND_BLOCK = 256
"""Scales that share a scale of their own under double quantization, as bitsandbytes has it.

`quantize_4bit`, https://github.com/bitsandbytes-foundation/bitsandbytes
"""


@dataclass(frozen=True)
class Weight:
    """One parameter."""

    name: str
    elements: int
    """Numbers, also where several share a byte."""
    shape: tuple[int, ...]
    stored: int
    """Bytes, with scales and tables of a quantized one."""
    format: str
    """bfloat16, float32, nf4, fp4, int8, ..."""
    trains: bool
    layer: str
    """The transformer layer that it is in; empty outside of them."""
    embeds: bool
    """Whether it is the table of an embedding."""

    @property
    def is_quantized(self) -> bool:
        """Whether it is stored in other numbers than it is computed with."""
        return self.format in ("nf4", "fp4", "int8")


def fill_fake_weights(model: Any) -> None:
    """Give a model on the meta device weights within the running FakeTensorMode.

    They look like a CPU's, have the real shapes and formats, quantized ones with their scales, and
    hold nothing.
    """
    import bitsandbytes as bnb
    import torch

    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = _fake(parameter)
            module._parameters[name] = made[id(parameter)]
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
    tables = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
    return tuple(
        _weight(name, parameter, layers, scales.get(id(parameter)), id(parameter) in tables)
        for name, parameter in model.named_parameters()
    )


def iterate_tensors(model: Any) -> Iterator["torch.Tensor"]:
    """All tensors that a filled model keeps: weights, their scales and tables, and buffers."""
    for parameter in model.parameters():
        yield parameter
        yield from _scales(parameter)
    for module in _int8_layers(model):
        yield module.state.SCB
    yield from model.buffers()


def _fake(parameter: Any) -> Any:
    import bitsandbytes as bnb
    import torch

    if isinstance(parameter, bnb.nn.Params4bit):
        return _fake_4bit(parameter)
    whole = isinstance(parameter, bnb.nn.Int8Params)
    data = torch.empty(parameter.shape, dtype=torch.int8 if whole else parameter.dtype)
    return torch.nn.Parameter(data, requires_grad=parameter.requires_grad)


def _fake_4bit(parameter: Any) -> Any:
    """Two numbers in a byte, and a scale for each block; scales may be quantized themselves."""
    import torch
    from bitsandbytes.functional import QuantState

    blocks = -(-parameter.numel() // parameter.blocksize)
    nested = None
    if parameter.compress_statistics:
        second = torch.empty(-(-blocks // SECOND_BLOCK))
        nested = QuantState(
            second, code=torch.empty(256), blocksize=SECOND_BLOCK, dtype=torch.float32
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
    """8-bit layers move their numbers into a state at the first forward; here they are in it."""
    import torch

    module.state.CB = module.weight.data
    module.state.SCB = torch.empty(module.weight.shape[0])
    module.weight.CB = module.weight.SCB = None


def _int8_layers(model: Any) -> Iterator[Any]:
    import bitsandbytes as bnb

    return (part for part in model.modules() if isinstance(part, bnb.nn.Linear8bitLt))


def _scales(parameter: Any) -> list["torch.Tensor"]:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    second = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *second]


def _weight(name: str, parameter: Any, layers: list[str], int8: Any, embeds: bool) -> Weight:
    state = getattr(parameter, "quant_state", None)
    form = str(parameter.dtype).removeprefix("torch.")
    shape = tuple(parameter.shape if state is None else state.shape)
    elements = 1
    for size in shape:
        elements *= size
    extra = _scales(parameter) + ([int8] if int8 is not None else [])
    return Weight(
        name=name,
        elements=elements,
        shape=shape,
        stored=sum(tensor.numel() * tensor.itemsize for tensor in [parameter, *extra]),
        format=form if state is None else state.quant_type,
        trains=parameter.requires_grad,
        layer=next((layer for layer in layers if name.startswith(f"{layer}.")), ""),
        embeds=embeds,
    )
