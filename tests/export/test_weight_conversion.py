"""Merges into checkpoints whose names, layouts and classes differ from those of the model."""

import json
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.adapter_models import INT8, NF4
from helpers.export_runs import make_run
from helpers.model_families import FAMILIES, family_config, family_tokenizer, save_family
from luthier.config.library_settings import QuantizationSettings
from luthier.export import merge_streaming, model_layout
from luthier.export.merge_adapter import BOUNDS, compare_logits, compare_models, prompts_of
from luthier.export.merge_in_memory import load_tuned
from luthier.export.weight_conversion import group_tensors, revert_name
from luthier.export.weight_files import WeightFiles
from luthier.model.artifact import find_artifact

IDS = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 100, 33, 44]])
EXPERTS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
           "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
           "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"q_proj": 32}}  # fmt: skip
ATTENTION = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
UP = EXPERTS | {"target_parameters": ["experts.up_proj", "experts.down_proj"]}
TEXT = r"model\.language_model\..*\.(q_proj|v_proj)"
TEXT_ONLY = ATTENTION | {"target_modules": TEXT}
TEXT_EXPERTS = EXPERTS | {"target_modules": TEXT}
WHOLE = ATTENTION | {"modules_to_save": ["experts"]}
LATENT = {"target_modules": ["q_b_proj", "o_proj"]}
LLAMA4 = r"language_model\..*\.(q_proj|v_proj)"


def family_class(name):
    return getattr(transformers, FAMILIES[name].architecture)


