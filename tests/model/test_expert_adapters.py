"""LoRA on the experts of a mixture: all of it trains as arithmetic says; plain peft loads it."""

import copy
import json
import re
import warnings

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils import transformers_weight_conversion as conversion

from helpers.adapter_models import config_of, gradients, stir, trained
from helpers.model_families import FAMILIES, save_family
from luthier.config.library_settings import LoraSettings
from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.memory.meta_model import build_meta_model
from luthier.model.adapter_targets import check_names_in_files, find_target_layers
from luthier.model.adapter_training import lora_plus_groups
from luthier.model.adapters import add_adapter
from luthier.model.device import Machine
from luthier.model.expert_adapters import (
    _CONVERTED_LAYERS,
    _CONVERTED_TYPES,
    describe_experts,
    load_adapter,
    names_taken_by_peft,
    shortest_names,
)
from luthier.model.experts import find_experts, find_routers, unpacked_expert_bytes
from luthier.model.load import load_model
from luthier.model.model_class import find_text_modules

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": "all-linear"}
IDS = torch.tensor([[5, 80, 81, 100, 12, 7, 9, 33]])
MIXTURES = [
    *("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe", "qwen3_next", "qwen3_5_moe"),
    *("gemma4_moe", "jamba", "lfm2_moe", "granite_moe_hybrid", "llama4_text", "nemotron_h"),
]
TAKEN = ("deepseek_v3", "glm4_moe", "qwen3_next")
"""Families whose dense layers and shared experts peft takes for experts."""
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the checkpoint of a family lies; each is made once."""
    root, folders = tmp_path_factory.mktemp("families"), {}

    def make(family):
        if family not in folders:
            folders[family] = save_family(root / family, family)
        return folders[family]

    return make


def load(path, quantization=None, dtype="float32"):
    machine = Machine("cpu", dtype, "eager")
    return load_model(ModelConfig(path=str(path)), quantization or {}, machine)


def plain(path, family):
    """The model as transformers alone loads it."""
    model_class = getattr(transformers, FAMILIES[family].architecture)
    return model_class.from_pretrained(path, attn_implementation="eager")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def adapted_layers(model):
    """The names of linear layers and of parameters with an adapter, as they are in the base."""
    layers, parameters = set(), set()
    for name, layer in model.named_modules():
        plain_name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(layer, ParamWrapper):
            parameters.add(f"{plain_name}.{layer.parameter_name}")
        elif isinstance(layer, LoraLayer):
            layers.add(plain_name)
    return layers, parameters


@pytest.mark.parametrize("family", MIXTURES)
def test_everything_but_the_router_trains_and_plain_peft_loads_it(family, folder, tmp_path):
    model = load(folder(family))
    layers = set(find_target_layers(model, "all-linear"))
    experts = {name for group in find_experts(model) for name in group.parameter_names}
    routers = find_routers(model)
    wrapped = add_adapter(model, LORA, seed=1)
    assert adapted_layers(wrapped) == (layers, experts)
    assert not any(f".{router}." in name for router in routers for name in trained(wrapped))
    dropouts = [m.p for m in wrapped.modules() if isinstance(m, torch.nn.Dropout) and m.p == 0.05]
    assert len(dropouts) == len(layers)
    assert re.match(r"\d\d% of the layers' weights, rank 4 each$", describe_experts(wrapped, LORA_))
    stir(wrapped)
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys")
        again = peft.PeftModel.from_pretrained(plain(folder(family), family), tmp_path)
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
        linear = load_adapter(load(folder(family)), tmp_path)
    assert adapted_layers(linear) == (layers, experts)
    torch.testing.assert_close(logits(linear), expected, rtol=0, atol=1e-5)
    assert (logits(plain(folder(family), family)) - expected).abs().max() > 1e-3


LORA_ = LoraSettings(LORA)


@pytest.mark.parametrize("family", MIXTURES)
def test_gradients_are_those_of_the_whole_weights(family, folder):
    """With W + s B A in place of W, dL/dA is s B' dL/dW and dL/dB is s dL/dW A'."""
    wrapped = add_adapter(load(folder(family)), LORA | {"lora_dropout": 0.0}, seed=1)
    stir(wrapped)
    own = gradients(wrapped, IDS)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    text_part = find_text_modules(merged)
    merged.requires_grad_(True)
    merged.train()
    merged(input_ids=IDS, labels=IDS).loss.backward()
    weights = dict(merged.named_parameters())
    for name, layer in wrapped.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = name.removeprefix("base_model.model.").replace(".base_layer", "")
        is_parameter = isinstance(layer, ParamWrapper)
        whole = weights[f"{base}.{layer.parameter_name if is_parameter else 'weight'}"].grad
        if whole is None:
            assert base not in text_part
            continue
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scale = layer.scaling["default"]
        if is_parameter:
            count, rank = whole.shape[0], layer.r["default"]
            if getattr(layer.get_base_layer(), "is_transposed", False):
                whole = whole.transpose(1, 2)
            a3 = a.reshape(count, rank, -1)
            b3 = b.reshape(b.shape[0], rank, count).permute(2, 0, 1)
            grad_a = (scale * b3.transpose(1, 2) @ whole).reshape(a.shape)
            grad_b = (scale * whole @ a3.transpose(1, 2)).permute(1, 2, 0).reshape(b.shape)
        else:
            grad_a, grad_b = scale * b.T @ whole, scale * whole @ a.T
        for part, expected in (("A", grad_a), ("B", grad_b)):
            real = own[f"{name}.lora_{part}.default.weight"]
            torch.testing.assert_close(real, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_checkpointing_gives_the_same_gradients(family, folder):
    plainly = add_adapter(load(folder(family)), LORA | {"lora_dropout": 0.0}, seed=1)
    stir(plainly)
    expected = gradients(plainly, IDS)
    plainly.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients(plainly, IDS).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_float32_adapters_train_in_a_16_bit_base(folder):
    exact = add_adapter(load(folder("qwen3_moe")), LORA | {"lora_dropout": 0.0}, seed=1)
    half = add_adapter(
        load(folder("qwen3_moe"), dtype="bfloat16"), LORA | {"lora_dropout": 0.0}, seed=1
    )
    for model in (exact, half):
        stir(model)
    assert {p.dtype for p in trained(half).values()} == {torch.float32}
    expected, real = gradients(exact, IDS), gradients(half, IDS)
    errors = [
        ((real[name] - gradient).norm() / gradient.norm()).item()
        for name, gradient in expected.items()
        if ".experts." in name
    ]
    # Rounding to 16 bits, which moves a few tokens to other experts.
    assert sorted(errors)[len(errors) // 2] < 0.2


RANKS = {
    "a rank": ({"experts": 2}, 2, 2.0),
    "a rank under rsLoRA": ({"experts": 16, "use_rslora": True}, 16, 8 / 4),
    "patterns of the user's": (
        {"experts": 2, "rank_pattern": {"gate_up_proj": 8, "down_proj": 8}},
        8,
        4 / 8,
    ),
    "true": ({"experts": True, "target_modules": ["q_proj"]}, 4, 2.0),
}


@pytest.mark.parametrize(("settings", "rank", "scale"), RANKS.values(), ids=RANKS)
def test_ranks_and_scales(settings, rank, scale, folder, tmp_path):
    model = add_adapter(load(folder("qwen3_moe")), LORA | settings, seed=1)
    wrappers = [layer for layer in model.modules() if isinstance(layer, ParamWrapper)]
    assert {layer.r["default"] for layer in wrappers} == {rank}
    assert {layer.scaling["default"] for layer in wrappers} == {scale}
    assert describe_experts(model, LoraSettings(LORA | settings)).endswith(f", rank {rank} each")
    stir(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain(folder("qwen3_moe"), "qwen3_moe"), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


CHOICES = {
    "none": ({"experts": False}, set(), "stay as they are: lora.experts=false"),
    "a list": ({"target_modules": ["q_proj"]}, set(), "target_modules names others"),
    "of one layer": ({"layers_to_transform": [1]}, {"1.gate_up_proj", "1.down_proj"}, "1 of 2"),
    "excluded": ({"exclude_modules": ["experts"]}, set(), "the settings leave out all of them"),
    "excluded by a pattern": (
        {"exclude_modules": r".*layers\.0\..*experts"},
        {"1.gate_up_proj", "1.down_proj"},
        "in 1 of 2 layers",
    ),
    "named": (
        {"target_parameters": ["experts.down_proj"]},
        {"0.down_proj", "1.down_proj"},
        "rank 4 each",
    ),
    "whole": ({"modules_to_save": ["experts"]}, set(), "all of them train"),
    "another method": ({"method": "oft", "oft_block_size": 8}, set(), "oft reaches linear layers"),
}


@pytest.mark.parametrize(("settings", "names", "words"), CHOICES.values(), ids=CHOICES)
def test_experts_are_chosen(settings, names, words, folder, tmp_path):
    lora = settings if "method" in settings else LORA | settings
    model = add_adapter(load(folder("qwen3_moe")), lora, seed=1)
    _, parameters = adapted_layers(model)
    assert {re.sub(r".*layers\.(\d+)\.mlp\.experts", r"\1", n) for n in parameters} == names
    assert words in describe_experts(model, LoraSettings(lora))
    stir(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain(folder("qwen3_moe"), "qwen3_moe"), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_taken_layers_keep_ranks_of_their_own(folder, tmp_path):
    lora = LORA | {"rank_pattern": {"gate_proj": 2}, "alpha_pattern": {"up_proj": 3}}
    model = add_adapter(load(folder("deepseek_v3")), lora, seed=1)
    stir(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain(folder("deepseek_v3"), "deepseek_v3"), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    assert "mlp.experts.gate_up_proj" in str(again.targeted_parameter_names)


def test_a_pattern_of_layers_stays_in_its_layers(folder, tmp_path):
    """peft reads a pattern as the last names of what it matches, in any layer, on these types."""
    lora = LORA | {"target_modules": r".*layers\.0\..*(o_proj|gate_proj)"}
    model = add_adapter(load(folder("deepseek_v3")), lora, seed=1)
    layers, _ = adapted_layers(model)
    assert layers == {"model.layers.0.self_attn.o_proj", "model.layers.0.mlp.gate_proj"}
    stir(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain(folder("deepseek_v3"), "deepseek_v3"), tmp_path)
    assert adapted_layers(again)[0] == {"model.layers.0.self_attn.o_proj"}
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_4_bit_layers_that_peft_takes_are_trained_and_loaded(folder, tmp_path):
    model = add_adapter(load(folder("deepseek_v3"), NF4), LORA, seed=1)
    stir(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0
    again = load_adapter(load(folder("deepseek_v3"), NF4), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", TAKEN)
def test_peft_takes_layers_for_experts(family, folder):
    """When this fails, peft is mended: then `make_config_portable` can go."""
    assert {"gate_proj", "up_proj", "down_proj"} <= names_taken_by_peft(load(folder(family)))


def test_peft_still_refuses_dropout_on_parameters(folder):
    """When this fails, peft is mended: then the config of a saved adapter can tell its dropout."""
    config = peft.LoraConfig(target_parameters=["experts.down_proj"], lora_dropout=0.1)
    with pytest.raises(ValueError, match="lora_dropout"):
        peft.get_peft_model(load(folder("jamba")), config)


REFUSED = {
    "DoRA": ({"use_dora": True}, ["lora.use_dora", "lora.experts=false"]),
    "PiSSA": ({"init_lora_weights": "pissa"}, ["lora.init_lora_weights", "lora.experts=false"]),
    "OLoRA": ({"init_lora_weights": "olora"}, ["lora.init_lora_weights", "true or gaussian"]),
    "a bias": ({"lora_bias": True}, ["lora.lora_bias"]),
    "another method": ({"method": "oft", "experts": True}, ["lora.experts", "linear layers only"]),
    "AdaLoRA on parameters": (
        {"method": "adalora", "target_parameters": ["experts.down_proj"]},
        ["lora.target_parameters"],
    ),
    "a typo": ({"target_parameters": ["experts.gate_up_porj"]}, ["gate_up_proj?"]),
    "DoRA on named parameters": (
        {"use_dora": True, "target_parameters": ["experts.down_proj"]},
        ["lora.use_dora", "lora.target_parameters"],
    ),
}


@pytest.mark.parametrize(("settings", "words"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_on_experts_is_refused_before_loading(settings, words, folder):
    lora = settings if "method" in settings else LORA | settings
    config = config_of(folder("mixtral"), lora=lora)
    with pytest.raises(UserError) as error:
        check_names_in_files(config)
    assert all(word in str(error.value) for word in words), str(error.value)


REFUSED_LOADED = {
    "nothing": (
        {"target_parameters": ["expert.down_proj"]},
        ["nothing in", "down_proj?"],
    ),
    "a router": (
        {"target_modules": ["gate"]},
        ["is the router of experts", "lora.target_parameters=[mlp.gate.weight]"],
    ),
    "a norm": ({"target_parameters": ["norm.weight"]}, ["LoRA goes on matrices"]),
    "a layer twice": ({"target_parameters": ["q_proj.weight"]}, ["lora.target_modules"]),
    "experts as layers": ({"target_modules": ["w1"]}, ["lora.experts=true trains them"]),
}


@pytest.mark.parametrize(("settings", "words"), REFUSED_LOADED.values(), ids=REFUSED_LOADED)
def test_names_that_mean_no_experts_are_told(settings, words, folder):
    with pytest.raises(UserError) as error:
        add_adapter(load(folder("mixtral")), LORA | settings, seed=1)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_dora_without_experts_is_refused_where_plain_peft_would_lose_it(folder):
    lora = LORA | {"use_dora": True, "experts": False}
    with pytest.raises(UserError, match=r"lora\.use_dora: peft takes .*\n.*lora\.exclude_modules"):
        add_adapter(load(folder("deepseek_v3")), lora, seed=1)
    add_adapter(load(folder("mixtral")), lora, seed=1)


LOST = {
    "DoRA on all": ("use_dora", {}, True),
    "a bias on all": ("lora_bias", {}, True),
    "a list": ("use_dora", {"target_modules": ["q_b_proj", "mlp.up_proj"]}, True),
    "a pattern": ("use_dora", {"target_modules": r".*layers\.0.*\.(o_proj|down_proj)"}, True),
    "excluded": ("use_dora", {"exclude_modules": ["gate_proj", "up_proj", "down_proj"]}, False),
    "other layers": ("use_dora", {"target_modules": ["o_proj"]}, False),
    "a pattern of others": ("lora_bias", {"target_modules": r".*o_proj"}, False),
}


@pytest.mark.parametrize(("key", "settings", "is_refused"), LOST.values(), ids=LOST)
def test_what_plain_peft_would_lose_is_refused_before_loading(key, settings, is_refused, folder):
    lora = LORA | {"experts": False, key: True} | settings
    config = config_of(folder("deepseek_v3"), lora=lora)
    if is_refused:
        with pytest.raises(UserError, match=rf"lora\.{key}: peft takes .*\n.*exclude_modules"):
            check_names_in_files(config)
    else:
        check_names_in_files(config)


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_next"])
def test_dora_is_refused_on_layers_of_other_types_before_loading(family, folder):
    config = config_of(folder(family), lora=LORA | {"experts": False, "use_dora": True})
    with pytest.raises(UserError, match=r"lora\.use_dora: peft takes .* on .*mlp"):
        check_names_in_files(config)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_dora_goes_on_mixtures_of_which_peft_takes_no_layer(family, folder):
    check_names_in_files(
        config_of(folder(family), lora=LORA | {"experts": False, "use_dora": True})
    )


def test_the_types_of_which_peft_takes_layers():
    """The table is peft's own; types that are no `model_type` of a config are left out."""
    types = {
        name
        for name, base in conversion._MODEL_TO_CONVERSION_PATTERN.items()
        if base in conversion._MOE_FUSED_TARGETS and name in transformers.CONFIG_MAPPING
    }
    projections = {
        name
        for name, base in conversion._MODEL_TO_CONVERSION_PATTERN.items()
        if name in types
        and set(_CONVERTED_LAYERS) <= set(conversion._MOE_TARGET_MODULE_MAPPING[base])
    }
    assert projections == _CONVERTED_TYPES
    # Their files have w1, w2 and w3 for experts alone.
    assert types - projections == {"minimax", "minimax_m2", "mixtral"}


