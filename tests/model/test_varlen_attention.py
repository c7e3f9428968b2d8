"""Packed rows document by document: the numbers of a dense mask, for every family that has it."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from helpers.model_families import FAMILIES, family_config, make_family_model
from luthier.errors import UserError
from luthier.model import varlen_attention
from luthier.model.device import VARLEN_ATTENTION
from luthier.model.model_class import choose_attention, has_varlen_attention, resolve_model_class
from luthier.model.varlen_attention import (
    DocumentMask,
    attention_by_masks,
    register_varlen_attention,
    use_masks,
    varlen_attention_forward,
)

register_varlen_attention()

LENGTHS = ((5, 40, 1, 18), (30, 2, 32))
"""The documents of two rows: longer than the windows of the families (16), and of one token."""
WITHOUT = {
    "gpt_oss": "attention sinks", "gemma2": "soft-capped scores", "falcon": "classes of its own",
    "mamba2": "no attention at all", "bloom": "ALiBi",
}  # fmt: skip
LANGUAGE = [name for name, family in FAMILIES.items() if family.method == "sft"]


def positions(lengths=LENGTHS):
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


def batch():
    where = positions()
    ids = torch.randint(3, 200, where.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "position_ids": where, "use_cache": False}


def with_varlen(model):
    """The same model with the attention that a load with `varlen` chooses."""
    model.set_attn_implementation(choose_attention(model.config, type(model), VARLEN_ATTENTION))
    return model


def loss_of(model, **more):
    inputs = batch() | more
    logits = model(**inputs).logits
    right = logits.gather(-1, inputs["input_ids"][..., None])[..., 0]
    return (logits.logsumexp(-1) - right).mean()


def assert_same_gradients(model, expected, bound=1e-5):
    for (key, weight), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        if other.grad is None:
            assert weight.grad is None, key
        else:
            assert (weight.grad - other.grad).norm() <= bound * other.grad.norm() + 1e-8, key


def count_calls(monkeypatch):
    """A list that grows with each layer that computes document by document."""
    calls, by_document = [], varlen_attention._attend_by_document

    def count(*args):
        calls.append(1)
        return by_document(*args)

    monkeypatch.setattr(varlen_attention, "_attend_by_document", count)
    return calls


def test_the_families_that_have_it():
    configs = {name: family_config(name) for name in LANGUAGE}
    without = {
        name
        for name, config in configs.items()
        if not has_varlen_attention(config, resolve_model_class(config, "CAUSAL_LM"))
    }
    assert without == set(WITHOUT)


@pytest.mark.parametrize("name", [name for name in LANGUAGE if name not in WITHOUT])
def test_losses_and_gradients_are_those_of_a_dense_mask(name, monkeypatch):
    model = make_family_model(name)
    expected = copy.deepcopy(model)
    dense = loss_of(expected)
    dense.backward()
    calls = count_calls(monkeypatch)
    loss = loss_of(with_varlen(model))
    loss.backward()
    # Masks of these two do not look at the positions; the trainer adds masks that do.
    assert bool(calls) == (name not in ("qwen2_5_vl", "granite_moe_hybrid"))
    assert loss.item() == pytest.approx(dense.item(), rel=1e-6)
    assert_same_gradients(model, expected)


def test_recomputed_layers_and_compiled_models_give_the_same(monkeypatch):
    expected = make_family_model("gemma3_text")
    dense = loss_of(expected)
    dense.backward()
    model = with_varlen(make_family_model("gemma3_text")).train()
    model.gradient_checkpointing_enable()
    calls = count_calls(monkeypatch)
    loss_of(model).backward()
    assert len(calls) == 2 * model.config.num_hidden_layers
    assert_same_gradients(model, expected)
    model.gradient_checkpointing_disable()
    compiled = torch.compile(model, backend="eager")
    assert loss_of(compiled).item() == pytest.approx(dense.item(), rel=1e-6)


def test_rows_that_are_not_packed_take_the_path_of_sdpa_to_the_last_bit(monkeypatch):
    model, expected = with_varlen(make_family_model("mistral")), make_family_model("mistral")
    calls = count_calls(monkeypatch)
    padded = torch.ones(2, 64, dtype=torch.long)
    padded[1, 40:] = 0
    for mask in (padded, padded.flip(1), None):
        more = {"position_ids": None, "attention_mask": mask}
        assert torch.equal(loss_of(model, **more), loss_of(expected, **more))
    settings = {"max_new_tokens": 4, "do_sample": False, "attention_mask": padded.flip(1)}
    written = [net.generate(batch()["input_ids"], **settings) for net in (model, expected)]
    assert torch.equal(*written)
    assert not calls


def config_with(name="llama", **fields):
    config = family_config(name)
    for key, value in fields.items():
        setattr(config, key, value)
    config._attn_implementation_internal = VARLEN_ATTENTION
    return config


def mask_of(make, config, **more):
    arguments = {
        "inputs_embeds": torch.zeros(2, 64, 0), "attention_mask": None, "past_key_values": None,
        "position_ids": positions(),
    }  # fmt: skip
    return make(config, **arguments | more)


FORMS = {
    "causal": (create_causal_mask, {}, None, LENGTHS),
    "window": (create_sliding_window_causal_mask, {"sliding_window": 8}, 8, LENGTHS),
    "window of one": (
        create_sliding_window_causal_mask, {"sliding_window": 1}, 1, ((1,) * 64, (1,) * 64)
    ),
    "chunks": (
        create_chunked_causal_mask, {"attention_chunk_size": 16}, 16,
        ((5, 16, 16, 8, 1, 16, 2), (16, 14, 2, 16, 16)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_masks_of_documents_say_where_they_lie(form):
    make, fields, window, lengths = FORMS[form]
    mask = mask_of(make, config_with(**fields))
    assert isinstance(mask, DocumentMask)
    assert mask.shape == (2, 1, 0, 0)
    assert mask.spans.lengths == [n for row in lengths for n in row]
    assert mask.spans.ends.tolist() == torch.tensor([0, *mask.spans.lengths]).cumsum(0).tolist()
    assert (mask.spans.ends.dtype, mask.spans.window) == (torch.int32, window)
    # What models do with masks on the way.
    for other in (mask[:, :, :, :64], mask.to("cpu"), mask.detach(), mask.to(torch.float32)):
        assert other.spans is mask.spans
    with pytest.raises(RuntimeError):
        torch.zeros(2, 4, 64, 64) + mask


def together(batch_idx, head_idx, q_idx, kv_idx):
    """Two tokens that see each other."""
    return (q_idx < 2) & (kv_idx < 2)


BLOCKS = torch.full((2, 64), -1).index_fill_(1, torch.arange(4, 9), 0)
OTHER_MASKS = {
    "a mask of the user": {"and_mask_function": together},
    "bidirectional parts": {"or_mask_function": together},
    "blocks that see each other": {"block_sequence_ids": BLOCKS},
    "padding": {"attention_mask": (torch.arange(64) < 50).expand(2, -1)},
}


@pytest.mark.parametrize("kind", OTHER_MASKS)
def test_masks_of_other_forms_are_dense(kind):
    masks = []
    for attention in (VARLEN_ATTENTION, "sdpa"):
        config = config_with()
        config._attn_implementation_internal = attention
        masks.append(mask_of(create_causal_mask, config, **OTHER_MASKS[kind]))
    assert not isinstance(masks[0], DocumentMask)
    assert torch.equal(*masks)


def test_rows_of_one_document_need_no_mask():
    one = torch.arange(64).expand(2, -1)
    assert mask_of(create_causal_mask, config_with(), position_ids=one) is None


SHAPES = {
    # heads, heads of keys, head size, size of values, window
    "plain": (4, 4, 16, 16, None),
    "grouped": (4, 2, 16, 16, None),
    "one head of keys": (6, 1, 16, 16, None),
    "values are smaller": (4, 4, 24, 16, None),
    "values are larger": (4, 2, 16, 24, None),
    "window": (4, 2, 16, 16, 8),
    "window that ends in the middle": (4, 2, 16, 24, 7),
    "odd head size": (4, 2, 20, 20, 3),
}


def attend(shape, dtype=torch.float32, **more):
    """Outputs and gradients by documents, and by a dense mask."""
    heads, key_heads, size, value_size, window = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((heads, size), (key_heads, size), (key_heads, value_size))
    states = [torch.randn(2, count, 64, width, generator=generator) for count, width in sizes]
    goal = torch.randn(2, 64, heads, value_size, generator=generator)
    make = create_causal_mask if window is None else create_sliding_window_causal_mask
    config = config_with(sliding_window=window)
    mask = mask_of(make, config)
    config._attn_implementation_internal = "sdpa"
    dense = mask_of(make, config)
    module, results = torch.nn.Module(), []
    for is_varlen in (True, False):
        leaves = [state.to(dtype).requires_grad_() for state in states]
        if is_varlen:
            output, weights = varlen_attention_forward(module, *leaves, mask, scaling=0.3, **more)
            assert weights is None
        else:
            settings = {"attn_mask": dense, "scale": 0.3, "enable_gqa": True}
            output = scaled_dot_product_attention(*leaves, **settings).transpose(1, 2)
        output.backward(goal.to(dtype))
        results.append([output, *(leaf.grad for leaf in leaves)])
    return results


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_heads_of_every_shape(shape, dtype):
    bound = 3e-6 if dtype == torch.float32 else 0.1
    for result, expected in zip(*attend(shape, dtype), strict=True):
        assert result.shape == expected.shape
        assert (result - expected).abs().max() < bound


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_kernel_of_a_gpu_gets_what_it_takes(shape, monkeypatch):
    """A plain attention over `cu_seq` stands for torch's kernel, with its rules on sizes."""

    def kernel(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa
    ):
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        assert query.shape[-1] % 8 == 0
        assert enable_gqa == (query.shape[1] != key.shape[1])
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert max_q == max_k == cu_seq_q.diff().max()
        left, right = window_size
        assert right == 0
        outputs = []
        for start, stop in pairwise(cu_seq_q.tolist()):
            allowed = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
            if left >= 0:
                allowed = allowed.triu(-left)
            states = (state[start:stop].transpose(0, 1) for state in (query, key, value))
            settings = {"attn_mask": allowed, "scale": scale, "enable_gqa": enable_gqa}
            outputs.append(scaled_dot_product_attention(*states, **settings).transpose(0, 1))
        return torch.cat(outputs)

    if shape[3] > shape[2]:
        pytest.skip("values that are larger take the other path")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr(varlen_attention, "_has_kernel", lambda query: True)
    calls = count_calls(monkeypatch)
    for result, expected in zip(*attend(shape), strict=True):
        assert (result - expected).abs().max() < 3e-6
    assert not calls


