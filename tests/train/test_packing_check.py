"""Packed documents do not see each other: losses, gradients, the proof before the first step."""

import copy
from itertools import pairwise

import pytest
import torch
from transformers import AttentionInterface

from helpers.sft_trainer import model, packing, plain_loss, rows, trainer
from luthier.data.batching.collators import FlatteningCollator, PackingCollator
from luthier.data.batching.settings import BatchingSettings
from luthier.errors import UserError
from luthier.model import varlen_attention
from luthier.train.packing_check import check_isolation


@pytest.fixture(autouse=True)
def uncompiled():
    """Flex attention as plain PyTorch: compiling it takes seconds and a C++ compiler."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


MODELS = [
    ("llama", "eager"), ("llama", "sdpa"), ("qwen3", "eager"), ("qwen3", "sdpa"),
    ("gemma2", "eager"), ("gemma3", "eager"), ("gemma3", "sdpa"), ("gpt2", "eager"),
    ("gpt2", "sdpa"), ("mixtral", "sdpa"), ("llama", "varlen"), ("gemma3", "varlen"),
    ("mixtral", "varlen"),
]  # fmt: skip


def step(made, net):
    """The loss and the gradients of all batches of an epoch as one step."""
    loader = iter(made.get_train_dataloader())
    batches, count = made.get_batch_samples(loader, 1000, torch.device("cpu"))
    net.zero_grad()
    losses = [made.compute_loss(net, batch, num_items_in_batch=count) for batch in batches]
    sum(losses).backward()
    return sum(losses).item(), len(batches)


def assert_equal_gradients(net, expected):
    for (name, a), b in zip(net.named_parameters(), expected.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm() + 1e-9, name


@pytest.mark.parametrize(("name", "attention"), MODELS, ids=["-".join(m) for m in MODELS])
@pytest.mark.parametrize("size", [1, 3], ids=["one row a batch", "three rows a batch"])
def test_packed_loss_and_gradients_are_those_of_single_rows(tmp_path, name, attention, size):
    net, data = model(name, attention), rows()
    alone = copy.deepcopy(net)
    expected = plain_loss(alone, data)
    expected.backward()
    made = trainer(net, tmp_path, data, packing(), per_device_train_batch_size=size)
    loss, batches = step(made, net)
    assert batches < len(data["input_ids"]) / size
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_equal_gradients(net, alone)


def flash_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention as kernels of variable length compute it, document by document."""
    assert attention_mask is None
    together = {"is_causal": True, "scale": scaling, "enable_gqa": True}
    attend = torch.nn.functional.scaled_dot_product_attention
    if "cu_seq_lens_q" not in kwargs:
        return attend(query, key, value, **together).transpose(1, 2).contiguous(), None
    assert (query.shape[0], kwargs["cu_seq_lens_q"].dtype) == (1, torch.int32)
    ends = kwargs["cu_seq_lens_q"].tolist()
    spans = list(pairwise(ends))
    longest = max(stop - start for start, stop in spans)
    assert longest == kwargs["max_length_q"] == kwargs["max_length_k"]
    parts = [
        attend(*(part[:, :, start:stop] for part in (query, key, value)), **together)
        for start, stop in spans
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("size", [1, 3], ids=["one row a batch", "three rows a batch"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_flattened_loss_and_gradients_are_those_of_single_rows(tmp_path, name, size):
    AttentionInterface.register("flash_by_hand", flash_attention)
    net, data, alone = model(name), rows(), model(name)
    # Set here, since a model that is made with such a name looks for the package.
    net.config._attn_implementation_internal = "flash_by_hand"
    expected = plain_loss(alone, data)
    expected.backward()
    made = trainer(net, tmp_path, data, packing(), per_device_train_batch_size=size)
    loss, _ = step(made, net)
    assert isinstance(made.data_collator, FlatteningCollator)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_equal_gradients(net, alone)


def test_packing_by_the_plan_of_flash_is_right_under_other_attention_too():
    assert check_isolation(model(), FlatteningCollator(0)).content == 0


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("attention", "packed"),
    # Flex attention has no backward on a CPU, so it is only seen here.
    [
        ("sdpa", False),
        ("sdpa", True),
        ("flex_attention", True),
        ("varlen", False),
        ("varlen", True),
    ],
    ids=[
        "single rows",
        "packed rows",
        "packed rows, flex attention",
        "single rows, varlen",
        "packed rows, varlen",
    ],
)
def test_evaluation_is_the_same_packed_or_not(tmp_path, attention, packed, size):
    net, data = model(attention=attention), rows()
    plan = packing() if packed else None
    metrics = trainer(net, tmp_path, data, plan, per_device_eval_batch_size=size).evaluate()
    assert metrics["eval_loss"] == pytest.approx(plain_loss(model(), data).item(), rel=1e-6)


def test_padding_to_a_constant_length_changes_no_loss(tmp_path):
    net, data = model(), rows()
    alone = copy.deepcopy(net)
    expected = plain_loss(alone, data)
    expected.backward()
    for plan in (packing(64, constant=True), BatchingSettings(length=64, constant=True)):
        made = trainer(net, tmp_path, data, plan, per_device_train_batch_size=4)
        shapes = {tuple(batch["input_ids"].shape)[1] for batch in made.get_train_dataloader()}
        assert shapes == {64}
        assert step(made, net)[0] == pytest.approx(expected.item(), rel=1e-5)
        assert_equal_gradients(net, alone)


APART = [*MODELS, ("llama", "flex_attention"), ("gemma3", "flex_attention")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "attention"), APART, ids=["-".join(m) for m in APART])
def test_models_that_keep_documents_apart_pass_to_the_last_bit(name, attention, dtype):
    shown = check_isolation(model(name, attention, dtype), PackingCollator(0))
    assert shown.content == 0
    assert shown.position < (1e-5 if dtype == torch.float32 else 0.1)
    # Rounding of a layer of experts depends on which rows share its products, on some CPUs.
    assert shown.content_allowed == pytest.approx(1e-5, rel=0.1)


MENDED = {
    "falcon": "attention gets masks of single documents",
    "opt": "attention gets masks of single documents",
    "mamba": "2 of 2 layers carry a state and run document by document",
    "lfm2": "1 of 2 layers carry a state and run document by document",
    "qwen3_next": "1 of 2 layers carry a state and run document by document",
}


@pytest.mark.parametrize("name", MENDED)
def test_models_that_do_not_get_documents_one_by_one(tmp_path, name, capsys):
    net, data = model(name, "eager"), rows()
    alone = copy.deepcopy(net)
    expected = plain_loss(alone, data)
    expected.backward()
    made = trainer(net, tmp_path, data, packing(), per_device_train_batch_size=3)
    assert f"packing   {MENDED[name]}\n" in capsys.readouterr().out
    assert step(made, net)[0] == pytest.approx(expected.item(), rel=1e-5)
    assert_equal_gradients(net, alone)


@pytest.mark.parametrize("name", ["bloom", "rwkv"])
def test_models_that_cannot_be_mended_are_refused_before_the_first_step(tmp_path, name):
    net = model(name, "eager")
    with pytest.raises(UserError, match="cannot train packed rows") as refusal:
        trainer(net, tmp_path, rows(), packing())
    text = str(refusal.value)
    assert type(net).__name__ in text
    assert "documents see each other" in text
    assert "trainer.args.packing=false" in text


def run_on(positions):
    """Count on from the document before, which still is not the number behind its last one."""
    positions[:, 9:] += 12
    positions[1, 12:] += 30


def begin_later(positions):
    """Begin each document of a packed row at another number than in a row of its own."""
    positions += 5


@pytest.mark.parametrize("shift", [run_on, begin_later])
def test_positions_that_are_not_the_documents_own_are_refused(shift):
    net = model("gpt2")

    def call(**batch):
        """A class that keeps documents apart, yet counts its positions in another way."""
        if "position_ids" in batch:
            shift(positions := batch["position_ids"].clone())
            batch["position_ids"] = positions
        return net(**batch)

    with pytest.raises(UserError, match="its positions are not its own"):
        check_isolation(net, PackingCollator(0), call)


def test_kernels_that_are_missing_are_not_needed():
    """LFM2's own way of flat rows asks for `causal_conv1d`."""
    assert check_isolation(model("lfm2", "eager"), FlatteningCollator(0)).documents is not None


def test_the_proof_leaves_the_model_as_it_was(tmp_path):
    net = model("gpt2").train()
    net.transformer.h[0].eval()
    before = {name: module.training for name, module in net.named_modules()}
    state = torch.get_rng_state()
    check_isolation(net, PackingCollator(0))
    assert {name: module.training for name, module in net.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)


def test_varlen_attention_that_is_wrong_gives_way_to_masks(tmp_path, monkeypatch, capsys):
    by_document = varlen_attention._attend_by_document
    monkeypatch.setattr(
        varlen_attention, "_attend_by_document", lambda *args: 1.01 * by_document(*args)
    )
    net = model("llama", "varlen")
    trainer(net, tmp_path, rows(), packing())
    assert net.config._attn_implementation == "sdpa"
    printed = capsys.readouterr().out
    assert "packing   masks in place of varlen: its logits differ by 0.0" in printed


@pytest.mark.parametrize("name", ["opt", "lfm2", "qwen3_next"])
def test_varlen_attention_of_models_that_need_help(tmp_path, name, capsys):
    net, data = model(name, "varlen"), rows()
    alone = copy.deepcopy(net)
    expected = plain_loss(alone, data)
    expected.backward()
    made = trainer(net, tmp_path, data, packing(), per_device_train_batch_size=3)
    assert f"packing   {MENDED[name]}\n" in capsys.readouterr().out
    assert net.config._attn_implementation == "varlen"
    assert step(made, net)[0] == pytest.approx(expected.item(), rel=1e-5)
    assert_equal_gradients(net, alone)


def test_flat_rows_where_recurrent_layers_have_kernels_for_them(tmp_path, monkeypatch, capsys):
    """Plain functions over documents stand for causal-conv1d and flash-linear-attention."""
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    convolve, scan = module.causal_conv1d_fn, module.torch_chunk_gated_delta_rule

    def convolve_documents(states, *args, seq_idx=None, **kwargs):
        if seq_idx is None:
            return convolve(states, *args, activation=kwargs["activation"])
        lengths = seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
        pieces = states.split(lengths, dim=2)
        return torch.cat([convolve(p, *args, activation=kwargs["activation"]) for p in pieces], 2)

    def scan_documents(query, key, value, g, beta, cu_seqlens=None, **kwargs):
        settings = {"use_qk_l2norm_in_kernel": kwargs["use_qk_l2norm_in_kernel"]}
        if cu_seqlens is None:
            return scan(query, key, value, g=g, beta=beta, **settings)
        lengths = cu_seqlens.diff().tolist()
        pieces = zip(*(t.split(lengths, dim=1) for t in (query, key, value, g, beta)), strict=True)
        outputs = [scan(q, k, v, g=d, beta=b, **settings)[0] for q, k, v, d, b in pieces]
        return torch.cat(outputs, dim=1), None

    net, data = model("qwen3_next", "varlen"), rows()
    alone = copy.deepcopy(net)
    expected = plain_loss(alone, data)
    expected.backward()
    monkeypatch.setattr(module, "causal_conv1d_fn", convolve_documents)
    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", scan_documents)
    made = trainer(net, tmp_path, data, packing(), per_device_train_batch_size=3)
    assert "packing   flat rows, whose documents" in capsys.readouterr().out
    assert step(made, net)[0] == pytest.approx(expected.item(), rel=1e-5)
    assert isinstance(made.data_collator, FlatteningCollator)
    assert made.isolation.documents is None
    assert_equal_gradients(net, alone)
