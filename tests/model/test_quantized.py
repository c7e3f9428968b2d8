"""Models that come quantized: known by config.json, and trained only where that is right."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from helpers import quantized_checkpoints as qc
from helpers.adapter_models import LORA, NF4, config_of, gradients, load, logits, trained
from helpers.model_families import save_family
from luthier.errors import UserError
from luthier.model import quantized
from luthier.model.adapters import add_adapter
from luthier.model.device import Machine

CPU = Machine("cpu", "float32", "sdpa")
DEQUANTIZE = {"dequantize": True}
FP8 = qc.FP8
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
MXFP4 = {"quant_method": "mxfp4"}
TWO_SCHEMES = qc.W4A16 | {"config_groups": {
    "a": {"targets": ["re:.*mlp.*"], "weights": {}}, "b": {"targets": ["Linear"], "weights": {}},
}}  # fmt: skip
REORDERED = qc.compressed("pack-quantized", {"num_bits": 4, "type": "int", "actorder": "group"})
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def torchao(kind):
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_data": {}}}}


def marked(folder, target, found, below=None):
    """A copy of a model's folder whose config.json says that it is quantized."""
    shutil.copytree(folder, target)
    content = json.loads((target / "config.json").read_text())
    (content.setdefault(below, {}) if below else content)["quantization_config"] = found
    (target / "config.json").write_text(json.dumps(content))
    return target


REFUSED = {
    "GPTQ without its packages": (GPTQ, {}, LORA, "pip install gptqmodel optimum"),
    "AWQ without its package": (AWQ, {}, LORA, "pip install gptqmodel"),
    "fp8 on a CPU": (FP8, {}, LORA, "cpu does not multiply in fp8. Use quantization=dequantize"),
    "no backward": (MXFP4, {}, LORA, "no gradient goes through its layers. Use quantization=dequ"),
    "compressed": (COMPRESSED, {}, LORA, "Use quantization=dequantize"),
    "unknown": ({"quant_method": "quip"}, {}, LORA, "(quip): luthier does not know that format"),
    "no adapter": ({"quant_method": "quanto"}, {}, LORA, "(quanto): peft has no adapter for its"),
    "not read": ({"quant_method": "modelopt"}, {}, LORA, "(ModelOpt): transformers 5.23 does not"),
    "nor to be unpacked": (
        {"quant_method": "vptq"},
        DEQUANTIZE,
        LORA,
        "Name the model that it was",
    ),
    "several schemes": (TWO_SCHEMES, DEQUANTIZE, LORA, "one scheme for all layers, not several"),
    "an untried scheme": (REORDERED, DEQUANTIZE, LORA, "actorder=group"),
    "quantized twice": (GPTQ, NF4, LORA, "cannot be quantized again. Use quantization=none"),
    "bitsandbytes twice": (BNB, NF4, LORA, "cannot be quantized again"),
    "fp8 and nf4": (FP8, NF4, LORA, "or =dequantize"),
    "all weights": (BNB, {}, {}, "quantized weights cannot be trained. Add lora=default"),
    "not to be unpacked": (
        GPTQ,
        DEQUANTIZE,
        LORA,
        "cannot be unpacked while loading; bitsandbytes, fp8",
    ),
}


