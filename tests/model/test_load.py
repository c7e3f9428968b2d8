import json
import shutil

import pytest
import torch
import transformers

from helpers.model_families import family_config, save_family
from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.model.load import load_model, resolve_attention
from luthier.model.model_class import choose_attention, resolve_model_class

CPU = Machine("cpu", "float32", "sdpa")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_in_the_machines_number_format(tiny_model, dtype):
    model = load_model(ModelConfig(path=str(tiny_model)), {}, Machine("cpu", dtype, "sdpa"))
    assert str(model.dtype) == f"torch.{dtype}"
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "sdpa"
    assert not model.training


def test_weights_that_all_train_are_float32(tiny_model):
    machine = Machine("cpu", "bfloat16", "sdpa")
    model = load_model(ModelConfig(path=str(tiny_model)), {}, machine, full=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_configured_arguments_have_the_last_word(tiny_model):
    config = ModelConfig(path=str(tiny_model), kwargs={"attn_implementation": "eager"})
    assert load_model(config, {}, CPU).config._attn_implementation == "eager"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_bits_multiply_in_the_machines_number_format(tiny_model, dtype):
    model = load_model(ModelConfig(path=str(tiny_model)), NF4, Machine("cpu", dtype, "sdpa"))
    layer = model.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == getattr(torch, dtype)
    assert layer.weight.dtype == torch.uint8
    assert layer.support_avx512bf16_for_cpu is False


def test_a_configured_compute_dtype_stays(tiny_model):
    asked = NF4 | {"bnb_4bit_compute_dtype": "bfloat16"}
    model = load_model(ModelConfig(path=str(tiny_model)), asked, CPU)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


def test_eight_bits_on_a_cpu(tiny_model):
    model = load_model(ModelConfig(path=str(tiny_model)), {"load_in_8bit": True}, CPU)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def spoil_architecture(folder):
    (folder / "config.json").write_text('{"model_type": "martian"}')


def spoil_weights(folder):
    (folder / "model.safetensors").unlink()


def spoil_code(folder):
    content = json.loads((folder / "config.json").read_text()) | {
        "model_type": "own",
        "auto_map": {
            "AutoConfig": "modeling.OwnConfig",
            "AutoModelForCausalLM": "modeling.OwnModel",
        },
    }
    (folder / "config.json").write_text(json.dumps(content))


SPOILT = {
    "unknown architecture": (spoil_architecture, {}, "martian"),
    "no weights": (spoil_weights, {}, "model.safetensors"),
    "own code": (spoil_code, {}, "model.trust_remote_code=true"),
    "attention": (lambda _: None, {"attention": "flash"}, "flash"),
}


@pytest.mark.parametrize(("spoil", "settings", "said"), SPOILT.values(), ids=SPOILT)
def test_what_cannot_be_loaded_is_told(tiny_model, tmp_path, spoil, settings, said):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    spoil(folder)
    machine = Machine("cpu", "float32", settings.get("attention", "sdpa"))
    with pytest.raises(UserError) as raised:
        load_model(ModelConfig(path=str(folder), **settings), {}, machine)
    assert str(raised.value).startswith(f"model.path={folder}: the model cannot be loaded")
    assert said in str(raised.value)


def test_quantization_that_the_library_refuses_is_told(tiny_model):
    with pytest.raises(UserError, match="load_in_4bit"):
        load_model(ModelConfig(path=str(tiny_model)), {"load_in_4bit": "yes"}, CPU)


TOWERS = {
    # architecture, attention of the machine -> what transformers is given
    ("Lfm2VlConfig", "flash_attention_2"): {
        "": "flash_attention_2", "text_config": "flash_attention_2", "vision_config": "sdpa",
    },
    ("Lfm2VlConfig", "sdpa"): "sdpa",
    ("VibeVoiceAsrConfig", "sdpa"): {
        "": "sdpa", "text_config": "sdpa", "acoustic_tokenizer_encoder_config": "eager",
        "semantic_tokenizer_encoder_config": "eager",
    },
    ("Inkling2Config", "sdpa"): "eager",
    ("Gemma2Config", "flash_attention_2"): "flash_attention_2",
}  # fmt: skip


@pytest.mark.parametrize(("config", "attention"), TOWERS, ids=lambda each: each)
def test_a_tower_that_lacks_the_attention_of_the_text_part_gets_its_own(config, attention):
    architecture = getattr(transformers, config)()
    # No class is named, as in a folder whose config.json lacks `architectures`.
    model_class = resolve_model_class(architecture, "CAUSAL_LM")
    chosen = choose_attention(architecture, model_class, attention)
    assert chosen == TOWERS[config, attention]


@pytest.mark.parametrize(
    ("family", "typed", "resolved"),
    [("gpt_oss", "auto", "eager"), ("llama", "auto", "sdpa"), ("gpt_oss", "eager", "eager"),
     ("gpt_oss", "sdpa", None), ("qwen3_vl", "auto", "sdpa")],
)  # fmt: skip
def test_the_attention_of_a_model_is_known_before_it_is_loaded(family, typed, resolved, tmp_path):
    family_config(family).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), attention=typed)
    machine = Machine("cpu", "float32", "sdpa" if typed == "auto" else typed)
    if resolved is None:
        with pytest.raises(UserError, match=r"model.attention=sdpa: GptOssForCausalLM does not"):
            resolve_attention(config, machine, "CAUSAL_LM")
        return
    assert resolve_attention(config, machine, "CAUSAL_LM").attention == resolved
    packed = resolve_attention(config, machine, "CAUSAL_LM", packs=True).attention
    assert packed == ("varlen" if resolved == "sdpa" else resolved)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "bloom", "mamba2"])
def test_a_class_without_sdpa_gets_eager_attention_unless_it_was_typed(name, tmp_path):
    save_family(tmp_path, name)
    model = load_model(ModelConfig(path=str(tmp_path)), {}, CPU)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(UserError, match=r"model.attention=sdpa: .* does not have it. It has eager"):
        load_model(ModelConfig(path=str(tmp_path), attention="sdpa"), {}, CPU)
