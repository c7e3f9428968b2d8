"""Adapter settings that are wrong are told before anything is loaded, right ones are not."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from luthier.config import library_fields
from luthier.config.load import load_config
from luthier.config.methods import ADAPTERS
from luthier.errors import UserError

SMALL = ["model=smollm2_135m", "dataset=quickstart"]
NF4, INT8 = "quantization=nf4", "quantization=int8"

RIGHT = {
    "another method's fields": ["lora=other", "lora.method=road", "lora.group_size=32"],
    "AdaLoRA takes LoRA's": ["lora=adalora", "lora.lora_dropout=0.1", "lora.beta1=0.9"],
    "tokens by text and id": ["lora=default", "lora.trainable_token_indices=['<think>', 5]"],
    "OFT without a rank": ["lora=oft", "lora.r=0"],
    "LoftQ's own settings": ["lora=loftq", NF4, "lora.loftq_config={loftq_bits: 4}"],
    "Kronecker products on 8 bits": ["lora=lokr", INT8],
    "whole weights": ["lora=default", "quantization=dequantize"],
    "parts": ["lora=none", "model.train=['layers\\.[23]\\.']", "model.freeze=[mlp]"],
    "new tokens": ["lora=default", "model.add_tokens=['<think>']", "model.add_special_tokens=[a]"],
}


@pytest.mark.parametrize("typed", RIGHT.values(), ids=RIGHT)
def test_what_is_right(typed):
    assert load_config([*SMALL, *typed]).config.output_dir


WRONG = {
    "no such method": (["lora=other", "lora.method=boff"], "lora.method: 'boff' is not an option"),
    "a refused method": (
        ["lora=other", "lora.method=prefix_tuning"],
        "lora.method: prefix_tuning is not trained by luthier: it puts tokens of its own before",
    ),
    "another method's field": (
        ["lora=vera", "lora.lora_alpha=3"],
        "lora.lora_alpha: is not a setting of peft.VeraConfig",
    ),
    "a misspelt field": (["lora=oft", "lora.oft_blok_size=8"], "Did you mean lora.oft_block_size?"),
    "packed weights": (
        ["lora=other", "lora.method=hra", NF4],
        "lora.method: hra works on the weights themselves, and 4-bit weights are packed",
    ),
    "packed in 8 bits": (["lora=other", "lora.method=hra", INT8], "8-bit weights are packed"),
    "PiSSA on 4 bits": (["lora=pissa", NF4], "init_lora_weights: pissa_niter_16 starts from the"),
    "OLoRA on 8 bits": (
        ["lora=default", "lora.init_lora_weights=olora", INT8],
        "olora starts from the weights themselves, and 8-bit weights are packed",
    ),
    "DoRA on 8 bits": (["lora=dora", INT8], "lora.use_dora: DoRA needs the lengths"),
    "LoftQ on whole weights": (["lora=loftq"], "loftq makes up for the error of 4-bit weights"),
    "LoRA+ of another method": (["lora=ia3", "lora.plus_ratio=4"], "lora.plus_ratio: is for"),
    "LoRA+ backwards": (["lora=plus", "lora.plus_ratio=0"], "lora.plus_ratio: 0 is too small"),
    "a ratio in words": (["lora=plus", "lora.plus_ratio=fast"], "'fast' is not a number"),
    "AdaLoRA's steps": (["lora=adalora", "lora.total_step=9"], "the training's own steps"),
    "a loss of its own": (["lora=default", "lora.kasa_config={}"], "adds a loss of its own"),
    "a rank": (["lora=default", "lora.r=0"], "lora.r: 0 is too small"),
    "dropout": (["lora=default", "lora.lora_dropout=1"], "lora.lora_dropout: 1 must be"),
    "unpacked and packed": (
        ["lora=default", "quantization=dequantize", "quantization.load_in_4bit=true"],
        "quantization.dequantize: whole weights take no load_in_4bit",
    ),
    "packed weights that train": (["lora=none", NF4], "quantized weights cannot be trained"),
    "a pattern beside an adapter": (["lora=default", "model.train=[mlp]"], "for full fine-tuning"),
}


@pytest.mark.parametrize(("typed", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong(typed, said):
    with pytest.raises(UserError) as raised:
        load_config([*SMALL, *typed])
    assert said in str(raised.value)
    assert str(raised.value).startswith("1 mistake")


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_methods_settings_are_known_without_importing_peft(name):
    found = library_fields.read_class_fields(
        "peft", f"tuners/{name}/config.py", ADAPTERS[name].config
    )
    assert {"task_type", "target_modules"} <= set(found or {}) or name == "adalora"


def test_methods_are_folders_of_peft():
    tuners = Path(find_spec("peft").origin).parent / "tuners"
    assert all((tuners / name / "config.py").is_file() for name in ADAPTERS)
