"""LoRA beside the weights of experts: as torch multiplies by the sum, whatever multiplies."""

import copy

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.layer import ParamWrapper

from helpers.adapter_models import config_of, gradients, stir
from helpers.model_families import FAMILIES, save_family
from luthier.memory.meta_model import build_meta_model
from luthier.model.adapters import add_adapter
from luthier.model.device import Machine
from luthier.model.expert_adapters import load_adapter
from luthier.model.expert_lora import ExpertsLora, FactoredWeight, LoraTerm, adapt_experts

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
IDS = torch.tensor([[5, 80, 81, 100, 12, 7, 9, 33]])
MIXTURES = [
    *("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe", "qwen3_next", "qwen3_5_moe"),
    *("gemma4_moe", "jamba", "lfm2_moe", "granite_moe_hybrid", "llama4_text", "nemotron_h"),
]
X, OFFSETS = torch.randn(6, 8), torch.tensor([2, 2, 6], dtype=torch.int32)
CHOSEN = torch.tensor([0, 2, 2, 1, 0, 1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the checkpoint of a family lies; each is made once."""
    root, folders = tmp_path_factory.mktemp("families"), {}

    def make(family):
        if family not in folders:
            folders[family] = save_family(root / family, family)
        return folders[family]

    return make


def plain(path, family, implementation="grouped_mm", dtype=torch.float32):
    """The model as transformers alone loads it."""
    model_class = getattr(transformers, FAMILIES[family].architecture)
    model = model_class.from_pretrained(path, attn_implementation="eager", dtype=dtype)
    if family != "llama4_text":
        # Its experts have a forward of their own alone.
        model.set_experts_implementation(implementation)
    return model


def with_peft_alone(model):
    """A copy whose adapters are computed by peft's own layers."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, ExpertsLora):
            layer.__class__ = ParamWrapper
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def factored(rank=4):
    """Weights of 3 experts with two adapters, and their sum."""
    torch.manual_seed(0)
    weight = torch.randn(3, 8, 12)
    shapes = ((3, 8, rank), (3, rank, 12))
    terms = [LoraTerm(*(torch.randn(shape) for shape in shapes), scale) for scale in (0.5, 2.0)]
    total = weight + sum(term.scale * term.left @ term.right for term in terms)
    return FactoredWeight(weight, terms), total


def fallback(x, weight):
    """transformers' product where torch has none."""
    return torch.ops.transformers.grouped_mm_fallback(x, weight, offs=OFFSETS)


LINEAR = torch.nn.functional.linear
PRODUCTS = {
    "an expert, @": lambda w: X @ w[1],
    "an expert, mm": lambda w: torch.mm(X, w[1]),
    "an expert, linear": lambda w: LINEAR(X, w.transpose(1, 2)[1]),
    "linear with a bias": lambda w: LINEAR(X, w[2].transpose(0, 1), torch.ones(12)),
    "an expert by a tensor": lambda w: torch.matmul(X, w[torch.tensor(2)]),
    "in float32": lambda w: X @ w[0].float(),
    "batches": lambda w: torch.bmm(X.view(3, 2, 8), w),
    "batches of chosen experts": lambda w: torch.bmm(X[:, None], w[CHOSEN]),
    "batches, the weight first": lambda w: torch.bmm(w.transpose(1, 2), X.view(3, 2, 8).mT),
    "groups": lambda w: torch.nn.functional.grouped_mm(X, w, offs=OFFSETS),
    "groups without torch's product": lambda w: fallback(X, w),
}  # fmt: skip


@pytest.mark.parametrize("rank", [4, 8, 11])
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products_are_those_of_the_sum_and_do_not_make_it(product, rank, monkeypatch):
    weight, total = factored(rank)
    torch.testing.assert_close(weight.sum(), total)
    expected = product(total)
    monkeypatch.setattr(FactoredWeight, "sum", None)
    torch.testing.assert_close(product(weight), expected, rtol=1e-4, atol=1e-4)


OTHERS = {
    "a slice": lambda w: w[1:],
    "a mask": lambda w: w[torch.tensor([True, False, True])],
    "other axes": lambda w: w.transpose(0, 1),
    "einsum": lambda w: torch.einsum("si,eio->seo", X, w),
    "a method": lambda w: w.permute(2, 0, 1),
    "a product from the left": lambda w: torch.matmul(torch.ones(4, 8), w),
    "a name": lambda w: torch.bmm(X.view(3, 2, 8), mat2=w),
}


@pytest.mark.parametrize("function", OTHERS.values(), ids=OTHERS)
def test_all_else_is_computed_with_the_sum(function):
    weight, total = factored()
    torch.testing.assert_close(function(weight), function(total), rtol=1e-4, atol=1e-4)
    assert (weight.shape, weight.dtype, weight.ndim) == (total.shape, total.dtype, 3)
    with pytest.raises(AttributeError):
        weight.data_ptr()


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("family", MIXTURES)
def test_logits_and_gradients_are_those_of_plain_peft(family, implementation, folder, monkeypatch):
    model = add_adapter(plain(folder(family), family, implementation), LORA, seed=1)
    stir(model)
    reference = with_peft_alone(model)
    # No module of these makes the sum.
    monkeypatch.setattr(FactoredWeight, "sum", None)
    real, expected = gradients(model, IDS), gradients(reference, IDS)
    assert real.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(real[name], gradient, rtol=1e-3, atol=2e-5)
    experts = [layer for layer in model.modules() if isinstance(layer, ExpertsLora)]
    assert experts
    for layer in experts:
        # What the module read was there for the forward alone.
        assert layer.parameter_name not in vars(layer.get_base_layer())


def test_no_copy_of_the_experts_is_kept_for_the_backward(folder):
    def kept(model):
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(input_ids=IDS, labels=IDS)
        assert output.loss.requires_grad
        return sum(size for size, _ in storages.values())

    base = plain(folder("qwen3_moe"), "qwen3_moe")
    experts = sum(p.nbytes for name, p in base.named_parameters() if ".experts." in name)
    model = add_adapter(base, LORA, seed=1)
    assert kept(with_peft_alone(model)) - kept(model) > 0.6 * experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_16_bits_round_products_and_not_the_adapter(dtype, folder):
    """Without autocast the adapter is computed in float32, under autocast in its format."""
    model = add_adapter(plain(folder("qwen3_moe"), "qwen3_moe", dtype=dtype), LORA, seed=1)
    stir(model)
    layer = next(layer for layer in model.modules() if isinstance(layer, ExpertsLora))
    assert layer._make_term("default").left.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer._make_term("default").left.dtype == torch.bfloat16
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32
    with torch.no_grad():
        exact = add_adapter(plain(folder("qwen3_moe"), "qwen3_moe"), LORA, seed=1)
        stir(exact)
        expected = exact.eval()(input_ids=IDS).logits
        error = (model.eval()(input_ids=IDS).logits.float() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 0.2)


def test_two_adapters_are_added_up_and_one_can_be_switched_off(folder, tmp_path):
    model = add_adapter(plain(folder("gpt_oss"), "gpt_oss"), LORA, seed=1)
    folders = [tmp_path / "first", tmp_path / "second"]
    for path in folders:
        stir(model)
        model.save_pretrained(path)
    both = load_adapter(plain(folder("gpt_oss"), "gpt_oss"), folders[0])
    both = load_adapter(both, folders[1], "second").eval()
    reference = peft.PeftModel.from_pretrained(plain(folder("gpt_oss"), "gpt_oss"), folders[0])
    reference.load_adapter(folders[1], "second")
    reference.eval()
    for active in (["default", "second"], ["second"]):
        for wrapped in (both, reference):
            wrapped.base_model.set_adapter(active)
        torch.testing.assert_close(logits(both), logits(reference), rtol=0, atol=1e-5)
    with both.disable_adapter(), reference.disable_adapter():
        assert torch.equal(logits(both), logits(reference))


def test_kernels_that_read_weights_themselves_get_the_sum(folder):
    model = add_adapter(plain(folder("qwen3_moe"), "qwen3_moe"), LORA, seed=1)
    layer = next(layer for layer in model.modules() if isinstance(layer, ExpertsLora))
    experts = layer.get_base_layer()
    experts.config._experts_implementation = "sonicmoe"
    with layer._activate_lora(["default"]):
        assert isinstance(getattr(experts, layer.parameter_name), torch.Tensor)


def test_adapters_on_other_parameters_stay_as_peft_computes_them(folder):
    config = peft.LoraConfig(target_parameters=["q_proj.weight", "experts.down_proj"])
    model = adapt_experts(peft.get_peft_model(plain(folder("mixtral"), "mixtral"), config))
    classes = {
        layer.parameter_name: type(layer)
        for layer in model.modules()
        if isinstance(layer, ParamWrapper)
    }
    assert classes == {"weight": ParamWrapper, "down_proj": ExpertsLora}


def test_plans_simulate_the_same_layers(folder):
    model = build_meta_model(
        config_of(folder("qwen3_moe"), lora=LORA), Machine("cpu", "float32", "eager")
    )
    assert any(isinstance(layer, ExpertsLora) for layer in model.modules())


def test_peft_still_adds_to_all_experts(folder):
    """When this fails, peft computes experts beside their weights: then `ExpertsLora` can go."""
    model = add_adapter(plain(folder("qwen3_moe"), "qwen3_moe"), LORA, seed=1)
    reference = with_peft_alone(model)
    layer = next(layer for layer in reference.modules() if type(layer) is ParamWrapper)
    with layer._activate_lora(["default"]):
        weight = getattr(layer.get_base_layer(), layer.parameter_name)
        assert weight.shape == layer.get_param().shape and weight.requires_grad
