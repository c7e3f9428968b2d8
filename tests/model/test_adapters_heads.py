"""Heads beside adapters: whatever the checkpoint lacks is trained whole and saved."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from luthier.config.schema import ModelConfig
from luthier.model.adapters import add_adapter
from luthier.model.device import Machine
from luthier.model.load import load_model

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "vocab_size": 64,
}  # fmt: skip
BART = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}  # fmt: skip
DISTIL = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "vocab_size": 64}
CONFIGS = {
    "roberta": lambda: transformers.RobertaConfig(**SMALL),
    "deberta": lambda: transformers.DebertaV2Config(**SMALL),
    "distilbert": lambda: transformers.DistilBertConfig(**DISTIL),
    "llama": lambda: transformers.LlamaConfig(**SMALL, pad_token_id=0),
    "bart": lambda: transformers.BartConfig(**BART),
}
BASES = {"llama": "AutoModelForCausalLM", "bart": "AutoModelForSeq2SeqLM"}
TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


@pytest.mark.parametrize(
    ("name", "task", "whole"),
    [
        ("roberta", "SEQ_CLS", {"classifier.dense", "classifier.out_proj"}),
        ("roberta", "TOKEN_CLS", {"classifier"}),
        ("deberta", "SEQ_CLS", {"pooler.dense", "classifier"}),
        ("distilbert", "SEQ_CLS", {"pre_classifier", "classifier"}),
        ("bart", "SEQ_CLS", {"classification_head.dense", "classification_head.out_proj"}),
        ("llama", "SEQ_CLS", {"score"}),
        ("llama", "TOKEN_CLS", {"score"}),
    ],
)
def test_what_the_checkpoint_lacks_is_saved(tmp_path, name, task, whole):
    make = getattr(transformers, BASES.get(name, "AutoModelForMaskedLM"))
    torch.manual_seed(0)
    make.from_config(CONFIGS[name]()).save_pretrained(tmp_path / "base")
    machine = Machine("cpu", "float32", "eager" if name == "deberta" else "sdpa")
    config = ModelConfig(path=str(tmp_path / "base"))
    model = load_model(config, {}, machine, task=task, num_labels=3)
    assert set(model.new_layers) == whole
    adapted = add_adapter(model, {"r": 2}, 0, task)
    adapted.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    bare = {
        n.removeprefix("base_model.model.").rpartition(".")[0] for n in names if "lora" not in n
    }
    assert bare == whole
    assert not any(f"{layer}.lora" in n for n in names for layer in whole)
    plain = getattr(transformers, TASKS[task]).from_pretrained(tmp_path / "adapter", num_labels=3)
    ids = {"input_ids": torch.tensor([[5, 6, 7, 2]])}
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(**ids).logits, adapted.eval()(**ids).logits)


def test_a_language_model_gets_no_head(tmp_path):
    transformers.LlamaForCausalLM(CONFIGS["llama"]()).save_pretrained(tmp_path / "base")
    model = load_model(
        ModelConfig(path=str(tmp_path / "base")), {}, Machine("cpu", "float32", "sdpa")
    )
    assert model.new_layers == []
    assert add_adapter(model, {"r": 2}, 0).peft_config["default"].modules_to_save is None
