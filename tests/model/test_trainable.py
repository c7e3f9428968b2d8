"""Full fine-tuning of parts that patterns choose."""

import pytest
import torch

from helpers.adapter_models import IDS, config_of, gradients, prepared, remade, trained
from luthier.config.load import load_config as load_config
from luthier.errors import UserError

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
