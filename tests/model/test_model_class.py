"""The class that loads a model, and its text part: what trains, and what gets an adapter."""

from contextlib import nullcontext

import pytest
import torch
import transformers

from helpers.adapter_models import IDS, config_of, logits, prepared, stir, trained
from helpers.model_families import FAMILIES, SIZES, family_config, make_family_model, save_family
from luthier.errors import UserError
from luthier.model.adapter_targets import find_target_layers, scope_saved_modules
from luthier.model.model_class import (
    build_empty_model,
    check_trains_on_text,
    expose_backbone,
    find_text_modules,
    find_vision_modules,
)
from luthier.model.trainable import freeze_parameters

DECODER = "model.language_model"
PIXELS = ("model.vision_tower", "model.multi_modal_projector")
WRAPPERS = {
    "llama4": ("language_model", ("vision_model", "multi_modal_projector")),
    "qwen3_5": (DECODER, ("model.visual",)),
    "qwen3_vl": (DECODER, ("model.visual",)),
    "qwen2_5_vl": (DECODER, ("model.visual",)),
    "mistral3": (DECODER, PIXELS),
    "gemma3": (DECODER, PIXELS),
    "gemma4": (DECODER, ("model.vision_tower", "model.embed_vision")),
    "muse_glimmer": (
        DECODER,
        (
            "model.vision_tower",
            "model.vision_adapter",
            "model.vision_projection",
            "model.perception_emb_norm",
        ),
    ),
}


def empty_model(name):
    config = family_config(name)
    config.architectures = [FAMILIES[name].architecture]
    return build_empty_model(config, "CAUSAL_LM")


@pytest.mark.parametrize("name", WRAPPERS)
def test_text_reaches_the_decoder_of_a_wrapper_and_nothing_beside_it(name):
    prefix, others = WRAPPERS[name]
    model = empty_model(name)
    text = find_text_modules(model)
    assert (text.prefix, text.others) == (prefix, others)
    freeze_parameters(model, [], [])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(others)}
    assert frozen
    targets = find_target_layers(model, "all-linear")
    assert targets
    assert all(target.startswith(f"{prefix}.") for target in targets)


@pytest.mark.parametrize("name", WRAPPERS)
def test_images_reach_the_tower_and_the_projector_as_well(name):
    prefix, others = WRAPPERS[name]
    model = empty_model(name)
    rows = find_text_modules(model, with_vision=True)
    assert (rows.prefix, rows.others, rows.vision) == (prefix, (), others)
    assert find_vision_modules(model) == others
    targets = find_target_layers(model, "all-linear", with_vision=True)
    text = find_target_layers(model, "all-linear")
    assert set(targets) > set(text)
    assert all(target.startswith(others) for target in set(targets) - set(text))


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "gpt2"])
def test_all_of_a_model_of_text_trains(name):
    task = {"t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}.get(name, "CAUSAL_LM")
    model = build_empty_model(family_config(name), task)
    assert find_text_modules(model).others == ()
    freeze_parameters(model, [], [])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_head_of_a_wrapper_that_classifies_trains():
    with torch.device("meta"):
        model = transformers.Gemma3ForSequenceClassification(family_config("gemma3"))
    freeze_parameters(model, [], [])
    trained_names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in trained_names
    assert not any("vision" in name for name in trained_names)


@pytest.mark.parametrize("name", ["llama4", "llama4_text"])
def test_the_backbone_of_llama_4_gives_what_the_output_layer_takes(name):
    model = make_family_model(name)
    # When this fails, transformers is mended and `expose_backbone` needless.
    assert transformers.PreTrainedModel.base_model.fget(model) is model
    expose_backbone(model)
    hidden = model.base_model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(model.get_output_embeddings()(hidden), logits(model))


TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "patch_size": 14, "image_size": 28}
OTHER_BACKBONES = {
    "mllama": lambda: transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(
            text_config=SIZES | {"cross_attention_layers": [1], "num_hidden_layers": 3},
            vision_config=TOWER
            | {"attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 64}
            | {"intermediate_layers_indices": [0], "max_num_tiles": 2, "intermediate_size": 48}
            | {"supported_aspect_ratios": [[1, 1], [1, 2]]},
        )
    ),
    "kosmos-2.5": lambda: transformers.Kosmos2_5ForConditionalGeneration(
        transformers.Kosmos2_5Config(
            text_config={"vocab_size": 272, "embed_dim": 64, "layers": 2, "ffn_dim": 96}
            | {"attention_heads": 4, "dropout": 0.0},
            vision_config={"hidden_size": 32, "patch_embed_hidden_size": 48, "head_dim": 16}
            | {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48},
            latent_query_num=4,
        )
    ),
    "nemotron 3 omni": lambda: transformers.NemotronH_Omni_Reasoning_V3(
        transformers.NemotronH_Omni_Reasoning_V3_Config(
            text_config=family_config("nemotron_h").to_dict(),
            vision_config=TOWER
            | {"num_attention_heads": 2, "max_img_size": 56, "video_temporal_patch_size": 2},
            projector_hidden_size=32,
            vision_hidden_size=32,
        )
    ),
}


