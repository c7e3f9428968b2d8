"""New tokens and single rows of the embeddings: they train, and a saved model has them."""

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from helpers.adapter_models import (
    FP4,
    IDS,
    LORA,
    NF4,
    config_of,
    gradients,
    load,
    logits,
    prepared,
    remade,
    stir,
    trained,
)
from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model import embeddings
from luthier.model.adapters import add_adapter
from luthier.model.tokenizer import load_tokenizer

NEW = ["<think>", "</think>"]
TEXT = "a<think>b</think> c"
EMBEDDINGS = {"modules_to_save": ["embed_tokens", "lm_head"]}
WAYS = {
    "rows": (LORA, {}, "float32"),
    "rows-bfloat16": (LORA, {}, "bfloat16"),
    "rows-nf4": (LORA, NF4, "bfloat16"),
    "rows-fp4": (LORA, FP4, "float32"),
    "rows-dora": (LORA | {"use_dora": True}, {}, "float32"),
    "rows-adalora": ({"method": "adalora", "init_r": 4, "target_r": 2}, {}, "float32"),
    "whole": (LORA | EMBEDDINGS, {}, "float32"),
    "whole-nf4": (LORA | EMBEDDINGS, NF4, "bfloat16"),
    "full": ({}, {}, "float32"),
}


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request, tiny_model, tmp_path_factory):
    target = tmp_path_factory.mktemp(request.param) / "model"
    return remade(tiny_model, target, tie_word_embeddings=request.param == "tied")


def grown(folder, way):
    lora, quantization, dtype = WAYS[way]
    model = {"add_tokens": NEW}
    config = config_of(folder, model=model, lora=lora, quantization=quantization)
    model, tokenizer = prepared(config, dtype)
    return model, tokenizer, torch.tensor([tokenizer.encode(TEXT)])


def rows_of(model, side):
    layer = model.get_input_embeddings() if side == "input" else model.get_output_embeddings()
    return layer.weight.detach().float()


def again(saved, way):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    lora, quantization, dtype = WAYS[way]
    load_it = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    packed = BitsAndBytesConfig(**quantization, bnb_4bit_compute_dtype=dtype)
    more = {"quantization_config": packed} if quantization else {}
    tokenizer = AutoTokenizer.from_pretrained(saved)
    return load_it.from_pretrained(saved, dtype=dtype, **more), tokenizer


@pytest.mark.parametrize("way", WAYS)
def test_new_tokens_train_on_both_sides(folder, way):
    model, tokenizer, ids = grown(folder, way)
    new = tokenizer.convert_tokens_to_ids(NEW)
    assert set(new) <= set(ids[0].tolist())
    before = {side: rows_of(model, side).clone() for side in ("input", "output")}
    gradients(model, ids)
    torch.optim.AdamW(trained(model).values(), lr=1e-2, weight_decay=0).step()
    for side, rows in before.items():
        moved = (rows_of(model, side) != rows).any(dim=1)
        assert moved[new].all()
        if way.startswith("rows"):
            assert moved.sum() == len(new)
    tied = folder.parent.name.startswith("tied")
    assert torch.equal(rows_of(model, "input"), rows_of(model, "output")) == tied


@pytest.mark.parametrize("way", WAYS)
def test_a_saved_model_has_them_and_agrees_with_its_tokenizer(folder, way, tmp_path):
    model, tokenizer, ids = grown(folder, way)
    stir(model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, read = again(tmp_path, way)
    assert read.encode(TEXT) == ids[0].tolist()
    assert max(read.get_vocab().values()) < loaded.get_input_embeddings().weight.shape[0]
    _, packed, dtype = WAYS[way]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32"):
        wanted, got = logits(model, ids), logits(loaded, ids)
    # bitsandbytes repacks 4-bit weights for inference, to a kernel of 16 bits.
    rough = packed or dtype != "float32"
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.05 if rough else 1e-5)


@pytest.mark.parametrize("way", ["rows", "rows-bfloat16", "rows-nf4", "whole", "whole-nf4"])
def test_losses_that_read_the_output_layers_weight_train_the_rows(folder, way):
    model, _, ids = grown(folder, way)
    stir(model)
    wanted = {name: g.clone() for name, g in gradients(model, ids).items()}
    model.zero_grad()
    add_fused_lm_head(model.get_base_model())
    model(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
    bound = 1e-4 if WAYS[way][2] == "float32" else 0.05
    for name, weight in trained(model).items():
        assert (weight.grad - wanted[name]).norm() <= bound * wanted[name].norm(), name


def test_an_adapter_with_new_rows_is_small(folder, tmp_path):
    model, _, _ = grown(folder, "rows")
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "adapter_model.safetensors")
    rows = {name: w.shape[0] for name, w in weights.items() if "lora_" not in name}
    assert set(rows.values()) == {len(NEW)}
    assert len(rows) == (1 if folder.parent.name.startswith("tied") else 2)


