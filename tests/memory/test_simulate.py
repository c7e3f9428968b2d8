"""A step without content holds what a step with content holds, to the byte."""

import random
from dataclasses import replace

import pytest
import torch
from transformers.integrations import moe

from helpers.memory_configs import INT8, LORA, NF4
from helpers.model_families import save_family
from helpers.vision_families import save_vision_family
from luthier.memory import kernels, meta_model, simulate, workload
from luthier.memory.simulate import GRADIENTS
from luthier.model.adapters import add_adapter
from luthier.model.load import load_model
from luthier.model.vision_processor import find_vision_processor

CASES = {
    "LoRA": {},
    "LoRA, checkpoints": {"activation_checkpointing": True},
    "LoRA, bfloat16 autocast": {"dtype": "bfloat16"},
    "LoRA on nf4": {"quantization": NF4, "dtype": "bfloat16"},
    "LoRA on nf4, checkpoints": {"quantization": NF4, "activation_checkpointing": True},
    "LoRA on nf4 without double quantization": {
        "quantization": NF4 | {"bnb_4bit_use_double_quant": False}
    },
    "LoRA on int8": {"quantization": INT8},
    "LoRA and a whole layer": {"lora": LORA | {"modules_to_save": ["lm_head"]}},
    "DoRA": {"lora": LORA | {"use_dora": True}},
    "all weights": {"lora": {}},
    "all weights, bfloat16 autocast": {"lora": {}, "dtype": "bfloat16"},
    "all weights, gradients of a batch before": {"lora": {}, "gradient_accumulation_steps": 2},
    "one row, no mask": {"per_device_train_batch_size": 1},
}


def load_real_model(config, machine):
    """The model with content, as training gets it."""
    model = load_model(config.model, config.quantization, machine, full=not config.lora.is_enabled)
    if config.lora.is_enabled:
        model = add_adapter(model, config.lora, config.seed)
    for layer in meta_model._int8_layers(model):
        layer.init_8bit_state()
    return model


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_a_step_of_shapes_holds_what_a_real_step_holds(settings, tiny, configured):
    config = configured(tiny, **settings)
    machine = workload.machine_for(config.model, workload.detect_hardware(config.model))
    work = workload.read_workload(config, machine)
    planned = simulate.simulate_step(meta_model.build_meta_model(config, machine), work, "cpu")
    torch.manual_seed(0)
    done = simulate._run_step(load_real_model(config, machine), work, "cpu", (1.0,))
    assert planned.weights == done.weights
    assert planned.held == done.held
    assert planned.peaks[1.0].bytes == done.peaks[1.0].bytes


@pytest.mark.parametrize("trains", [True, False], ids=["LoRA on experts", "experts as they are"])
def test_a_mixture_holds_what_a_real_step_of_torchs_product_holds(
    trains, configured, tmp_path, monkeypatch
):
    save_family(tmp_path, "qwen3_moe")
    lora = LORA | {"experts": trains, "lora_dropout": 0.0}
    config = configured(tmp_path, lora=lora, per_device_train_batch_size=1)
    machine = workload.machine_for(config.model, workload.detect_hardware(config.model))
    work = workload.read_workload(config, machine)
    planned = simulate.simulate_step(meta_model.build_meta_model(config, machine), work, "cpu")
    monkeypatch.setattr(kernels, "grouped_mm", moe._grouped_mm)
    done = simulate._run_step(load_real_model(config, machine), work, "cpu", (1.0,))
    assert planned.weights == done.weights
    assert planned.peaks[1.0].bytes == pytest.approx(done.peaks[1.0].bytes, rel=0.002)


IMAGES = {
    "frozen tower": LORA,
    "adapter on the tower": LORA | {"vision": True},
    "all weights": {},
}


