"""A saved adapter is on its base again as it was when it was saved."""

import pytest
import torch

from helpers.adapter_models import IDS, LORA, NF4, config_of, logits, prepared, stir
from luthier.errors import UserError
from luthier.model.artifact import find_artifact
from luthier.model.device import Machine
from luthier.model.load import load_trained
from luthier.model.tokenizer import load_tokenizer

CPU = Machine("cpu", "float32", "sdpa")
WAYS = {
    "lora": {"lora": LORA},
    "dora": {"lora": LORA | {"use_dora": True}},
    "adalora": {"lora": {"method": "adalora", "init_r": 4, "target_r": 2}},
    "ia3": {"lora": {"method": "ia3"}},
    "whole output layer": {"lora": LORA | {"modules_to_save": ["lm_head"]}},
    "new tokens": {"lora": LORA, "model": {"add_tokens": ["<think>", "</think>"]}},
    "4 bits": {"lora": LORA, "quantization": NF4},
}


def saved(folder, target, **groups):
    """The logits of a stirred adapter, which is saved to `target`."""
    model, tokenizer = prepared(config_of(folder, **groups))
    stir(model)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return logits(model), len(tokenizer)


@pytest.mark.parametrize("groups", WAYS.values(), ids=WAYS)
def test_what_was_saved_is_loaded(tiny_model, tmp_path, groups):
    wanted, vocabulary = saved(tiny_model, tmp_path / "saved", **groups)
    found = find_artifact(str(tmp_path / "saved"))
    tokenizer = load_tokenizer(found.base)
    assert len(tokenizer) == vocabulary
    tuned = load_trained(found, CPU, tokenizer, groups.get("quantization"))
    torch.testing.assert_close(logits(tuned), wanted, rtol=0, atol=1e-5)
    assert not tuned.training
    assert not any(weight.requires_grad for weight in tuned.parameters())
    with tuned.disable_adapter():
        assert not torch.equal(tuned(IDS).logits, wanted)


def test_weights_of_an_adapter_that_are_missing_are_told(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    saved(tiny_model, tmp_path / "saved", lora=LORA)
    file = tmp_path / "saved/adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(min(weights))
    save_file(weights, file)
    found = find_artifact(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="the adapter has no weights for"):
        load_trained(found, CPU, load_tokenizer(found.base))
    file.unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        load_trained(found, CPU, load_tokenizer(found.base))
