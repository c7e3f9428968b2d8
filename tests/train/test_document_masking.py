"""Packed documents train as single rows do in classes that do not keep them apart themselves."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.model_families import make_family_model
from helpers.sft_trainer import model, packing, plain_loss, rows, trainer
from luthier.data.batching.collators import FlatteningCollator, PackingCollator
from luthier.train.packing_check import check_isolation

LENGTHS = "1 of 2 layers carry a state and run document by document"
ALL = "2 of 2 layers carry a state and run document by document"
MASKS = "attention gets masks of single documents"
FAMILIES = {
    "gpt_oss": MASKS, "lfm2": LENGTHS, "mamba2": ALL, "qwen3_5": LENGTHS,
    "granite_moe_hybrid": f"{LENGTHS}; {MASKS}", "qwen2_5_vl": MASKS,
}  # fmt: skip


def with_adapter(net):
    """LoRA on every layer whose weights no kernel reads past it, B not zero."""
    targets = r".*\.(q_proj|v_proj|in_proj|in_proj_qkv|down_proj|gate_proj)"
    adapted = get_peft_model(net, LoraConfig(r=4, target_modules=targets, lora_dropout=0.0))
    torch.manual_seed(2)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data = 0.1 * torch.randn(weight.shape)
    return adapted


@pytest.mark.parametrize("recomputes", [False, True], ids=["activations kept", "recomputed"])
@pytest.mark.parametrize("adapts", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_loss_and_gradients_are_those_of_single_rows(tmp_path, name, adapts, recomputes):
    net, data = make_family_model(name), rows(count=12)
    net = with_adapter(net) if adapts else net
    alone = copy.deepcopy(net)
    expected = plain_loss(alone, data)
    expected.backward()
    made = trainer(
        net, tmp_path, data, packing(), per_device_train_batch_size=2, router_aux_loss_coef=0.0
    )
    assert str(made.isolation.documents) == FAMILIES[name]
    if recomputes:
        net.activation_checkpointing_enable({"use_reentrant": False})
    net.train()
    batches, count = made.get_batch_samples(
        iter(made.get_train_dataloader()), 1000, torch.device("cpu")
    )
    assert 1 < len(batches) < 6
    loss = 0
    for batch in batches:
        part = made.compute_loss(net, batch, num_items_in_batch=count)
        part.backward()
        loss += part.item()
    assert loss == pytest.approx(expected.item(), rel=2e-6)
    scale = max(w.grad.norm() for w in alone.parameters() if w.grad is not None)
    for (label, a), b in zip(net.named_parameters(), alone.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), label
        if b.grad is not None:
            assert (a.grad - b.grad).norm() <= 2e-6 * b.grad.norm() + 1e-7 * scale, label


@pytest.mark.parametrize("collator", [PackingCollator, FlatteningCollator])
@pytest.mark.parametrize("name", ["lfm2", "mamba2", "gpt_oss"])
def test_rows_and_flat_rows_stay_apart(name, collator):
    shown = check_isolation(make_family_model(name), collator(0))
    assert shown.content < 1e-6
    assert shown.position < 1e-5


@pytest.mark.parametrize("name", ["lfm2", "gpt_oss"])
def test_what_is_not_packed_computes_as_before(name):
    net = make_family_model(name)
    ids = torch.arange(3, 23)[None]
    mask = torch.ones_like(ids)
    kinds = ({}, {"attention_mask": mask}, {"position_ids": torch.arange(20)[None]})
    before = [net(ids, **kind).logits for kind in kinds]
    replies = net.generate(ids, max_new_tokens=4, do_sample=False)
    state, config = set(net.state_dict()), net.config.to_dict()
    # Batches of the same shape as one that was packed.
    documents = check_isolation(net, PackingCollator(0)).documents
    documents.expect_batch(torch.tensor([[*range(12), *range(8)]]))
    apart = net(ids, position_ids=torch.tensor([[*range(12), *range(8)]]), use_cache=False).logits
    assert not torch.allclose(apart, before[0], atol=1e-3)
    assert [torch.equal(net(ids, **kind).logits, b) for kind, b in zip(kinds, before, strict=True)]
    assert torch.equal(net.generate(ids, max_new_tokens=4, do_sample=False), replies)
    assert (set(net.state_dict()), net.config.to_dict()) == (state, config)


def test_a_copy_of_a_model_watches_its_own_layers():
    net = make_family_model("lfm2")
    check_isolation(net, PackingCollator(0))
    other = copy.deepcopy(net)
    for weight in other.parameters():
        torch.nn.init.zeros_(weight)
    ids = torch.arange(3, 23)[None]
    assert other(ids).logits.abs().max() == 0
    assert net(ids).logits.abs().max() > 0


def test_a_layer_is_called_once_where_ranks_must_make_the_same_calls():
    net = make_family_model("lfm2")
    documents = check_isolation(net, PackingCollator(0), is_sharded=True).documents
    calls = []
    net.model.layers[0].conv.in_proj.register_forward_hook(lambda *all: calls.append(all))
    positions = torch.tensor([[*range(2), *range(3), *range(15)]])
    documents.expect_batch(positions)
    net(torch.arange(3, 23)[None], position_ids=positions, use_cache=False)
    assert len(calls) == 1


def test_a_convolution_with_an_adapter_is_no_layer_of_its_own():
    net = make_family_model("lfm2")
    with pytest.warns(UserWarning, match="groups > 1"):
        adapted = get_peft_model(net, LoraConfig(r=64, target_modules=r".*\.conv\.conv"))
    documents = check_isolation(adapted, PackingCollator(0)).documents
    assert documents.recurrent_layers == 1


def test_models_that_keep_documents_apart_stay_as_they_are():
    net = model("llama")
    assert check_isolation(net, PackingCollator(0)).documents is None
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_evaluation_of_packed_and_padded_rows_is_the_same(tmp_path):
    data = rows(count=12)
    for plan in (packing(), packing(eval_packing=False)):
        net = make_family_model("lfm2")
        made = trainer(net, tmp_path, data, plan, per_device_eval_batch_size=3)
        with torch.no_grad():
            expected = plain_loss(make_family_model("lfm2"), data).item()
        assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=2e-6)
