"""Runs of a trainer of the user's own (`trainer.method`): its loss, its resume, its refusals."""

import json
import shutil

import numpy as np
import pytest
import yaml

from helpers.train_command import LORA, PACKED, metrics, record, said, weights, words
from luthier.record import checkpoints

pytestmark = pytest.mark.train

CODE = '''
import torch
from trl import DPOTrainer, SFTTrainer


class Plain(SFTTrainer):
    """The loss of SFT, written out."""

    base_method = "sft"
    power = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]
        outputs = model(**inputs, use_cache=False)
        log_probs = outputs.logits[:, :-1].float().log_softmax(-1)
        log_probs = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]
        losses = -log_probs * (1 - log_probs.exp()) ** self.power
        tokens = len(losses) if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / tokens
        return (loss, outputs) if return_outputs else loss


class Focal(Plain):
    power = 2


class Scaled(SFTTrainer):
    """Twice the loss of SFT, by way of luthier's own."""

    base_method = "sft"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        assert outputs.log_probs.shape == inputs["labels"][:, 1:].shape
        return (2 * loss, outputs) if return_outputs else 2 * loss


class Pairs(DPOTrainer):
    base_method = "sft"


class Broken(SFTTrainer):
    base_method = "sft"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        raise KeyError("absent")
'''


@pytest.fixture
def own(tiny):
    (tiny / "own_trainer.py").write_text(CODE)
    return tiny


def command(folder, name, method):
    accumulates = "trainer.args.gradient_accumulation_steps=2"
    return [
        *words(folder, max_steps=4), *LORA[:2], "lora.lora_dropout=0", *PACKED, accumulates,
        *([f"trainer.method=python:own_trainer.py:{method}"] if method else []),
        f"output_dir={name}",
    ]  # fmt: skip


def losses(run, key="loss"):
    return [line[key] for line in metrics(run) if key in line]


def test_a_trainer_of_ones_own_has_its_loss_and_goes_on(forks, own):
    for name, method in (("built_in", ""), ("plain", "Plain"), ("scaled", "Scaled")):
        assert forks.run(own, *command(own, name, method)) == 0, said(own)
    built_in, plain, scaled = (own / name for name in ("built_in", "plain", "scaled"))
    np.testing.assert_allclose(losses(plain), losses(built_in), rtol=1e-5)
    np.testing.assert_allclose(losses(plain, "grad_norm"), losses(built_in, "grad_norm"), rtol=1e-4)
    np.testing.assert_allclose(losses(scaled)[0], 2 * losses(built_in)[0], rtol=1e-5)
    # Held-out losses are those of the class, too, and the means of tokens those of the model.
    first = losses(built_in, "eval_loss")[0]
    np.testing.assert_allclose(losses(scaled, "eval_loss")[0], 2 * first, rtol=0.05)
    assert losses(scaled, "mean_token_accuracy") != []
    assert losses(plain, "mean_token_accuracy") == []
    code = record(plain)["code"]["python:own_trainer.py:Plain"]
    assert code["settings"] == ["trainer.method"]
    assert yaml.safe_load((plain / "config.yaml").read_text())["trainer"]["method"] == (
        "python:own_trainer.py:Plain"
    )
    line = command(own, "focal", "Focal")
    assert forks.run(own, *line) == 0, said(own)
    run = own / "focal"
    assert losses(run)[0] < losses(plain)[0]
    before = weights(run), metrics(run)
    interrupt(run, 2)
    assert forks.run(own, *line) == 0, said(own)
    assert (weights(run), metrics(run)) == before
    # Another loss, of the class above it, is another run.
    (own / "own_trainer.py").write_text(CODE.replace("losses.sum()", "2 * losses.sum()"))
    interrupt(run, 2)
    assert forks.run(own, *line) == 2
    assert "trainer.method: python:own_trainer.py:Focal (SHA-256 " in said(own)


def test_what_is_no_trainer_of_the_method_is_told(forks, own):
    assert forks.run(own, *command(own, "pairs", "Pairs")) == 2
    assert "Pairs derives from DPOTrainer, and its base_method is trained by SFTTrainer" in said(
        own
    )
    assert forks.run(own, *command(own, "broken", "Broken")) == 2
    assert "own_trainer.py:" in said(own)


def interrupt(run, step):
    for number, path in checkpoints.list_checkpoints(run / "checkpoints"):
        if number > step:
            shutil.rmtree(path)
    shutil.rmtree(run / "model")
    (run / "run.json").write_text(json.dumps(record(run) | {"status": "running"}))
