"""What luthier sets of a trainer's arguments, and the routers' loss, which is off unless it is set.

That loss is held against plain arithmetic over the whole step, one row at a time.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.testing import assert_close
from trl import DPOConfig

from helpers import preference_trainer, sft_trainer
from helpers.adapter_models import config_of
from helpers.model_families import family_config, make_family_model
from luthier.config import load_config
from luthier.config.cross_checks import ROUTER_LOSS_OF_A_BATCH
from luthier.config.methods import METHODS
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.model.trainable import freeze_parameters
from luthier.train.arguments import check_router_loss, set_unused_search
from luthier.train.methods import load_method
from luthier.train.methods.dpo import LuthierDPOTrainer

CPU = Machine("cpu", "float32", "sdpa")
COEF = "router_aux_loss_coef"
ROUTED = {"num_local_experts": 4, "output_router_logits": True, COEF: 0.5}


def settings(method, **args):
    chosen = {"method": method, "args": args}
    if method in ("grpo", "rloo"):
        chosen["rewards"] = ["number"]
    return chosen


@pytest.mark.parametrize("method", METHODS)
def test_the_routers_loss_is_off_unless_it_is_set(method, tmp_path):
    config = config_of("none", trainer=settings(method))
    made = load_method(method).build_arguments(config, CPU, tmp_path, has_eval=False)
    assert not getattr(made, COEF, 0.0)
    if hasattr(made, COEF):
        config = config_of("none", trainer=settings(method, **{COEF: 0.25}))
        made = load_method(method).build_arguments(config, CPU, tmp_path, has_eval=False)
        assert getattr(made, COEF) == 0.25


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_routers_loss_is_refused_where_a_step_is_several_batches(method, tmp_path, monkeypatch):
    words = [
        f"trainer={method}",
        "model.path=x",
        "dataset.path=x.jsonl",
        f"trainer.args.{COEF}=0.1",
    ]
    with pytest.raises(UserError) as raised:
        load_config([*words, "trainer.args.gradient_accumulation_steps=2"])
    assert f"trainer.args.{COEF}: {ROUTER_LOSS_OF_A_BATCH}" in str(raised.value)
    load_config([*words, "trainer.args.gradient_accumulation_steps=1"])
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", 2)
    config = config_of("none", trainer=settings(method, **{COEF: 0.1}))
    with pytest.raises(UserError, match=f"trainer.args.{COEF}: the router's loss depends on"):
        load_method(method).build_arguments(config, CPU, tmp_path, has_eval=False)


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("granite_moe_hybrid", "num_experts"),
        ("deepseek_v3", "num_experts"),
        ("llama", "output_router_logits"),
        ("qwen3_moe", None),
        ("gpt_oss", None),
        ("qwen3_vl_moe", None),
    ],
)
def test_a_model_without_a_router_loss_is_refused_before_it_is_loaded(family, field, tmp_path):
    family_config(family).save_pretrained(tmp_path)
    check_router_loss(config_of(tmp_path))
    config = config_of(tmp_path, trainer=settings("sft", **{COEF: 0.1}))
    if field is None:
        check_router_loss(config)
        return
    with pytest.raises(UserError, match=f"trainer.args.{COEF}: .* whose config has no {field}"):
        check_router_loss(config)


def router_loss(net, sequences):
    """Experts x the sum of each one's share of the tokens and its mean probability."""
    layers = [
        net(torch.tensor([ids]), output_router_logits=True).router_logits for ids in sequences
    ]
    scores = torch.cat([layer for row in layers for layer in row])
    probabilities = scores.softmax(-1)
    chosen = torch.zeros_like(scores).scatter(1, probabilities.topk(2).indices, 1.0)
    return scores.shape[1] * (chosen.mean(0) * probabilities.mean(0)).sum()


def step(made):
    """What one step of SGD at rate 1 takes from each weight: its gradient."""
    before = {name: weight.detach().clone() for name, weight in trained(made.model)}
    made.train()
    return {name: before[name] - weight.detach() for name, weight in trained(made.model)}


def trained(net):
    return [(name, weight) for name, weight in net.named_parameters() if weight.requires_grad]


def assert_difference(routed, plain, loss, net):
    """The step with the routers' loss differs from the one without it by its gradient."""
    named = trained(net)
    slopes = torch.autograd.grad(loss, [weight for _, weight in named], allow_unused=True)
    sizes = 0.0
    for (name, weight), slope in zip(named, slopes, strict=True):
        slope = torch.zeros_like(weight) if slope is None else slope
        assert_close(routed[name] - plain[name], 0.3 * slope, rtol=2e-3, atol=2e-5, msg=name)
        sizes += float(slope.abs().sum())
    assert sizes > 1


