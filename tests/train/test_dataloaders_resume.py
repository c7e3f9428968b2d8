"""A run that stops and goes on, in one process and in two, ends with the weights of one that did
not, to the last bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.sft_trainer import model, packing, rows, trainer
from luthier.train.dataloaders import StreamDataset

WAYS = {
    "packed": (packing(), {}),
    "grouped by length": (None, {"train_sampling_strategy": "group_by_length"}),
    "shuffled": (None, {}),
}


def build(folder, way, **args):
    plan, settings = WAYS[way]
    net = model("llama")
    # Dropout shows whether the random state of the process is where it was, too.
    for layer in net.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return trainer(net, folder, rows(60), plan, **{
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "optim": "adamw_torch",
        "learning_rate": 0.01, "gradient_accumulation_steps": 2, "save_strategy": "steps",
        "save_steps": 1, **settings, **args,
    })  # fmt: skip


def weights(made):
    return {name: value.clone() for name, value in made.model.state_dict().items()}


@pytest.mark.train
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_exact_in_every_epoch(tmp_path, way):
    made = build(tmp_path, way)
    made.train()
    whole, steps = weights(made), made.state.max_steps
    assert steps >= 6
    # In the first epoch, between the two, and in the second.
    for step in (1, steps // 2, steps // 2 + 1, steps - 1):
        again = build(tmp_path / "again", way, save_strategy="no")
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert again.state.global_step == steps
        assert all(torch.equal(whole[name], value) for name, value in weights(again).items()), step


def stream():
    """Begins a pass over the rows of a source."""
    data = rows(30)
    return (
        {"input_ids": ids, "labels": labels}
        for ids, labels in zip(data["input_ids"], data["labels"], strict=True)
    )


def stream_trainer(folder, packed, size=4, **args):
    made = StreamDataset(
        stream, seed=5, shuffle_buffer=8, length=32 if packed else None, pack_rows=4
    )
    return trainer(model(), folder, made, packing() if packed else None, **{
        "max_steps": 9, "per_device_train_batch_size": size, "learning_rate": 0.01,
        "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3, **args,
    })  # fmt: skip


@pytest.mark.train
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "single rows"])
def test_a_stream_is_resumed_in_its_first_pass_and_in_later_ones(tmp_path, packed):
    made = stream_trainer(tmp_path, packed)
    made.train()
    whole = weights(made)
    # A pass is about two steps of packed rows and four of single ones.
    for step in (3, 6):
        again = stream_trainer(tmp_path / "again", packed, save_strategy="no")
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert all(torch.equal(whole[name], value) for name, value in weights(again).items())


def two_processes(folder):
    """Run this file in two processes; see `main` below."""
    shared = {"PYTHONPATH": str(Path(__file__).parents[1])}
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | shared
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               "--master_port=29617", __file__, str(folder)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# Every number of rows here leaves a rest that two processes cannot share out evenly.
TOGETHER = {"optim": "sgd", "learning_rate": 0.1, "save_strategy": "no"}


@pytest.mark.train
def test_two_processes_train_as_one_and_resume_as_one(tmp_path):
    two_processes(tmp_path)
    for way in WAYS:
        one = exactly(tmp_path / "one", way, per_device_train_batch_size=4)
        one.train()
        two, resumed = (load_file(tmp_path / f"{way}-{name}.safetensors") for name in ("2", "r"))
        for name, value in weights(one).items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=f"{way} {name}")
            assert torch.equal(two[name], resumed[name]), f"{way} {name}"
        loss = json.loads((tmp_path / f"{way}.json").read_text(encoding="utf-8"))
        assert loss == pytest.approx(one.evaluate()["eval_loss"], rel=1e-5), way
    one = stream_trainer(tmp_path / "one", packed=True, size=4, save_strategy="no")
    one.train()
    two = load_file(tmp_path / "stream.safetensors")
    for name, value in weights(one).items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=f"stream {name}")


def exactly(folder, way, **args):
    made = build(folder, way, **{"per_device_train_batch_size": 2, **TOGETHER, **args})
    for layer in made.model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    return made


def save(made, path):
    from safetensors.torch import save_file

    if made.accelerator.is_main_process:
        save_file(weights(made), path)
    made.accelerator.wait_for_everyone()


def train_and_resume(folder, way):
    """Train, and train again from a checkpoint in the second epoch."""
    made = exactly(folder / way, way, save_strategy="steps")
    made.train()
    save(made, folder / f"{way}-2.safetensors")
    loss = made.evaluate()["eval_loss"]
    if made.accelerator.is_main_process:
        (folder / f"{way}.json").write_text(json.dumps(loss), encoding="utf-8")
    checkpoint = folder / way / f"checkpoint-{made.state.max_steps - 1}"
    again = exactly(folder / f"{way} again", way)
    again.train(resume_from_checkpoint=str(checkpoint))
    save(again, folder / f"{way}-r.safetensors")


def main(folder):
    """What each of the two processes does."""
    for way in WAYS:
        train_and_resume(folder, way)
    made = stream_trainer(folder / "stream", packed=True, size=2, save_strategy="no")
    made.train()
    save(made, folder / "stream.safetensors")
    made.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
