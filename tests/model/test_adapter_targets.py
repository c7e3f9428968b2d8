"""Settings of an adapter that name layers: each matches what it says, or the mistake is told."""

import pytest
import torch
import transformers

from helpers.adapter_models import INT8, LORA, NF4, gradients, load, logits, remade, stir, trained
from helpers.model_families import FAMILIES, family_config
from luthier.errors import UserError
from luthier.model.adapter_targets import bypassed_layer_suffixes, find_target_layers
from luthier.model.adapters import add_adapter


def layers(model):
    """The layers with an adapter, by their names from the number on."""
    names = {name.partition(".lora_A")[0] for name in trained(model) if ".lora_A." in name}
    return {name.partition(".layers.")[2] for name in names}


def ranks(model):
    return {
        name.partition(".layers.")[2].partition(".lora_A")[0]: weight.shape[0]
        for name, weight in trained(model).items()
        if ".lora_A." in name
    }


CHOSEN = {
    "numbers": ({"layers_to_transform": [1]}, 7),
    "a number": ({"layers_to_transform": 1, "target_modules": ["q_proj"]}, 1),
    "excluded": ({"exclude_modules": ["down_proj", "0.self_attn.q_proj"]}, 2 * 6 - 1),
    "an excluding pattern": ({"exclude_modules": r".*\.mlp\..*"}, 2 * 4),
}


@pytest.mark.parametrize(("lora", "count"), CHOSEN.values(), ids=CHOSEN)
def test_layers_are_chosen(tiny_model, lora, count):
    model = add_adapter(load(tiny_model), LORA | lora, seed=1)
    assert len(layers(model)) == count
    assert not any("lm_head" in name for name in trained(model))


def test_ranks_and_scales_follow_patterns(tiny_model):
    patterns = {"rank_pattern": {"q_proj": 2, r"1\.mlp\..*": 8}, "alpha_pattern": {"q_proj": 16}}
    model = add_adapter(load(tiny_model), LORA | patterns, seed=1)
    found = ranks(model)
    assert found["0.self_attn.q_proj"] == found["1.self_attn.q_proj"] == 2
    assert found["1.mlp.up_proj"] == 8
    assert found["0.mlp.up_proj"] == 4
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 16 / 2


WRONG = {
    "excluded": ({"exclude_modules": ["dwon_proj"]}, ["lora.exclude_modules", "down_proj?"]),
    "whole": ({"modules_to_save": ["lm_haed"]}, ["lora.modules_to_save", "lm_head?"]),
    "a number": ({"layers_to_transform": [1, 2]}, ["no layer 2", "from 0 to 1"]),
    "a rank": ({"rank_pattern": {"q_porj": 2}}, ["lora.rank_pattern", "q_proj?"]),
    "a broken rank": ({"rank_pattern": {"(": 2}}, ["lora.rank_pattern", "regular expression"]),
    "a scale": ({"alpha_pattern": {"lm_head": 2}}, ["lora.alpha_pattern", "lm_head"]),
    "the output layer": (
        {"target_modules": ["q_proj", "lm_head"]},
        ["lm_head is the output layer", "lora.modules_to_save=[lm_head]"],
    ),
}


@pytest.mark.parametrize(("lora", "said"), WRONG.values(), ids=WRONG)
def test_names_that_match_nothing_are_told(tiny_model, lora, said):
    with pytest.raises(UserError) as raised:
        add_adapter(load(tiny_model), LORA | lora, seed=1)
    for words in said:
        assert words in str(raised.value)


BASES = {
    "float32": ({}, "float32"),
    "bfloat16": ({}, "bfloat16"),
    "nf4": (NF4, "bfloat16"),
    "int8": (INT8, "float32"),
}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("base", BASES)
def test_biases_train_in_float32(tiny_model, tmp_path, base, bias):
    quantization, dtype = BASES[base]
    folder = remade(tiny_model, tmp_path / "model", attention_bias=True)
    model = add_adapter(load(folder, quantization, dtype), LORA | {"bias": bias}, seed=1)
    plain = logits(load(folder, quantization, dtype))
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=0.02)
    biases = {name: p for name, p in trained(model).items() if name.endswith("bias")}
    assert len(biases) == 2 * 4
    found = gradients(model)
    stir(model)
    logits(model)
    assert {p.dtype for p in biases.values()} == {torch.float32}
    assert all(found[name].abs().sum() > 0 for name in biases)
    model.save_pretrained(tmp_path / "adapter")
    from peft import PeftModel

    again = PeftModel.from_pretrained(load(folder, quantization, dtype), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0.03)


def test_biases_that_cannot_train_in_float32_are_told(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=300)).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match=r"the bias of .*ln_1"):
        add_adapter(load(tmp_path, dtype="bfloat16"), LORA | {"bias": "all"}, seed=1)
    assert gradients(add_adapter(load(tmp_path), LORA | {"bias": "all"}, seed=1))


NARROW = {"vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 1, "pad_token_id": 0}
MAMBA = {
    "mamba": ("MambaConfig", NARROW | {"state_size": 8}),
    "mamba2": (
        "Mamba2Config",
        NARROW | {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    ),
}
BYPASSED = {
    "mamba2": ["mixer.out_proj"],
    "falcon_h1": ["mamba.out_proj"],
    "nemotron_h": ["mixer.out_proj"],
    "granite_moe_hybrid": ["mamba.out_proj"],
    "jamba": ["mamba.dt_proj"],
    "qwen3_next": [],
    "lfm2": [],
    "t5": [],
}


@pytest.mark.parametrize(("name", "endings"), BYPASSED.items(), ids=BYPASSED)
def test_layers_are_known_whose_weight_a_kernel_reads(name, endings):
    with torch.device("meta"):
        model = getattr(transformers, FAMILIES[name].architecture)(family_config(name))
    assert bypassed_layer_suffixes(model) == endings
    chosen = find_target_layers(model, "all-linear")
    assert not any(layer.endswith(ending) for layer in chosen for ending in endings)


def mamba(name):
    kind, sizes = MAMBA[name]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes))


EXCLUDED = {
    "nothing": {},
    "a list": {"exclude_modules": ["norm"]},
    "a pattern": {"exclude_modules": r".*\.norm"},
}


@pytest.mark.parametrize("lora", EXCLUDED.values(), ids=EXCLUDED)
@pytest.mark.parametrize("name", MAMBA)
def test_adapters_of_mamba_all_train(name, lora):
    model = add_adapter(mamba(name), LORA | lora, seed=1)
    assert layers(model) == {"0.mixer.in_proj"}
    stir(model)
    found = gradients(model)
    assert all(gradient is not None and gradient.any() for gradient in found.values())


@pytest.mark.parametrize("name", MAMBA)
def test_a_layer_that_a_kernel_passes_by_is_refused(name):
    with pytest.raises(UserError) as raised:
        add_adapter(mamba(name), LORA | {"target_modules": ["in_proj", "out_proj"]}, seed=1)
    assert "lora.target_modules" in str(raised.value) and "Leave out out_proj" in str(raised.value)


def test_peft_still_refuses_the_output_layers_of_mamba():
    """If it takes them one day, that is no reason to let the kernels pass the adapters by."""
    import peft

    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        peft.get_peft_model(mamba("mamba2"), peft.LoraConfig(target_modules="all-linear"))
