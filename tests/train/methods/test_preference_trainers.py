"""What holds for every trainer of judged replies: the loss is a mean over the rows of a step."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from trl import DPOConfig, KTOConfig, RewardConfig

from helpers.preference_trainer import (
    CHAT,
    PREFERENCES,
    arguments,
    listed,
    lora,
    model,
    moved,
    tokenizer,
    trainer,
    unpaired,
)
from luthier.data.batching.preference_collators import (
    PartnerSampler,
    assign_fixed_partners,
    rotate_partners,
)
from luthier.data.batching.samplers import ShuffledSampler
from luthier.data.batching.settings import BatchingSettings
from luthier.data.encoders.preference import PreferenceEncoder, RewardEncoder, UnpairedEncoder
from luthier.train.methods.dpo import LuthierDPOTrainer
from luthier.train.methods.kto import LuthierKTOTrainer
from luthier.train.methods.orpo_cpo import (
    CPOConfig,
    LuthierCPOTrainer,
    LuthierORPOTrainer,
    ORPOConfig,
)
from luthier.train.methods.reward import LuthierRewardTrainer

TOKENIZER = tokenizer()
ROWS = {
    make: listed(make(TOKENIZER, CHAT).encode(examples))
    for make, examples in (
        (PreferenceEncoder, PREFERENCES),
        (UnpairedEncoder, unpaired()),
        (RewardEncoder, PREFERENCES),
    )
}
PAIRS, VERDICTS, WHOLE = ROWS.values()
SIMPO = {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.5, "max_length": 99}
KINDS = {
    "dpo": (LuthierDPOTrainer, DPOConfig, PAIRS, {"loss_type": ["sigmoid", "sft"], "beta": 0.3}),
    "kto": (LuthierKTOTrainer, KTOConfig, VERDICTS, {"beta": 0.3, "desirable_weight": 1.3}),
    "orpo": (LuthierORPOTrainer, ORPOConfig, PAIRS, {"beta": 0.3, "max_length": 99}),
    "simpo": (LuthierCPOTrainer, CPOConfig, PAIRS, SIMPO),
    "reward": (LuthierRewardTrainer, RewardConfig, WHOLE, {"center_rewards_coefficient": 0.01}),
}


def build(folder, name, batch=4, accumulation=1, batching=None, **args):
    kind, make, rows, own = KINDS[name]
    auto, more, task = transformers.AutoModelForCausalLM, {}, "CAUSAL_LM"
    if name == "reward":
        auto, more = transformers.AutoModelForSequenceClassification, {"num_labels": 1}
        task = "SEQ_CLS"
    settings = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 2,
        **own,
        **args,
    }
    return trainer(
        kind, lora(model(auto, **more), task), arguments(make, folder, **settings), rows,
        batching=batching,
    )  # fmt: skip


def weights(made):
    named = made.model.named_parameters()
    return {name: part.detach().clone() for name, part in named if part.requires_grad}


def losses(made):
    return [line["loss"] for line in made.state.log_history if "loss" in line]


@pytest.mark.train
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("strategy", ["sequential", "random"])
def test_batches_and_accumulation_give_the_same_training(tmp_path, name, strategy):
    # 7 pairs, and 13 replies: neither fills its last step.
    found = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        made = build(tmp_path, name, batch, accumulation, train_sampling_strategy=strategy)
        made.train()
        found.append((losses(made), weights(made)))
    for other, parts in found[1:]:
        assert other == pytest.approx(found[0][0], rel=1e-5)
        for key, part in parts.items():
            torch.testing.assert_close(part, found[0][1][key], rtol=1e-4, atol=1e-6, msg=key)
    start = weights(build(tmp_path, name))
    assert all(bool((part != start[key]).any()) for key, part in found[0][1].items())


@pytest.mark.parametrize("name", [*KINDS, "aot"])
def test_an_evaluation_does_not_depend_on_its_batches(tmp_path, name):
    own = {"loss_type": "aot"} if name == "aot" else {}
    made = build(tmp_path, "dpo" if name == "aot" else name, **own)
    moved(made.model)
    found = []
    for size in (1, 3, 8):
        made.args.per_device_eval_batch_size = size
        measured = made.evaluate()
        found.append({k: v for k, v in measured.items() if "second" not in k and "time" not in k})
    for other in found[1:]:
        # A reward is 0.3 times the difference of two sums of log probabilities of about -80, and
        # float32 has numbers 8e-6 apart there.
        assert other == pytest.approx(found[0], rel=1e-5, abs=5e-6)
    assert all(f"eval_{name}" in found[0] for name in made.result_metrics)


@pytest.mark.parametrize("name", KINDS)
def test_an_evaluation_measures_what_a_step_over_all_rows_measures(tmp_path, name):
    made = build(tmp_path, name, batch=99)
    moved(made.model)
    measured = made.evaluate()
    made.model.train()
    batches, counts = made.get_batch_samples(iter(made.get_train_dataloader()), 1, "cpu")
    made.current_gradient_accumulation_steps = 1
    loss = made.compute_loss(made.model, batches[0], num_items_in_batch=counts)
    assert measured["eval_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    logs = {}
    made.add_log_means(logs)
    assert logs.pop("num_tokens") == int(batches[0]["attention_mask"].sum())
    assert {f"eval_{key}": value for key, value in logs.items()} == pytest.approx(
        {key: measured[key] for key in (f"eval_{name}" for name in logs)}, rel=1e-4, abs=1e-5
    )


@pytest.mark.train
@pytest.mark.parametrize("name", KINDS)
def test_a_run_goes_on_in_a_later_epoch_as_if_it_had_never_stopped(tmp_path, name):
    args = {"batch": 2, "accumulation": 2, "train_sampling_strategy": "random"}
    saved = {"save_strategy": "steps", "save_steps": 3}
    made = build(tmp_path, name, **args, **saved)
    made.train()
    again = build(tmp_path / "again", name, **args)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for key, part in weights(again).items():
        assert torch.equal(part, weights(made)[key]), key


def test_rows_are_padded_to_one_width_where_that_is_asked_for(tmp_path):
    made = build(tmp_path, "dpo", batching=BatchingSettings(length=80, constant=True))
    widths = {batch["input_ids"].shape[1] for batch in made.get_train_dataloader()}
    assert widths == {80}


def test_every_row_has_a_partner_in_its_own_step():
    order = np.array([5, 3, 8, 1, 9, 2, 7])
    assert rotate_partners(order, 3).tolist() == [8, 5, 3, 2, 1, 9, 2]
    assert rotate_partners(np.array([4]), 3).tolist() == [4]
    sampler = PartnerSampler(ShuffledSampler(VERDICTS, seed=1), step=4)
    pairs = list(sampler)
    assert sorted(number for number, _ in pairs) == list(range(len(VERDICTS)))
    for start in range(0, 12, 4):
        own, partners = zip(*pairs[start : start + 4], strict=True)
        assert set(own) == set(partners)
        assert all(number != partner for number, partner in pairs[start : start + 4])
    sampler.set_epoch(1)
    assert list(sampler) != pairs
    fixed = assign_fixed_partners(VERDICTS, 4)
    sampler = PartnerSampler(ShuffledSampler(VERDICTS, seed=1), step=4, fixed=fixed)
    assert all(fixed[number] == partner for number, partner in sampler)


def two_processes(folder):
    """Run this file in two processes; see `main` below."""
    shared = {"PYTHONPATH": str(Path(__file__).parents[2])}
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | shared
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               "--master_port=29631", __file__, str(folder)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.train
def test_two_processes_train_as_one(tmp_path):
    two_processes(tmp_path)
    for name in KINDS:
        one = build(tmp_path / "one", name, batch=4)
        one.train()
        two = load_file(tmp_path / f"{name}.safetensors")
        for key, part in weights(one).items():
            torch.testing.assert_close(two[key], part, rtol=1e-4, atol=1e-6, msg=f"{name} {key}")
        said = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert said["losses"] == pytest.approx(losses(one), rel=1e-5), name
        measured = {key: value for key, value in one.evaluate().items() if key in said["measured"]}
        assert said["measured"] == pytest.approx(measured, rel=1e-4, abs=1e-5), name
        last = one.state.log_history[-3]
        assert said["last"] == pytest.approx({key: last[key] for key in said["last"]}, rel=1e-4)


UNLIKE = ("epoch", "step", "tokens_per_second", "memory_gib")
"""What two processes log otherwise than one, or what is told elsewhere."""


def main(folder):
    """Train and evaluate each kind in this process's part of two, and leave what came out."""
    for name in KINDS:
        # An evaluation before training must not take the model out of DDP.
        made = build(folder / name, name, batch=2)
        made.evaluate()
        made.train()
        measured = made.evaluate()
        if made.accelerator.is_main_process:
            save_file(weights(made), folder / f"{name}.safetensors")
            times = ("second", "time", "epoch")
            kept = {k: v for k, v in measured.items() if not any(word in k for word in times)}
            log = [line for line in made.state.log_history if "loss" in line]
            last = {key: value for key, value in log[-1].items() if key not in UNLIKE}
            said = {"losses": losses(made), "measured": kept, "last": last}
            (folder / f"{name}.json").write_text(json.dumps(said), encoding="utf-8")
        made.accelerator.wait_for_everyone()
    # The thread of gloo needs the GIL to let go of the last barrier, and the end of this function
    # drops the process group with the GIL held: in torch 2.13 both then wait for each other.
    time.sleep(1)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
