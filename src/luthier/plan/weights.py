"""The weights of a model, one by one: how many, in which format, how many bytes, and who trains."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.plan import skeleton

if TYPE_CHECKING:
    import torch

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


def fill(model: Any) -> None:
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


def listed(model: Any) -> tuple[Weight, ...]:
    """List the weights of a filled model."""
    import torch

    layers = sorted(skeleton.named_layers(model), key=len, reverse=True)
    scales = {id(module.weight): module.state.SCB for module in _int8_layers(model)}
    tables = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
    return tuple(
        _weight(name, parameter, layers, scales.get(id(parameter)), id(parameter) in tables)
        for name, parameter in model.named_parameters()
    )


def tensors(model: Any) -> Iterator["torch.Tensor"]:
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
