"""Full fine-tuning of parts that patterns choose."""

import pytest
import torch
import transformers

from helpers.adapter_models import IDS, config_of, gradients, prepared, remade, trained
from helpers.model_families import make_family_model, save_family
from luthier.config.load import load_config as load_config
from luthier.errors import UserError
from luthier.model.trainable import find_skipped_parameters, freeze_parameters

LAST = r"layers\.1\."
CHOSEN = {
    "one layer": ({"train": [LAST]}, 9),
    "all but": ({"freeze": ["embed_tokens", LAST]}, 21 - 1 - 9),
    "a part of a part": ({"train": [LAST], "freeze": ["mlp"]}, 9 - 3),
    "ends": ({"train": [r"proj\.weight$", "^lm_head"]}, 14 + 1),
}


@pytest.mark.parametrize(("model", "count"), CHOSEN.values(), ids=CHOSEN)
def test_patterns_choose_what_trains(tiny_model, model, count):
    found, _ = prepared(config_of(tiny_model, model=model))
    assert len(trained(found)) == count
    frozen = {n: p.clone() for n, p in found.named_parameters() if not p.requires_grad}
    moved = gradients(found)
    assert all(gradient.abs().sum() > 0 for gradient in moved.values())
    torch.optim.AdamW(trained(found).values(), lr=1e-3).step()
    assert all(torch.equal(found.get_parameter(name), p) for name, p in frozen.items())


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpointing_reaches_layers_above_frozen_ones(tiny_model, reentrant):
    model, _ = prepared(config_of(tiny_model, model={"train": [LAST]}))
    wanted = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert len(wanted) == 9
    for name, weight in trained(model).items():
        torch.testing.assert_close(weight.grad, wanted[name])


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_tied_embeddings_are_found_by_either_name(tiny_model, tmp_path, name):
    folder = remade(tiny_model, tmp_path / "model", tie_word_embeddings=True)
    model, _ = prepared(config_of(folder, model={"freeze": [name]}))
    assert not model.lm_head.weight.requires_grad
    assert len(trained(model)) == 20 - 1


WRONG = {
    "no such name": ({"freeze": ["embed_tokns"]}, ["model.freeze: 'embed_tokns'", "embed_tokens"]),
    "no such number": ({"train": [r"layers\.7\."]}, ["model.train", "model.layers.N.mlp.up_proj"]),
    "nothing left": ({"freeze": ["."]}, ["leaves nothing to train"]),
}


@pytest.mark.parametrize(("model", "said"), WRONG.values(), ids=WRONG)
def test_patterns_that_choose_nothing_are_told(tiny_model, model, said):
    with pytest.raises(UserError) as raised:
        prepared(config_of(tiny_model, model=model))
    for words in said:
        assert words in str(raised.value)


EARLY = {
    "beside an adapter": (["lora=default", "model.freeze=[mlp]"], "for full fine-tuning"),
    "a broken pattern": (["model.train=['(']"], "regular expression"),
}


@pytest.mark.parametrize(("overrides", "said"), EARLY.values(), ids=EARLY)
def test_what_is_wrong_in_itself_is_told_at_once(overrides, said):
    with pytest.raises(UserError) as raised:
        load_config(["model=smollm2_135m", "dataset=quickstart", *overrides])
    assert said in str(raised.value)


def switch_transformer():
    """Experts that are a module each: a step of four tokens runs four of eight at most."""
    torch.manual_seed(0)
    return transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(
            vocab_size=272, d_model=32, d_kv=8, d_ff=32, num_heads=4, num_experts=8, num_layers=2,
            num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
            dropout_rate=0.0, decoder_start_token_id=0,
        )
    )  # fmt: skip


def without_gradient(model):
    """The names of trained weights that a step on a row of text leaves without a gradient."""
    ids = torch.tensor([[5, 8, 9, 12]])
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    model.train()
    model(input_ids=ids, **inputs).logits.logsumexp(-1).sum().backward()
    return {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4", "gemma3", "gemma4", "gemma4_moe",
     "granite_moe_hybrid", "nemotron_h", "jamba", "t5", "bart", "modernbert"],
)  # fmt: skip
def test_a_step_reaches_all_weights_that_train(family):
    """So DDP has nothing to look for, also where a step does not choose some experts."""
    model = make_family_model(family)
    freeze_parameters(model, [], [])
    assert find_skipped_parameters(model) == []
    assert without_gradient(model) == set()


def test_a_step_reaches_the_adapters_of_all_experts(tmp_path):
    base = save_family(tmp_path, "qwen3_moe")
    model, _ = prepared(config_of(base, lora={"r": 4, "target_modules": "all-linear"}))
    assert any("experts" in name for name in trained(model))
    assert find_skipped_parameters(model) == []
    assert without_gradient(model) == set()


def test_weights_that_a_step_may_leave_out_are_known():
    tower = make_family_model("gemma3")
    freeze_parameters(tower, ["."], [])
    assert without_gradient(tower) <= set(names := find_skipped_parameters(tower))
    assert names and all("vision" in name or "projector" in name for name in names)
    experts = switch_transformer()
    assert (left_out := without_gradient(experts)) <= set(find_skipped_parameters(experts))
    assert left_out and all(".experts.expert_" in name for name in left_out)
    experts.requires_grad_(False).lm_head.requires_grad_(True)
    assert find_skipped_parameters(experts) == []
    by_chance = make_family_model("bart")
    by_chance.config.encoder_layerdrop = 0.1
    assert len(find_skipped_parameters(by_chance)) == len(list(by_chance.parameters()))
