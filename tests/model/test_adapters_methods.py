"""Every adapter method on every base: trained in float32, with right gradients, saved whole."""

import copy
import json
from dataclasses import dataclass, field
from functools import cache

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

from luthier.config.methods import ADAPTERS, REFUSED_ADAPTERS
from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model.adapters import add_adapter
from luthier.model.device import Machine
from luthier.model.load import load_model

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
INT8 = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
BASES = {
    "float32": ({}, "float32"),
    "bfloat16": ({}, "bfloat16"),
    "nf4": (NF4, "bfloat16"),
    "int8": (INT8, "float32"),
}
BITS = {"nf4": 4, "int8": 8}
IDS = torch.tensor([[5, 80, 81, 100, 12, 7, 9, 33]])

SETTINGS = {
    "lora": {"r": 4},
    "adalora": {"init_r": 4, "target_r": 2},
    "beft": {},
    "boft": {"boft_block_size": 8},
    "c3a": {"block_size": 16},
    "deft": {},
    "delora": {"r": 4},
    "fourierft": {"n_frequency": 50},
    "frod": {},
    "glora": {"r": 4},
    "gralora": {"r": 8, "gralora_k": 2},
    "hira": {"r": 4},
    "hra": {"r": 4},
    "ia3": {},
    "lily": {"r": 4},
    "ln_tuning": {},
    "loha": {"r": 4},
    "lokr": {"r": 4},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 8},
    "osf": {},
    "peanut": {"r": 4},
    "psoft": {"r": 4},
    "pvera": {"r": 8},
    "randlora": {"r": 8},
    "road": {"group_size": 8},
    "shira": {"r": 4},
    "supertuning": {},
    "tinylora": {},
    "trainable_tokens": {"token_indices": [80, 9]},
    "unilora": {},
    "vblora": {"vector_length": 16, "num_vectors": 16, "topk": 2},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 64},
    "rslora": {"r": 4, "use_rslora": True},
    "dora": {"r": 4, "use_dora": True},
    "gaussian": {"r": 4, "init_lora_weights": "gaussian"},
    "pissa": {"r": 4, "init_lora_weights": "pissa"},
    "olora": {"r": 4, "init_lora_weights": "olora"},
    "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
    "mica": {"r": 4, "init_lora_weights": "mica"},
    "lora_bias": {"r": 4, "lora_bias": True},
}
VARIANTS = [name for name in SETTINGS if name not in ADAPTERS]
"""LoRA with other settings."""
WHOLE = {("dora", "int8")} | {
    (start, base) for start in ("pissa", "olora", "orthogonal", "mica") for base in BITS
}
"""Variants that do not go on packed weights."""


def settings_of(name):
    return SETTINGS[name] | {"method": name if name in ADAPTERS else "lora"}


def fits(name, base):
    if name in VARIANTS:
        return (name, base) not in WHOLE
    return base not in BITS or BITS[base] in ADAPTERS[name].packed


def hardest(name):
    return "nf4" if fits(name, "nf4") else "bfloat16"


CASES = [
    # The others are for a longer run.
    pytest.param((name, base), marks=[pytest.mark.train] if base != hardest(name) else [])
    for name in SETTINGS
    for base in BASES
    if fits(name, base)
]
REFUSALS = [(name, base) for name in SETTINGS for base in BASES if not fits(name, base)]


def shown(case):
    return "-".join(case)


@cache
def loaded(folder, base):
    quantization, dtype = BASES[base]
    config = ModelConfig(path=str(folder))
    return load_model(config, quantization, Machine("cpu", dtype, "sdpa"))


@cache
def dequantized(folder, base):
    """A float32 model with the weights that a packed one stands for."""
    packed, plain = loaded(folder, base), copy.deepcopy(loaded(folder, "float32"))
    layers = dict(plain.named_modules())
    for name, layer in packed.named_modules():
        weight = layer.weight.data if isinstance(layer, Linear4bit | Linear8bitLt) else None
        if isinstance(layer, Linear4bit):
            weight = dequantize_4bit(weight, layer.weight.quant_state)
        elif weight is not None:
            weight = weight.float() * layer.weight.SCB[:, None] / 127
        if weight is not None:
            layers[name].weight.data = weight.float()
    return plain


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapted(base, name):
    """The model with an adapter that looks as if it had trained for a while."""
    model = add_adapter(copy.deepcopy(base), settings_of(name), seed=1)
    torch.manual_seed(3)
    for weight in trained(model).values():
        weight.data += 0.02 * torch.randn(weight.shape)
    return model