@pytest.mark.parametrize(("found", "asked", "lora", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_is_told(tiny_model, tmp_path, found, asked, lora, said):
    folder = marked(tiny_model, tmp_path / "model", found)
    with pytest.raises(UserError) as raised:
        quantized.check_quantized_model(config_of(folder, quantization=asked, lora=lora), CPU)
    assert str(raised.value).startswith(f"model.path={folder} comes quantized (")
    assert said in str(raised.value)


def test_a_checkpoint_of_compressed_tensors_needs_its_package(tiny_model, tmp_path):
    if importlib.util.find_spec("compressed_tensors"):
        pytest.skip("compressed-tensors is installed")
    folder = marked(tiny_model, tmp_path / "model", qc.W4A16)
    with pytest.raises(UserError, match="pip install compressed-tensors"):
        quantized.check_quantized_model(config_of(folder, quantization=DEQUANTIZE, lora=LORA), CPU)


EXPERT_SCHEMES = {
    "W4A16": (qc.W4A16, True),
    "FP8 by row": (qc.W8A8_FP8, True),
    "NVFP4": (qc.NVFP4, False),
    "zero points": (qc.compressed("pack-quantized", {"type": "int", "symmetric": False}), False),
    "8 bits": (qc.compressed("int-quantized", {"type": "int", "num_bits": 8}), False),
    "FP8 in blocks": (
        qc.compressed(
            "float-quantized", {"type": "float", "num_bits": 8, "strategy": "block"}
        ),
        False,
    ),
    "experts left whole": (qc.NVFP4 | {"ignore": ["re:.*mlp.experts.*"]}, True),
}  # fmt: skip


@pytest.mark.parametrize(("found", "works"), EXPERT_SCHEMES.values(), ids=EXPERT_SCHEMES)
@pytest.mark.parametrize("below", [None, "text_config"])
def test_experts_that_transformers_unpacks_wrongly_are_refused(tmp_path, found, works, below):
    counts = {"n_routed_experts": 8}
    content = {below: counts | {"quantization_config": found}} if below else counts
    tmp_path.joinpath("config.json").write_text(
        json.dumps(content if below else content | {"quantization_config": found})
    )
    problem = quantized.compressed_tensors_problem(config_of(tmp_path).model)
    assert (problem is None) == works
    assert works or "does not unpack experts in" in problem


def test_transformers_drops_the_scale_of_experts_in_nvfp4(tmp_path, monkeypatch):
    """A release that knows the scale makes this fail: then such checkpoints can be let in."""
    pytest.importorskip("compressed_tensors")
    save_family(tmp_path / "model", "qwen3_moe")
    packed, whole = qc.quantize_checkpoint(
        tmp_path / "model", tmp_path, qc.pack_nvfp4, qc.NVFP4, qc.EXPERTS
    )
    name = "model.layers.0.mlp.experts.down_proj"
    monkeypatch.setattr(quantized, "compressed_tensors_problem", lambda _: None)
    expected, weight = (
        load(folder, how).get_parameter(name) for folder, how in ((whole, {}), (packed, DEQUANTIZE))
    )
    assert weight.norm() > 100 * expected.norm()


def test_every_format_of_transformers_has_its_row():
    """A new format, and one that can be unpacked from now on, makes this fail."""
    from inspect import signature

    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    formats = quantized.QUANTIZATION_FORMATS
    bitsandbytes = {"bitsandbytes_4bit", "bitsandbytes_8bit"}
    found = {**AUTO_QUANTIZATION_CONFIG_MAPPING}
    assert {found.pop(name).__name__ for name in bitsandbytes} == {"BitsAndBytesConfig"}
    assert set(formats) - {"bitsandbytes", "modelopt"} == set(found)
    for name, config in found.items():
        able = formats[name].dequantize_class or (name == "gguf" and "GgufConfig")
        assert ("dequantize" in signature(config).parameters) == bool(able), name
        assert not able or able == config.__name__
    assert all(row.trains or row.reason for row in formats.values())


CONSTANT_ANSWERS = {
    "auto-round", "eetq", "fbgemm_fp8", "fp8", "gemma", "gguf", "gptq", "higgs", "hqq", "metal",
    "mxfp4", "mxfp8", "nvfp4", "quanto", "quark", "sinq", "spqr", "vptq",
}  # fmt: skip
"""Formats whose quantizer says whether it trains without a look at the checkpoint."""
WITHOUT_ADAPTER = {"eetq", "mxfp8", "quanto", "sinq"}
"""Formats that transformers says to train on, and luthier does not."""


def test_what_trains_is_what_transformers_says():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    says = {name: AUTO_QUANTIZER_MAPPING[name].is_trainable.fget(None) for name in CONSTANT_ANSWERS}
    trains = {name for name, answer in says.items() if answer} - WITHOUT_ADAPTER
    rows = quantized.QUANTIZATION_FORMATS
    assert trains == {name for name in CONSTANT_ANSWERS if rows[name].trains}


WITH_PACKAGES = {
    "GPTQ": (GPTQ, LORA, None),
    "torchao in 8 bits": (torchao("Int8WeightOnlyConfig"), LORA, None),
    "torchao in 4 bits": (torchao("Int4WeightOnlyConfig"), LORA, "only through 8 bits"),
    "HQQ on a CPU": ({"quant_method": "hqq"}, LORA, "no kernel for it on cpu"),
    "AWQ": (AWQ, LORA, None),
    "DoRA": (GPTQ, LORA | {"use_dora": True}, "only plain LoRA"),
    "IA3": (AWQ, {"method": "ia3"}, "only plain LoRA"),
    "PiSSA": (GPTQ, LORA | {"init_lora_weights": "pissa"}, "needs the weights themselves"),
}


@pytest.mark.parametrize(("found", "lora", "said"), WITH_PACKAGES.values(), ids=WITH_PACKAGES)
def test_with_its_packages_plain_lora_trains(tiny_model, tmp_path, monkeypatch, found, lora, said):
    for name in ("gptqmodel", "optimum", "torchao", "hqq"):
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


GPT_OSS_EXPERTS = r"experts\.(gate_up|down)_proj$"
KIMI = qc.W4A16 | {"ignore": ["re:.*self_attn.*", "re:.*shared_experts.*", "lm_head"]}
CHECKPOINTS = {
    "Llama in fp8": ("llama", qc.pack_fp8, qc.FP8, qc.LINEAR, None),
    "DeepSeek-V3 in fp8": ("deepseek_v3", qc.pack_fp8, qc.FP8, qc.EXPERTS, None),
    "Qwen3-MoE in fp8": ("qwen3_moe", qc.pack_fp8, qc.FP8, qc.LINEAR, None),
    "gpt-oss in mxfp4": ("gpt_oss", qc.pack_mxfp4, qc.MXFP4, GPT_OSS_EXPERTS, None),
    "Llama in W4A16": ("llama", qc.pack_w4a16, qc.W4A16, qc.LINEAR, None),
    "Llama in FP8 by row": ("llama", qc.pack_channels_in_fp8, qc.W8A8_FP8, qc.LINEAR, None),
    "Llama in NVFP4": ("llama", qc.pack_nvfp4, qc.NVFP4, qc.LINEAR, None),
    "DeepSeek-V3 in W4A16": ("deepseek_v3", qc.pack_w4a16, KIMI, qc.EXPERTS, None),
    "Qwen3-MoE in FP8 by row": (
        "qwen3_moe", qc.pack_channels_in_fp8, qc.W8A8_FP8, qc.LINEAR, None,
    ),
    "a text part in W4A16": ("mistral3", qc.pack_w4a16, qc.W4A16, qc.TEXT_LINEAR, "text_config"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_dequantized_weights_are_those_of_plain_arithmetic_and_are_saved_so(case, tmp_path):
    family, pack, quantization, names, below = case
    if quantization["quant_method"] == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    save_family(tmp_path / "model", family)
    packed, whole = qc.quantize_checkpoint(
        tmp_path / "model", tmp_path, pack, quantization, names, below
    )
    quantized.check_quantized_model(config_of(packed, quantization=DEQUANTIZE, lora=LORA), CPU)
    plain, model = load(whole), load(packed, DEQUANTIZE)
    weights = dict(model.named_parameters())
    for name, expected in plain.named_parameters():
        # compressed-tensors unpacks NVFP4 in bfloat16.
        error = 2**-7 * expected.abs() if pack is qc.pack_nvfp4 else torch.zeros(1)
        assert weights[name].dtype == torch.float32
        assert ((weights[name] - expected).abs() <= error).all(), name
    # transformers would reverse on saving what it did on loading.
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in (tmp_path / "saved/config.json").read_text()
    saved = type(model).from_pretrained(tmp_path / "saved", attn_implementation="eager")
    names_in = [set(load_file(f / "model.safetensors")) for f in (tmp_path / "saved", whole)]
    assert names_in[0] == names_in[1]
    torch.testing.assert_close(logits(saved), logits(model))


def test_a_model_that_bitsandbytes_packed_is_unpacked_and_saved_so(tiny_model, tmp_path):
    packed = load(tiny_model, NF4)
    packed.save_pretrained(tmp_path / "packed")
    config = config_of(tmp_path / "packed", quantization=DEQUANTIZE)
    quantized.check_quantized_model(config, CPU)
    model = load(tmp_path / "packed", DEQUANTIZE)
    torch.testing.assert_close(logits(model), logits(packed), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in (tmp_path / "saved/config.json").read_text()
    saved = type(model).from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(saved), logits(model))
    torch.testing.assert_close(
        saved.get_input_embeddings().weight, model.get_input_embeddings().weight
    )


def test_adapters_train_on_dequantized_weights(tmp_path):
    save_family(tmp_path / "model", "gpt_oss")
    packed, _ = qc.quantize_checkpoint(
        tmp_path / "model", tmp_path, qc.pack_mxfp4, qc.MXFP4, GPT_OSS_EXPERTS
    )
    experts = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    model = add_adapter(load(packed, DEQUANTIZE, "bfloat16"), LORA | experts, seed=1)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {
        torch.bfloat16
    }
    moved = {name for name, grad in gradients(model).items() if grad.abs().sum() > 0}
    assert {name for name in trained(model) if "lora_B" in name} <= moved
    assert any("experts" in name for name in moved)
