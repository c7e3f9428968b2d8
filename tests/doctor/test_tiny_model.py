"""The weights that four bits hold, and rows of different lengths."""

import json

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file

from luthier.doctor.tiny_model import ROWS, write_tiny_model


def test_four_bits_hold_the_linear_weights_without_a_loss(tmp_path):
    write_tiny_model(tmp_path)
    weights = load_file(tmp_path / "model/model.safetensors")
    linear = [weight for name, weight in weights.items() if "_proj" in name]
    assert len(linear) == 14
    for weight in linear:
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        assert torch.equal(dequantize_4bit(packed, state), weight)
        assert weight.unique().numel() == 16
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len({len(row["prompt"] + row["completion"]) for row in rows}) == len(rows) == ROWS
