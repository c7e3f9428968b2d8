"""A tiny model, shapes of large ones as folders with a config.json, and the command as typed."""

import pytest

from helpers import memory_configs
from helpers.memory_configs import LORA, write_model_config
from luthier.config.schema import RunConfig


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """The C library of the plan's tests gives everything back, whatever the machine's does."""
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random Llama of two layers, without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**memory_configs.TINY)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Write a config.json alone, as `luthier plan` needs it; gives back the folder."""

    def shapes(name, sizes, kind="LlamaConfig"):
        return write_model_config(tmp_path_factory.mktemp("shapes") / name, sizes, kind)

    return shapes


@pytest.fixture
def configured():
    """A run's configuration by its parts; `args` are the trainer's."""

    def configured(
        folder,
        lora=LORA,
        quantization=None,
        max_length=32,
        dtype="float32",
        model=None,
        method="sft",
        teacher=None,
        rewards=(),
        **args,
    ):
        return RunConfig.model_validate(
            {
                "model": {"path": str(folder), "dtype": dtype, "device": "cpu"} | (model or {}),
                "quantization": quantization or {},
                "lora": lora,
                "dataset": {"path": "rows.jsonl"},
                "chat": {"max_length": max_length},
                "trainer": {
                    "method": method,
                    "teacher": teacher,
                    "rewards": list(rewards),
                    "args": {"per_device_train_batch_size": 2, "activation_checkpointing": False}
                    | args,
                },
                "output_dir": "runs/tried",
            }
        )

    return configured
