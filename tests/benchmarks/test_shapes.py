"""Weights and FLOPs of the shapes against published numbers and torch's own counter."""

import pytest

from shapes import GPUS, SHAPES, find_gpu

PUBLISHED = {
    "qwen_1_7b": 1_720_574_976,
    "llama_8b": 8_030_261_248,
    "llama_70b": 70_553_706_496,
}
"""Weights by the model cards' safetensors metadata."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_those_of_the_real_model(name):
    assert SHAPES[name].weights == PUBLISHED[name]


def test_adapters_have_the_weights_that_peft_reports():
    assert SHAPES["llama_8b"].lora_weights(16) == 41_943_040


def test_flops_of_a_step_are_what_torch_counts():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    shape, tokens = SHAPES["tiny"], 32
    model = build(shape, "eager")
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    # Eager attention computes all pairs, also those that the mask takes out.
    assert shape.step_flops(tokens, tokens**2) == counter.get_total_flops()


def test_frozen_weights_cost_two_thirds():
    shape = SHAPES["llama_8b"]
    full, lora = shape.step_flops(1, 0), shape.step_flops(1, 0, rank=16)
    assert full == 6 * 7_504_658_432
    assert lora == 4 * 7_504_658_432 + 6 * 41_943_040


def build(shape, attention):
    import torch

    from shapes import build_random_model

    return build_random_model(shape, torch.float32, "cpu", attention)


NAMES = {
    "NVIDIA H200": "H200",
    "NVIDIA H200 NVL": "H200 NVL",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA L40S": "L40S",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
}


@pytest.mark.parametrize(("name", "gpu"), NAMES.items(), ids=NAMES)
def test_a_device_is_found_by_torchs_name(name, gpu):
    assert find_gpu(name) == GPUS[gpu]


def test_an_unknown_device_has_no_peak():
    assert find_gpu("CPU, 2 cores") is None