def gradients(model, **checkpointing):
    model.train()
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    torch.manual_seed(5)
    model(input_ids=IDS, labels=IDS).loss.backward()
    if checkpointing:
        model.gradient_checkpointing_disable()
    return {name: p.grad.clone() for name, p in trained(model).items()}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@dataclass
class Case:
    folder: object
    name: str
    base: str
    model: object
    gradients: dict = field(default_factory=dict)


@pytest.fixture(scope="module", params=CASES, ids=shown)
def case(request, tiny_model):
    name, base = request.param
    return Case(tiny_model, name, base, adapted(loaded(tiny_model, base), name))


def test_it_trains_in_float32_and_every_weight_has_a_gradient(case):
    case.gradients = gradients(case.model)
    assert case.gradients
    assert {p.dtype for p in trained(case.model).values()} == {torch.float32}
    assert {gradient.dtype for gradient in case.gradients.values()} == {torch.float32}
    assert [name for name, g in case.gradients.items() if g.abs().sum() == 0] == []


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpointing_gives_the_same_gradients(case, reentrant):
    wanted = case.gradients or gradients(case.model)
    got = gradients(case.model, use_reentrant=reentrant)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_packed_base_gives_what_its_dequantized_weights_give(case):
    if case.base not in BITS:
        return
    reference = adapted(dequantized(case.folder, case.base), case.name)
    if case.base == "int8":
        # Its activations are rounded to 8 bits, which a forward shows and a gradient hardly does.
        torch.testing.assert_close(logits(case.model), logits(reference), rtol=0, atol=0.01)
    wanted, got = gradients(reference), gradients(case.model)
    error = [(got[name] - wanted[name]).norm() / wanted[name].norm() for name in wanted]
    bound = 0.15 if case.base == "nf4" else 0.02
    assert torch.stack(error).median() < bound


def test_a_saved_one_gives_the_same_logits_in_plain_peft(case, tmp_path):
    case.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == settings_of(case.name)["method"].upper()
    base = copy.deepcopy(loaded(case.folder, case.base))
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert again is not case.model
    if case.base in ("float32", "int8"):
        torch.testing.assert_close(logits(again), logits(case.model), rtol=0, atol=1e-5)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(logits(again), logits(case.model), rtol=0, atol=0.02)


def test_a_step_at_a_small_rate_moves_each_weight_and_not_the_base(case):
    weights = dict(case.model.named_parameters())
    frozen = {name: p.detach().clone() for name, p in weights.items() if not p.requires_grad}
    before = {name: weight.detach().clone() for name, weight in trained(case.model).items()}
    gradients(case.model)
    torch.optim.AdamW(trained(case.model).values(), lr=1e-5, weight_decay=0).step()
    for name, weight in trained(case.model).items():
        assert not torch.equal(weight, before[name]), name
    for name, weight in frozen.items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize(("name", "base"), REFUSALS, ids=[shown(case) for case in REFUSALS])
def test_what_does_not_go_on_packed_weights_is_told(tiny_model, name, base):
    with pytest.raises(UserError) as raised:
        add_adapter(copy.deepcopy(loaded(tiny_model, base)), settings_of(name), seed=1)
    assert f"{BITS[base]}-bit" in str(raised.value)
    assert "quantization=" in str(raised.value)


@pytest.mark.parametrize("name", [*REFUSED_ADAPTERS, "lorra"])
def test_other_methods_are_told(tiny_model, name):
    with pytest.raises(UserError, match=r"lora\.method") as raised:
        add_adapter(loaded(tiny_model, "float32"), {"method": name}, seed=1)
    assert REFUSED_ADAPTERS.get(name, "Did you mean lora") in str(raised.value)


def test_every_method_is_tried():
    assert set(ADAPTERS) <= set(SETTINGS)
    everything = {kind.value.lower() for kind in peft.PeftType}
    assert everything <= set(ADAPTERS) | set(REFUSED_ADAPTERS)