@pytest.mark.parametrize("lora", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("family", ["gemma3", "idefics3", "llava_clip", "qwen3_vl"])
def test_images_hold_what_those_of_a_real_step_hold(family, lora, configured, tmp_path):
    save_vision_family(tmp_path, family)
    model = {} if lora else {"train": ["."]}
    config = configured(tmp_path, lora=lora, model=model, max_length=64)
    machine = workload.machine_for(config.model, workload.detect_hardware(config.model))
    text = workload.read_workload(config, machine)
    work = replace(text, images=((60, 40), (28, 28)))
    processor = find_vision_processor(config.model)

    def simulate_work(work):
        made = meta_model.build_meta_model(config, machine)
        return simulate.simulate_step(made, work, "cpu", processor=processor)

    planned = simulate_work(work)
    torch.manual_seed(0)
    images = simulate.make_image_inputs(processor, work)
    loaded = load_real_model(config, machine)
    done = simulate._run_step(loaded, work, "cpu", (1.0,), images)
    assert planned.weights == done.weights
    # Idefics3's index of real tiles has a few bytes more without content.
    assert planned.peaks[1.0].bytes == pytest.approx(done.peaks[1.0].bytes, rel=0.001)
    assert planned.peaks[1.0].bytes > simulate_work(text).peaks[1.0].bytes


def simulated(config, kind="cpu", shares=(1.0,)):
    machine = workload.machine_for(config.model, workload.detect_hardware(config.model))
    work = workload.read_workload(config, machine)
    return simulate.simulate_step(meta_model.build_meta_model(config, machine), work, kind, shares)


def test_nothing_outside_moves(tiny, configured):
    random.seed(1)
    torch.manual_seed(1)
    before = torch.random.get_rng_state(), random.getstate()
    simulated(configured(tiny, activation_checkpointing=True))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    attention = torch.nn.functional.scaled_dot_product_attention
    simulated(configured(tiny), "cuda")
    assert torch.nn.functional.scaled_dot_product_attention is attention


def test_gradients_count_by_their_share(tiny, configured):
    config = configured(tiny, lora={}, gradient_accumulation_steps=2)
    found = simulated(config, shares=(1.0, 0.5, 0.0))
    whole, half, none = (found.peaks[share] for share in (1.0, 0.5, 0.0))
    gradients = sum(weight.stored for weight in found.weights)
    assert whole.bytes_by_phase[GRADIENTS] == gradients
    assert whole.bytes - half.bytes == half.bytes - none.bytes == gradients // 2


def test_activations_grow_with_rows_and_tokens(shapes, configured):
    folder = shapes("wide", {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 256,
                             "num_hidden_layers": 4, "num_attention_heads": 4,
                             "num_key_value_heads": 4})  # fmt: skip
    sizes = [
        simulated(configured(folder, max_length=length, per_device_train_batch_size=rows), "cuda")
        for rows, length in ((2, 128), (4, 128), (4, 256))
    ]
    one, two, four = (size.peaks[1.0].bytes_by_phase["activations"] for size in sizes)
    assert two / one == pytest.approx(2, rel=0.03)
    assert four / two == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("attention, grows", [("sdpa", 2), ("eager", 4)])
def test_eager_attention_keeps_the_square_of_the_length(attention, grows, shapes, configured):
    folder = shapes("thin", {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16,
                             "num_hidden_layers": 2, "num_attention_heads": 8,
                             "num_key_value_heads": 8})  # fmt: skip
    sizes = []
    for length in (1024, 2048):
        config = configured(folder, lora={}, max_length=length, per_device_train_batch_size=1)
        model = config.model.model_copy(update={"attention": attention})
        found = simulated(config.model_copy(update={"model": model}), "cuda")
        sizes.append(found.peaks[1.0].bytes_by_phase["activations"])
    assert sizes[1] / sizes[0] == pytest.approx(grows, rel=0.1)


def saved(mask, groups=1, dtype=torch.bfloat16):
    """The sizes of what the stand-in for a GPU's attention keeps for the backward."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept = []
    with (
        FakeTensorMode(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        query = torch.empty(2, 8, 32, 64, dtype=dtype, requires_grad=True)
        key = torch.empty(2, 8 // groups, 32, 64, dtype=dtype, requires_grad=True)
        given = torch.zeros(2, 1, 32, 32, dtype=torch.bool) if mask else None
        made = kernels.cuda_attention(
            query, key, key, given, is_causal=not mask, enable_gqa=groups > 1
        )
        made.sum().backward()
        assert query.grad.shape == query.shape and key.grad.shape == key.shape
    return sorted({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}.values())


Q = 2 * 8 * 32 * 64 * 2
SAVED = {
    "flash: queries, keys, output, sums": ((False, 1), [Q, Q, Q, 2 * 8 * 32 * 4]),
    "flash with shared keys": ((False, 4), [Q // 4, Q, Q, 2 * 8 * 32 * 4]),
    "efficient: and the mask as numbers": ((True, 1), [Q, Q, Q, 2 * 8 * 32 * 4, 2 * 32 * 32 * 2]),
}


@pytest.mark.parametrize("given, kept", SAVED.values(), ids=SAVED)
def test_what_attention_on_a_gpu_keeps(given, kept):
    # Counters of random numbers are there too, of a few bytes.
    assert [size for size in saved(*given) if size > 64] == sorted(kept)


def test_offloaded_activations_leave_the_device(tiny, configured):
    kept = simulated(configured(tiny, max_length=128), "cuda").peaks[1.0].bytes_by_phase
    gone = simulated(configured(tiny, max_length=128, activation_offloading=True), "cuda")
    assert gone.peaks[1.0].bytes_by_phase["activations"] < kept["activations"] / 2
