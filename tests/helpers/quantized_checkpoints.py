"""Quantized checkpoints as they are on the hub, and what their numbers are by plain arithmetic.

Each is made of an unquantized one: its matrices are packed here, tensor by tensor, without the
libraries that read them.
"""

import json
import re
import shutil

import torch
from safetensors.torch import load_file, save_file

BLOCK = 32
"""Rows and columns that share a scale in fp8, and numbers that do in 4 bits."""
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The number of each of the 16 codes of E2M1."""
LINEAR = r"proj\.weight$"
"""Matrices of the layers; the head, embeddings and routers are left as they are."""
TEXT_LINEAR = rf"language_model.*{LINEAR}"
"""Matrices of a wrapper's text part."""
EXPERTS = r"experts\.\d+\..*proj\.weight$"
"""Matrices of the experts alone."""


def compressed(form, weights, inputs=None, ignore=("lm_head",)):
    """The mark of compressed-tensors for all linear layers but those of `ignore`."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": list(ignore),
    }  # fmt: skip


FP8 = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": ["lm_head"],
}  # fmt: skip
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
W4A16 = compressed(
    "pack-quantized",
    {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": BLOCK},
)
W8A8_FP8 = compressed(
    "float-quantized",
    {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
    {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
)
NVFP4 = compressed(
    "nvfp4-pack-quantized",
    {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group",
     "group_size": 16},
)  # fmt: skip


def pack_fp8(name, weight):
    """DeepSeek's format: E4M3 with a scale for each block of a matrix."""
    rows, columns = (size // BLOCK for size in weight.shape)
    blocks = weight.reshape(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
    packed = (blocks / scale).to(torch.float8_e4m3fn)
    whole = (packed.float() * scale).reshape(weight.shape)
    scales = scale.reshape(rows, columns)
    return {name: packed.reshape(weight.shape), f"{name}_scale_inv": scales}, whole


def pack_mxfp4(name, weight):
    """gpt-oss' format: E2M1 in blocks of 32 along the inputs, each with a power of two."""
    turned = weight.transpose(1, 2)  # a weight of its experts is (experts, inputs, outputs)
    blocks = turned.reshape(*turned.shape[:2], -1, BLOCK)
    power = (blocks.abs().amax(-1, keepdim=True) / 6).log2().ceil()
    codes = _nearest_fp4(blocks / 2**power)
    whole = (FP4[codes] * 2**power).reshape(turned.shape).transpose(1, 2).contiguous()
    scales = (power.squeeze(-1) + 127).to(torch.uint8)
    return {f"{name}_blocks": _pairs(codes), f"{name}_scales": scales}, whole


def pack_w4a16(name, weight):
    """Kimi K2's format: whole numbers of 4 bits, eight in an int32, a scale for each 32."""
    groups = weight.reshape(weight.shape[0], -1, BLOCK)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    numbers = (groups / scale).round().clamp(-8, 7)
    whole = (numbers * scale).reshape(weight.shape)
    nibbles = (numbers + 8).long().reshape(weight.shape[0], -1, 8)
    packed = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    stem = name.removesuffix("weight")
    shape = torch.tensor(weight.shape)
    tensors = {"packed": packed, "scale": scale.squeeze(-1), "shape": shape}
    return {f"{stem}weight_{key}": tensor for key, tensor in tensors.items()}, whole


def pack_channels_in_fp8(name, weight):
    """FP8 of compressed-tensors: E4M3 with a scale for each row."""
    scale = weight.abs().amax(-1, keepdim=True) / 448
    packed = (weight / scale).to(torch.float8_e4m3fn)
    return {name: packed, f"{name}_scale": scale}, packed.float() * scale


def pack_nvfp4(name, weight):
    """NVFP4 of compressed-tensors: E2M1, an E4M3 scale for each 16, and one for the matrix."""
    groups = weight.reshape(weight.shape[0], -1, 16)
    largest = groups.abs().amax(-1, keepdim=True)
    total = 448 * 6 / weight.abs().max()
    scale = (largest / 6 * total).to(torch.float8_e4m3fn)
    step = scale.float() / total
    codes = _nearest_fp4(groups / step)
    whole = (FP4[codes] * step).reshape(weight.shape)
    stem = name.removesuffix("weight")
    tensors = {
        "packed": _pairs(codes.reshape(weight.shape)), "scale": scale.squeeze(-1),
        "global_scale": total.reshape(1),
    }  # fmt: skip
    return {f"{stem}weight_{key}": tensor for key, tensor in tensors.items()}, whole


def quantize_checkpoint(folder, target, pack, quantization, names=LINEAR, below=None):
    """Write a checkpoint quantized, and the same numbers whole; returns both folders in `target`.

    `names` finds the matrices that are packed. The configuration's mark stands in its part `below`,
    or on top.
    """
    weights, packed, whole = load_file(folder / "model.safetensors"), {}, {}
    for name, weight in weights.items():
        tensors, numbers = ({name: weight}, weight)
        if re.search(names, name):
            tensors, numbers = pack(name, weight.float())
        packed |= {key: tensor.contiguous() for key, tensor in tensors.items()}
        whole[name] = numbers
    assert set(packed) != set(whole), f"nothing in {folder} is called {names}"
    for part, content in (("packed", packed), ("whole", whole)):
        shutil.copytree(folder, target / part)
        save_file(content, target / part / "model.safetensors", metadata={"format": "pt"})
    mark_quantized(target / "packed", quantization, below)
    return target / "packed", target / "whole"


def mark_quantized(folder, quantization, below=None):
    """Write into config.json that the model is quantized."""
    content = json.loads((folder / "config.json").read_text())
    (content[below] if below else content)["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(content))


def _nearest_fp4(numbers):
    """The code of the nearest number of E2M1."""
    return (numbers.unsqueeze(-1) - FP4).abs().argmin(-1)


def _pairs(codes):
    """Two codes in a byte, the first in its lower half."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
