"""Models that come quantized: known by config.json, and trained only where that is right."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.adapter_models import IDS, LORA, NF4, config_of, gradients, load, logits, trained
from luthier.errors import UserError
from luthier.model import quantized
from luthier.model.adapters import add_adapter
from luthier.model.device import Machine

CPU = Machine("cpu", "float32", "sdpa")
DEQUANTIZE = {"dequantize": True}
BLOCK = 32
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
MXFP4 = {"quant_method": "mxfp4"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def marked(folder, target, found, below=None):
    """A copy of a model's folder whose config.json says that it is quantized."""
    shutil.copytree(folder, target)
    content = json.loads((target / "config.json").read_text())
    (content.setdefault(below, {}) if below else content)["quantization_config"] = found
    (target / "config.json").write_text(json.dumps(content))
    return target


def in_fp8(folder, target):
    """The model in fp8 with a scale for each block, as DeepSeek's and Qwen's are."""
    marked(folder, target, FP8 | {"modules_to_not_convert": ["lm_head"]})
    weights, packed = load_file(folder / "model.safetensors"), {}
    for name, weight in weights.items():
        packed[name] = weight
        if name.endswith("proj.weight"):
            rows, columns = (size // BLOCK for size in weight.shape)
            blocks = weight.float().reshape(rows, BLOCK, columns, BLOCK)
            scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
            whole = (blocks / scale).to(torch.float8_e4m3fn)
            packed[name] = whole.reshape(weight.shape)
            packed[f"{name}_scale_inv"] = scale.reshape(rows, columns)
    save_file(packed, target / "model.safetensors", metadata={"format": "pt"})
    return target


REFUSED = {
    "GPTQ without its packages": (GPTQ, {}, LORA, "pip install gptqmodel optimum"),
    "AWQ without its package": (AWQ, {}, LORA, "pip install gptqmodel"),
    "fp8 on a CPU": (FP8, {}, LORA, "cpu does not multiply in fp8. Use quantization=dequantize"),
    "no backward": (MXFP4, {}, LORA, "no gradient goes through its layers. Use quantization=dequ"),
    "compressed": (COMPRESSED, {}, LORA, "Use quantization=dequantize"),
    "unknown": ({"quant_method": "quip"}, {}, LORA, "(quip): luthier cannot train on that"),
    "quantized twice": (GPTQ, NF4, LORA, "cannot be quantized again. Use quantization=none"),
    "bitsandbytes twice": (BNB, NF4, LORA, "cannot be quantized again"),
    "fp8 and nf4": (FP8, NF4, LORA, "or =dequantize"),
    "all weights": (BNB, {}, {}, "quantized weights cannot be trained. Add lora=default"),
    "not to be unpacked": (GPTQ, DEQUANTIZE, LORA, "cannot be unpacked while loading; fp8"),
    "unpacking without its package": (COMPRESSED, DEQUANTIZE, LORA, "pip install compressed-"),
}


@pytest.mark.parametrize(("found", "asked", "lora", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_is_told(tiny_model, tmp_path, found, asked, lora, said):
    folder = marked(tiny_model, tmp_path / "model", found)
    with pytest.raises(UserError) as raised:
        quantized.check_quantized_model(config_of(folder, quantization=asked, lora=lora), CPU)
    assert str(raised.value).startswith(f"model.path={folder} comes quantized (")
    assert said in str(raised.value)


WITH_PACKAGES = {
    "GPTQ": (GPTQ, LORA, None),
    "AWQ": (AWQ, LORA, None),
    "DoRA": (GPTQ, LORA | {"use_dora": True}, "only plain LoRA"),
    "IA3": (AWQ, {"method": "ia3"}, "only plain LoRA"),
    "PiSSA": (GPTQ, LORA | {"init_lora_weights": "pissa"}, "needs the weights themselves"),
}


@pytest.mark.parametrize(("found", "lora", "said"), WITH_PACKAGES.values(), ids=WITH_PACKAGES)
def test_with_its_packages_plain_lora_trains(tiny_model, tmp_path, monkeypatch, found, lora, said):
    for name in ("gptqmodel", "optimum"):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    config = config_of(marked(tiny_model, tmp_path / "model", found), lora=lora)
    if said is None:
        quantized.check_quantized_model(config, CPU)
        return
    with pytest.raises(UserError, match=said):
        quantized.check_quantized_model(config, CPU)


def test_whole_models_are_left_alone(tiny_model):
    quantized.check_quantized_model(config_of(tiny_model, quantization=NF4, lora=LORA), CPU)
    with pytest.raises(UserError, match="is not quantized"):
        quantized.check_quantized_model(config_of(tiny_model, quantization=DEQUANTIZE), CPU)


def test_the_mark_is_found_in_a_text_model_within_another(tiny_model, tmp_path):
    folder = marked(tiny_model, tmp_path / "model", FP8, below="text_config")
    assert quantized.read_quantization_config(config_of(folder).model) == FP8


def test_a_broken_config_is_told(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: it is no JSON"):
        quantized.check_quantized_model(config_of(folder), CPU)


def test_adapters_train_on_a_model_that_bitsandbytes_packed(tiny_model, tmp_path):
    load(tiny_model, NF4).save_pretrained(tmp_path)
    quantized.check_quantized_model(config_of(tmp_path, lora=LORA), CPU)
    model = add_adapter(load(tmp_path), LORA, seed=1)
    torch.testing.assert_close(logits(model), logits(load(tiny_model, NF4)))
    assert all(g.abs().sum() > 0 for name, g in gradients(model).items() if "lora_B" in name)
    with pytest.raises(UserError, match="4-bit weights are packed"):
        add_adapter(load(tmp_path), {"method": "hra"}, seed=1)


def unpacked(config, dtype):
    from transformers import AutoModelForCausalLM

    quantized.check_quantized_model(config, CPU)
    model = AutoModelForCausalLM.from_pretrained(
        config.model.path,
        dtype=dtype,
        quantization_config=quantized.dequantize_config(config.model),
    )
    model = quantized.cast_to_dtype(model, dtype)
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_is_unpacked_to_whole_weights(tiny_model, tmp_path, dtype):
    folder = in_fp8(tiny_model, tmp_path / "model")
    whole = unpacked(config_of(folder, quantization=DEQUANTIZE, lora=LORA), dtype)
    plain = load(tiny_model)
    for name, weight in whole.named_parameters():
        wanted = plain.get_parameter(name)
        assert (weight.float() - wanted).norm() < 0.05 * wanted.norm(), name
    model = add_adapter(whole, LORA, seed=1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in trained(model).values())


def test_mxfp4_is_unpacked_to_whole_weights(tmp_path):
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=266,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=2,
        num_experts_per_tok=2,
    )
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = weights.pop(name).shape
        # Every byte holds two numbers 1.0 (0b0010), and every scale is 2 ** (122 - 127).
        weights[f"{name}_blocks"] = torch.full((experts, rows, columns // 32, 16), 0x22).byte()
        weights[f"{name}_scales"] = torch.full((experts, rows, columns // 32), 122).byte()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((tmp_path / "config.json").read_text())
    content["quantization_config"] = MXFP4
    (tmp_path / "config.json").write_text(json.dumps(content))
    whole = unpacked(config_of(tmp_path, quantization=DEQUANTIZE, lora=LORA), "bfloat16")
    experts = {n: p for n, p in whole.named_parameters() if n.endswith("proj") and "experts" in n}
    assert {float(value) for p in experts.values() for value in p.unique()} == {2.0**-5}
    model = add_adapter(whole, LORA, seed=1)
    assert all(g is not None for g in gradients(model).values())
