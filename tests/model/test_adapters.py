import pytest
import torch

from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model.adapters import add_adapter
from luthier.model.device import Machine
from luthier.model.load import load_model

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"load_in_8bit": True}
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
IDS = torch.tensor([[5, 80, 81, 100, 12, 7, 9, 33]])


def load(folder, quantization=None, dtype="float32"):
    config = ModelConfig(path=str(folder))
    return load_model(config, quantization or {}, Machine("cpu", dtype, "sdpa"))


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


BASES = {
    "float32": ({}, "float32"),
    "bfloat16": ({}, "bfloat16"),
    "nf4": (NF4, "bfloat16"),
    "int8": (INT8, "float32"),
}


@pytest.mark.parametrize(("quantization", "dtype"), BASES.values(), ids=BASES)
def test_only_the_adapter_trains_and_in_float32(tiny_model, quantization, dtype):
    model = add_adapter(load(tiny_model, quantization, dtype), LORA, seed=1)
    assert len(trained(model)) == 2 * 7 * 2
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained(model).items())
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for name, p in trained(model).items() if "lora_B" in name]
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("quantization", [{}, NF4], ids=["bfloat16", "nf4"])
@pytest.mark.parametrize("layers", [["lm_head"], ["embed_tokens"], ["norm"]], ids=lambda x: x[0])
def test_whole_layers_train_in_float32_inside_a_bfloat16_base(tiny_model, quantization, layers):
    base = load(tiny_model, quantization, "bfloat16")
    with torch.no_grad():
        wanted = base(IDS).logits
    model = add_adapter(base, LORA | {"modules_to_save": layers}, seed=1)
    got = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(got.logits, wanted, rtol=0.02, atol=0.02)
    got.loss.backward()
    copies = [p for name, p in trained(model).items() if "modules_to_save" in name]
    assert len(copies) == (1 + 2 * 2 if layers == ["norm"] else 1)
    assert {(p.dtype, p.grad.dtype) for p in copies} == {(torch.float32, torch.float32)}


def test_the_base_keeps_its_number_formats(tiny_model):
    model = add_adapter(load(tiny_model, NF4, "bfloat16"), LORA, seed=1)
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.uint8, torch.bfloat16}


def test_the_seed_decides_the_weights_and_nothing_else_moves(tiny_model):
    state = torch.random.get_rng_state()
    one, same, other = (add_adapter(load(tiny_model), LORA, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, weight in trained(one).items():
        assert torch.equal(weight, trained(same)[name])
    assert any(not torch.equal(w, trained(other)[name]) for name, w in trained(one).items())


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model):
    gradients = []
    for checkpointing in (False, True):
        model = add_adapter(load(tiny_model), LORA, seed=1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in trained(model).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


WRONG = {
    "one of two": (
        {"target_modules": ["q_proj", "v_porj"]},
        ["no layer is named v_porj", "v_proj?"],
    ),
    "a name as pattern": ({"target_modules": "q_proj"}, ["write a list: [q_proj]"]),
    "a pattern": ({"target_modules": r".*\.w\d"}, ["matches no layer", "o_proj, q_proj"]),
    "a quantized layer": ({"modules_to_save": ["up_proj"]}, ["lora: ", "floating point"]),
    "rank": ({"r": 0}, ["lora: ", "positive"]),
}


@pytest.mark.parametrize(("lora", "said"), WRONG.values(), ids=WRONG)
def test_wrong_settings_are_told(tiny_model, lora, said):
    with pytest.raises(UserError) as raised:
        add_adapter(load(tiny_model, NF4), LORA | lora, seed=1)
    for words in said:
        assert words in str(raised.value)


@pytest.mark.parametrize("targets", [["q_proj", "mlp.up_proj"], r".*\.(q|v)_proj"], ids=str)
def test_names_and_patterns_pick_layers(tiny_model, targets):
    model = add_adapter(load(tiny_model), LORA | {"target_modules": targets}, seed=1)
    assert len(trained(model)) == 2 * 2 * 2


def test_a_saved_adapter_gives_the_same_logits_in_plain_peft(tiny_model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = add_adapter(load(tiny_model), LORA, seed=1)
    for name, weight in trained(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, model.eval()(IDS).logits)
