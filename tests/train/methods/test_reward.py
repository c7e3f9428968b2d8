"""Reward models: the loss by hand, where the score is read, what is saved."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from trl import RewardConfig

from helpers.chatml import CHATML
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
)
from luthier.config.schema import RunConfig
from luthier.data.batching.preference_collators import RewardCollator
from luthier.data.batching.token_rows import TokenRows
from luthier.data.encoders.preference import RewardEncoder
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.train.methods.reward import LuthierRewardTrainer, RewardMethod, choose_padding_token

ROWS = listed(RewardEncoder(tokenizer(), CHAT).encode(PREFERENCES))
# A template that ends with the stop token, and nothing behind it.
CLOSED = CHATML.replace("<|im_end|>\n", "<|im_end|>")


def scorer(**more):
    auto = transformers.AutoModelForSequenceClassification
    return model(auto, num_labels=1, **more)


def build(folder, **args):
    given = {"per_device_train_batch_size": 7, **args}
    return trainer(
        LuthierRewardTrainer,
        lora(scorer(), "SEQ_CLS"),
        arguments(RewardConfig, folder, **given),
        ROWS,
    )


def score(net, ids):
    """The head's output at the last token, from the hidden states themselves."""
    with torch.no_grad():
        base = net.get_base_model()
        hidden = base.model(torch.tensor([ids.tolist()])).last_hidden_state
        return float(base.score(hidden[:, -1]))


@pytest.mark.parametrize("center", [None, 0.3])
def test_the_loss_by_hand(tmp_path, center):
    made = build(tmp_path, center_rewards_coefficient=center)
    moved(made.model)
    rows = [ROWS.table.row(number) for number in range(len(ROWS))]
    found = [[score(made.model, row[f"{s}_ids"]) for s in ("chosen", "rejected")] for row in rows]
    chosen, rejected = torch.tensor(found).T
    expected = torch.log1p(torch.exp(rejected - chosen)).mean()
    if center:
        expected = expected + center * ((chosen + rejected) ** 2).mean()
    measured = made.evaluate()
    assert measured["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert measured["eval_accuracy"] == pytest.approx(float((chosen > rejected).float().mean()))
    assert measured["eval_margin"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-4)
    assert measured["eval_max_reward"] == pytest.approx(max(map(max, found)), rel=1e-5)
    assert measured["eval_min_reward"] == pytest.approx(min(map(min, found)), rel=1e-5)
    made.model.train()
    loss = made.compute_loss(made.model, next(iter(made.get_train_dataloader())))
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_the_head_trains_and_is_saved_with_the_adapter(tmp_path):
    from peft import PeftModel

    net = scorer()
    torch.manual_seed(1)
    net.save_pretrained(tmp_path / "base")
    made = build(tmp_path, num_train_epochs=2, learning_rate=1.0)
    trained = [name for name, part in made.model.named_parameters() if part.requires_grad]
    assert any("score.modules_to_save" in name for name in trained)
    assert not any("score" in name and "lora_" in name for name in trained)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1
    )
    loaded = PeftModel.from_pretrained(base, tmp_path / "saved")
    ids = ROWS.table.row(0)["chosen_ids"]
    made.model.eval()
    assert score(loaded, ids) == pytest.approx(score(made.model, ids), abs=1e-6)
    assert score(loaded, ids) != pytest.approx(score(lora(scorer(), "SEQ_CLS"), ids), abs=1e-3)


def prepared(rows):
    return SimpleNamespace(train=rows, eval={})


@pytest.mark.parametrize(
    ("template", "pad", "expected"),
    [(CHATML, "<pad>", 256), (CHATML, "<|im_end|>", 256), (CLOSED, "<|im_end|>", 256)],
    ids=["a token of its own", "the stop token in its midst", "the stop token at its end"],
)
def test_no_conversation_ends_with_the_padding_token(template, pad, expected):
    tok = tokenizer(template, pad)
    rows = listed(RewardEncoder(tok, CHAT).encode(PREFERENCES))
    assert choose_padding_token(tok, prepared(rows)) == expected


def test_a_row_that_ends_with_the_padding_token_is_not_scored_at_another():
    tok = tokenizer(CLOSED, "<|im_end|>")
    rows = listed(RewardEncoder(tok, CHAT).encode(PREFERENCES))
    item = SimpleNamespace(number=0, row=rows.table.row(0), partner=None, real=True)
    with pytest.raises(ValueError, match="ends with the padding token"):
        RewardCollator(tok.pad_token_id)([item])
    assert RewardCollator(256)([item])["input_ids"].shape[0] == 2


def test_a_tokenizer_without_a_token_to_pad_with_is_refused():
    # Each of the tokens that could stand for padding also ends a row.
    class Row(dict):
        pass

    ends = [256, 258]
    table = SimpleNamespace(
        row=lambda n: {"chosen_ids": np.array([1, ends[n]]), "rejected_ids": np.array([ends[n]])},
        lengths=np.array([2, 2]),
    )
    with pytest.raises(UserError, match="Every token that could stand for padding"):
        choose_padding_token(tokenizer(), prepared(TokenRows(table)))


@pytest.mark.train
def test_the_same_seed_makes_the_same_head(tmp_path):
    model().save_pretrained(tmp_path)
    run = {"model": {"path": str(tmp_path)}, "dataset": {"path": "y"}, "output_dir": "z"}
    heads = []
    for seed in (1, 1, 2):
        config = RunConfig(**run, trainer={"method": "reward"}, lora={"r": 4}, seed=seed)
        torch.rand(seed)
        net = RewardMethod().load_model(config, Machine("cpu", "float32", "sdpa"), prepared(ROWS))
        assert net.config.num_labels == 1
        heads.append(net.score.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.train
def test_training_puts_pairs_in_order(tmp_path):
    made = build(tmp_path, num_train_epochs=15, per_device_train_batch_size=4, learning_rate=0.1)
    made.train()
    measured = made.evaluate()
    assert measured["eval_accuracy"] == 1
    assert measured["eval_margin"] > 0.5
