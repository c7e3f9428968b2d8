"""ORPO, CPO and SimPO: losses by hand, and TRL's own where they mean the same."""

import math

import pytest
import torch

from helpers.preference_trainer import (
    CHAT,
    PREFERENCES,
    arguments,
    listed,
    log_probability,
    lora,
    model,
    moved,
    tokenizer,
    trainer,
)
from luthier.data.encoders.preference import PreferenceEncoder
from luthier.train.methods.orpo_cpo import (
    CPOConfig,
    LuthierCPOTrainer,
    LuthierORPOTrainer,
    ORPOConfig,
)

ROWS = listed(PreferenceEncoder(tokenizer(), CHAT).encode(PREFERENCES))


def build(kind, folder, **args):
    make = ORPOConfig if kind is LuthierORPOTrainer else CPOConfig
    given = {"per_device_train_batch_size": 7, "max_length": 99, **args}
    return trainer(kind, lora(model()), arguments(make, folder, **given), ROWS)


def said(net):
    """The log-probability of each reply and its tokens, chosen first."""
    rows = [ROWS.table.row(number) for number in range(len(ROWS))]
    with torch.no_grad():
        return [
            [
                (float(log_probability(net, row["prompt_ids"], row[f"{side}_ids"])),
                 len(row[f"{side}_ids"]))
                for side in ("chosen", "rejected")
            ]
            for row in rows
        ]  # fmt: skip


def learned(found):
    """The negative log-likelihood of the better replies by token."""
    return -sum(chosen[0] for chosen, _ in found) / sum(chosen[1] for chosen, _ in found)


def log_sigmoid(value):
    return -math.log1p(math.exp(-value))


def test_orpo_by_hand(tmp_path):
    made = build(LuthierORPOTrainer, tmp_path, beta=0.4)
    moved(made.model)
    found = said(made.model)
    ratios = []
    for sides in found:
        chosen, rejected = (math.exp(total / count) for total, count in sides)
        odds = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
        ratios.append(log_sigmoid(math.log(odds)))
    expected = learned(found) - 0.4 * sum(ratios) / len(ratios)
    measured = made.evaluate()
    assert measured["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert measured["eval_log_odds_ratio"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert measured["eval_nll_loss"] == pytest.approx(learned(found), rel=1e-5)
    means = [sides[0][0] / sides[0][1] for sides in found]
    assert measured["eval_rewards/chosen"] == pytest.approx(0.4 * sum(means) / 7, rel=1e-5)


def test_simpo_by_hand(tmp_path):
    made = build(LuthierCPOTrainer, tmp_path, loss_type="simpo", beta=2.0, simpo_gamma=1.0,
                 cpo_alpha=0.0)  # fmt: skip
    moved(made.model)
    found = said(made.model)
    apart = [2.0 * (a / m - b / n) - 1.0 for (a, m), (b, n) in found]
    expected = -sum(map(log_sigmoid, apart)) / len(apart)
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_cpo_by_hand(tmp_path):
    made = build(LuthierCPOTrainer, tmp_path, loss_type="sigmoid", beta=0.3, cpo_alpha=0.7)
    moved(made.model)
    found = said(made.model)
    apart = [0.3 * (a - b) for (a, _), (b, _) in found]
    expected = -sum(map(log_sigmoid, apart)) / len(apart) + 0.7 * learned(found)
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def as_trl_has_it(batch):
    """A batch in the columns that TRL's own collator gives."""
    count = len(batch["real"])
    sides = {"chosen": slice(0, count), "rejected": slice(count, None)}
    columns = {}
    for side, part in sides.items():
        ids, mask = batch["input_ids"][part], batch["completion_mask"][part]
        columns[f"{side}_input_ids"] = ids
        columns[f"{side}_attention_mask"] = batch["attention_mask"][part]
        columns[f"{side}_labels"] = torch.where(mask == 1, ids, -100)
    return columns


@pytest.mark.parametrize(
    "args",
    [
        {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.1},
        {"loss_type": "hinge", "beta": 0.3},
        {"loss_type": "ipo", "beta": 0.3, "cpo_alpha": 0.0},
        {"loss_type": "simpo", "beta": 2.0},
        {"loss_type": "alphapo", "beta": 2.0, "alpha": 0.2},
    ],
    ids=lambda args: args["loss_type"],
)
def test_contrasts_gradients_and_metrics_are_those_of_trl(tmp_path, args):
    made = build(LuthierCPOTrainer, tmp_path, **args)
    moved(made.model, by=0.1)
    made.model.train()
    batch = next(iter(made.get_train_dataloader()))
    ours = made.compute_loss(made.model, batch)
    ours.backward()
    own = [p.grad.clone() for p in made.model.parameters() if p.grad is not None]
    made.model.zero_grad()
    theirs, metrics = made.get_batch_loss_metrics(made.model, as_trl_has_it(batch))
    theirs.backward()
    grads = [p.grad.clone() for p in made.model.parameters() if p.grad is not None]
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for a, b in zip(own, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    logs = {}
    made.add_log_means(logs)
    # TRL takes the mean over all positions here, prompts and padding among them.
    same = [key for key in metrics if not key.startswith("logits/")]
    if not made.cpo_alpha:
        same.remove("nll_loss")
    expected = {key: float(metrics[key]) for key in same}
    assert {key: logs[key] for key in same} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_trl_computes_the_odds_of_orpo(tmp_path):
    made = build(LuthierORPOTrainer, tmp_path, beta=0.4)
    moved(made.model)
    made.model.train()
    batch = next(iter(made.get_train_dataloader()))
    made.compute_loss(made.model, batch)
    logs = {}
    made.add_log_means(logs)
    _, metrics = made.get_batch_loss_metrics(made.model, as_trl_has_it(batch))
    # Its `nll_loss` is of the prompts, too, and they do not train here.
    same = [key for key in metrics if not key.startswith("logits/") and key != "nll_loss"]
    expected = {key: float(metrics[key]) for key in same}
    assert {key: logs[key] for key in same} == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.train
@pytest.mark.parametrize(
    ("kind", "args"),
    [(LuthierORPOTrainer, {}), (LuthierCPOTrainer, {"loss_type": "simpo", "beta": 2.0})],
)
def test_training_tells_the_replies_apart(tmp_path, kind, args):
    made = build(kind, tmp_path, num_train_epochs=12, per_device_train_batch_size=4,
                 learning_rate=0.1, **args)  # fmt: skip
    before = made.evaluate()
    made.train()
    after = made.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"]
