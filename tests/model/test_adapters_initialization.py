"""Adapters that start as something: LoftQ's correction of 4-bit weights, parts of the base."""

import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel

from helpers.adapter_models import (
    FP4,
    INT8,
    LORA,
    NF4,
    config_of,
    load,
    logits,
    prepared,
    stir,
    trained,
)
from helpers.model_families import save_family
from luthier.errors import UserError
from luthier.model.adapters import add_adapter, convert_to_plain_lora
from luthier.model.expert_lora import QuantizedExpertsLora

LOFTQ = LORA | {"init_lora_weights": "loftq"}


def errors(model, original):
    """Of each 4-bit layer: its error, what its adapter leaves of it, and the adapter's rank."""
    weights = dict(original.named_parameters())
    for name, layer in model.get_base_model().named_modules():
        if name.endswith("proj"):
            packed = layer.base_layer.weight
            whole = dequantize_4bit(packed.data, packed.quant_state).float()
            error = weights[f"{name}.weight"].detach() - whole
            delta = layer.get_delta_weight("default").detach()
            yield error, error - delta, layer.r["default"]


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("quantization", [NF4, FP4], ids=["nf4", "fp4"])
def test_loftq_takes_the_largest_part_of_the_error(tiny_model, quantization, rslora):
    lora = LOFTQ | {"use_rslora": rslora, "rank_pattern": {"up_proj": 8}}
    config = config_of(tiny_model, quantization=quantization, lora=lora)
    model, _ = prepared(config)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    found = list(errors(model, load(tiny_model)))
    assert {rank for *_, rank in found} == {4, 8}
    for before, after, rank in found:
        least = torch.linalg.svdvals(before)[rank:].norm()
        assert least <= 1.0001 * after.norm() <= 1.02 * least
        assert after.norm() < 0.97 * before.norm()


def test_loftq_starts_nearer_to_the_model_as_it_was(tiny_model):
    config = config_of(tiny_model, quantization=NF4, lora=LOFTQ | {"r": 16})
    wanted = logits(load(tiny_model))
    corrected = logits(prepared(config)[0])
    plain = logits(load(tiny_model, NF4))
    assert (corrected - wanted).norm() < 0.8 * (plain - wanted).norm()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_loftq_takes_the_largest_part_of_the_error_of_each_expert(family, tmp_path):
    folder = save_family(tmp_path / "base", family)
    config = config_of(folder, quantization=NF4, lora=LOFTQ | {"r": 6, "use_rslora": True})
    model, _ = prepared(config)
    weights = dict(load(folder).named_parameters())
    names = {name for name in weights if name.endswith(("experts.gate_up_proj", "down_proj"))}
    assert names
    corrected = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedExpertsLora):
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        name = f"{name}.{layer.parameter_name}"
        corrected.add(name)
        term = layer._make_term("default")
        error = weights[name] - layer.get_base_layer().dequantize(layer.parameter_name)
        after = error - term.scale * term.left @ term.right
        least = torch.linalg.svdvals(error)[:, 6:].norm(dim=1)
        left_over = after.flatten(1).norm(dim=1)
        assert (least <= 1.0001 * left_over).all() and (left_over <= 1.02 * least).all()
    assert corrected == names


def test_loftq_is_saved_as_plain_lora(tiny_model, tmp_path):
    model, _ = prepared(config_of(tiny_model, quantization=NF4, lora=LOFTQ))
    stir(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    again = PeftModel.from_pretrained(load(tiny_model, NF4), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_loftq_is_drawn_from_the_seed(tiny_model):
    config = config_of(tiny_model, quantization=NF4, lora=LOFTQ)
    one, other = trained(prepared(config)[0]), trained(prepared(config)[0])
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


WRONG = {
    "on whole weights": ({}, {}, "quantization=nf4"),
    "on 8 bits": (INT8, {}, "quantization=nf4"),
    "rounds": (NF4, {"loftq_config": {"loftq_iter": 4}}, "loftq_iter: more than one round"),
    "bits": (NF4, {"loftq_config": {"loftq_bits": 2}}, "loftq_bits: 4 is the only"),
    "with DoRA": (NF4, {"use_dora": True}, "Use one of them"),
    "from data": (NF4, {"init_lora_weights": "eva"}, "pass over the data"),
}


@pytest.mark.parametrize(("quantization", "lora", "said"), WRONG.values(), ids=WRONG)
def test_a_start_that_does_not_fit_is_told(tiny_model, quantization, lora, said):
    with pytest.raises(UserError) as raised:
        add_adapter(load(tiny_model, quantization), LOFTQ | lora, seed=1)
    assert said in str(raised.value)


STARTS = {
    "pissa": {"init_lora_weights": "pissa"},
    "fast pissa": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "dora": {"init_lora_weights": "pissa", "use_dora": True},
    "ranks": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2, "0.mlp.up_proj": 6}},
}


@pytest.mark.parametrize("lora", STARTS.values(), ids=STARTS)
def test_a_part_of_the_base_is_saved_as_plain_lora_for_the_base_as_it_was(
    tiny_model, tmp_path, lora
):
    model = add_adapter(load(tiny_model), LORA | lora, seed=1)
    torch.testing.assert_close(logits(model), logits(load(tiny_model)), rtol=0, atol=1e-5)
    stir(model)
    model.save_pretrained(tmp_path)
    convert_to_plain_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert config["init_lora_weights"] is True
    again = PeftModel.from_pretrained(load(tiny_model), tmp_path)
    assert (logits(model) - logits(load(tiny_model))).abs().max() > 0.1
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-4)


def test_other_adapters_are_saved_as_they_are(tiny_model, tmp_path):
    model = add_adapter(load(tiny_model), LORA, seed=1)
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    convert_to_plain_lora(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
