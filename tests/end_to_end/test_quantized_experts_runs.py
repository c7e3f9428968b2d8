"""LoRA on experts in 4 bits from the command line: trained, resumed, measured, answered, merged."""

import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.chatml import jsonl
from helpers.head_runs import CASES
from helpers.model_families import save_family
from luthier.cli.merge import run as merge
from luthier.cli.train import main, train
from luthier.model.artifact import find_artifact
from luthier.model.device import Machine
from luthier.model.load import keep_backward_kernels, load_trained
from luthier.model.tokenizer import load_tokenizer

CHATS = [("name a colour", "green"), ("two and two", "four, as all know")]
pytestmark = pytest.mark.train
IDS = torch.randint(3, 250, (1, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def folder(request, tmp_path_factory):
    """A checkpoint of a family and a few rows."""
    folder = tmp_path_factory.mktemp(request.param)
    save_family(folder / "model", request.param)
    rows = [{"prompt": question, "completion": answer} for question, answer in CHATS * 4]
    jsonl(folder / "rows.jsonl", rows)
    return folder


def run(folder, output, steps, *more):
    """The adapter that a run in nf4 saves after so many steps."""
    assert main(train, [
        "model=hub", f"model.path={folder / 'model'}", "model.device=cpu", "model.dtype=float32",
        "model.attention=eager", "quantization=nf4", "lora=default", "lora.lora_dropout=0.0",
        "lora.target_modules=[q_proj,v_proj]",
        "lora.target_parameters=[experts.gate_up_proj,experts.down_proj]",
        "dataset=jsonl", f"dataset.path={folder / 'rows.jsonl'}", f"dataset.cache={folder}/cache",
        "dataset.eval.share=null", "chat.max_length=64", f"output_dir={folder / output}",
        "trainer.args.per_device_train_batch_size=2", "trainer.args.disable_tqdm=true",
        "trainer.args.lr_scheduler_type=constant", "trainer.args.warmup_steps=0",
        "trainer.args.learning_rate=0.01", "trainer.args.save_strategy=steps",
        "trainer.args.save_steps=1", "trainer.evaluation.samples=2",
        f"trainer.args.max_steps={steps}", *more,
    ]) == 0  # fmt: skip
    return load_file(folder / output / "model" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(folder):
    """The adapter of a run that was never stopped, in `folder / "whole"`."""
    return run(folder, "whole", 3)


def test_a_resumed_run_has_the_adapter_of_one_that_was_never_stopped(folder, whole):
    run(folder, "stopped", 2)
    resumed = run(folder, "stopped", 3)
    assert whole.keys() == resumed.keys()
    assert sum("experts" in name for name in whole) == 8
    assert all(weight.abs().max() > 0 for weight in whole.values())
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)


def test_the_merged_model_is_the_one_that_was_trained(folder, whole, capsys):
    target = folder / "merged"
    assert merge([str(folder / "whole"), "--out", str(target), "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    # Tensor by tensor, and checked against the model with its adapter on packed experts.
    assert "whole  " not in said
    difference = re.search(r"logits differ by up to \S+ \((\S+) standard deviations\)", said)
    assert difference is not None and float(difference[1]) < 1e-4
    assert "the likeliest token is the same at 100.0% of positions" in said
    artifact = find_artifact(str(folder / "whole"))
    machine = Machine("cpu", "float32", "eager")
    trained = load_trained(artifact, machine, load_tokenizer(artifact.base))
    merged = AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, attn_implementation="eager"
    )
    base = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    with torch.no_grad():
        logits, expected, before = (
            model(input_ids=IDS).logits for model in (merged.eval(), trained, base.eval())
        )
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert (before - expected).abs().max() > 0.05


def test_a_merged_model_that_is_packed_again_says_that_its_experts_stay_whole(
    folder, whole, capsys
):
    target = folder / "packed"
    words = [str(folder / "whole"), "--out", str(target), "--quantize", "nf4", "--no-verify"]
    assert merge(words) == 0
    assert "weights keep their number format" in capsys.readouterr().out
    packed = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager")
    keep_backward_kernels(packed)
    assert packed.is_quantized
    with torch.no_grad():
        assert packed.eval()(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["classes", "rewards"])
def test_a_head_trains_beside_experts_in_4_bits(folder, kind):
    method, rows, _ = CASES[kind]
    jsonl(folder / f"{method}.jsonl", rows)
    output = folder / method
    assert main(train, [
        "model=hub", f"model.path={folder / 'model'}", "model.device=cpu", "model.dtype=float32",
        "quantization=nf4", "lora=default", f"trainer={method}", "dataset=jsonl",
        f"dataset.path={folder / method}.jsonl", f"dataset.cache={folder}/cache",
        "dataset.eval.share=null", f"output_dir={output}", "trainer.args.disable_tqdm=true",
        "trainer.args.per_device_train_batch_size=2", "trainer.args.max_steps=1",
        "trainer.args.warmup_steps=0", "trainer.args.learning_rate=0.01",
    ]) == 0  # fmt: skip
    adapter = load_file(output / "model" / "adapter_model.safetensors")
    assert sum("experts" in name for name in adapter) == 8
    assert not any(".gate." in name or ".router." in name for name in adapter)
    assert all(weight.any() for weight in adapter.values())
    assert sum("score" in name for name in adapter) == 1
