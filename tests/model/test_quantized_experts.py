"""Experts packed in 4 bits, against the model that holds the same numbers unpacked in float32."""

import copy
import json
import shutil
import warnings

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers.model_families import save_family
from luthier.config.library_settings import QuantizationSettings
from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.export.adapter_delta import dequantized_as_trained
from luthier.infer.dequantize import dequantized_layers
from luthier.model.adapters import add_adapter
from luthier.model.device import Machine
from luthier.model.expert_lora import adapt_experts
from luthier.model.experts import (
    describe_unpacked_experts,
    find_experts,
    find_routers,
    unpacked_expert_bytes,
)
from luthier.model.load import keep_backward_kernels, load_model
from luthier.model.quantized_experts import (
    QuantizedExperts,
    find_packed_experts,
    quantize_experts,
)

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FAMILIES = (
    "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_5_moe", "gemma4_moe", "jamba",
    "llama4_text",
)  # fmt: skip
IDS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a family's checkpoint by its name, made once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = save_family(tmp_path_factory.mktemp(name), name)
        return made[name]

    return folder


def load(folder, quantization=NF4, dtype="float32", **kwargs):
    config = ModelConfig(path=str(folder), kwargs=kwargs)
    return load_model(config, quantization, Machine("cpu", dtype, "eager")).requires_grad_(False)


def unpacked_reference(packed, folder):
    """The plain float32 model with the numbers of a packed one, by bitsandbytes alone."""
    reference = load(folder, {})
    plain = dict(reference.named_modules())
    for name, module in packed.named_modules():
        for key, weight in module._parameters.items():
            if isinstance(weight, Params4bit):
                numbers = dequantize_4bit(weight.data, weight.quant_state)
                plain[name]._parameters[key].data = numbers.float()
    return reference


