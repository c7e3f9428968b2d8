"""What is read back of a save is compared with the slices that the ranks hold."""

import pytest
import torch
from safetensors.torch import save_file

from luthier.train.trainers.sharded_weights import (
    _find_difference,
    _SliceSums,
    _sum_bits,
    find_unsaved,
)

WEIGHTS = {
    "layer.weight": torch.arange(1, 25, dtype=torch.float32).reshape(6, 4),
    "layer.bias": torch.arange(1, 4, dtype=torch.bfloat16),
    "experts.gate_up": torch.arange(1, 17, dtype=torch.float32).reshape(2, 2, 4),
    "head.weight": torch.arange(1, 25, dtype=torch.float32).reshape(6, 4),
    "scale": torch.tensor(3.0),
}
TIES = {"layer.weight": 7, "head.weight": 7, "layer.bias": 8}
EXPERTS = {
    f"experts.{n}.{part}": WEIGHTS["experts.gate_up"][n, row]
    for n in range(2)
    for row, part in enumerate(("gate", "up"))
}


def halves():
    """The slices of two ranks, along the first axis; a scalar is whole on both."""
    ranks = []
    for rank in range(2):
        sums = {}
        for name, value in WEIGHTS.items():
            cut = -(-len(value) // 2) if value.dim() else 0
            local = value[rank * cut : (rank + 1) * cut] if value.dim() else value
            offset = (rank * cut, *[0] * (value.dim() - 1)) if value.dim() else ()
            shapes = tuple(local.shape), tuple(value.shape)
            sums[name] = _SliceSums(offset, *shapes, str(local.dtype), *_sum_bits(local))
        ranks.append(sums)
    return ranks


def saved():
    """What transformers writes: one of two tied matrices, and each expert by itself."""
    return {name: WEIGHTS[name] for name in ("layer.weight", "layer.bias", "scale")} | EXPERTS


def zeroed(name, rows):
    value = saved()[name].clone()
    value[rows] = 0
    return {name: value}


CASES = {
    "as the ranks hold it": ({}, None),
    "the second rank's half is zeros": (
        zeroed("layer.weight", slice(3, None)), "the part of layer.weight that rank 1 holds"
    ),
    "two rows changed places": (
        {"layer.weight": WEIGHTS["layer.weight"][[1, 0, 2, 3, 4, 5]]}, "that rank 0 holds"
    ),
    "another number format": ({"layer.bias": WEIGHTS["layer.bias"].float()}, "layer.bias"),
    "another shape": (
        {"layer.weight": WEIGHTS["layer.weight"][:3]},
        "layer.weight has the shape (3, 4) instead of (6, 4)",
    ),
    "an expert is zeros": (zeroed("experts.1.up", slice(None)), "what was made of experts.gate_up"),
    "an expert is missing": ({"experts.1.up": None}, "what was made of experts.gate_up"),
    "all experts are missing": (dict.fromkeys(EXPERTS), "experts.gate_up is missing"),
    "a tensor too many": ({"other": torch.ones(2)}, "has other values"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_was_saved_is_compared_with_each_rank(tmp_path, case):
    changes, problem = CASES[case]
    tensors = {name: value for name, value in {**saved(), **changes}.items() if value is not None}
    file = tmp_path / "model.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    found = _find_difference([file], halves(), TIES)
    assert found is None if problem is None else problem in (found or "")


def test_tied_weights_that_are_renamed_are_written_once(tmp_path):
    file = tmp_path / "model.safetensors"
    tensors = saved()
    tensors["wrapped.layer.weight"] = tensors.pop("layer.weight")
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    assert _find_difference([file], halves(), TIES) is None


def test_a_file_that_is_not_there_is_named(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    assert _find_difference([file], halves(), {}) == "adapter_model.safetensors is missing"


def test_a_save_without_any_weights_is_no_save(tmp_path):
    """Nothing was expected, and nothing is in the file: the adapter would be lost."""
    file = tmp_path / "adapter_model.safetensors"
    save_file({}, file)
    problem = _find_difference([file], [{}, {}], {})
    assert problem == "there are no weights to save in it"


def test_the_sums_do_not_depend_on_how_a_tensor_is_cut(monkeypatch):
    values = torch.randn(1000)
    expected = _sum_bits(values)
    monkeypatch.setattr("luthier.train.trainers.sharded_weights._CHUNK", 8)
    assert _sum_bits(values) == expected
    assert _sum_bits(values.flip(0))[0] == expected[0]
    assert _sum_bits(values.flip(0)) != expected


def test_what_trains_must_be_among_what_is_saved():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    saved = ["0.bias", "1.bias"]
    assert find_unsaved(model, saved, {}) == ["1.weight"]
    assert find_unsaved(model, saved, {"1.weight": 5, "0.bias": 5}) == []
    assert find_unsaved(model, [*saved, "1.weight"], {}) == []