@pytest.mark.parametrize("make", OTHER_BACKBONES.values(), ids=OTHER_BACKBONES)
def test_wrappers_without_a_backbone_train_by_the_fused_head(make):
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    model = make().eval()
    expose_backbone(model)
    labels = IDS.clone()
    expected = model(input_ids=IDS, labels=labels).loss
    add_fused_lm_head(model)
    loss = model(input_ids=IDS, labels=labels, fused_lm_head=True).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert layer.weight.grad.abs().sum() > 0


IMAGES_TOO = "cannot be trained on text alone"
NO_CLASS = "no class that loads it as a language model"
REFUSED = {
    "Blip2Config": IMAGES_TOO,
    "Kosmos2Config": IMAGES_TOO,
    "Molmo2Config": IMAGES_TOO,
    "Florence2Config": NO_CLASS,
    "Pix2StructConfig": NO_CLASS,
    "UdopConfig": NO_CLASS,
    "T5Config": "trainer=seq2seq is for",
    "Qwen3OmniMoeConfig": "ForConditionalGeneration only generates, and has no forward",
    "Qwen2_5OmniConfig": r"Save it with transformers' Qwen2_5OmniThinkerForConditionalGeneration",
    "T5Gemma2Config": "It is an encoder-decoder: its encoder reads images as well as text",
    "KyutaiSpeechToTextConfig": "cannot be trained on text alone: .* has no table of embeddings",
    "PI0Config": "PI0ForConditionalGeneration has no output layer",
}


@pytest.mark.parametrize("config", REFUSED)
def test_what_does_not_train_on_text_alone_is_refused(config):
    with pytest.raises(UserError, match=REFUSED[config]):
        check_trains_on_text(getattr(transformers, config)())


def test_the_thinker_of_qwen_omni_trains_its_text_part():
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Qwen3OmniMoeThinkerConfig(
        audio_config={"encoder_layers": 1, "d_model": 32, "encoder_attention_heads": 2,
                      "encoder_ffn_dim": 32, "output_dim": 64, "downsample_hidden_size": 16},
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64,
                       "intermediate_size": 48, "deepstack_visual_indexes": [0]},
        text_config=sizes | {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4,
                             "moe_intermediate_size": 32, "vocab_size": 272},
    )  # fmt: skip
    check_trains_on_text(config)
    model = build_empty_model(config, "CAUSAL_LM")
    assert find_text_modules(model).others == ("model.audio_tower", "model.visual")
    rows = find_text_modules(model, with_vision=True)
    assert (rows.others, rows.vision) == (("model.audio_tower",), ("model.visual",))
    prefix = "model.language_model.layers.0.self_attn"
    expected = [f"{prefix}.{name}_proj" for name in "qkvo"]
    # A list of names means the text part, too: the towers have a q_proj of their own.
    for targets in ("all-linear", ["q_proj", "k_proj", "v_proj", "o_proj"]):
        assert find_target_layers(model, targets) == expected


SEQUENCES = {"T5Gemma2Config": "cannot be trained: its encoder reads images", "T5Config": None}


@pytest.mark.parametrize(("config", "reason"), SEQUENCES.items(), ids=SEQUENCES)
def test_an_encoder_decoder_that_reads_images_is_refused(config, reason):
    refused = pytest.raises(UserError, match=reason) if reason else nullcontext()
    with refused:
        check_trains_on_text(getattr(transformers, config)(), task="SEQ_2_SEQ_LM")


def test_a_model_that_cannot_be_built_empty_is_not_judged():
    config = family_config("gemma3")
    config.text_config.hidden_activation = "none such"
    with pytest.raises(KeyError):
        build_empty_model(config, "CAUSAL_LM")
    check_trains_on_text(config)


