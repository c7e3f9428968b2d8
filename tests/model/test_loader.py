"""Models that a function of the user's own loads: what it gets, and what its result has to be."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.config.schema import ChatSettings, DatasetConfig, ModelConfig, RunConfig, TrainerConfig
from luthier.errors import UserError
from luthier.memory.plan import plan_memory
from luthier.model.device import Machine
from luthier.model.load import load_model, read_model_config
from luthier.model.loader import check_log_probs

CODE = """
import torch
from transformers import (
    GenerationMixin, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel,
)

def load(path, dtype):
    return LlamaForCausalLM.from_pretrained(path, dtype=dtype)

def whatever(path, **settings):
    assert settings["device_map"] == {"": "cpu"}
    assert settings["attn_implementation"] in (None, "eager")
    return LlamaForCausalLM.from_pretrained(path, **settings)

def layers(path, dtype, count):
    return LlamaForCausalLM.from_pretrained(path, dtype=dtype, num_hidden_layers=count)

def half(path):
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)

def mixed(path):
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.model.norm.to(torch.bfloat16)
    return model

def meta(path, dtype):
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig.from_pretrained(path))

def module(path):
    return torch.nn.Linear(2, 2)

def backbone(path, dtype):
    return LlamaModel.from_pretrained(path, dtype=dtype)

class Headless(LlamaForCausalLM):
    def get_output_embeddings(self):
        return None

def headless(path, dtype):
    return Headless.from_pretrained(path, dtype=dtype)

class Nameless(PreTrainedModel, GenerationMixin):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Embedding(64, 16)
        self.head = torch.nn.Linear(16, 64)

    def get_input_embeddings(self):
        return self.table

    def get_output_embeddings(self):
        return self.head

def nameless(path):
    return Nameless(LlamaConfig.from_pretrained(path))

class Loud(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 1.5
        return outputs

def loud(path, dtype):
    return Loud.from_pretrained(path, dtype=dtype)

def fails(path):
    raise KeyError("weights")
"""
CPU = Machine("cpu", "float32", "sdpa")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    text = (tmp_path / "model" / "config.json").read_text()
    (tmp_path / "model" / "config.json").write_text(text.replace('"llama"', '"own_kind"'))
    (tmp_path / "own.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model_config(name, arguments=None, **settings):
    path = f"python:own.py:{name}"
    return ModelConfig(path="./model", loader={path: arguments} if arguments else path, **settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["load", "whatever"])
def test_a_function_gets_what_it_has_an_argument_for(name, dtype):
    model = load_model(model_config(name), {}, Machine("cpu", dtype, "sdpa"))
    assert (model.dtype, model.training) == (getattr(torch, dtype), False)
    assert (model.new_layers, model.config.use_cache) == ([], False)
    check_log_probs(model)
    assert "forward" not in vars(model)


def test_arguments_and_attention_come_from_the_config():
    model = load_model(model_config("layers", {"count": 1}), {}, CPU)
    assert len(model.model.layers) == 1
    model = load_model(model_config("whatever", attention="eager"), {}, CPU)
    assert model.config._attn_implementation == "eager"
    # A type that nobody knows is a plain config with its fields.
    assert read_model_config(model_config("load")).hidden_size == 16


REFUSED = [
    ("half", {}, "own.py:half returned weights in bfloat16, and the run has them in float32."),
    ("mixed", {"full": True}, "returned weights in bfloat16, and the run has them in float32, as"),
    ("meta", {}, "returned a model whose model.embed_tokens.weight has no values (meta)."),
    ("module", {}, "returned a Linear, and a transformers.PreTrainedModel is needed"),
    ("backbone", {}, "LlamaModel cannot generate. Write class LlamaModel(PreTrainedModel, Gen"),
    ("headless", {}, "Headless has no output layer that scores the next token of text"),
    ("nameless", {}, "Nameless.base_model_prefix is '', which names no module"),
    ("fails", {}, "own.py:fails failed: KeyError: 'weights' (/"),
]


@pytest.mark.parametrize(
    ("name", "settings", "words"), REFUSED, ids=[refused[0] for refused in REFUSED]
)
def test_what_cannot_be_used_is_told(name, settings, words):
    with pytest.raises(UserError, match=r"^model\.loader: ") as caught:
        load_model(model_config(name), {}, CPU, **settings)
    assert words in str(caught.value)


def test_settings_that_would_be_lost_are_told():
    with pytest.raises(UserError, match=r"the model of python:own\.py:load has sdpa"):
        load_model(model_config("load", attention="eager"), {}, CPU)
    with pytest.raises(UserError, match="has no argument revision, so it would load another"):
        load_model(model_config("load", revision="v2"), {}, CPU)
    with pytest.raises(UserError, match="quantization cannot be set where a function loads"):
        load_model(model_config("load"), {"load_in_4bit": True}, CPU)


def test_the_memory_of_such_a_model_is_not_planned():
    config = RunConfig(
        model=model_config("load"),
        dataset=DatasetConfig(path="rows.jsonl"),
        chat=ChatSettings(),
        trainer=TrainerConfig(),
        output_dir="out",
        seed=1,
    )
    with pytest.raises(UserError, match=r"^model\.loader: the plan builds a model without weights"):
        plan_memory(config)


def test_logits_that_losses_would_not_be_computed_from_are_told():
    model = load_model(model_config("loud"), {}, CPU)
    with pytest.raises(UserError, match="the logits of Loud are not its output layer's"):
        check_log_probs(model)
