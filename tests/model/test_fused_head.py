"""The fused head: exact log-probabilities and gradients, and nothing computed that nobody needs."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import add_fused_lm_head

from helpers.model_families import VOCABULARY, make_family_model
from luthier.memory.simulate import ACTIVATIONS, MemoryTracker
from luthier.model import fused_head
from luthier.model.fused_head import (
    OUTPUTS,
    HeadLogProbs,
    LogitScaling,
    TiledHead,
    use_head_log_probs,
)
from luthier.model.model_class import expose_backbone

TOKENS, VOCAB, WIDTH = 37, 90, 16
PLAIN = LogitScaling()
SCALINGS = {
    "plain": {},
    "factor (Cohere, Granite)": {"factor": 0.3},
    "softcap (Gemma 2)": {"softcap": 5.0},
    "temperature (GRPO)": {"inverse_temperature": 1.25},
    "all": {"factor": 1.5, "softcap": 4.0, "inverse_temperature": 0.8},
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles, and several blocks in each."""
    sizes = {"TILE_NUMBERS": 10 * VOCAB, "LEAST_ROWS": 1, "_BLOCK_NUMBERS": 3 * VOCAB, "_SLICE": 40}
    for name, size in sizes.items():
        monkeypatch.setattr(fused_head, name, size)


def draw_inputs(dtype, trains_head, has_bias=True):
    """Hidden states, weight, bias, targets; the same numbers in every format."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    hidden.requires_grad_()
    weight.requires_grad_(trains_head)
    bias = bias.requires_grad_(trains_head) if has_bias else None
    return hidden, weight, bias, torch.randint(VOCAB, (TOKENS,), generator=generator)


def head_outputs(hidden, weight, bias, targets, scaling=PLAIN, outputs=OUTPUTS):
    return fused_head._apply(hidden, weight, bias, targets, scaling, outputs)


def plain_outputs(hidden, weight, bias, targets, scaling=PLAIN):
    """The same by plain logits, in the format of the inputs."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scaling.factor
    if scaling.softcap is not None:
        logits = scaling.softcap * torch.tanh(logits / scaling.softcap)
    logits = logits * scaling.inverse_temperature
    logs = logits.log_softmax(-1)
    picked = logs.gather(-1, targets[:, None])[:, 0]
    entropy, squares = -(logs.exp() * logs).sum(-1), (2 * logs).logsumexp(-1)
    return picked, entropy, squares, logits.mean(-1), logits.argmax(-1) == targets


def gradients(outputs, inputs, has_entropy):
    """Gradients of a sum in which every token has a weight of its own."""
    weights = torch.linspace(-1, 2, TOKENS, dtype=outputs[0].dtype)
    loss = (outputs[0] * weights).sum()
    if has_entropy:
        loss = loss + (outputs[1] * weights.flip(0)).sum()
    return torch.autograd.grad(loss, [x for x in inputs if x is not None and x.requires_grad])


