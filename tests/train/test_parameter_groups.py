"""Muon beside AdamW, groups of weights with rates of their own, and optimizers of the user's."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from luthier.config.schema import OptimizerConfig
from luthier.errors import UserError
from luthier.memory.meta_model import list_weights
from luthier.memory.optimizers import find_optimizer, state_bytes
from luthier.model.adapter_training import lora_plus_groups
from luthier.train.trainers.base import TrainerMixin
from luthier.train.trainers.parameter_groups import find_hidden_matrices, split_by_patterns

MATRICES = [
    f"model.layers.{layer}.{name}.weight"
    for layer in range(2)
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip
CODE = """
import torch

def whole(model, args, momentum=0.5):
    return torch.optim.SGD(model.parameters(), lr=args.learning_rate * 2, momentum=momentum)

def groups(model, args):
    weights = list(model.parameters())
    return [{"params": weights[:1], "lr": 0.5}, {"params": weights[1:]}]

def partial(model, args):
    return torch.optim.SGD(list(model.parameters())[1:], lr=1.0)

def foreign(model, args):
    return torch.optim.SGD([*model.parameters(), torch.nn.Parameter(torch.zeros(1))], lr=1.0)

def nothing(model, args):
    return "adamw"

def broken(model, args):
    return 1 / 0
