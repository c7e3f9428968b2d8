"""The experts of a model and their routers, found by shape in every type that transformers has."""

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from luthier.model.experts import find_experts, find_routers, has_experts

_SIZES = {
    "num_hidden_layers": 4,
    "num_layers": 4,
    "first_k_dense_replace": 1,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    # Without these the default config of the type has no experts, or cannot be built.
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 16,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
    "hunyuan_v1_moe": {"head_dim": 64, "num_experts": 4},
    "dots1": {"n_routed_experts": 16, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 2, "num_hidden_layers": 4},
}
_UNBUILDABLE = {
    "dbrx": "its default config lacks rope_theta, and its experts have two axes",
    "qwen4_exp_text": "its default config has no indexer",
}


def _empty_model(model_type: str, **settings: Any) -> Any:
    """Return the causal model of a type with four layers on the meta device."""
    import torch
    import transformers
    from transformers.models.auto import modeling_auto

    config = transformers.CONFIG_MAPPING[model_type](**_SETTINGS.get(model_type, {}) | settings)
    for name, size in _SIZES.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, size)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if isinstance(types := getattr(config, name, None), list):
            with suppress(AttributeError):  # some are properties
                setattr(config, name, types[:4])
    name = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    with torch.device("meta"):
        return getattr(transformers, name)._from_config(config)


def _types_with_experts() -> Iterator[str]:
    """Return the text types whose config classes name experts."""
    from transformers.models.auto import configuration_auto, modeling_auto

    for model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if model_type in _UNBUILDABLE:
            continue
        config_class = configuration_auto.CONFIG_MAPPING[model_type]
        if "text_config" in getattr(config_class, "sub_configs", {}):
            continue
        settings = _SETTINGS.get(model_type, {})
        if has_experts(config_class(**settings).to_dict()):
            yield model_type


def test_every_type_has_its_experts_and_routers() -> None:
    import torch
    from torch.nn.modules.conv import _ConvNd

    missing, types = [], list(_types_with_experts())
    for model_type in types:
        model = _empty_model(model_type)
        experts = find_experts(model)
        names = {name for layer in experts for name in layer.parameter_names}
        routers = find_routers(model)
        blocks = {layer.name.rpartition(".")[0] for layer in experts}
        for module_name, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                whole = f"{module_name}.{name}"
                if parameter.ndim == 3 and not isinstance(module, _ConvNd) and whole not in names:
                    missing.append((model_type, whole))
            # No layer of attention or of a dense or shared feed-forward part is a router.
            is_router = any(f"{module_name}.".startswith(f"{router}.") for router in routers)
            if isinstance(module, torch.nn.Linear) and is_router:
                assert re.search(r"\.(gate|router|shared_expert_gate)(\.|$)", module_name)
        for block in blocks:
            if not any(router.startswith(f"{block}.") for router in routers):
                missing.append((model_type, f"{block}: no router"))
    assert missing == []
    assert len(types) >= 50


ROWS = [
    ("qwen3_moe", "model.layers.0.mlp.experts", False, (), ["mlp.gate"]),
    ("mixtral", "model.layers.0.mlp.experts", False, (), ["mlp.gate"]),
    (
        "gpt_oss",
        "model.layers.0.mlp.experts",
        True,
        ("gate_up_proj_bias", "down_proj_bias"),
        ["mlp.router"],
    ),
    ("deepseek_v3", "model.layers.1.mlp.experts", False, (), ["mlp.gate"]),
    ("qwen3_next", "model.layers.0.mlp.experts", False, (), ["mlp.gate", "mlp.shared_expert_gate"]),
    ("llama4_text", "model.layers.0.feed_forward.experts", True, (), ["feed_forward.router"]),
    ("gemma4_text", "model.layers.0.experts", False, (), ["router"]),
    ("nemotron_h", "model.layers.1.mixer.experts", False, (), ["mixer.gate"]),
    ("jamba", "model.layers.1.feed_forward.experts", False, (), ["feed_forward.router"]),
    ("phimoe", "model.layers.0.mlp.experts", False, (), ["mlp.router"]),
    (
        "jetmoe",
        "model.layers.0.self_attention.experts.input_linear",
        False,
        (),
        ["mlp.router", "self_attention.experts.router"],
    ),
]


@pytest.mark.parametrize(("model_type", "name", "is_transposed", "biases", "routers"), ROWS)
def test_layout_of_experts(
    model_type: str, name: str, is_transposed: bool, biases: tuple[str, ...], routers: list[str]
) -> None:
    model = _empty_model(model_type)
    by_name = {experts.name: experts for experts in find_experts(model)}
    experts = by_name[name]
    assert experts.is_transposed == is_transposed
    assert experts.biases == biases
    module = model.get_submodule(name)
    assert experts.num_weights == sum(p.numel() for p in module.parameters() if p.ndim == 3)
    relative = {re.sub(r".*layers\.\d+\.", "", router) for router in find_routers(model)}
    assert sorted(relative) == sorted(routers)


def test_dense_models_have_none() -> None:
    # Gemma 4's config has the keys of experts, and no experts; Bamba has convolutions.
    for model_type in ("llama", "bamba", "qwen3_5_text"):
        model = _empty_model(model_type)
        assert find_experts(model) == []
        assert find_routers(model) == []


def test_experts_under_an_adapter_are_found() -> None:
    """Peft wraps the module once for each of its parameters, and renames it so."""
    import peft

    model = _empty_model("qwen3_moe")
    before = find_experts(model)
    config = peft.LoraConfig(
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    import torch

    with torch.device("meta"):
        peft.get_peft_model(model, config)
    after = find_experts(model)
    assert [experts.shapes for experts in after] == [experts.shapes for experts in before]
    assert after[0].name == f"{before[0].name}.base_layer.base_layer"
