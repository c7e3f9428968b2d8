"""Weights in bytes, against what loading makes of them and against plain arithmetic."""

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.memory_configs import INT8, LLAMA_8B, NF4, TINY
from luthier.memory import meta_model, workload

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
