"""What adapters ask of a trainer: LoRA+'s two rates, and AdaLoRA's ranks."""

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers.adapter_models import IDS, LORA, NF4, load, logits, trained
from luthier.config.library_settings import LoraSettings
from luthier.errors import UserError
from luthier.model.adapter_training import RankAllocation, lora_plus_groups, prepare_trainer
from luthier.model.adapters import add_adapter

ADALORA = {"method": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1}


class StopAt(TrainerCallback):
    """Stops a training after a number of steps."""

    def __init__(self, step):
        self.step = step

    def on_optimizer_step(self, args, state, control, **given):
        control.should_training_stop = state.global_step + 1 >= self.step


class Quiet(Trainer):
    """Tells nobody that someone trains."""

    def _send_telemetry(self):
        pass


def trainer_of(model, lora, folder, **given):
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"max_steps": 3, "learning_rate": 1e-3, "save_strategy": "no"} | given,
    )
    rows = [{"input_ids": IDS[0], "labels": IDS[0]} for _ in range(16)]
    trainer = Quiet(model, args, train_dataset=rows)
    prepare_trainer(trainer, LoraSettings(lora))
    return trainer


def rates(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "paged_adamw_8bit"])
def test_lora_plus_trains_b_faster(tiny_model, tmp_path, optim):
    lora = LORA | {"plus_ratio": 16, "use_dora": True, "modules_to_save": ["norm"]}
    model = add_adapter(load(tiny_model), lora, seed=1)
    trainer = trainer_of(model, lora, tmp_path, optim=optim, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    assert trainer.create_optimizer() is optimizer
    found = rates(optimizer, model)
    assert set(found) == set(trained(model))
    for name, rate in found.items():
        assert rate == pytest.approx(1e-3 * (16 if ".lora_B." in name else 1)), name
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}


def test_lora_plus_follows_the_schedule(tiny_model, tmp_path):
    lora = LORA | {"plus_ratio": 4}
    model = add_adapter(load(tiny_model), lora, seed=1)
    trainer = trainer_of(model, lora, tmp_path, max_steps=6)
    trainer.add_callback(StopAt(4))
    trainer.train()
    found = sorted(set(rates(trainer.optimizer, model).values()))
    assert found == pytest.approx([rate * (1 - 4 / 6) for rate in (1e-3, 4e-3)])


INTERRUPTED = {
    "lora plus": LORA | {"plus_ratio": 4},
    "adalora": ADALORA | {"tfinal": 1},
    "adalora at its budget": ADALORA | {"tfinal": 3},
    "pissa": LORA | {"init_lora_weights": "pissa_niter_4"},
    "rows": LORA | {"trainable_token_indices": [5, 80]},
    "whole": LORA | {"modules_to_save": ["lm_head"], "bias": "all"},
    "oft": {"method": "oft", "oft_block_size": 8},
    "ln_tuning": {"method": "ln_tuning"},
}


LONGER = ("lora plus", "pissa", "rows", "oft", "ln_tuning")


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param(lora, id=name, marks=[pytest.mark.train] if name in LONGER else [])
        for name, lora in INTERRUPTED.items()
    ],
)
def test_an_interrupted_training_goes_on_as_it_would(tiny_model, tmp_path, lora):
    ends = []
    for steps in ((6,), (4, 6)):
        folder = tmp_path / str(len(steps))
        for number, until in enumerate(steps):
            model = add_adapter(load(tiny_model), lora, seed=1)
            saving = {"save_steps": 2, "save_strategy": "steps"}
            trainer = trainer_of(model, lora, folder, max_steps=6, learning_rate=1e-2, **saving)
            trainer.add_callback(StopAt(until))
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if number else None)
        ends.append(model)
    for name, weight in trained(ends[0]).items():
        torch.testing.assert_close(trained(ends[1])[name], weight)
    torch.testing.assert_close(logits(ends[1]), logits(ends[0]))


def test_groups_keep_what_they_have(tiny_model):
    model = add_adapter(load(tiny_model), LORA, seed=1)
    weights = list(trained(model).values())
    groups = [{"params": weights, "lr": 2.0, "weight_decay": 0.3, "betas": (0.1, 0.2)}]
    slow, fast = lora_plus_groups(groups, model, 8)
    assert (slow["lr"], fast["lr"], len(slow["params"])) == (2.0, 16.0, len(weights) // 2)
    assert slow["betas"] == fast["betas"] == (0.1, 0.2)


@pytest.mark.parametrize("quantization", [{}, NF4], ids=["whole", "nf4"])
def test_adalora_comes_down_to_its_budget(tiny_model, tmp_path, quantization):
    model = add_adapter(load(tiny_model, quantization), ADALORA, seed=1)
    trainer = trainer_of(model, ADALORA, tmp_path, max_steps=8)
    trainer.train()
    kept = sum(int((p != 0).sum()) for name, p in trained(model).items() if "lora_E" in name)
    assert kept <= 2 * 7 * 2
    assert kept > 0
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tiny_model, quantization), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), wanted, rtol=0, atol=0.02 if quantization else 1e-5)


def test_adalora_trains_the_same_weights_on_any_base(tiny_model):
    bases = [load(tiny_model), load(tiny_model, dtype="bfloat16"), load(tiny_model, NF4)]
    names = [set(trained(add_adapter(base, ADALORA, seed=1))) for base in bases]
    assert names[0] == names[1] == names[2]
    assert len(names[0]) == 2 * 7 * 3


def test_adaloras_penalty_is_pefts(tiny_model):
    model = add_adapter(load(tiny_model), ADALORA, seed=1).train()
    loss = model(input_ids=IDS, labels=IDS).loss  # with the penalty, as peft adds it
    loss.backward()
    wanted = {name: p.grad for name, p in trained(model).items()}
    model.zero_grad()
    model.get_base_model()(input_ids=IDS, labels=IDS).loss.backward()
    RankAllocation().on_pre_optimizer_step(None, None, None, model=model)
    for name, weight in trained(model).items():
        torch.testing.assert_close(weight.grad, wanted[name])


def test_adaloras_schedule_fits_into_the_training(tiny_model, tmp_path):
    lora = ADALORA | {"tinit": 4, "tfinal": 4}
    model = add_adapter(load(tiny_model), lora, seed=1)
    with pytest.raises(UserError, match=r"lora\.tinit=4 and lora\.tfinal=4 .* 8 in which"):
        trainer_of(model, lora, tmp_path, max_steps=8).train()
