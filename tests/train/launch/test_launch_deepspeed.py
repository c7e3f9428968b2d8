"""What DeepSpeed does not train right is said before a model is loaded."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from luthier.config import load_config
from luthier.errors import UserError
from luthier.train.launch import deepspeed
from luthier.train.launch.request import parse_launch_command

ZERO_CASES = [
    ("full", [], 3, {}, "bf16", None),
    ("recipe-decides", [], 2, {}, "no", None),
    ("other-format", [], 2, {}, "fp16", r"`--mixed_precision fp16`\), but the recipe trains in bf"),
    ("quantized", ["quantization=nf4", "lora=default"], 2, {}, "bf16", None),
    ("quantized-slices", ["quantization=nf4", "lora=default"], 3, {}, "bf16", "^quantization: "),
    ("new-tokens", ["model.add_tokens=[a]"], 3, {}, "bf16", None),
    ("new-tokens-beside-an-adapter", ["model.add_tokens=[a]", "lora=default"], 3, {}, "bf16",
     "^model.add_tokens: single rows .* do not train under DeepSpeed ZeRO-3"),
    ("rows-beside-an-adapter", ["lora=default", "lora.trainable_token_indices=[5]"], 3, {}, "bf16",
     "^lora.trainable_token_indices: single rows"),
    ("mixture", [], 3, {}, "bf16", None),
    ("experts", ["lora=default"], 3, {}, "bf16", "^lora.experts: adapters on experts"),
    ("experts-left-out", ["lora=default", "lora.experts=false"], 3, {}, "bf16", None),
    ("split-layers", [], 2, {"tensor_parallel": {"autotp_size": 2}}, "bf16",
     "Tensor parallelism was asked for .`autotp_size: 2`"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "stage", "settings", "precision", "part"),
    [case[1:] for case in ZERO_CASES],
    ids=[case[0] for case in ZERO_CASES],
)
def test_zero_stops_before_a_model_is_loaded(
    words, stage, settings, precision, part, tmp_path, monkeypatch
):
    flags = ["--use_deepspeed", "--mixed_precision", precision]
    request = parse_launch_command(flags, tmp_path, {"HF_HOME": str(tmp_path)})
    monkeypatch.setattr(deepspeed, "read_launch_request", lambda: request)
    line = ["model=hub", "model.path=m", "dataset=jsonl", "dataset.path=d", *words]
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=settings)
    args = SimpleNamespace(deepspeed_plugin=plugin, bf16=True, fp16=False)
    with pytest.raises(UserError, match=part) if part is not None else nullcontext():
        deepspeed.check_zero_settings(load_config(line).config, args, has_experts=True)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_3_refuses_rows_with_images(stage):
    config = load_config(["model=hub", "model.path=m", "dataset=jsonl", "dataset.path=d"]).config
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={})
    args = SimpleNamespace(deepspeed_plugin=plugin, bf16=True, fp16=False)
    refused = pytest.raises(UserError, match=r"^dataset: rows with images do not train under")
    with refused if stage == 3 else nullcontext():
        deepspeed.check_zero_settings(config, args, has_experts=False, has_images=True)