@pytest.mark.parametrize("has_entropy", [False, True], ids=["log-probabilities", "and entropy"])
@pytest.mark.parametrize("trains_head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_numbers_and_gradients_are_those_of_plain_logits(
    scaling, trains_head, has_entropy, small_tiles
):
    scaling = LogitScaling(**scaling)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        *inputs, targets = draw_inputs(dtype, trains_head)
        done = head_outputs(*inputs, targets, scaling)
        expected = plain_outputs(*inputs, targets, scaling)
        torch.testing.assert_close(done, expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(
            gradients(done, inputs, has_entropy), gradients(expected, inputs, has_entropy),
            atol=tolerance, rtol=tolerance,
        )  # fmt: skip


def test_the_mean_loss_is_cross_entropy(small_tiles):
    hidden, weight, bias, targets = draw_inputs(torch.float32, trains_head=True)
    loss = -head_outputs(hidden, weight, bias, targets, outputs=())[0].mean()
    expected = cross_entropy(hidden @ weight.T + bias, targets)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    inputs = (hidden, weight, bias)
    grads = torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("trains_head", [False, True], ids=["frozen", "trained"])
def test_gradients_hold_numerically(trains_head, small_tiles):
    hidden, weight, bias, targets = draw_inputs(torch.float64, trains_head)
    hidden = hidden[:5].detach().requires_grad_()
    scaling = LogitScaling(0.5, 3.0, 1.2)
    assert torch.autograd.gradcheck(
        lambda *inputs: head_outputs(*inputs, targets[:5], scaling)[:2], (hidden, weight, bias)
    )


@pytest.mark.parametrize("trains_head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
def test_16_bits_are_as_exact_as_trls_function(autocast, trains_head, small_tiles):
    dtype = torch.float32 if autocast else torch.bfloat16
    *exact_inputs, targets = draw_inputs(torch.float64, trains_head)
    for x in exact_inputs:
        x.data = x.data.to(torch.bfloat16).to(torch.float64)
    expected = gradients(plain_outputs(*exact_inputs, targets), exact_inputs, False)
    errors = []
    for is_ours in (True, False):
        *inputs, _ = draw_inputs(dtype, trains_head)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if is_ours:
                outputs = head_outputs(*inputs, targets)
            else:
                outputs = ChunkedLogProbFunction.apply(
                    *inputs, targets, 1.0, 40, None, 1.0, OUTPUTS
                )
        grads = gradients(outputs, inputs, False)
        assert {grad.dtype for grad in grads} == {dtype}
        pairs = zip(grads, expected, strict=True)
        errors.append([float((grad.double() - exact).norm()) for grad, exact in pairs])
        assert all(
            grad.dtype == dtype for grad in gradients(head_outputs(*inputs, targets), inputs, False)
        )
    assert all(ours <= 1.05 * theirs for ours, theirs in zip(*errors, strict=True)), errors


# In a model.

FAMILIES = (
    "llama", "llama4", "gemma2", "cohere2", "granite_moe_hybrid", "falcon_h1", "qwen3_moe",
    "qwen3_vl", "gpt2",
)  # fmt: skip


def make_model(name, **settings):
    """A model with TRL's head and luthier's function in it, and a batch with masked tokens."""
    model = make_family_model(name)
    expose_backbone(model)
    if settings:
        model = get_peft_model(model, LoraConfig(**settings)).eval()
    base = model.get_base_model() if settings else model
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.randint(8, VOCABULARY - 16, (3, 14), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :9], labels[1], labels[2, 5:7] = -100, -100, -100
    return model, ids, labels


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_loss_and_gradients_are_those_of_its_own_logits(name):
    model, ids, labels = make_model(name)
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    theirs = model(ids, labels=labels, fused_lm_head=True)
    use_head_log_probs(model)
    ours = model(ids, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(-ours.log_probs.sum(), loss, atol=1e-4, rtol=1e-6)
    for output in ("log_probs", "entropy", "is_top1", "label_mask", "loss"):
        torch.testing.assert_close(ours[output], theirs[output], atol=1e-5, rtol=1e-5)
    (-ours.log_probs.sum()).backward()
    done = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert done.keys() == expected.keys()
    for key, grad in expected.items():
        scale = max(float(grad.abs().max()), 1e-3)
        assert float((done[key] - grad).abs().max()) < 1e-5 * scale, key
    assert torch.equal(model(ids, use_cache=False).logits[:, :-1].float(), logits)


@pytest.fixture
def projected(monkeypatch):
    """The tokens of each pass over the output layer."""
    counts, project = [], TiledHead.project

    def count(self, hidden, *others):
        counts.append(len(hidden))
        return project(self, hidden, *others)

    monkeypatch.setattr(TiledHead, "project", count)
    return counts


ADAPTERS = {
    "adapter alone": ({}, 1),
    "whole output layer": ({"modules_to_save": ["lm_head"]}, 2),
}


@pytest.mark.parametrize(("settings", "passes"), ADAPTERS.values(), ids=ADAPTERS)
def test_only_trained_tokens_are_projected_and_once_where_the_layer_is_frozen(
    settings, passes, projected
):
    model, ids, labels = make_model("llama", target_modules=["q_proj"], **settings)
    use_head_log_probs(model)
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    output.log_probs.sum().backward()
    assert projected == [int((labels[:, 1:] != -100).sum())] * passes
    head = [p.grad for n, p in model.named_parameters() if "lm_head" in n and p.requires_grad]
    assert len(head) == passes - 1
    assert all(float(grad.abs().max()) > 0 for grad in head)
    with torch.no_grad():
        model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert len(projected) == passes + 1


def test_a_batch_without_a_trained_token_has_a_loss_of_zero_and_a_gradient_of_zero():
    model, ids, labels = make_model("llama")
    use_head_log_probs(model)
    output = model(ids, labels=torch.full_like(labels, -100), fused_lm_head=True)
    output.loss.backward()
    assert output.loss.item() == 0
    assert float(model.model.layers[0].mlp.up_proj.weight.grad.abs().max()) == 0


def test_a_model_without_trls_head_stays_as_it_is():
    model = make_family_model("llama")
    use_head_log_probs(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("trains_head", [False, True], ids=["frozen", "trained"])
def test_memory_stays_below_that_of_trls_function(trains_head, monkeypatch):
    """4,096 tokens of 49,152 logits: 805 MB at once, of which 64 MiB and a bit are there."""
    # Larger blocks take more memory, and without content each costs as much time as any other.
    monkeypatch.setattr(fused_head, "_BLOCK_NUMBERS", 2**22)
    peaks = []
    for is_ours in (True, False):
        with FakeTensorMode(), MemoryTracker("cpu", (1.0,)) as tracker:
            hidden = torch.empty(4096, 576, requires_grad=True)
            weight = torch.empty(49152, 576, requires_grad=trains_head)
            targets = torch.zeros(4096, dtype=torch.int64)
            tracker.phase = ACTIVATIONS
            if is_ours:
                outputs = head_outputs(hidden, weight, None, targets)
            else:
                outputs = ChunkedLogProbFunction.apply(
                    hidden, weight, None, targets, 1.0, 32768, None, 1.0, OUTPUTS
                )
            outputs[0].sum().backward()
        peaks.append(tracker.peaks[1.0].bytes)
    weight_bytes = 49152 * 576 * 4 * trains_head
    assert peaks[0] - weight_bytes < 150e6 < peaks[1] / 3


def test_the_function_is_trls_on_other_devices(monkeypatch):
    monkeypatch.setattr(fused_head, "_DEVICES", ())
    monkeypatch.setattr(HeadLogProbs, "apply", None)
    model, ids, labels = make_model("llama")
    use_head_log_probs(model)
    assert model(ids, labels=labels, fused_lm_head=True).loss.item() > 0
