"""Weights in bytes, against what loading makes of them and against plain arithmetic."""

import io

import pytest
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.memory_configs import INT8, LLAMA_8B, LORA, NF4, TINY
from helpers.model_families import save_family
from luthier.memory import meta_model, workload
from luthier.memory.plan import plan_memory
from luthier.memory.report import print_plan
from luthier.model.device import Machine
from luthier.model.load import describe_packing, load_model

LAYER_8B = 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336
NORM = 4096
TABLES_8B = 2 * 128256 * 4096


def listed(config):
    machine = workload.machine_for(config.model, workload.hypothetical_gpus(2**36, 1))
    model = meta_model.build_meta_model(config, machine)
    with FakeTensorMode():
        meta_model.fill_fake_weights(model)
        return meta_model.list_weights(model)


def bytes_of(found, form, trains=False):
    return sum(w.stored for w in found if w.format == form and w.trains == trains)


@pytest.fixture(scope="module")
def llama(shapes):
    """Two layers of it: all are alike."""
    return shapes("llama", LLAMA_8B | {"num_hidden_layers": 2})


def test_llama_8b_in_bfloat16(shapes, configured):
    found = listed(configured(shapes("whole", LLAMA_8B), dtype="auto"))
    base = [w for w in found if not w.trains]
    assert (
        sum(w.elements for w in base) == 32 * (LAYER_8B + 2 * NORM) + NORM + TABLES_8B == 8030261248
    )
    assert bytes_of(found, "bfloat16") == 2 * 8030261248


def test_llama_8b_in_nf4(llama, configured):
    found = listed(configured(llama, quantization=NF4, dtype="auto"))
    quantized = 2 * LAYER_8B
    blocks = quantized // 64
    tables = 2 * 7 * (16 * 4 + 256 * 4 + 4)
    assert bytes_of(found, "nf4") == quantized // 2 + blocks + blocks // 256 * 4 + tables
    assert bytes_of(found, "bfloat16") == 2 * (5 * NORM + TABLES_8B)


def test_llama_8b_in_int8(llama, configured):
    found = listed(configured(llama, quantization=INT8, dtype="auto"))
    rows = 2 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
    assert bytes_of(found, "int8") == 2 * LAYER_8B + rows * 4


def test_an_adapter_is_float32_and_has_peft_s_size(llama, configured):
    found = listed(configured(llama, lora={"r": 16}, dtype="auto"))
    pairs = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096),
             (4096, 14336), (4096, 14336), (14336, 4096)]  # fmt: skip
    trained = 2 * sum(16 * (ins + outs) for ins, outs in pairs)
    assert bytes_of(found, "float32", trains=True) == 4 * trained == 4 * 41943040 // 16


def test_layers_and_tables_are_known(llama, configured):
    found = listed(configured(llama, lora={}))
    assert len({w.layer for w in found} - {""}) == 2
    assert [w.name for w in found if not w.layer] == [
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
    ]  # fmt: skip
    assert [w.name for w in found if w.embeds] == ["model.embed_tokens.weight"]
    assert all(w.trains and w.format == "float32" for w in found)


def test_tied_weights_count_once(shapes, configured):
    folder = shapes("tied", TINY | {"tie_word_embeddings": True})
    found = listed(configured(folder, lora={}))
    assert [w.name for w in found if not w.layer] == [
        "model.embed_tokens.weight", "model.norm.weight"
    ]  # fmt: skip


def experts_run(configured, folder, quantization, **args):
    """A run in bfloat16 with LoRA on the experts of a model."""
    names = ["experts.gate_up_proj", "experts.down_proj"]
    lora = LORA | {"lora_dropout": 0.0, "target_modules": ["q_proj"], "target_parameters": names}
    model = {"attention": "eager"}
    return configured(folder, lora, quantization, dtype="bfloat16", model=model, **args)


def test_packed_experts_take_the_bytes_that_loading_makes_of_them(tmp_path, configured):
    config = experts_run(configured, save_family(tmp_path / "gpt_oss", "gpt_oss"), NF4)
    planned = listed(config)
    loaded = load_model(config.model, NF4, Machine("cpu", "bfloat16", "eager"))
    buffers = sum(tensor.numel() * tensor.itemsize for tensor in loaded.buffers())
    real = sum(tensor.numel() * tensor.itemsize for tensor in meta_model.iterate_tensors(loaded))
    assert sum(w.stored for w in planned if not w.trains) == pytest.approx(real - buffers, rel=0.01)
    experts = [w for w in planned if w.is_expert]
    assert {w.format for w in experts} == {"nf4"}
    assert sum(w.elements for w in experts) == 2 * 4 * (64 * 192 + 96 * 64)
    assert plan_memory(config).unpacked_experts == {}


def test_experts_that_int8_leaves_whole_are_counted_and_named(tmp_path, configured):
    config = experts_run(configured, save_family(tmp_path / "gpt_oss", "gpt_oss"), INT8)
    plan = plan_memory(config)
    assert plan.unpacked_experts == {"bfloat16": 2 * 2 * 4 * (64 * 192 + 96 * 64)}
    text = io.StringIO()
    print_plan(plan, [], Console(file=text, width=200))
    assert "experts stay in bfloat16: 0.00 GB. Only quantization=nf4 or fp4" in text.getvalue()
    loaded = load_model(config.model, INT8, Machine("cpu", "bfloat16", "eager"))
    assert describe_packing(loaded).startswith("int8 packs ")
    assert f"{describe_packing(loaded)}." in text.getvalue()


def test_a_step_holds_the_unpacked_experts_of_one_layer_where_it_checkpoints(shapes, configured):
    layers, experts, hidden, inner = 6, 16, 256, 512
    sizes = TINY | {"num_hidden_layers": layers, "hidden_size": hidden, "head_dim": 64}
    sizes |= {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": inner}
    folder = shapes("experts", sizes | {"dtype": "bfloat16"}, "Qwen3MoeConfig")
    peaks = {}
    for checkpoints in (False, True):
        config = experts_run(configured, folder, NF4, activation_checkpointing=checkpoints)
        parts = {item.name: item.bytes for item in plan_memory(config).best.parts}
        peaks[checkpoints] = sum(parts.get(name, 0) for name in ("activations", "backward"))
    unpacked = 2 * experts * 3 * hidden * inner
    # What was unpacked; frozen weights have no gradient.
    assert unpacked < peaks[True] < unpacked * 1.3
    assert peaks[False] > layers * unpacked
