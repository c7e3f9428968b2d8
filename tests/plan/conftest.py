"""A tiny model, shapes of large ones as folders with a config.json, and the command as typed."""

import pytest

from luthier.config.schema import RunConfig

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
INT8 = {"load_in_8bit": True}
TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


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
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Write a config.json alone, as `luthier plan` needs it; gives back the folder."""

    def shapes(name, sizes, kind="LlamaConfig"):
        import transformers

        folder = tmp_path_factory.mktemp("shapes") / name
        getattr(transformers, kind)(**sizes).save_pretrained(folder)
        return folder

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
                    "args": {"per_device_train_batch_size": 2, "activation_checkpointing": False}
                    | args,
                },
                "output_dir": "runs/tried",
            }
        )

    return configured


@pytest.fixture
def plan_command(capsys):
    """`luthier plan` as typed; gives back exit code, output and errors."""
    from luthier.errors import UserError, report
    from luthier.plan.command import run

    def plan_command(*words):
        try:
            code = run(list(words))
        except UserError as error:
            code = report(error)
        out, err = capsys.readouterr()
        return code, out, err

    return plan_command