@pytest.mark.parametrize("name", ["softcap", "position_bias", "s_aux"])
def test_what_it_cannot_compute_is_an_error(name):
    with pytest.raises(ValueError, match="varlen attention has no"):
        attend(SHAPES["plain"], **{name: torch.ones(1)})


def test_a_batch_of_other_tokens_is_an_error():
    mask = mask_of(create_causal_mask, config_with())
    states = torch.zeros(2, 4, 63, 16)
    with pytest.raises(ValueError, match="keys and values of the same tokens"):
        varlen_attention_forward(torch.nn.Module(), states, states, states, mask)


def test_towers_keep_their_own_and_classes_without_it_are_named():
    config = family_config("qwen3_vl")
    chosen = choose_attention(config, resolve_model_class(config, "CAUSAL_LM"), VARLEN_ATTENTION)
    assert chosen == {"": "varlen", "text_config": "varlen", "vision_config": "sdpa"}
    config = family_config("gpt_oss")
    model_class = resolve_model_class(config, "CAUSAL_LM")
    assert choose_attention(config, model_class, VARLEN_ATTENTION) == "eager"
    with pytest.raises(UserError, match=r"model.attention=varlen: GptOss.* does not have it"):
        choose_attention(config, model_class, VARLEN_ATTENTION, "varlen")


def test_a_saved_model_does_not_know_the_name(tmp_path):
    model = with_varlen(make_family_model("qwen3_vl"))
    model.save_pretrained(tmp_path)
    assert all("varlen" not in file.read_text() for file in tmp_path.glob("*.json"))
    plain = type(model).from_pretrained(tmp_path)
    assert plain.config.text_config._attn_implementation == "sdpa"
    with attention_by_masks(model):
        assert torch.equal(loss_of(plain), loss_of(model))
    assert model.config.text_config._attn_implementation == VARLEN_ATTENTION
    use_masks(model)
    assert model.config.text_config._attn_implementation == "sdpa"