@pytest.mark.train
def test_the_routers_loss_of_rows_is_taken_over_the_whole_step(tmp_path):
    # Rows of different lengths, so that padding is beside them.
    data = sft_trainer.rows(8)
    net = sft_trainer.model("mixtral")
    size = {"per_device_train_batch_size": 8, "max_steps": 1}
    steps = [
        step(sft_trainer.trainer(copy.deepcopy(net), tmp_path, data, **size, **{COEF: coef}))
        for coef in (0.0, 0.3)
    ]
    assert_difference(steps[1], steps[0], router_loss(net, data["input_ids"]), net)


@pytest.mark.train
def test_the_routers_loss_of_pairs_is_taken_over_the_whole_step(tmp_path):
    encoder = load_encoder()
    rows = preference_trainer.listed(encoder.encode(preference_trainer.PREFERENCES))
    steps = []
    for coef in (0.0, 0.3):
        net = preference_trainer.lora(mixture(), init_lora_weights=False)
        start = copy.deepcopy(net)
        args = preference_trainer.arguments(
            DPOConfig, tmp_path, per_device_train_batch_size=7, max_steps=1, learning_rate=1.0,
            **{COEF: coef},
        )  # fmt: skip
        steps.append(step(preference_trainer.trainer(LuthierDPOTrainer, net, args, rows)))
    sequences = [
        [*row["prompt_ids"], *row[side]]
        for row in map(rows.table.row, range(len(rows)))
        for side in ("chosen_ids", "rejected_ids")
    ]
    assert_difference(steps[1], steps[0], router_loss(start, sequences), start)


def load_encoder():
    from luthier.data.encoders.preference import PreferenceEncoder

    return PreferenceEncoder(preference_trainer.tokenizer(), preference_trainer.CHAT)


def mixture():
    return preference_trainer.model(kind=transformers.MixtralConfig, **ROUTED)


@pytest.mark.train
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_a_mixture_trains_alike_in_one_batch_and_in_four(adapted, tmp_path):
    data, found = sft_trainer.rows(12), []
    for batch in (4, 1):
        torch.manual_seed(0)
        net = transformers.AutoModelForCausalLM.from_config(family_config("qwen3_moe"))
        net.config.output_router_logits = True
        if adapted:
            net = preference_trainer.lora(net, lora_dropout=0.0)
        made = sft_trainer.trainer(
            net, tmp_path, data, per_device_train_batch_size=batch, max_steps=3,
            gradient_accumulation_steps=4 // batch, learning_rate=0.1, **{COEF: 0.0},
        )  # fmt: skip
        made.train()
        assert net.config.router_aux_loss_coef == 0.001, "the saved config keeps its own"
        found.append(dict(trained(net)))
    for name, weight in found[0].items():
        assert_close(weight, found[1][name], rtol=1e-4, atol=1e-6, msg=name)


REENTRANT = {
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": True},
}


@pytest.mark.parametrize(
    ("trains", "settings", "expected"),
    [
        pytest.param("language_model", {}, False, id="all-are-reached"),
        pytest.param(".", {}, True, id="an-open-tower"),
        pytest.param(".", {"activation_checkpointing": True}, True, id="recomputed"),
        pytest.param("language_model", {"method": "python:own.Trainer"}, True, id="own-trainer"),
        pytest.param(".", REENTRANT, False, id="torch-refuses-both"),
        pytest.param(".", {"ddp_find_unused_parameters": False}, False, id="the-users-false"),
        pytest.param(
            "language_model", {"ddp_find_unused_parameters": True}, True, id="the-users-true"
        ),
    ],
)
def test_ddp_looks_for_weights_without_a_gradient_where_there_may_be_some(
    trains, settings, expected
):
    args = SimpleNamespace(
        **{
            "ddp_find_unused_parameters": None,
            "activation_checkpointing": False,
            "activation_checkpointing_kwargs": None,
        }
        | settings
    )
    model = make_family_model("gemma3")
    freeze_parameters(model, [trains], [])
    method = settings.get("method", "sft")
    config = SimpleNamespace(
        model=SimpleNamespace(loader=None), trainer=SimpleNamespace(method=method)
    )
    set_unused_search(args, model, config)
    assert args.ddp_find_unused_parameters is expected
