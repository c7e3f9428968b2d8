"""KTO: the loss by hand with its KL term, TRL's own numbers, fixed partners, what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from trl import KTOConfig, KTOTrainer

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
    unpaired,
)
from luthier.config.schema import RunConfig, SourceConfig
from luthier.data.batching.token_rows import TokenRows
from luthier.data.encoders.preference import PairSplittingEncoder, UnpairedEncoder
from luthier.errors import UserError
from luthier.train.methods import kto
from luthier.train.methods.encoders import ENCODER_FACTORIES
from luthier.train.methods.kto import KTOMethod, LuthierKTOTrainer

EXAMPLES = unpaired()
ROWS = listed(UnpairedEncoder(tokenizer(), CHAT).encode(EXAMPLES))
BETA = 0.3


def build(folder, net=None, rows=ROWS, **args):
    given = {"per_device_train_batch_size": 13, "beta": BETA, **args}
    settings = arguments(KTOConfig, folder, **given)
    return trainer(LuthierKTOTrainer, net or lora(model()), settings, rows)


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def ratio(policy, base, row, reply):
    said = (row["prompt_ids"], reply["completion_ids"])
    return float(log_probability(policy, *said) - log_probability(base, *said))


def by_hand(policy, base, weights):
    """Equations 7 and 8 of the paper, row by row, over the whole set as one step."""
    rows = [ROWS.table.row(number) for number in range(len(ROWS))]
    with torch.no_grad():
        gone = [ratio(policy, base, row, rows[number - 1]) for number, row in enumerate(rows)]
        kl = max(sum(gone) / len(gone), 0)
        total = 0.0
        for row in rows:
            moved_by = BETA * (ratio(policy, base, row, row) - kl)
            good, bad = 1 - sigmoid(moved_by), 1 - sigmoid(-moved_by)
            total += weights[0] * good if row["label"] else weights[1] * bad
    return total / len(rows), kl


def test_the_loss_by_hand(tmp_path):
    made = build(tmp_path, desirable_weight=1.3, undesirable_weight=0.7)
    moved(made.model)
    expected, kl = by_hand(made.model, model(), (1.3, 0.7))
    assert kl > 0
    made.model.train()
    batches, counts = made.get_batch_samples(iter(made.get_train_dataloader()), 1, "cpu")
    made.current_gradient_accumulation_steps = 1
    loss = made.compute_loss(made.model, batches[0], num_items_in_batch=counts)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    measured = made.evaluate()
    assert measured["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert measured["eval_kl"] == pytest.approx(kl, rel=1e-4)


def test_a_divergence_is_never_negative(tmp_path):
    made = build(tmp_path)
    # The reference's own replies become less likely.
    moved(made.model, seed=6, by=-0.3)
    scores = {
        "logps": torch.zeros(2), "ref_logps": torch.zeros(2), kto.DRIFT: torch.tensor([-3.0, -1.0]),
        "label": torch.tensor([True, False]), "real": torch.tensor([True, True]),
    }  # fmt: skip
    assert float(made.estimate_kl(scores)) == 0
    assert made.loss_terms(scores).rows.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_losses_gradients_and_metrics_are_those_of_trl(tmp_path, loss):
    made = build(tmp_path, loss_type=loss)
    moved(made.model)
    made.model.train()
    batches, counts = made.get_batch_samples(iter(made.get_train_dataloader()), 1, "cpu")
    made.current_gradient_accumulation_steps = 1
    batch = batches[0]
    ours = made.compute_loss(made.model, batch, num_items_in_batch=counts)
    ours.backward()
    own = [p.grad.clone() for p in made.model.parameters() if p.grad is not None]
    made.model.zero_grad()
    made.calculate_KL = loss == "kto"
    rows = {name: part for name, part in batch.items() if name not in ("real", "numbers")}
    theirs = KTOTrainer._compute_loss(made, made.model, rows, False)
    theirs.backward()
    grads = [p.grad.clone() for p in made.model.parameters() if p.grad is not None]
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for a, b in zip(own, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    logs = {}
    made.add_log_means(logs)
    expected = {name: values[-1] for name, values in made._metrics["train"].items()}
    if loss != "kto":
        del expected["kl"]
    expected["num_tokens"] = logs["num_tokens"]
    assert logs == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_rows_of_one_kind_have_no_margin(tmp_path):
    good = [number for number, one in enumerate(EXAMPLES) if one["label"]]
    rows = TokenRows(ROWS.table, torch.tensor(good).numpy())
    measured = build(tmp_path, rows=rows).evaluate()
    assert "eval_rewards/chosen" in measured
    assert not {"eval_rewards/rejected", "eval_rewards/margins"} & set(measured)


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "all weights"])
def test_a_reference_that_was_asked_once_says_the_same(tmp_path, full):
    args = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    nets = [model() if full else lora(model()) for _ in range(2)]
    once = build(tmp_path, nets[0], precompute_ref_log_probs=True, **args)
    each = trainer(
        LuthierKTOTrainer, nets[1], arguments(KTOConfig, tmp_path, beta=BETA, **args), ROWS,
        **({"ref_model": model()} if full else {}),
    )  # fmt: skip
    for made in (once, each):
        made.train()
    for a, b in zip(once.model.parameters(), each.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_partners_stay_where_the_reference_was_asked_once(tmp_path):
    args = {"per_device_train_batch_size": 4, "train_sampling_strategy": "random"}
    made = build(tmp_path, precompute_ref_log_probs=True, **args)
    loader = made.get_train_dataloader()
    found = [dict(zip(*map(tuple, zip(*loader.dataset.sampler, strict=True)), strict=True))]
    loader.dataset.set_epoch(1)
    found.append(dict(zip(*map(tuple, zip(*loader.dataset.sampler, strict=True)), strict=True)))
    assert found[0] == found[1]
    assert list(found[0]) != list(found[1])


def config(**args):
    return RunConfig(
        model={"path": "x"}, dataset={"path": "y"}, output_dir="z",
        trainer={"method": "kto", "args": args}, chat={"empty_replies": "train"},
    )  # fmt: skip


MACHINE = SimpleNamespace(dtype="float32", device_type="cpu")


def test_a_step_of_one_row_has_nothing_to_estimate_from(tmp_path):
    alone = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    with pytest.raises(UserError, match="leaves nothing to estimate the KL term from"):
        KTOMethod().build_arguments(config(**alone), MACHINE, tmp_path, has_eval=False)
    KTOMethod().build_arguments(
        config(**alone, loss_type=kto.LOSS_WITHOUT_KL), MACHINE, tmp_path, has_eval=False
    )
    several = alone | {"gradient_accumulation_steps": 2}
    KTOMethod().build_arguments(config(**several), MACHINE, tmp_path, has_eval=False)


def test_pairs_are_taken_apart():
    kinds = {
        kind: ENCODER_FACTORIES["kto"](config(), tokenizer(), kind, SourceConfig(path="y"), None)
        for kind in ("unpaired", "preference")
    }
    assert type(kinds["preference"]) is PairSplittingEncoder
    assert len(kinds["preference"].encode(PREFERENCES).columns["label"]) == 2 * len(PREFERENCES)


@pytest.mark.parametrize(
    ("weights", "says"), [((1.0, 1.0), False), ((3.0, 1.0), True), ((1.0, 2.0), True)]
)
def test_unequal_weights_are_pointed_out(capsys, tmp_path, weights, says):
    args = arguments(KTOConfig, tmp_path, desirable_weight=weights[0],
                     undesirable_weight=weights[1])  # fmt: skip
    kto._advise_weights(SimpleNamespace(args=args, prepared=SimpleNamespace(train=ROWS)))
    assert ("7 good and 6 bad replies" in capsys.readouterr().out) == says
