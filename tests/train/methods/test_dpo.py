"""DPO and its kin: losses against hand-made ones and TRL's own, the reference, what is refused."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from helpers.model_families import family_config
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
from luthier.config.methods import METHODS
from luthier.config.schema import RunConfig
from luthier.data.encoders.preference import PreferenceEncoder
from luthier.errors import UserError
from luthier.train.methods.dpo import (
    PAIR_LOSSES,
    SFT_LOSS,
    DPOMethod,
    LuthierDPOTrainer,
    PairLossSettings,
)

ROWS = listed(PreferenceEncoder(tokenizer(), CHAT).encode(PREFERENCES))
BETA = 0.3


def build(folder, net=None, **args):
    given = {"per_device_train_batch_size": 7, "beta": BETA, **args}
    return trainer(
        LuthierDPOTrainer, net or lora(model()), arguments(DPOConfig, folder, **given), ROWS
    )


def batch_of(made):
    made.model.train()
    return next(iter(made.get_train_dataloader()))


def gradients(made):
    found = [part.grad.clone() for part in made.model.parameters() if part.grad is not None]
    made.model.zero_grad()
    return found


def test_the_loss_of_pairs_by_hand(tmp_path):
    made = build(tmp_path)
    base, policy = model(), moved(made.model)
    total = 0.0
    with torch.no_grad():
        for number in range(len(ROWS)):
            row = ROWS.table.row(number)
            ratios = [
                log_probability(policy, row["prompt_ids"], row[f"{side}_ids"])
                - log_probability(base, row["prompt_ids"], row[f"{side}_ids"])
                for side in ("chosen", "rejected")
            ]
            total += math.log1p(math.exp(-BETA * float(ratios[0] - ratios[1])))
    loss = made.compute_loss(policy, batch_of(made))
    assert float(loss.detach()) == pytest.approx(total / len(ROWS), rel=1e-5)
    assert made.evaluate()["eval_loss"] == pytest.approx(total / len(ROWS), rel=1e-5)


@pytest.mark.parametrize(
    "args",
    [
        *({"loss_type": name} for name in PAIR_LOSSES),
        {"loss_type": SFT_LOSS},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": "sigmoid", "ld_alpha": 0.3},
        {"loss_type": "ipo", "ld_alpha": 0.0},
        {"loss_type": "sigmoid", "use_weighting": True},
        {"loss_type": "sigmoid", "f_divergence_type": "js_divergence"},
        {"loss_type": "ipo", "f_divergence_type": "forward_kl"},
        {"loss_type": "hinge", "f_divergence_type": "alpha_divergence"},
    ],
    ids=lambda args: " ".join(map(str, args.values())),
)
def test_losses_gradients_and_metrics_are_those_of_trl(tmp_path, args):
    made = build(tmp_path, label_smoothing=0.1, **args)
    moved(made.model)
    batch = batch_of(made)
    ours = made.compute_loss(made.model, batch)
    ours.backward()
    own = gradients(made)
    rows = {name: part for name, part in batch.items() if name not in ("real", "numbers")}
    theirs = DPOTrainer._compute_loss(made, made.model, rows, False)
    theirs.backward()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for a, b in zip(own, gradients(made), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    logs = {}
    made.add_log_means(logs)
    expected = {name: values[-1] for name, values in made._metrics["train"].items()}
    expected["num_tokens"] = logs["num_tokens"]
    assert logs == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_all_losses_of_trl_are_there():
    known = METHODS["dpo"].choices["loss_type"]
    assert set(known) == {*PAIR_LOSSES, SFT_LOSS}
    for name in known:
        assert f"`'{name}'`" in DPOConfig.__doc__.replace("\n", "")


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_a_divergence_of_equal_likelihoods_scores_nothing(kind):
    strengths = PairLossSettings(BETA, 0.0, 0.05, kind, 0.5)
    assert float(strengths.score(torch.zeros(1))) == pytest.approx(0, abs=1e-6)


def test_an_adapter_at_its_start_is_its_own_reference(tmp_path):
    made = build(tmp_path)
    assert list(made.model.peft_config) == ["default"]
    measured = made.evaluate()
    assert measured["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert measured["eval_rewards/margins"] == 0
    trained = {name for name, part in made.model.named_parameters() if part.requires_grad}
    assert trained and all("lora_" in name and ".default." in name for name in trained)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_an_adapter_on_experts_is_copied_as_the_reference(tmp_path, family):
    torch.manual_seed(0)
    config = family_config(family)
    net = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    made = build(tmp_path, lora(net, init_lora_weights=False))
    adapted = made.model
    assert list(adapted.peft_config) == ["default", "ref"]
    own = {name for name, _ in adapted.named_parameters() if ".default." in name}
    copies = {name for name, _ in adapted.named_parameters() if ".ref." in name}
    assert any("experts" in name for name in own)
    assert copies == {name.replace(".default.", ".ref.") for name in own}
    ids = torch.tensor([[5, 6, 7, 8]])
    before = adapted(ids).logits.detach()
    adapted.set_adapter("ref")
    torch.testing.assert_close(adapted(ids).logits, before)
    adapted.set_adapter("default")
    assert made.evaluate()["eval_loss"] == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.train
def test_an_adapter_that_starts_as_a_part_of_the_base_keeps_a_copy(tmp_path):
    net = lora(model(), init_lora_weights="pissa")
    ids = torch.tensor([[5, 6, 7, 8]])
    before = net(ids).logits.detach()
    made = build(tmp_path, net, save_strategy="steps", save_steps=1, max_steps=1)
    torch.testing.assert_close(made.model(ids).logits, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(before, model()(ids).logits, rtol=1e-3, atol=1e-3)
    assert made.model.peft_config["default"].init_lora_weights == "pissa"
    assert made.evaluate()["eval_loss"] == pytest.approx(math.log(2), rel=1e-5)
    made.train()
    assert abs(made.evaluate()["eval_rewards/margins"]) > 0
    saved = tmp_path / "checkpoint-1"
    assert (saved / "adapter_model.safetensors").is_file()
    assert not (saved / "ref").exists()
    assert "ref" in made.model.peft_config


def test_full_fine_tuning_has_a_reference_of_its_own(tmp_path):
    net, reference = model(), model()
    args = arguments(DPOConfig, tmp_path, per_device_train_batch_size=7, beta=BETA)
    made = trainer(LuthierDPOTrainer, net, args, ROWS, ref_model=reference)
    assert made.evaluate()["eval_rewards/margins"] == 0
    kept = copy.deepcopy(reference.state_dict())
    made.train()
    assert made.evaluate()["eval_rewards/margins"] > 0
    assert all(torch.equal(part, kept[name]) for name, part in reference.state_dict().items())


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "all weights"])
def test_a_reference_that_was_asked_once_says_the_same(tmp_path, full):
    args = {"max_steps": 2, "per_device_train_batch_size": 3}
    nets = [model() if full else lora(model()) for _ in range(2)]
    given = {"ref_model": model()} if full else {}
    asked = arguments(DPOConfig, tmp_path, **args, precompute_ref_log_probs=True)
    once = trainer(LuthierDPOTrainer, nets[0], asked, ROWS)
    each = trainer(
        LuthierDPOTrainer, nets[1], arguments(DPOConfig, tmp_path, **args), ROWS, **given
    )
    assert once.ref_model is None
    assert "ref_chosen_logps" in batch_of(once)
    for made in (once, each):
        made.train()
    for a, b in zip(once.model.parameters(), each.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert once.evaluate()["eval_loss"] == pytest.approx(each.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.train
def test_training_raises_the_margin(tmp_path):
    made = build(tmp_path, num_train_epochs=12, per_device_train_batch_size=4, learning_rate=0.3)
    made.train()
    measured = made.evaluate()
    assert measured["eval_rewards/accuracies"] == 1
    assert measured["eval_rewards/margins"] > 1
    assert measured["eval_loss"] < 0.4


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_loss_stops_the_run(tmp_path, broken):
    made = build(tmp_path)
    next(p for n, p in made.model.named_parameters() if "lora_B" in n).data += broken
    with pytest.raises(UserError, match="at step 1, so the run stops"):
        made.train()


def config(**settings):
    trainer = {"method": "dpo", "args": settings.pop("args", {})}
    parts = {"model": {"path": "x"}, "dataset": {"path": "y"}, "output_dir": "z"}
    return RunConfig(**parts, trainer=trainer, **settings)


MACHINE = SimpleNamespace(dtype="float32", device_type="cpu")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora": {"r": 4, "bias": "all"}}, r"lora\.bias=all: the reference is the model"),
        ({"args": {"loss_type": ["sigmoid", "simpo"]}}, "loss_type: simpo is none of sigmoid"),
        ({"args": {"loss_type": "sft", "use_weighting": True}}, "use_weighting=true weighs pairs"),
        ({"args": {"loss_type": ["ipo"], "loss_weights": [1.0, 2.0]}}, r"trainer\.args: .*length"),
    ],
    ids=["trained biases", "a loss of another method", "weighted tokens", "too many weights"],
)
def test_what_does_not_go_together_is_said(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        DPOMethod().build_arguments(config(**settings), MACHINE, tmp_path, has_eval=True)


@pytest.mark.parametrize(
    ("lora_settings", "args", "words"),
    [
        ({"method": "adalora", "total_step": 9}, {}, "supports only 1 trainable adapter"),
        ({}, {"loss_type": "exo_pair"}, "Label smoothing must be greater than 0"),
        ({}, {"sync_ref_model": True}, "sync_ref_model=True` while using a PEFT model"),
    ],
    ids=["an adapter that cannot be copied", "a loss that needs smoothing", "a synced adapter"],
)
def test_what_trl_refuses_is_passed_on(tmp_path, lora_settings, args, words):
    with pytest.raises(UserError, match=words):
        build(tmp_path, lora(model(), **lora_settings), **args)


@pytest.mark.parametrize("method", ["delora", "oft", "vera", "ln_tuning"])
def test_other_adapters_have_a_reference_too(tmp_path, method):
    from luthier.model.adapters import add_adapter

    net = add_adapter(model(), {"method": method}, 1)
    made = build(tmp_path, net, max_steps=2, learning_rate=0.05)
    inputs = next(iter(made.get_eval_dataloader()))
    before = made.score_reference(inputs)
    assert made.evaluate()["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    made.train()
    assert abs(made.evaluate()["eval_rewards/margins"]) > 0
    for name, part in made.score_reference(inputs).items():
        assert torch.equal(part, before[name])


def test_the_arguments_leave_the_rows_alone(tmp_path):
    args = DPOMethod().build_arguments(
        config(args={"beta": 0.5}), MACHINE, tmp_path, has_eval=False
    )
    assert (args.beta, args.max_length, args.loss_type) == (0.5, None, ["sigmoid"])
    assert args.remove_unused_columns is False