def test_a_run_says_that_experts_in_one_matrix_stay(tmp_path):
    config = transformers.DbrxConfig(
        d_model=64, n_heads=4, n_layers=2, vocab_size=272, max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    )  # fmt: skip
    model = transformers.DbrxForCausalLM(config)
    assert find_experts(model) == []
    assert unpacked_expert_bytes(model) == {"float32": 2 * 3 * 4 * 32 * 64 * 4}
    joined = copy.deepcopy(model)
    wrapped = add_adapter(model, LORA, seed=1)
    assert re.match(r"\d\d% of the layers' weights, stay as", describe_experts(wrapped, LORA_))
    whole = LORA | {"target_modules": ["Wqkv"], "modules_to_save": ["experts"]}
    assert ", train: " in describe_experts(add_adapter(joined, whole, seed=1), LoraSettings(whole))


def test_a_router_trains_where_it_is_named(folder):
    lora = LoraSettings(LORA | {"target_modules": ["shared_expert_gate"]})
    model = add_adapter(load(folder("qwen3_next")), lora, seed=1)
    assert describe_experts(model, lora).endswith("shared_expert_gate is a router and trains")


def test_a_plan_counts_the_adapter_to_the_byte(folder):
    for family in ("deepseek_v3", "gpt_oss"):
        config = config_of(folder(family), lora=LORA)
        planned = build_meta_model(config, Machine("cpu", "float32", "eager"))
        real = add_adapter(load(folder(family)), LORA, seed=1)
        sizes = [
            {name: (tuple(p.shape), p.dtype) for name, p in trained(model).items()}
            for model in (planned, real)
        ]
        assert sizes[0] == sizes[1]


