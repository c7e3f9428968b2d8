"""A run of packed rows trains document by document what a run with masks trains."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.train_command import metrics, record, said, words

pytestmark = pytest.mark.train


def test_a_packed_run_with_varlen_attention_is_that_with_masks(forks, tiny):
    # Plain gradient descent, since Adam makes large steps of the smallest gradients.
    line = [
        *words(tiny, packing="true", optim="sgd", activation_checkpointing="true"),
        "trainer.evaluation.samples=2", "trainer.evaluation.max_new_tokens=4",
    ]  # fmt: skip
    runs = {"sdpa": tiny / "by-masks", "auto": tiny / "by-documents"}
    for attention, run in runs.items():
        more = [f"model.attention={attention}", f"output_dir={run.name}"]
        assert forks.run(tiny, *line, *more) == 0, said(tiny)[-2000:]
    masks, documents = runs.values()
    assert "attention varlen" in said(tiny)
    attention = [record(run)["sessions"][-1]["attention"] for run in runs.values()]
    assert attention == ["sdpa", "varlen"]
    for row, expected in zip(metrics(documents), metrics(masks), strict=True):
        numbers = {key: value for key, value in expected.items() if isinstance(value, float)}
        assert {key: row[key] for key in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6)
    trained, expected = (load_file(run / "model" / "model.safetensors") for run in runs.values())
    for name, weight in trained.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)
    # Nothing that others read has the name, and plain transformers loads it.
    assert "varlen" not in json.dumps(
        [json.loads(file.read_text()) for file in (documents / "model").glob("*.json")]
    )
    plain = AutoModelForCausalLM.from_pretrained(documents / "model")
    assert plain.config._attn_implementation == "sdpa"
