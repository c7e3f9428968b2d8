"""Adapters of a text class fit the class that the checkpoint names, with equal logits."""

import json

import pytest
import torch

from helpers.model_families import make_family_model, save_family
from luthier.model.adapter_keys import find_renames, find_unknown_layers, layer_name, open_adapter
from luthier.model.artifact import find_artifact
from luthier.model.device import Machine
from luthier.model.load import load_trained
from luthier.model.tokenizer import load_tokenizer
from luthier.storage.sizes import read_safetensors_header

IDS = torch.tensor([[5, 80, 81, 100, 12, 7]])
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "all linear layers": ("qwen3_5", {"target_modules": "all-linear"}),
    "ranks by whole names": (
        "qwen3_5",
        {"target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"v_proj": 2},
         "rank_pattern": {"model.layers.1.self_attn.q_proj": 2,
                          "^model.layers.0.mlp.down_proj": 3}},
    ),
    "some layers, whole head and rows": (
        "qwen3_5",
        {"target_modules": ["up_proj"], "layers_to_transform": [1], "modules_to_save": ["lm_head"],
         "trainable_token_indices": {"embed_tokens": [5, 7]}},
    ),
    "DoRA": ("qwen3_5", {"target_modules": ["up_proj"], "use_dora": True}),
    "experts": ("qwen3_5_moe", {"target_modules": ["k_proj"], "target_parameters": EXPERTS}),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrappers")
    return {family: save_family(folder / family, family) for family in ("qwen3_5", "qwen3_5_moe")}


def save_for_text_class(base, target, **settings):
    """An adapter as an older luthier saved it: AutoModelForCausalLM took the text part alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    text = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    assert type(text).__name__.endswith("ForCausalLM")
    tuned = get_peft_model(text, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for weight in tuned.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape)
    tuned.save_pretrained(target, save_embedding_layers=False)
    with torch.inference_mode():
        return tuned.eval()(IDS).logits


@pytest.mark.parametrize(("family", "settings"), CASES.values(), ids=CASES)
def test_an_adapter_of_the_text_class_is_loaded_with_equal_logits(
    bases, tmp_path, family, settings
):
    expected = save_for_text_class(bases[family], tmp_path / "old", **settings)
    artifact = find_artifact(str(tmp_path / "old"))
    tuned = load_trained(artifact, Machine("cpu", "float32", "sdpa"), load_tokenizer(artifact.base))
    assert type(tuned.get_base_model()).__name__.endswith("ForConditionalGeneration")
    with torch.inference_mode():
        torch.testing.assert_close(tuned(IDS).logits, expected, rtol=0, atol=1e-5)
    # Servers pass over these names, and the class knows the new ones.
    keys = list(read_safetensors_header(tmp_path / "old/adapter_model.safetensors").tensors)
    model = make_family_model(family)
    unknown = find_unknown_layers(keys, model)
    assert [key for key in unknown if "lm_head" not in key] == unknown and unknown
    renames = find_renames(keys, model)
    assert set(renames) == set(unknown)
    assert find_unknown_layers(renames.values(), model) == []


def test_a_merge_takes_an_adapter_of_the_text_class_and_keeps_the_tower(bases, tmp_path, luthier):
    from transformers import AutoModelForImageTextToText

    expected = save_for_text_class(bases["qwen3_5"], tmp_path / "old", target_modules="all-linear")
    code, out, err = luthier("merge", tmp_path / "old", "--out", tmp_path / "merged")
    assert code == 0, out + err
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["architectures"] == ["Qwen3_5ForConditionalGeneration"]
    assert (tmp_path / "merged/preprocessor_config.json").is_file()
    model, found = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "merged", dtype="float32", output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(IDS).logits, expected, rtol=0, atol=1e-4)


def test_names_that_fit_are_left_alone(tmp_path):
    model = make_family_model("llama")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert find_renames([key], model) == {}
    with open_adapter(tmp_path, model) as folder:
        assert folder == tmp_path


NAMES = {
    "model.layers.0.mlp.up_proj.lora_A.weight": "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.experts.base_layer.lora_B.weight": "model.layers.0.mlp.experts.base_layer",
    "model.layers.0.mlp.up_proj.lora_magnitude_vector": "model.layers.0.mlp.up_proj",
    "model.embed_tokens.lora_embedding_A": "model.embed_tokens",
    "model.embed_tokens.token_adapter.trainable_tokens_delta": "model.embed_tokens",
    "model.layers.0.mlp.up_proj.ia3_l": "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.up_proj.hada_w1_a": "model.layers.0.mlp.up_proj",
    "lm_head.weight": "lm_head",
}


@pytest.mark.parametrize(("key", "layer"), NAMES.items(), ids=NAMES)
def test_the_layer_of_a_saved_tensor(key, layer):
    assert layer_name(f"base_model.model.{key}") == layer