def adapters_of(*models, rank=4):
    """The models with one LoRA on all experts, which has trained for a while."""
    names = [name for experts in find_experts(models[0]) for name in experts.parameter_names]
    adapted = []
    for model in models:
        torch.manual_seed(0)
        config = LoraConfig(r=rank, lora_alpha=8, target_modules=[], target_parameters=names)
        adapted.append(adapt_experts(get_peft_model(model, config)))
    torch.manual_seed(1)
    for weights in zip(*(trained(model).values() for model in adapted), strict=True):
        noise = 0.05 * torch.randn(weights[0].shape)
        for weight in weights:
            weight.data = weight.data.float() + noise
    return adapted


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_and_gradients(model):
    model.train()
    model.zero_grad()
    logits = model(input_ids=IDS).logits.float()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in trained(model).items()}


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def relative_error(gradients, wanted):
    assert list(gradients) == list(wanted)
    assert all(wanted[name].norm() > 0 for name in wanted)
    return max(((gradients[n] - wanted[n]).norm() / wanted[n].norm()).item() for n in wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_unpacked_model(folders, family):
    folder = folders(family)
    packed = load(folder)
    names = find_packed_experts(packed)
    reference = unpacked_reference(packed, folder)
    assert names == [n for experts in find_experts(reference) for n in experts.parameter_names]
    assert find_experts(packed) == find_experts(reference)
    assert find_routers(packed) == find_routers(reference)
    assert torch.equal(logits_of(packed), logits_of(reference))
    assert not torch.equal(logits_of(packed), logits_of(load(folder, {})))
    packed, reference = adapters_of(packed, reference)
    logits, gradients = loss_and_gradients(packed)
    wanted_logits, wanted = loss_and_gradients(reference)
    assert len(wanted) == 2 * len(names)
    torch.testing.assert_close(logits, wanted_logits, rtol=0, atol=1e-5)
    assert relative_error(gradients, wanted) < 1e-5


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("checkpoints", [False, True], ids=["kept", "checkpointing"])
def test_every_way_to_multiply_experts_works(folders, implementation, checkpoints):
    folder = folders("gpt_oss")
    packed = load(folder, experts_implementation=implementation)
    packed, reference = adapters_of(packed, unpacked_reference(packed, folder))
    if checkpoints:
        packed.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        packed.enable_input_require_grads()
    assert relative_error(loss_and_gradients(packed)[1], loss_and_gradients(reference)[1]) < 1e-5
    modules = [layer for layer in packed.modules() if isinstance(layer, QuantizedExperts)]
    assert all(module._unpacked is None and not module._added for module in modules)


VARIANTS = {
    "nf4": NF4,
    "fp4": NF4 | {"bnb_4bit_quant_type": "fp4"},
    "scales in float32": NF4 | {"bnb_4bit_use_double_quant": False},
    "stored in bfloat16": NF4 | {"bnb_4bit_quant_storage": "bfloat16"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_experts_take_the_bytes_of_their_type_and_the_numbers_of_the_merge(folders, variant):
    folder = folders("mixtral")
    settings = VARIANTS[variant]
    packed, plain = load(folder, settings), load(folder, {})
    for experts in find_experts(packed):
        module = packed.get_submodule(experts.name)
        for name, (count, rows, columns) in experts.shapes.items():
            weight, numbers = module._parameters[name], count * rows * columns
            state = weight.quant_state
            assert weight.numel() * weight.itemsize == numbers // 2
            scale_bytes = 1 if settings["bnb_4bit_use_double_quant"] else 4
            assert state.absmax.numel() * state.absmax.itemsize == numbers // 64 * scale_bytes
            before = plain.get_submodule(experts.name)._parameters[name].data
            merged = dequantized_as_trained(before, QuantizationSettings(settings), False)
            assert torch.equal(getattr(module, name), merged)
            assert not torch.equal(before, merged)


def test_blocks_may_run_over_the_end_of_an_expert():
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.randn(3, 5, 7))
    settings = BitsAndBytesConfig(**NF4)
    before = module.weight.data.clone()
    quantize_experts(module, ["weight"], settings)
    module.to("cpu")
    wanted = dequantized_as_trained(before, QuantizationSettings(NF4), False)
    assert module.weight.shape == (3, 5, 7)
    assert torch.equal(module.weight, wanted)


def test_products_are_computed_in_the_format_that_is_asked_for(folders):
    folder = folders("gpt_oss")
    packed = load(folder, NF4 | {"bnb_4bit_compute_dtype": "bfloat16"})
    module = packed.get_submodule(find_experts(packed)[0].name)
    assert module.gate_up_proj.dtype == torch.bfloat16
    for implementation in ("eager", "grouped_mm"):
        packed.set_experts_implementation(implementation)
        logits = logits_of(packed)
        reference = logits_of(unpacked_reference(packed, folder))
        assert 0 < (logits - reference).abs().max() < 0.1 * reference.std()


def test_gradients_in_bfloat16_are_as_near_as_those_of_linear_layers(folders):
    folder = folders("qwen3_moe")
    packed = load(folder, dtype="bfloat16")
    packed, reference = adapters_of(packed, unpacked_reference(packed, folder))
    _, gradients = loss_and_gradients(packed)
    _, wanted = loss_and_gradients(reference)
    flat = [torch.cat([side[name].flatten() for name in wanted]) for side in (gradients, wanted)]
    # The bound of test_load_4bit: routers choose other experts for a few tokens.
    assert torch.cosine_similarity(*flat, dim=0) > 0.98


def test_the_adapter_is_that_of_plain_peft(folders, tmp_path):
    folder = folders("gpt_oss")
    packed = load(folder)
    reference = unpacked_reference(packed, folder)
    names = [name for experts in find_experts(packed) for name in experts.shapes]
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj"]}
    lora["target_parameters"] = [f"experts.{name}" for name in dict.fromkeys(names)]
    adapted = add_adapter(packed, lora, seed=0)
    torch.manual_seed(1)
    for weight in trained(adapted).values():
        weight.data += 0.05 * torch.randn_like(weight)
    adapted.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    plain.load_state_dict(reference.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded = PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(logits_of(loaded), logits_of(adapted), rtol=0, atol=1e-5)
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted), logits_of(reference))


def test_a_reply_unpacks_once_and_an_adapter_may_be_switched_off_in_between(folders):
    folder = folders("qwen3_moe")
    packed = load(folder)
    (packed,) = adapters_of(packed)
    with_adapter = logits_of(packed)
    with packed.disable_adapter():
        without = logits_of(packed)
    assert not torch.equal(with_adapter, without)
    with dequantized_layers(packed):
        module = next(m for m in packed.modules() if isinstance(m, QuantizedExperts))
        for _ in range(2):
            assert torch.equal(logits_of(packed), with_adapter)
            with packed.disable_adapter():
                assert torch.equal(logits_of(packed), without)
        assert len(module._held) == 2
    assert module._held is None


def test_copies_and_moves_keep_the_scales(folders):
    packed = load(folders("qwen3_moe"))
    logits = logits_of(packed)
    twin = copy.deepcopy(packed)
    assert torch.equal(logits_of(twin), logits)
    assert torch.equal(logits_of(twin.to("cpu")), logits)


def test_int8_leaves_experts_whole_and_says_so(folders):
    packed = load(folders("mixtral"), {"load_in_8bit": True}, dtype="bfloat16")
    count = sum(experts.num_weights for experts in find_experts(packed))
    sizes = unpacked_expert_bytes(packed)
    assert sizes == {"bfloat16": 2 * count}
    text = describe_unpacked_experts(sizes)
    assert text.startswith("experts stay in bfloat16: 0.00 GB.")
    assert unpacked_expert_bytes(load(folders("mixtral"))) == {}
    assert describe_unpacked_experts({}) is None


def test_a_checkpoint_that_transformers_packed_has_its_experts_whole(folders, tmp_path):
    settings = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(
        folders("qwen3_moe"), quantization_config=settings, dtype=torch.float32
    )
    plain.save_pretrained(tmp_path)
    loaded = load(tmp_path, {})
    assert find_packed_experts(loaded) == []
    assert unpacked_expert_bytes(loaded)
    keep_backward_kernels(plain)
    torch.testing.assert_close(logits_of(loaded), logits_of(plain), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scales", ["absmax", "SCB"])
def test_experts_that_were_packed_one_by_one_are_refused_before_loading(folders, tmp_path, scales):
    folder = tmp_path / "packed"
    shutil.copytree(folders("qwen3_moe"), folder)
    config = json.loads((folder / "config.json").read_text())
    bits = "load_in_8bit" if scales == "SCB" else "load_in_4bit"
    config["quantization_config"] = {"quant_method": "bitsandbytes", bits: True}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    name = f"model.layers.0.mlp.experts.0.down_proj.weight.{scales}"
    save_file(weights | {name: torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"packed one by one \({name}\)(.|\n)*quantization=nf4"):
        load(folder, {})


# The libraries by themselves: where one of these fails, a workaround of luthier's can go.


def test_transformers_alone_leaves_experts_whole(folders):
    model = AutoModelForCausalLM.from_pretrained(
        folders("mixtral"), quantization_config=BitsAndBytesConfig(**NF4)
    )
    assert unpacked_expert_bytes(model)


def test_peft_alone_cannot_train_on_packed_parameters(folders):
    """bitsandbytes 0.50's own helper hides the parameter from peft 0.21."""
    model = load(folders("mixtral"), {})
    for experts in find_experts(model):
        replace_parameter_4bit(model.get_submodule(experts.name), "down_proj")
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    with pytest.warns(match="no parameter was matched"):
        adapted = get_peft_model(model, config)
    assert not any("experts" in name for name in trained(adapted))
