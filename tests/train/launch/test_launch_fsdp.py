"""What FSDP2 does not train right is said before a model is loaded."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from luthier.config.schema import ChatSettings, DatasetConfig, ModelConfig, RunConfig, TrainerConfig
from luthier.errors import UserError
from luthier.train.launch.fsdp import check_fsdp_launch, check_packed_storage

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
WHOLE = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
LORA = {"r": 4, "target_modules": "all-linear"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def run_config(folder, quantization=None, args=None, lora=LORA, checkpoint=None, method="sft"):
    content = {"model_type": "llama"}
    if checkpoint is not None:
        content["quantization_config"] = checkpoint
    (folder / "config.json").write_text(json.dumps(content))
    return RunConfig(
        model=ModelConfig(path=str(folder)),
        dataset=DatasetConfig(path="x"),
        chat=ChatSettings(max_length=64),
        trainer=TrainerConfig(method=method, args=args or {}),
        quantization=quantization or {},
        lora=lora,
        output_dir="out",
    )


@pytest.mark.parametrize(
    ("environ", "settings", "message"),
    [
        pytest.param({}, {"args": {"optim": "adafactor"}}, None, id="one-process"),
        pytest.param(FSDP2, {}, None, id="lora"),
        pytest.param(FSDP2, {"lora": {}, "args": {"optim": "sgd"}}, None, id="sgd"),
        pytest.param(FSDP2, {"quantization": NF4}, None, id="qlora"),
        pytest.param(FSDP2, {"checkpoint": {"load_in_4bit": True}}, None, id="checkpoint-in-nf4"),
        pytest.param(FSDP2 | {"FSDP_VERSION": "1"}, {}, "fsdp_version: 2", id="fsdp1"),
        pytest.param(
            FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {},
            "trainer.args.activation_checkpointing=true", id="fsdp-recomputes",
        ),
        pytest.param(
            FSDP2, {"args": {"optim": "paged_adamw_8bit"}}, "trainer.args.optim=paged_adamw_8bit",
            id="optimizer-of-bitsandbytes",
        ),
        pytest.param(FSDP2, {"args": {"optim": "adafactor"}}, "adamw_torch", id="adafactor"),
        pytest.param(FSDP2, {"args": {"torch_compile": True}}, "torch_compile=true", id="compiled"),
        pytest.param(
            FSDP2 | WHOLE, {"args": {"save_only_model": True}}, None, id="models-alone"
        ),
        pytest.param(
            FSDP2, {"args": {"save_only_model": True}}, "FULL_STATE_DICT", id="models-in-shards"
        ),
        pytest.param(
            FSDP2 | WHOLE, {"args": {"save_only_model": True, "load_best_model_at_end": True}},
            "the best model", id="the-best-of-models-alone",
        ),
        pytest.param(FSDP2, {"method": "seq2seq"}, "encoder and decoder share", id="seq2seq"),
        pytest.param(FSDP2, {"method": "dpo"}, None, id="dpo"),
        pytest.param(
            FSDP2, {"lora": LORA | {"method": "adalora"}}, "lora.method=adalora", id="adalora"
        ),
        pytest.param(
            FSDP2, {"quantization": {"load_in_8bit": True}}, "8-bit weights.\nUse quantization=nf4",
            id="int8",
        ),
        pytest.param(
            FSDP2, {"checkpoint": {"load_in_8bit": True}}, "weights of 8-bit bitsandbytes",
            id="checkpoint-in-int8",
        ),
        pytest.param(FSDP2, {"checkpoint": {"quant_method": "gptq"}}, "weights of gptq", id="gptq"),
        pytest.param(
            FSDP2,
            {"checkpoint": {"quant_method": "fp8"}, "quantization": {"dequantize": True}}, None,
            id="dequantized",
        ),
    ],
)  # fmt: skip
def test_what_fsdp2_trains(environ, settings, message, tmp_path):
    config = run_config(tmp_path, **settings)
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        check_fsdp_launch(config, environ)


@pytest.mark.parametrize(
    "environ", [FSDP2, {"ACCELERATE_USE_DEEPSPEED": "true"}], ids=["fsdp2", "deepspeed"]
)
def test_a_model_that_a_function_loads_is_not_sliced(environ, tmp_path):
    config = run_config(tmp_path)
    loader = {"loader": "python:own.py:load"}
    config = config.model_copy(update={"model": config.model.model_copy(update=loader)})
    check_fsdp_launch(config, {})
    with pytest.raises(UserError, match=r"model\.loader: a model that a function loads was not"):
        check_fsdp_launch(config, environ)


@pytest.mark.parametrize(
    ("environ", "bf16", "storage", "message"),
    [
        pytest.param(FSDP2, True, None, None, id="bytes"),
        pytest.param(FSDP2, True, "bfloat16", None, id="the-same"),
        pytest.param(FSDP2, False, "float32", None, id="no-mixed-precision"),
        pytest.param({}, True, "float32", None, id="one-process"),
        pytest.param(FSDP2, True, "float32", "storage=bfloat16", id="cast"),
        pytest.param(
            FSDP2 | {"ACCELERATE_MIXED_PRECISION": "bf16"}, False, "float16", "bf16 would round",
            id="the-launch-file-casts",
        ),
    ],
)  # fmt: skip
def test_packed_weights_are_not_rounded(environ, bf16, storage, message, tmp_path, monkeypatch):
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    stored = {} if storage is None else {"bnb_4bit_quant_storage": storage}
    config = run_config(tmp_path, quantization=NF4 | stored)
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        check_packed_storage(config, SimpleNamespace(bf16=bf16, fp16=False))
