"""Models whose files bear other names than their own weights go on from their checkpoints exactly.

transformers saves them under the hub's names, and Trainer looks for the model's own.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.chatml import jsonl
from helpers.model_families import save_family
from luthier.cli.train import main, train
from luthier.storage.manifest import read_manifest, write_manifest

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
    (file,) = (folder / output / "model").glob("*.safetensors")
    return load_file(file)


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


def test_a_saved_image_text_model_is_loaded_with_its_processor_by_plain_transformers(tmp_path):
    from transformers import (
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
    )

    save_family(tmp_path / "model", "gemma3")
    tokens = {"image": "<|image|>", "boi": "<|vision_start|>", "eoi": "<|vision_end|>"}
    tokenizer = AutoTokenizer.from_pretrained(
        tmp_path / "model",
        extra_special_tokens={f"{name}_token": token for name, token in tokens.items()},
    )
    tokenizer.save_pretrained(tmp_path / "model")
    processor = Gemma3Processor(Gemma3ImageProcessorPil(), tokenizer)
    processor.save_pretrained(tmp_path / "processor")
    settings = (tmp_path / "processor" / "processor_config.json").read_text()
    (tmp_path / "model" / "processor_config.json").write_text(settings)
    jsonl(tmp_path / "rows.jsonl", [{"prompt": "name a colour", "completion": "green"}] * 4)
    run(tmp_path, "run", 1)
    saved = tmp_path / "run" / "model"
    assert (saved / "processor_config.json").read_text() == settings
    model = AutoModelForImageTextToText.from_pretrained(saved)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert type(AutoProcessor.from_pretrained(saved)).__name__ == "Gemma3Processor"


def test_an_adapters_checkpoint_under_the_text_classs_names_goes_on_exactly(tmp_path):
    """As an older luthier wrote it, which trained Qwen3.5 as its text part alone."""
    save_family(tmp_path / "model", "qwen3_5")
    rows = [{"prompt": question, "completion": answer} for question, answer in CHATS * 4]
    jsonl(tmp_path / "rows.jsonl", rows)
    lora = ["lora=default", "lora.target_modules=[o_proj,up_proj]"]
    expected = run(tmp_path, "whole", 2, *lora)
    run(tmp_path, "stopped", 1, *lora)
    checkpoint = tmp_path / "stopped" / "checkpoints" / "checkpoint-1"
    file, facts = checkpoint / "adapter_model.safetensors", read_manifest(checkpoint)["made"]
    names = {name: name.replace("model.language_model.", "model.") for name in load_file(file)}
    assert all(old != new for old, new in names.items())
    save_file({names[name]: tensor for name, tensor in load_file(file).items()}, file)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, facts)
    resumed = run(tmp_path, "stopped", 2, *lora)
    assert expected.keys() == resumed.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)


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
