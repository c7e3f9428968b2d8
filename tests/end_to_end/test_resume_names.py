"""Models whose files bear other names than their own weights go on from their checkpoints exactly.

transformers saves them under the hub's names, and Trainer looks for the model's own.
"""

import pytest
import torch
from safetensors.torch import load_file

from helpers.chatml import jsonl
from helpers.model_families import save_family
from luthier.cli.train import main, train
from luthier.storage.manifest import read_manifest

CHATS = [("name a colour", "green"), ("two and two", "four, as all know")]
PROCESSOR = "preprocessor_config.json"


def run(folder, output, steps, *more):
    assert main(train, [
        "model=hub", f"model.path={folder / 'model'}", "model.device=cpu", "model.dtype=float32",
        "dataset=jsonl", f"dataset.path={folder / 'rows.jsonl'}", f"dataset.cache={folder}/cache",
        "dataset.eval.share=null", "chat.max_length=64", f"output_dir={folder / output}",
        "trainer.args.per_device_train_batch_size=2", "trainer.args.disable_tqdm=true",
        "trainer.args.lr_scheduler_type=constant", "trainer.args.warmup_steps=0",
        "trainer.args.learning_rate=0.01", "trainer.args.activation_checkpointing=false",
        "trainer.args.save_strategy=steps", "trainer.args.save_steps=1",
        "trainer.evaluation.samples=0", f"trainer.args.max_steps={steps}", *more,
    ]) == 0  # fmt: skip
    return load_file(folder / output / "model" / "model.safetensors")


@pytest.mark.parametrize("family", ["gemma3", "qwen3_moe"])
def test_a_resumed_run_has_the_weights_of_one_that_was_never_stopped(tmp_path, family):
    save_family(tmp_path / "model", family)
    rows = [{"prompt": question, "completion": answer} for question, answer in CHATS * 4]
    jsonl(tmp_path / "rows.jsonl", rows)
    expected = run(tmp_path, "whole", 2)
    run(tmp_path, "stopped", 1)
    resumed = run(tmp_path, "stopped", 2)
    assert expected.keys() == resumed.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)
    if (tmp_path / "model" / PROCESSOR).is_file():
        for folder in ("model", "checkpoints/checkpoint-2"):
            carried = tmp_path / "stopped" / folder
            assert (carried / PROCESSOR).read_text() == (tmp_path / "model" / PROCESSOR).read_text()
            assert PROCESSOR in read_manifest(carried)["files"]


def test_a_checkpoint_of_another_class_is_told_and_not_passed_over(tmp_path):
    from transformers import AutoModelForCausalLM

    from helpers.model_families import make_family_model
    from luthier.errors import UserError
    from luthier.train.trainers.checkpoints import load_named_weights

    save_family(tmp_path / "model", "qwen3_5")
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    text.save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match=r"weights are of another class.*there is no model"):
        load_named_weights(make_family_model("qwen3_5"), tmp_path / "text")