def test_lora_plus_takes_the_b_of_experts(folder):
    model = add_adapter(load(folder("gpt_oss")), LORA, seed=1)
    groups = [{"params": list(trained(model).values()), "lr": 1.0}]
    fast = {id(p) for p in lora_plus_groups(groups, model, 16)[-1]["params"]}
    for name, parameter in trained(model).items():
        assert (id(parameter) in fast) == (".lora_B." in name)
    assert any(".experts." in name and id(p) in fast for name, p in trained(model).items())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_heads_of_other_tasks_go_with_experts(family, folder, tmp_path):
    machine = Machine("cpu", "float32", "eager")
    base = load_model(
        ModelConfig(path=str(folder(family))), {}, machine, task="SEQ_CLS", num_labels=2
    )
    model = add_adapter(base, LORA, seed=1, task_type="SEQ_CLS")
    layers, parameters = adapted_layers(model)
    assert parameters and not any("score" in name for name in layers)
    assert any("score" in name for name in trained(model))
    stir(model)
    model.save_pretrained(tmp_path)
    again_base = load_model(
        ModelConfig(path=str(folder(family))), {}, machine, task="SEQ_CLS", num_labels=2
    )
    again = peft.PeftModel.from_pretrained(again_base, tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_new_tokens_go_with_experts(folder, tmp_path):
    lora = LORA | {"trainable_token_indices": [80, 9]}
    model = add_adapter(load(folder("mixtral")), lora, seed=1)
    stir(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain(folder("mixtral"), "mixtral"), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_shortest_names():
    names = ["a.0.q", "a.1.q", "a.0.k", "b.k", "a", "b"]
    assert shortest_names(["a.0.q", "a.1.q"], names) == ["q"]
    assert shortest_names(["a.0.k"], names) == ["0.k"]
    assert shortest_names([], names) == []
