"""Weights as an adapter met them in training: packed by bitsandbytes and unpacked again."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def as_trained(weight: "Tensor", quantization: dict[str, Any], transposed: bool) -> "Tensor":
    """A layer's weight (float32) as the run's quantization left it.

    `transposed`: whether it is (inputs, outputs); bitsandbytes packs (outputs, inputs).
    """
    matrix = weight.T.contiguous() if transposed else weight
    through = _through_4bit if quantization.get("load_in_4bit") else _through_8bit
    found = through(matrix, quantization)
    return found.T if transposed else found


def _through_4bit(weight: "Tensor", quantization: dict[str, Any]) -> "Tensor":
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from transformers import BitsAndBytesConfig

    settings: Any = BitsAndBytesConfig.from_dict(dict(quantization))
    packed, state = quantize_4bit(
        weight,
        compress_statistics=settings.bnb_4bit_use_double_quant,
        quant_type=settings.bnb_4bit_quant_type,
        quant_storage=settings.bnb_4bit_quant_storage,
    )
    return dequantize_4bit(packed, state).to(torch.float32)


def _through_8bit(weight: "Tensor", quantization: dict[str, Any]) -> "Tensor":
    import torch
    from bitsandbytes.functional import int8_vectorwise_quant

    # bitsandbytes rounds to float16 first; columns of large weights are not kept apart here.
    packed, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
    return packed.to(torch.float32) * (scales.to(torch.float32)[:, None] / 127.0)