def test_new_rows_start_at_the_mean_and_others_stay(folder):
    tokenizer, model = load_tokenizer(ModelConfig(path=str(folder))), load(folder)
    plain = load(folder).get_input_embeddings().weight
    config = ModelConfig(path=str(folder), add_tokens=NEW)
    embeddings.add_tokens(tokenizer, config)
    new = embeddings.new_token_ids(tokenizer, config)
    state = torch.random.get_rng_state()
    embeddings.initialize_new_rows(model, new, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] == model.config.vocab_size == max(new) + 1
    assert torch.equal(rows[: len(plain)], plain)
    torch.testing.assert_close(rows[new], plain.mean(dim=0).expand(2, -1), rtol=0, atol=1e-3)


def test_rows_that_are_left_over_are_used(tiny_model, tmp_path):
    folder = remade(tiny_model, tmp_path / "model", vocab_size=300)
    model, tokenizer, _ = grown(folder, "rows")
    new = tokenizer.convert_tokens_to_ids(NEW)
    rows, plain = rows_of(model, "output"), load(folder).lm_head.weight
    assert rows.shape[0] == 300
    torch.testing.assert_close(rows[new], plain[: new[0]].mean(dim=0).expand(2, -1))
    assert torch.equal(rows[: new[0]], plain[: new[0]])


def test_special_tokens_are_special(tiny_model):
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_model)))
    config = ModelConfig(path=str(tiny_model), add_tokens=NEW, add_special_tokens=["<|end|>"])
    embeddings.add_tokens(tokenizer, config)
    ids = tokenizer.encode("b<think> c<|end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "b<think> c"
    assert embeddings.new_token_ids(tokenizer, config) == [266, 267, 268]


def test_rows_of_known_tokens_train_by_text_and_by_id(tiny_model):
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_model)))
    lora = LORA | {"trainable_token_indices": ["<|im_end|>", 80]}
    model = add_adapter(load(tiny_model), lora, seed=1, tokenizer=tokenizer)
    (name,) = [name for name in trained(model) if "token_adapter" in name]
    assert trained(model)[name].shape == (2, 64)
    assert model.peft_config["default"].trainable_token_indices == [2, 80]
    stir(model)
    assert gradients(model, IDS)[name][1].abs().sum() > 0


WRONG = {
    "several tokens": (LORA | {"trainable_token_indices": ["hello"]}, {}, ["'hello' is", "tokens"]),
    "an id too high": (LORA | {"trainable_token_indices": [266]}, {}, ["266", "0 to 265"]),
    "known already": (LORA, {"add_tokens": ["<|im_end|>"]}, ["token of this tokenizer", "(id 2)"]),
    "a method without rows": (
        {"method": "ia3"},
        {"add_tokens": NEW},
        ["model.add_tokens", "ia3", "modules_to_save=[model.embed_tokens,lm_head]"],
    ),
    "frozen embeddings": (
        {},
        {"add_tokens": NEW, "freeze": ["embed_tokens"]},
        ["model.add_tokens", "never train"],
    ),
}


@pytest.mark.parametrize(("lora", "model", "said"), WRONG.values(), ids=WRONG)
def test_what_would_not_train_is_told(tiny_model, lora, model, said):
    with pytest.raises(UserError) as raised:
        prepared(config_of(tiny_model, model=model, lora=lora))
    for words in said:
        assert words in str(raised.value)


def test_tied_embeddings_are_not_torn_apart(tiny_model, tmp_path):
    folder = remade(tiny_model, tmp_path / "model", tie_word_embeddings=True)
    model = add_adapter(load(folder), LORA | {"modules_to_save": ["embed_tokens"]}, seed=1)
    stir(model)
    sides = [rows_of(model, side) for side in ("input", "output")]
    assert torch.equal(*sides)
    with pytest.raises(UserError, match="one matrix"):
        add_adapter(load(folder), {"method": "loha", "modules_to_save": ["embed_tokens"]}, seed=1)


def test_a_bias_of_the_output_layer_is_not_lost(tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    PhiForCausalLM(
        PhiConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    ).save_pretrained(tmp_path)
    lora = LORA | {"trainable_token_indices": {"lm_head": [5]}}
    with pytest.raises(UserError, match="has a bias"):
        add_adapter(load(tmp_path), lora, seed=1)
