"""Rows with images train as plain transformers trains on the processor's own batches.

Several processes train as one does, also in steps in which some of them have no image.
"""

import json
import shutil

import pytest
import torch

from helpers import fsdp_cpu
from helpers.family_steps import tensors
from helpers.train_command import launch_ranks
from helpers.vision_runs import HELD_OUT, PAIRS, RATE, ROWS, VisionRuns
from luthier.model.model_class import find_vision_modules

pytestmark = pytest.mark.train

FAMILIES = ("idefics3", "llava_clip", "gemma3", "qwen3_vl")
LORA = ("lora=default", "lora.r=4", "lora.lora_dropout=0.0", "lora.vision=true")
ADAM = ("trainer.args.optim=adamw_torch", "trainer.args.learning_rate=0.02")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = VisionRuns(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


def descend(runs, model, loss, trains, steps=2):
    """Take steps of gradient descent by hand."""
    weights = {name: p for name, p in model.named_parameters() if trains(name)}
    for _ in range(steps):
        model.zero_grad()
        loss().backward()
        with torch.no_grad():
            for weight in weights.values():
                if weight.grad is not None:
                    weight -= RATE * weight.grad


def compare(runs, trained, reference, base):
    """Hold the saved weights against those of plain arithmetic; returns what moved."""
    moved = set()
    start, saved = dict(base.named_parameters()), runs.model(trained / "model")
    for name, weight in saved.named_parameters():
        expected = reference.get_parameter(name)
        change = (expected - start[name]).norm()
        assert (weight - expected).norm() <= 2e-3 * change + 1e-6, name
        moved |= {name} if change > 1e-6 else set()
    return moved


@pytest.mark.parametrize(
    ("name", "opened"), [("gemma3", False), *((name, True) for name in FAMILIES)]
)
def test_full_fine_tuning_is_that_of_plain_transformers(runs, name, opened):
    runs = runs(name)
    words = ["lora=none", *(["model.train=['.']"] if opened else [])]
    trained = runs.train(f"full-{opened}", *words)
    base, reference = runs.model(), runs.model()
    vision = find_vision_modules(base)
    with torch.no_grad():
        before = float(runs.nll(base, HELD_OUT))
    descend(
        runs, reference, lambda: runs.nll(reference, ROWS),
        lambda weight: opened or not weight.startswith(vision),
    )  # fmt: skip
    moved = compare(runs, trained, reference, base)
    assert any(weight.startswith(vision) for weight in moved) == opened
    loss = runs.results(trained)["eval_loss"]
    assert loss["before"] == pytest.approx(before, abs=1e-4)
    with torch.no_grad():
        after = float(runs.nll(runs.model(trained / "model"), HELD_OUT))
    assert loss["after"] == pytest.approx(after, abs=1e-4)


@pytest.mark.parametrize("name", ["idefics3", "qwen3_vl"])
def test_packed_rows_with_images_train_as_rows_do(runs, name):
    runs = runs(name)
    words = ("lora=none", "model.train=['.']", "trainer.args.packing=true",
             "trainer.args.gradient_accumulation_steps=1", "chat.max_length=512")  # fmt: skip
    trained = runs.train("packed", *words)
    base, reference = runs.model(), runs.model()
    descend(runs, reference, lambda: runs.nll(reference, ROWS), lambda weight: True)
    assert compare(runs, trained, reference, base)


def test_only_the_tower_may_train_on_batches_with_and_without_images(runs):
    runs = runs("qwen3_vl")
    # A batch is a row, so that two of the four batches of a step have no image.
    words = ("lora=none", "model.train=[visual]", "trainer.args.per_device_train_batch_size=1",
             "trainer.args.gradient_accumulation_steps=4")  # fmt: skip
    trained = runs.train("tower", *words)
    reference = runs.model()
    descend(runs, reference, lambda: runs.nll(reference, ROWS), lambda weight: "visual" in weight)
    moved = compare(runs, trained, reference, runs.model())
    assert moved
    assert all("visual" in weight for weight in moved)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_on_text_and_tower_loads_in_plain_peft_and_resumes_to_the_bit(runs, name):
    from peft import PeftModel

    runs = runs(name)
    more = (
        *LORA, *ADAM, "trainer.args.max_steps=3", "trainer.args.save_strategy=steps",
        "trainer.args.save_steps=2", "trainer.evaluation.samples=2",
        "trainer.evaluation.max_new_tokens=6",
    )  # fmt: skip
    trained = runs.train("lora", *more)
    adapted = PeftModel.from_pretrained(runs.model(), trained / "model").eval()
    with torch.no_grad():
        after = float(runs.nll(adapted, HELD_OUT))
    assert runs.results(trained)["eval_loss"]["after"] == pytest.approx(after, abs=1e-4)
    adapter = tensors(trained / "model")
    vision = find_vision_modules(runs.model())
    outer = [n for n in adapter if any(f".{part}." in n for part in vision) and ".lora_B." in n]
    assert any(adapter[name].abs().max() > 0 for name in outer)
    check_replies(runs, adapted, trained)
    # What a killed run leaves behind its second step.
    again = runs.folder / "resumed"
    shutil.copytree(trained, again)
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "checkpoint-3", ignore_errors=True)
    record = json.loads((again / "run.json").read_text())
    record = {key: value for key, value in record.items() if key != "seal"}
    (again / "run.json").write_text(json.dumps(record | {"status": "running"}))
    runs.train("resumed", *more)
    assert "resuming at step" in runs.said
    resumed = tensors(again / "model")
    assert all(torch.equal(adapter[name], resumed[name]) for name in adapter)


