"""What a config says about batches, how many steps there are, and what each step holds."""

import pytest
import torch

from helpers.sft_trainer import model, packing, plain_loss, rows, trainer
from luthier.config.schema import RunConfig
from luthier.data.batching.settings import BatchingSettings, read_batching_settings
from luthier.data.batching.token_rows import InMemoryTable, TokenRows
from luthier.errors import UserError


def config(args=None, max_length=64, padding="longest"):
    return RunConfig(
        model={"path": "x"}, dataset={"path": "x"}, output_dir="x",
        chat={"max_length": max_length}, trainer={"args": args or {}, "padding": padding},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("args", "padding", "plan"),
    [
        ({}, "longest", BatchingSettings(False, False, 64, False)),
        ({"packing": True}, "longest", BatchingSettings(True, True, 64, False)),
        (
            {"packing": True, "eval_packing": False},
            "longest",
            BatchingSettings(True, False, 64, False),
        ),
        (
            {"packing": True, "eval_packing": None},
            "max_length",
            BatchingSettings(True, True, 64, True),
        ),
        ({"eval_packing": True}, "max_length", BatchingSettings(False, True, 64, True)),
    ],
    ids=["neither", "packing is for both", "not for evaluation", "null is both", "evaluation only"],
)
def test_a_config_as_a_plan(args, padding, plan):
    assert read_batching_settings(config(args, padding=padding)) == plan


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"args": {"packing": True}, "max_length": None}, ["chat.max_length", "packing=true"]),
        ({"padding": "max_length", "max_length": None}, ["chat.max_length", "trainer.padding"]),
        (
            {"args": {"packing_strategy": "wrapped"}},
            ["packing_strategy=wrapped", "whole documents"],
        ),
        (
            {"args": {"train_sampling_strategy": "batch_rebalance"}},
            ["batch_rebalance", "trainer.args.packing=true"],
        ),
    ],
    ids=["packing to no length", "padding to no length", "a strategy that cuts", "rebalancing"],
)
def test_what_is_not_to_be_had_is_said_before_anything_is_loaded(settings, parts):
    with pytest.raises(UserError) as refusal:
        read_batching_settings(config(**settings))
    assert all(part in str(refusal.value) for part in parts)


def test_a_row_longer_than_a_packed_row_is_said(tmp_path):
    with pytest.raises(UserError, match=r"chat\.max_length=16: a row of 19 tokens"):
        trainer(model(), tmp_path, rows(), packing(16)).get_train_dataloader()


def layout(made):
    """The rows of each batch of an epoch."""
    return [batch["input_ids"].shape for batch in made.get_train_dataloader()]


def test_settings_of_the_trainer_reach_the_batches(tmp_path):
    args = {"per_device_train_batch_size": 4, "pad_to_multiple_of": 16}
    assert {width % 16 for _, width in layout(trainer(model(), tmp_path, rows(), **args))} == {0}
    grouped = trainer(model(), tmp_path, rows(400), per_device_train_batch_size=8,
                      train_sampling_strategy="group_by_length")  # fmt: skip
    by_chance = trainer(model(), tmp_path, rows(400), per_device_train_batch_size=8)
    assert sum(w for _, w in layout(grouped)) < 0.8 * sum(w for _, w in layout(by_chance))
    ordered = trainer(model(), tmp_path, rows(), train_sampling_strategy="sequential",
                      per_device_train_batch_size=1)  # fmt: skip
    given = [batch["input_ids"][0].tolist() for batch in ordered.get_train_dataloader()]
    assert given == rows()["input_ids"]


def test_workers_give_the_same_batches(tmp_path):
    plain, fetched = (
        trainer(model(), tmp_path, rows(), packing(), dataloader_num_workers=n,
                per_device_train_batch_size=2)
        for n in (0, 2)
    )  # fmt: skip
    pairs = zip(plain.get_train_dataloader(), fetched.get_train_dataloader(), strict=True)
    assert all(torch.equal(a[key], b[key]) for a, b in pairs for key in a)


@pytest.mark.parametrize("plan", [None, packing()], ids=["single rows", "packed rows"])
def test_tables_and_mixtures_are_taken_as_datasets_are(tmp_path, plan):
    data = rows()
    table = InMemoryTable(data["input_ids"], data["labels"])
    index = torch.arange(24).repeat(2).numpy()[:30]
    twice = {k: [column[i] for i in index] for k, column in data.items()}
    from_table = trainer(model(), tmp_path, TokenRows(table, index), plan)
    from_dataset = trainer(model(), tmp_path, twice, plan)
    pairs = zip(from_table.get_train_dataloader(), from_dataset.get_train_dataloader(), strict=True)
    assert all(torch.equal(a[key], b[key]) for a, b in pairs for key in a)


def test_named_evaluation_sets_have_their_own_losses(tmp_path):
    made = trainer(model(), tmp_path, rows(), packing())
    sets = {"short": rows(longest=6), "long": rows(seed=1)}
    tables = {k: InMemoryTable(v["input_ids"], v["labels"]) for k, v in sets.items()}
    metrics = made.evaluate(tables)
    for name, data in sets.items():
        alone = trainer(model(), tmp_path, data).evaluate()["eval_loss"]
        assert metrics[f"eval_{name}_loss"] == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("plan", [None, packing()], ids=["single rows", "packed rows"])
def test_an_evaluation_drops_no_row_with_the_last_batch(tmp_path, plan):
    net, data = model(), rows(22)
    made = trainer(net, tmp_path, data, plan, dataloader_drop_last=True,
                   per_device_eval_batch_size=5)  # fmt: skip
    assert made.evaluate()["eval_loss"] == pytest.approx(plain_loss(net, data).item(), rel=1e-6)


@pytest.mark.train
def test_an_adapter_trains_on_packed_rows(tmp_path):
    from luthier.model.adapters import add_adapter

    net = add_adapter(model(), {"r": 4, "target_modules": "all-linear"}, seed=0)
    made = trainer(net, tmp_path, rows(), packing(), max_steps=2, activation_checkpointing=True)
    assert made.isolation.content == 0
    made.train()
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    assert losses[1] != losses[0]


@pytest.mark.train
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("plan", [None, packing()], ids=["single rows", "packed rows"])
def test_as_many_steps_run_as_were_foretold(tmp_path, plan, accumulation):
    made = trainer(model(), tmp_path, rows(50), plan, num_train_epochs=2,
                   per_device_train_batch_size=2, learning_rate=0.01,
                   gradient_accumulation_steps=accumulation)  # fmt: skip
    batches = -(-len(made.get_train_dataloader().dataset) // 2)
    assert made.count_planned_steps() == 2 * -(-batches // accumulation)
    made.train()
    assert made.state.global_step == made.state.max_steps == 2 * -(-batches // accumulation)
    assert made.state.epoch == 2
    # Every token was seen as often as there were epochs, padding not counted.
    tokens = made.state.log_history[-2]["num_tokens"]
    assert tokens == 2 * sum(map(len, rows(50)["input_ids"]))
