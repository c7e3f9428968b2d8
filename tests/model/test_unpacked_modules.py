"""What quantization leaves as it is: towers, heads, layers that kernels read; and Falcon's."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from helpers.adapter_models import INT8, NF4
from helpers.model_families import save_family
from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model.adapters import add_adapter
from luthier.model.device import Machine
from luthier.model.load import describe_packing, load_model

WHOLE = {
    "qwen3_vl": ("CAUSAL_LM", {"model.visual"}),
    "gemma3": ("CAUSAL_LM", {"model.vision_tower", "model.multi_modal_projector"}),
    "jamba": ("CAUSAL_LM", {"model.layers.0.mamba.dt_proj"}),
    "falcon": ("CAUSAL_LM", set()),
    "bert": ("SEQ_CLS", {"classifier", "bert.pooler"}),
    "modernbert": ("TOKEN_CLS", {"classifier", "head"}),
    "qwen3": ("SEQ_CLS", {"score"}),
}


PACKED = {
    (
        "qwen3_vl",
        "nf4",
    ): "nf4 packs 100% of the layers' weights; in float32 stay: model.visual, lm_",
    (
        "jamba",
        "nf4",
    ): "nf4 packs 100% of the layers' weights; in float32 stay: mamba.dt_proj, lm_h",
    (
        "mixtral",
        "int8",
    ): "int8 packs 14% of the layers' weights; in float32 stay: lm_head (0.00 GB)",
    ("falcon", "nf4"): "nf4 packs 100% of the layers' weights",
}


@pytest.mark.parametrize(("name", "bits"), PACKED, ids=str)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_the_share_that_is_packed_is_said(name, bits, adapted, tmp_path):
    model = _load(save_family(tmp_path / "model", name), {"nf4": NF4, "int8": INT8}[bits])
    if adapted:
        model = add_adapter(model, {"r": 2, "target_modules": "all-linear"}, seed=1)
    assert describe_packing(model).startswith(PACKED[name, bits])


def test_nothing_is_said_of_a_model_that_is_not_packed(tmp_path):
    assert describe_packing(_load(save_family(tmp_path / "model", "llama"), {})) is None


CASES = {f"{name} {bits}": (name, bits) for name in WHOLE for bits in ("nf4", "int8")}
del CASES["falcon int8"]


@pytest.mark.parametrize(("name", "bits"), CASES.values(), ids=CASES)
def test_modules_that_stay_whole(name, bits, tmp_path):
    settings = {"nf4": NF4, "int8": INT8}[bits]
    task, whole = WHOLE[name]
    model = _load(save_family(tmp_path / "model", name), settings, task)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    kinds = Linear4bit | Linear8bitLt
    unpacked = {n for n, layer in linear.items() if not isinstance(layer, kinds)}
    expected = {n for n in linear if any(f"{n}.".startswith(f"{part}.") for part in whole)}
    assert unpacked - {"lm_head"} == expected
    assert all(linear[n].weight.dtype == torch.float32 for n in unpacked)
    if whole:
        assert expected
    ids = torch.tensor([[5, 80, 81, 100, 12, 7, 9, 33]])
    assert model(input_ids=ids).logits.isfinite().all()


def test_a_list_in_the_config_adds_to_the_tower(tmp_path):
    folder = save_family(tmp_path / "model", "qwen3_vl")
    model = _load(folder, NF4 | {"llm_int8_skip_modules": ["lm_head", "q_proj"]})
    decoder = model.model.language_model.layers[0]
    assert not isinstance(decoder.self_attn.q_proj, Linear4bit)
    assert isinstance(decoder.self_attn.k_proj, Linear4bit)
    assert not isinstance(model.model.visual.blocks[0].attn.qkv, Linear4bit)


def test_quantization_that_packs_nothing_is_refused_before_loading(tmp_path):
    folder = save_family(tmp_path / "model", "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="would pack none of the weights of LlamaForCausalLM"):
        _load(folder, NF4 | {"llm_int8_skip_modules": ["model", "lm_head"]})


def test_falcon_in_8_bits_is_refused(tmp_path):
    with pytest.raises(UserError, match="would pack none of the weights of FalconForCausalLM"):
        _load(save_family(tmp_path / "model", "falcon"), INT8)


def _load(folder, settings, task="CAUSAL_LM"):
    machine = Machine("cpu", "float32", "sdpa")
    return load_model(ModelConfig(path=str(folder)), settings, machine, task=task)