def loaded(name, folder):
    return family_class(name).from_pretrained(folder, dtype="float32").eval()


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def adapter_of(name, base, folder, settings, seed=3):
    """An adapter made and saved by plain peft, moved as if it had trained."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(loaded(name, base), LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape)
    model.save_pretrained(folder)
    return folder


def with_adapter(name, base, *adapters):
    from peft import PeftModel

    return PeftModel.from_pretrained(loaded(name, base), *adapters).eval()


def entries(folder):
    return {
        (entry.name, entry.dtype, entry.shape) for entry in WeightFiles(folder).entries.values()
    }


def far_apart(got, expected):
    """The largest difference in standard deviations of the logits."""
    return float((got - expected).abs().max() / expected.std())


CASES = {
    "Qwen3-MoE": ("qwen3_moe", EXPERTS),
    "Qwen3-MoE, one parameter": (
        "qwen3_moe", EXPERTS | {"target_parameters": ["experts.down_proj"]},
    ),
    "Qwen3-MoE, whole experts": ("qwen3_moe", WHOLE),
    "Qwen3-MoE, rsLoRA": ("qwen3_moe", EXPERTS | {"use_rslora": True}),
    "Qwen3-MoE and its router": (
        "qwen3_moe", ATTENTION | {"target_parameters": ["gate.weight", "experts.gate_up_proj"]},
    ),
    "Mixtral": ("mixtral", EXPERTS),
    "Mixtral, whole experts": ("mixtral", WHOLE),
    "gpt-oss": ("gpt_oss", EXPERTS),
    "gpt-oss, whole experts": ("gpt_oss", WHOLE),
    "DeepSeek-V3": ("deepseek_v3", EXPERTS | LATENT),
    "GLM4-MoE": ("glm4_moe", EXPERTS),
    "Qwen3-Next": ("qwen3_next", EXPERTS),
    "Qwen3.5": ("qwen3_5", TEXT_ONLY),
    "Qwen3.5-MoE": ("qwen3_5_moe", TEXT_EXPERTS),
    "Qwen3-VL": ("qwen3_vl", TEXT_ONLY),
    "Qwen3-VL-MoE": ("qwen3_vl_moe", TEXT_EXPERTS),
    "Qwen2.5-VL": ("qwen2_5_vl", TEXT_ONLY),
    "Mistral3": ("mistral3", TEXT_ONLY),
    "Gemma 4 MoE": ("gemma4_moe", TEXT_EXPERTS),
    "Jamba": ("jamba", EXPERTS),
    "LFM2-MoE": ("lfm2_moe", EXPERTS),
    "Granite-MoE-hybrid": ("granite_moe_hybrid", EXPERTS),
    "Nemotron-H": ("nemotron_h", UP),
    "Llama 4": ("llama4", EXPERTS | {"target_modules": LLAMA4}),
    "Muse-Glimmer": ("muse_glimmer", TEXT_ONLY),
    "Phi-3": ("phi3", ATTENTION | {"target_modules": ["qkv_proj", "gate_up_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("name, settings", CASES.values(), ids=CASES)
def test_a_merge_keeps_the_names_of_the_checkpoint(name, settings, tmp_path, luthier):
    base = save_family(tmp_path / "base", name)
    adapter = adapter_of(name, base, tmp_path / "adapter", settings)
    merged = tmp_path / "merged"
    code, out, err = luthier("merge", adapter, "--base", base, "--out", merged, "--no-verify")
    assert code == 0, err
    assert "whole  " not in out
    assert entries(merged) == entries(base)
    expected = logits(with_adapter(name, base, adapter))
    assert far_apart(logits(loaded(name, merged)), expected) < 3e-5
    assert far_apart(logits(loaded(name, base)), expected) > 1e-2
    before, after = WeightFiles(base), WeightFiles(merged)
    untouched = [key for key in before.entries if "norm" in key or "vis" in key or "embed" in key]
    assert untouched
    assert all(before.read_bytes(key) == after.read_bytes(key) for key in untouched)


def test_the_check_of_a_mixture_in_8_bits_is_not_loosened(tmp_path, luthier):
    """Rounded inputs flip a router; the check compares the weights that int8 left."""
    base = save_family(tmp_path / "base", "qwen3_moe")
    lora = EXPERTS | {"rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.0}
    run = make_run(tmp_path / "run", base, quantization=INT8, lora=lora)
    code, out, err = luthier("merge", run)
    assert code == 0, err
    assert "e-06 standard deviations" in out
    # An alpha that is a little off is found.
    file = run / "model" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 9}))
    artifact = find_artifact(str(run))
    tuned = partial(load_tuned, artifact, [(run / "model", 1.0)], True)
    difference = compare_models(tuned, run / "merged", "CAUSAL_LM", [IDS[0].tolist()])
    assert difference.relative > BOUNDS["float32"]


def test_rounding_that_flips_a_router_is_no_mistake_of_the_merge(tmp_path, luthier):
    """In bfloat16 two experts that score alike change places: 1.3 deviations of the logits."""
    name = "mixtral"
    base = save_family(tmp_path / "base", name)
    family_class(name).from_pretrained(base, dtype="bfloat16").save_pretrained(base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj"]}
    settings["target_parameters"] = EXPERTS["target_parameters"]
    adapter = adapter_of(name, base, tmp_path / "adapter", settings)
    merged = tmp_path / "merged"
    code, out, err = luthier("merge", adapter, "--base", base, "--out", merged)
    assert code == 0, err
    assert "both ran the experts that the model with its adapter chooses" in out
    prompts = prompts_of(find_artifact(str(adapter), str(base)), family_tokenizer(name))
    expected, got = (
        [model(torch.tensor([ids])).logits[0] for ids in prompts]
        for model in (with_adapter(name, base, adapter), loaded(name, merged))
    )
    assert compare_logits(expected, got).relative > BOUNDS["bfloat16"]


@pytest.mark.parametrize("damaged", ["gate.weight", "experts.2.w3.weight"])
def test_the_check_of_a_mixture_finds_other_weights(damaged, tmp_path, luthier):
    """Also those of a router, though its choices are taken from the other model."""
    base = save_family(tmp_path / "base", "mixtral")
    adapter = adapter_of("mixtral", base, tmp_path / "adapter", EXPERTS)
    merged = tmp_path / "merged"
    assert luthier("merge", adapter, "--base", base, "--out", merged)[0] == 0
    file = merged / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.0.block_sparse_moe.{damaged}"] *= 1.02
    save_file(tensors, file, {"format": "pt"})
    difference = compare_models(
        lambda: with_adapter("mixtral", base, adapter), merged, "CAUSAL_LM", [IDS[0].tolist()]
    )
    assert difference.relative > BOUNDS["float32"]


def test_experts_that_lie_the_other_way_round_on_disk_stay_so(tmp_path, luthier):
    """Qwen3-VL-MoE's checkpoints on the hub have (inputs, outputs), its model does not.

    transformers 5.23 turns them while loading, and saves them as the model has them.
    """
    name = "qwen3_vl_moe"
    base = save_family(tmp_path / "base", name)
    file = base / "model.safetensors"
    tensors = load_file(file)
    for key in tensors:
        if "mlp.experts." in key:
            tensors[key] = tensors[key].transpose(1, 2).contiguous()
    save_file(tensors, file, {"format": "pt"})
    adapter = adapter_of(name, base, tmp_path / "adapter", TEXT_EXPERTS)
    merged = tmp_path / "merged"
    command = ("merge", adapter, "--base", base, "--out", merged, "--no-verify")
    assert luthier(*command)[0] == 0
    assert entries(merged) == entries(base)
    expected = logits(with_adapter(name, base, adapter))
    assert far_apart(logits(loaded(name, merged)), expected) < 3e-5
    # Should transformers write them back as they were, this workaround can go.
    loaded(name, base).save_pretrained(tmp_path / "saved")
    assert entries(tmp_path / "saved") != entries(base)


def test_an_adapter_with_a_name_for_each_expert(tmp_path, luthier):
    """As peft saved it before transformers 5; peft itself still reads it."""
    name = "mixtral"
    base = save_family(tmp_path / "base", name)
    torch.manual_seed(3)
    tensors = {}
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts"
        for expert in range(4):
            for key, (rows, columns) in {"w1": (96, 64), "w3": (96, 64), "w2": (64, 96)}.items():
                start = f"{prefix}.{expert}.{key}"
                tensors[f"{start}.lora_A.weight"] = 0.1 * torch.randn(4, columns)
                tensors[f"{start}.lora_B.weight"] = 0.1 * torch.randn(rows, 4)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    settings |= {"target_modules": ["w1", "w2", "w3"], "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    merged = tmp_path / "merged"
    code, out, err = luthier("merge", adapter, "--out", merged)
    assert code == 0, err
    assert "whole  " not in out and entries(merged) == entries(base)
    expected = logits(with_adapter(name, base, adapter))
    assert far_apart(logits(loaded(name, merged)), expected) < 3e-5


def test_weighted_adapters_and_another_number_format(tmp_path, luthier):
    name = "qwen3_moe"
    base = save_family(tmp_path / "base", name)
    one = adapter_of(name, base, tmp_path / "one", EXPERTS)
    two = adapter_of(name, base, tmp_path / "two", EXPERTS, seed=7)
    merged = tmp_path / "merged"
    command = ("merge", f"{one}:0.25", f"{two}:-0.5", "--base", base, "--out", merged)
    assert luthier(*command, "--no-verify", "--dtype", "bfloat16")[0] == 0
    names = {(key, shape) for key, _, shape in entries(base)}
    assert {(key, shape) for key, _, shape in entries(merged)} == names
    assert {form for _, form, _ in entries(merged)} == {"BF16"}
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    key = "model.layers.1.mlp.experts.2.up_proj.weight"
    total = before[key].clone()
    for folder, weight in ((one, 0.25), (two, -0.5)):
        adapted = with_adapter(name, base, folder).merge_and_unload()
        # Gate and up are one parameter, up the second half.
        up = adapted.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[2][32:]
        total += weight * (up - before[key])
    assert torch.equal(after[key], total.detach().to(torch.bfloat16))


def test_what_the_model_has_no_place_for_stays_in_the_checkpoint(tmp_path, luthier):
    base = save_family(tmp_path / "base", "qwen3_next")
    file = base / "model.safetensors"
    extra = {"mtp.fc.weight": torch.randn(4, 4)}
    save_file(load_file(file) | extra, file, {"format": "pt"})
    adapter = adapter_of("qwen3_next", base, tmp_path / "adapter", EXPERTS)
    merged = tmp_path / "merged"
    assert luthier("merge", adapter, "--base", base, "--out", merged, "--no-verify")[0] == 0
    assert entries(merged) == entries(base)
    assert torch.equal(WeightFiles(merged).read("mtp.fc.weight"), extra["mtp.fc.weight"])


@pytest.mark.parametrize("name, most", [("mixtral", 2), ("gpt_oss", 1)])
def test_a_merge_holds_the_tensors_of_one_expert(name, most, tmp_path, monkeypatch):
    """Never more than one expert's gate and up, or the one tensor that holds all experts."""
    base = save_family(tmp_path / "base", name)
    adapter = adapter_of(name, base, tmp_path / "adapter", EXPERTS)
    plan = planned_merge(base, adapter)
    live = weakref.WeakSet()
    counts = []
    read = WeightFiles.read

    def counted(files, key):
        value = read(files, key)
        live.add(value)
        counts.append(len(live))
        return value

    monkeypatch.setattr(WeightFiles, "read", counted)
    (tmp_path / "out").mkdir()
    list(plan.write(tmp_path / "out"))
    assert max(counts) == most
    # What comes out with another tensor is written next, and kept no longer.
    assert not plan._ready


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_packed_experts_are_rounded_as_the_model_holds_them(name, tmp_path):
    """bitsandbytes' blocks run over a layer's experts, and so must the rounding."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    base = save_family(tmp_path / "base", name)
    adapter = adapter_of(name, base, tmp_path / "adapter", EXPERTS)
    (tmp_path / "out").mkdir()
    parameter = "model.layers.1.mlp.experts.down_proj"
    list(planned_merge(base, adapter, NF4, parameter).write(tmp_path / "out"))
    assert entries(tmp_path / "out") == entries(base)
    (tmp_path / "out" / "config.json").write_text((base / "config.json").read_text())
    plain = loaded(name, base).get_parameter(parameter).detach()
    packed, state = quantize_4bit(plain, quant_type="nf4", compress_statistics=True)
    delta = with_adapter(name, base, adapter).merge_and_unload().get_parameter(parameter) - plain
    merged = loaded(name, tmp_path / "out").get_parameter(parameter)
    assert torch.allclose(merged, dequantize_4bit(packed, state) + delta, atol=1e-6)
    assert (dequantize_4bit(packed, state) - plain).abs().max() > 1e-3


def planned_merge(base, adapter, quantization=None, packed=None):
    layout = model_layout.layout_of(find_artifact(str(adapter), str(base)), base)
    if packed is not None:
        layout = replace(layout, packed=frozenset({packed}))
    settings = QuantizationSettings(quantization or {})
    return merge_streaming.plan_merge(base, layout, [(adapter, 1.0)], settings, None)


@pytest.mark.parametrize("name", ["mixtral", "gemma3", "qwen2_5_vl", "gpt_neox", "qwen3_5_moe"])
def test_every_tensor_of_a_checkpoint_is_in_one_group(name, tmp_path):
    base = save_family(tmp_path / "base", name)
    with torch.device("meta"):
        model = family_class(name)(family_config(name))
    shapes = {key: entry.shape for key, entry in WeightFiles(base).entries.items()}
    groups = group_tensors(shapes, model)
    assert sorted(key for group in groups for key in group.names) == sorted(shapes)
    targets = [target for group in groups for target in group.targets]
    tied = {"lm_head.weight"} if model.config.get_text_config().tie_word_embeddings else set()
    assert {*targets} | tied == {*model.state_dict()} and len(targets) == len({*targets})


def test_the_head_of_a_wrapper_that_was_tied_gets_the_checkpoints_name():
    with torch.device("meta"):
        model = family_class("gemma3")(family_config("gemma3"))
    assert revert_name("lm_head.weight", model) == "language_model.lm_head.weight"
