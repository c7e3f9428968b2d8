"""Tiny models in the shapes that adapters care about, and what the tests ask of them."""

import torch

from luthier.config.schema import ModelConfig, RunConfig
from luthier.model.device import Machine
from luthier.model.embeddings import add_tokens
from luthier.model.load import load_model
from luthier.model.tokenizer import load_tokenizer
from luthier.model.trainable import make_trainable

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
INT8 = {"load_in_8bit": True}
LORA = {"r": 4, "lora_alpha": 8}
IDS = torch.tensor([[5, 80, 81, 100, 12, 7, 9, 33]])


def config_of(folder, **groups):
    """A run's config; `groups` replace whole groups, and `model` adds to its path."""
    model = {"path": str(folder)} | groups.pop("model", {})
    return RunConfig.model_validate(
        {"model": model, "dataset": {"path": "none.jsonl"}, "output_dir": "none"} | groups
    )


def prepared(config, dtype="float32"):
    """The model of a config with what trains, and its tokenizer: the way of a run."""
    machine = Machine("cpu", dtype, "sdpa")
    without = {"add_tokens": [], "add_special_tokens": []}
    tokenizer = load_tokenizer(config.model.model_copy(update=without))
    add_tokens(tokenizer, config.model)
    model = load_model(config.model, config.quantization, machine, full=not config.lora.is_enabled)
    return make_trainable(model, config, tokenizer, machine), tokenizer


def load(folder, quantization=None, dtype="float32"):
    config = ModelConfig(path=str(folder))
    return load_model(config, quantization or {}, Machine("cpu", dtype, "sdpa"))


def remade(folder, target, **changes):
    """A copy of a tiny model's folder with other settings, its weights drawn anew."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, **changes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits


def gradients(model, ids=IDS):
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in trained(model).items()}


def stir(model, size=0.05):
    """Move every trained weight, as if the model had trained for a while."""
    torch.manual_seed(3)
    for weight in trained(model).values():
        weight.data += size * torch.randn(weight.shape)