"""


class SmallTrainer(TrainerMixin, Trainer):
    pass


def tiny_model(tied=False):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def make_trainer(model, folder, settings, **args):
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], learning_rate=1e-2, weight_decay=0.1, **args
    )
    trainer = SmallTrainer(model, arguments)
    trainer.optimizer_config = OptimizerConfig(**settings)
    return trainer


def backward(model, seed):
    ids = torch.randint(48, (2, 12), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("tied", [False, True], ids=["head-apart", "tied"])
def test_muon_is_for_matrices_of_hidden_layers(tied):
    assert find_hidden_matrices(tiny_model(tied)) == MATRICES


def test_muon_steps_as_the_two_optimizers_and_goes_on_from_its_state(tmp_path, capsys):
    model = tiny_model()
    plain = copy.deepcopy(model)
    optimizer = make_trainer(model, tmp_path, {"name": "muon"}).create_optimizer()
    line = "optimizer muon trains 14 matrices of hidden layers (74% of the weights that train), "
    assert f"{line}AdamW the other 7 weights" in capsys.readouterr().out
    named = dict(plain.named_parameters())
    muon = torch.optim.Muon(
        [named.pop(name) for name in MATRICES], lr=1e-2, weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    decays = [named.pop("model.embed_tokens.weight"), named.pop("lm_head.weight")]
    adamw = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.1}, {"params": [*named.values()], "weight_decay": 0}],
        lr=1e-2, fused=True,
    )  # fmt: skip
    schedulers = [
        torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.1, total_iters=4)
        for each in (optimizer, muon, adamw)
    ]
    for step in range(4):
        if step == 2:
            # As a run that goes on from a checkpoint: a new optimizer with the saved state.
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
            again = make_trainer(model, tmp_path, {"name": "muon"}).create_optimizer()
            again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
            schedulers[0].optimizer = optimizer = again
        for net in (model, plain):
            backward(net, step)
        for each in (optimizer, muon, adamw):
            each.step()
        for scheduler in schedulers:
            scheduler.step()
    for (name, new), old in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("tied", [False, True], ids=["head-apart", "tied"])
def test_the_plan_counts_the_states_of_muon(tied, tmp_path):
    model = tiny_model(tied)
    optimizer = make_trainer(model, tmp_path, {"name": "muon"}).create_optimizer()
    backward(model, 0)
    optimizer.step()
    states = [s for state in optimizer.state.values() for s in state.values() if s.dim()]
    planned = state_bytes(find_optimizer("muon"), list_weights(model), on_gpu=False)
    assert planned == (sum(s.numel() * s.itemsize for s in states), 0)


def test_groups_have_their_own_rates_and_keep_the_rest(tmp_path):
    rules = [
        {"match": "embed_tokens|lm_head", "learning_rate": 1e-4},
        {"match": r"layers\.1\.", "weight_decay": 0.0},
        {"match": "norm", "learning_rate": 0.0},
    ]
    model = tiny_model()
    optimizer = make_trainer(model, tmp_path, {"groups": rules}).create_optimizer()
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    rates = {n: (group_of[id(p)]["lr"], group_of[id(p)]["weight_decay"])
             for n, p in model.named_parameters()}  # fmt: skip
    assert rates["lm_head.weight"] == rates["model.embed_tokens.weight"] == (1e-4, 0.1)
    assert rates["model.layers.0.mlp.up_proj.weight"] == (1e-2, 0.1)
    assert rates["model.layers.1.mlp.up_proj.weight"] == (1e-2, 0.0)
    assert rates["model.layers.1.input_layernorm.weight"] == (1e-2, 0.0)  # the first rule holds
    assert rates["model.norm.weight"] == (0.0, 0.0)
    # What is logged as the learning rate is that of the first group.
    assert optimizer.param_groups[0]["lr"] == 1e-2
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    backward(model, 0)
    optimizer.step()
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert still == {"model.norm.weight", "model.layers.0.input_layernorm.weight",
                     "model.layers.0.post_attention_layernorm.weight"}  # fmt: skip


def test_groups_go_with_muon(tmp_path):
    rules = [{"match": "q_proj", "learning_rate": 0.5}]
    model = tiny_model()
    optimizer = make_trainer(model, tmp_path, {"name": "muon", "groups": rules}).create_optimizer()
    own = [group for group in optimizer.param_groups if group["lr"] == 0.5]
    assert [(len(group["params"]), group["uses_muon"]) for group in own] == [(2, True)]
    backward(model, 0)
    optimizer.step()


def test_lora_plus_multiplies_the_rate_of_the_group():
    weights = {f"m.lora_{side}.w": torch.nn.Parameter(torch.zeros(1)) for side in "AB"}
    groups = [{"params": list(weights.values()), "lr": 1.0}]
    split = split_by_patterns(groups, weights, [{"match": "lora_", "learning_rate": 0.5}])

    class Holder:
        @staticmethod
        def named_parameters():
            return weights.items()

    assert [group["lr"] for group in lora_plus_groups(split, Holder, 4.0)] == [0.5, 2.0]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [{"match": "embed_token_", "learning_rate": 1.0}],
            "trainer.optimizer.groups[0].match: 'embed_token_' matches no parameter that trains. "
            "Near it: embed_tokens",
        ),
        (
            [{"match": "mlp", "learning_rate": 1.0}, {"match": "up_proj", "learning_rate": 2.0}],
            "groups[1].match: 'up_proj' matches only parameters that entries before it match",
        ),
    ],
    ids=["nothing", "behind-another"],
)
def test_patterns_that_do_nothing_are_errors(rules, message, tmp_path):
    with pytest.raises(UserError) as caught:
        make_trainer(tiny_model(), tmp_path, {"groups": rules}).create_optimizer()
    assert message in str(caught.value)


def test_a_function_gives_the_optimizer_or_groups(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)

    def create(name):
        return make_trainer(tiny_model(), tmp_path, {"name": name}).create_optimizer()

    whole = create({"python:own.py:whole": {"momentum": 0.25}})
    assert isinstance(whole, torch.optim.SGD)
    assert (whole.param_groups[0]["lr"], whole.param_groups[0]["momentum"]) == (0.02, 0.25)
    groups = create("python:own.py:groups")
    assert isinstance(groups, torch.optim.AdamW)
    assert [group["lr"] for group in groups.param_groups] == [0.5, 1e-2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("partial", "leaves out 1 of 21 parameters that are to train, such as model.embed_tokens"),
        ("foreign", "has 1 parameters that are none of the model's"),
        ("nothing", "returned a str. Return a torch.optim.Optimizer"),
        ("broken", "failed: ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_function_does_wrong_is_said(name, message, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tiny_model(), tmp_path, {"name": f"python:own.py:{name}"})
    with pytest.raises(UserError) as caught:
        trainer.create_optimizer()
    assert f"trainer.optimizer.name: python:own.py:{name} {message}" in str(caught.value)
