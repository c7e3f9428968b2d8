"""classify and tag on the small real model, with adapters, from the command line."""

import json

import pytest
from safetensors.torch import load_file
from tasks_material import run, written

pytestmark = pytest.mark.train

TEXTS = [
    {"text": f"{question} {n}", "label": label}
    for n in range(8)
    for question, label in (("Where is my card?", "card"), ("What is a lute?", "music"))
]
WORDS = [
    {"tokens": ["Anna", "Bell", "is", "in", "Paris", str(n)],
     "tags": ["B-PER", "I-PER", "O", "O", "B-LOC", "O"]}
    for n in range(16)
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "rows", "results"),
    [
        ("classify", TEXTS, {"accuracy", "macro_f1", "micro_f1"}),
        ("tag", WORDS, {"accuracy", "entity_precision", "entity_recall", "entity_f1"}),
    ],
    ids=["classify", "tag"],
)
def test_the_small_model_gets_a_head_and_an_adapter(tmp_path, method, rows, results):
    data = written(tmp_path / "rows.jsonl", rows)
    output, found = run(
        tmp_path, f"trainer={method}", "model=smollm2_135m", "lora=small", "model.device=cpu",
        "dataset=files", f"dataset.path={data}", "dataset.eval.share=null", "dataset.eval.count=4",
        "trainer.args.max_steps=2", "trainer.args.per_device_train_batch_size=4",
        "trainer.args.logging_steps=1",
    )  # fmt: skip
    assert set(found) == {"held_out_loss", *results}
    assert "new layers: score" in output
    folder = tmp_path / "run" / "model"
    weights = load_file(folder / "adapter_model.safetensors")
    assert any("score" in name for name in weights)
    assert all(weight.dtype.itemsize == 4 for weight in weights.values())
    labels = json.loads((folder / "labels.json").read_text())
    assert labels["num_labels"] == len(labels["label2id"]) == {"classify": 2, "tag": 4}[method]
    assert not (folder / "chat.json").exists()