def check_replies(runs, adapted, trained):
    """Samples are answered as plain transformers answers the processor's own prompt."""
    rows = [json.loads(line) for line in (trained / "replies.jsonl").read_text().splitlines()]
    assert len(rows) == len(HELD_OUT)
    for row, shown in zip(HELD_OUT, rows, strict=True):
        inputs = runs.inputs(row[:1], add_generation_prompt=True)
        end = runs.processor.tokenizer.eos_token_id
        out = adapted.generate(
            **inputs, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=0
        )
        ids = out[0, inputs["input_ids"].shape[1] :].tolist()
        ids = ids[: ids.index(end)] if end in ids else ids
        assert shown["after"] == runs.processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_checkpointing_and_four_bits_change_nothing_but_rounding(runs):
    runs = runs("gemma3")
    plain = runs.train("plain", *LORA)
    checkpointed = runs.train("checkpointed", *LORA, "trainer.args.activation_checkpointing=true")
    one, other = tensors(plain / "model"), tensors(checkpointed / "model")
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, atol=1e-6, rtol=1e-4)
    groups = "trainer.optimizer.groups=[{match: vision_tower, learning_rate: 0.005}]"
    slow = tensors(runs.train("slow", *LORA, groups) / "model")
    for name in (name for name in one if ".lora_B." in name and one[name].any()):
        ratio = slow[name].norm() / one[name].norm()
        assert ratio == pytest.approx(0.1 if "vision_tower" in name else 1, rel=0.1), name
    packed = runs.train("nf4", *LORA, *ADAM, "quantization=nf4")
    loss = runs.results(packed)["eval_loss"]
    assert loss["after"] != loss["before"]
    moved = tensors(packed / "model")
    assert any("vision_tower" in n and "lora_B" in n and moved[n].any() for n in moved)


BETA = 0.1
DPO = ("trainer=dpo", "dataset.eval.path=null")
REFERENCES = {
    "a reference model": (),
    "precomputed": ("trainer.args.precompute_ref_log_probs=true",),
}


@pytest.mark.parametrize(
    ("name", "more"),
    [*zip(("idefics3", "qwen3_vl"), REFERENCES.values(), strict=True)],
    ids=REFERENCES,
)
def test_dpo_of_all_weights_is_that_of_plain_transformers(runs, name, more):
    runs = runs(name)
    words = [*DPO, *more, "lora=none", "model.train=['.']"]
    trained = runs.train(f"dpo-{len(more)}", *words, rows="pairs")
    base, model = runs.model(), runs.model()

    def loss():
        total = torch.zeros(())
        for row in PAIRS:
            sides = [[*row["prompt"], *row[side]] for side in ("chosen", "rejected")]
            with torch.no_grad():
                before = [runs.log_probabilities(base, side)[0] for side in sides]
            better, worse = (
                runs.log_probabilities(model, side)[0] - reference
                for side, reference in zip(sides, before, strict=True)
            )
            total = total - torch.nn.functional.logsigmoid(BETA * (better - worse))
        return total / len(PAIRS)

    descend(runs, model, loss, lambda weight: True)
    moved = compare(runs, trained, model, base)
    assert any(weight.startswith(find_vision_modules(base)) for weight in moved)


def test_dpo_compares_with_the_model_without_its_adapter(runs):
    runs = runs("gemma3")
    worker = "trainer.args.dataloader_num_workers=1"
    trained = runs.train("dpo-lora", *DPO, *LORA, worker, rows="pairs")
    other = runs.train("dpo-early", *DPO, *LORA, *REFERENCES["precomputed"], rows="pairs")
    one, two = tensors(trained / "model"), tensors(other / "model")
    for weight, value in one.items():
        torch.testing.assert_close(two[weight], value, atol=1e-7, rtol=1e-4)
    assert any("vision_tower" in name and "lora_B" in name and one[name].any() for name in one)
    logged = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


# Four rows of which the first and the third have images, in their order: of two processes with a
# row each the second one never has an image, and of two rows each both have one.
PROCESSES = {
    "all weights, a process without an image": ("lora=none", "model.train=['.']"),
    "checkpointing": (
        "lora=none", "model.train=['.']", "trainer.args.activation_checkpointing=true",
    ),
    "an adapter": LORA,
}  # fmt: skip


CASES = {f"ddp, {case}": ("ddp", more) for case, more in PROCESSES.items()}
CASES |= {f"fsdp2, {n}": ("fsdp2", PROCESSES[n]) for n in PROCESSES if n != "checkpointing"}


@pytest.mark.parametrize(("sharding", "more"), CASES.values(), ids=CASES)
def test_two_processes_train_as_one(runs, forks, sharding, more):
    runs = runs("llava_clip" if sharding == "ddp" else "gemma3")
    name = f"{sharding}-{list(PROCESSES.values()).index(more)}"
    order = ("trainer.args.train_sampling_strategy=sequential", "dataset.eval.path=null")
    one = runs.train(f"one-{name}", *more, *order)
    words = runs.words(f"two-{name}", *more, *order, "trainer.args.per_device_train_batch_size=1")
    if sharding == "ddp":
        codes, said = launch_ranks(forks, runs.folder, *words)
        assert codes == [0, 0], said[-3000:]
    else:
        sharded = fsdp_cpu.fork_fsdp(forks, runs.folder, *words)
        assert sharded.code == 0, sharded.text[-3000:]
    reference, saved = tensors(one / "model"), tensors(runs.folder / f"two-{name}" / "model")
    assert fsdp_cpu.largest_difference(saved, reference) < 1e-5
    start = {} if "lora=default" in more else tensors(runs.base)
    moved = [n for n, w in saved.items() if n not in start or not torch.equal(w, start[n])]
    assert any("vision_tower" in weight for weight in moved)