@pytest.mark.parametrize("name", WRAPPERS)
def test_families_that_train_on_text_are_not_refused(name):
    config = family_config(name)
    config.architectures = [FAMILIES[name].architecture]
    check_trains_on_text(config)


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_vl", "gemma4"])
def wrapper(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return save_family(folder, request.param)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.0.mlp.down_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ".*layers.0.mlp.*"},
    ],
    ids=["all-linear", "list", "excluded", "excluded pattern"],
)
def test_an_adapter_goes_on_the_text_part_and_plain_peft_loads_it(wrapper, lora, tmp_path):
    from peft import PeftModel

    config = config_of(wrapper, lora={"method": "lora", "r": 4, "lora_alpha": 8} | lora)
    model, _ = prepared(config)
    names = [name for name in trained(model) if "lora_" in name]
    assert names
    assert all(".language_model." in name for name in names)
    if "exclude_modules" in lora:
        assert not any("layers.0.mlp.down_proj" in name for name in names)
        assert any("layers.1.mlp.down_proj" in name for name in names)
    stir(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    plain_class = transformers.AutoModelForImageTextToText
    base = plain_class.from_pretrained(wrapper, dtype=torch.float32)
    unadapted = logits(base)
    plain = PeftModel.from_pretrained(base, tmp_path)
    assert {n for n, _ in plain.named_parameters() if "lora_" in n} == set(names)
    torch.testing.assert_close(logits(plain, IDS), expected)
    assert not torch.allclose(unadapted, expected)


QKV = ".visual.blocks.0.attn.qkv."
VISION = {
    "all-linear": ({"target_modules": "all-linear"}, (QKV, ".visual.merger.")),
    "a list": ({"target_modules": ["q_proj", "qkv"]}, (QKV,)),
    "a layer that trains whole": (
        {"target_modules": ["q_proj", "qkv"], "modules_to_save": ["merger"]}, (".visual.merger.",),
    ),
    "numbered layers": (
        {"target_modules": "all-linear", "layers_to_transform": [0]}, (QKV,),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("lora", "opened"), VISION.values(), ids=VISION)
def test_an_adapter_goes_on_the_tower_too_and_plain_peft_loads_it(lora, opened, tmp_path):
    from peft import PeftModel

    base = save_family(tmp_path / "base", "qwen3_vl")
    model, _ = prepared(config_of(base, lora={"r": 4, "vision": True} | lora))
    names = {name for name in trained(model) if "lora_" in name or "modules_to_save" in name}
    for part in (".language_model.layers.0.self_attn.q_proj.", *opened):
        assert any(part in name for name in names), part
    stir(model)
    expected = dict(trained(model))
    model.save_pretrained(tmp_path / "adapter")
    plain_class = transformers.AutoModelForImageTextToText
    plain = PeftModel.from_pretrained(plain_class.from_pretrained(base), tmp_path / "adapter")
    weights = dict(plain.named_parameters())
    assert {n for n in weights if "lora_" in n or "modules_to_save" in n} == names
    assert all(torch.equal(weights[name], expected[name]) for name in names)


NO_VISION = {
    "a model of text": ("qwen3", {"target_modules": "all-linear"}, "has no tower for images"),
    "layers of the text part alone": (
        "qwen3_vl", {"target_modules": ["q_proj"]},
        r"names no layer of model\.visual, .*: linear_fc1, linear_fc2, proj, qkv;",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("family", "lora", "reason"), NO_VISION.values(), ids=NO_VISION)
def test_a_tower_that_would_not_train_is_told(family, lora, reason, tmp_path):
    base = save_family(tmp_path, family)
    with pytest.raises(UserError, match=rf"lora\.vision=true: .*{reason}"):
        prepared(config_of(base, lora={"r": 4, "vision": True} | lora))


@pytest.mark.parametrize("vision", [False, True], ids=["frozen", "open"])
def test_the_backward_pass_goes_through_a_tower_that_trains_alone(vision, tmp_path):
    base = save_family(tmp_path, "gemma3")
    lora = {"r": 4, "target_modules": "all-linear", "vision": vision}
    model, _ = prepared(config_of(base, lora=lora))
    # TRL's trainers call it again.
    model.enable_input_require_grads()
    inner = model.get_base_model().model
    features = inner.get_image_features(torch.randn(1, 3, 28, 28)).pooler_output
    assert features.requires_grad is vision
    assert model.get_base_model().get_input_embeddings()(IDS).requires_grad


SAVED = {
    "the tower's name, too": (["norm"], {"model.language_model.norm"}),
    "the output layer": (["lm_head"], {"lm_head"}),
    "a name of the text part": (
        ["language_model.norm", "lm_head"],
        {"language_model.norm", "lm_head"},
    ),
}


@pytest.mark.parametrize(("names", "scoped"), SAVED.values(), ids=SAVED)
def test_whole_layers_are_those_of_the_text_part(names, scoped):
    saved = scope_saved_modules(empty_model("mistral3"), names)
    assert {name for name in saved if ".layers." not in name} == scoped
    assert not any("vision" in name for name in saved)


def test_whole_layers_of_a_tower_are_refused():
    with pytest.raises(UserError, match=r"lora\.modules_to_save: model\.visual\.merger is not in"):
        scope_saved_modules(empty_model("qwen3_vl"), ["merger"])


def test_a_layer_trains_whole_in_the_text_part_alone(wrapper):
    lora = {"method": "lora", "r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    model, _ = prepared(config_of(wrapper, lora=lora))
    whole = [name for name in trained(model) if "modules_to_save" in name]
    assert whole
    assert all(".language_model." in name for name in whole)


def test_a_pattern_means_what_it_says_and_a_list_of_tower_layers_is_refused():
    model = empty_model("qwen3_vl")
    tower = find_target_layers(model, r"model\.visual\.blocks\.0\.attn\.qkv")
    assert tower == ["model.visual.blocks.0.attn.qkv"]
    with pytest.raises(UserError, match=r"model\.visual\.blocks\.0\.attn\.qkv is not in the part"):
        find_target_layers(model, ["qkv"])
