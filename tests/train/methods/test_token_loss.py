"""A loss of each token by a function of the user's own, against plain arithmetic."""

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig

from luthier.data.batching.settings import BatchingSettings
from luthier.data.batching.token_rows import InMemoryTable, TokenRows
from luthier.errors import UserError
from luthier.train.methods.sft import TokenTrainer
from luthier.train.methods.token_loss import TokenLoss

VOCABULARY = 64
SHAPES = [(4, 1), (9, 5), (17, 3), (6, 5), (12, 1), (5, 2), (30, 20), (8, 2)]
CODE = """
import torch

def weighted(log_probs, labels, weight, style, scale=1.0):
    assert len(style) == len(weight) == len(labels) == len(log_probs)
    factors = torch.tensor([2.0 if text == "loud" else 1.0 for text in style])
    return -log_probs * weight * factors * scale + 0.1 * log_probs.exp() * (labels % 2)

def plain(log_probs, labels):
    return -log_probs

def mean(log_probs, labels):
    return -log_probs.mean()

def number(log_probs, labels):
    return -log_probs.mean().item()

def detached(log_probs, labels):
    return -log_probs.detach()

def broken(log_probs, labels):
    return log_probs / 0

def fails(log_probs, labels):
    return log_probs + undefined

def unknown(log_probs, labels, quality):
    return -log_probs

def one(log_probs):
    return -log_probs
"""


@pytest.fixture(autouse=True)
def own_code(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)


def columns_of(number):
    style = "loud" if number % 3 == 0 else "quiet"
    return {"weight": 0.5 + number, "style": style, "prompt": "ignored"}


def make_rows():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n, _ in SHAPES]
    labels = [[-100] * p + row[p:] for row, (_, p) in zip(ids, SHAPES, strict=True)]
    return TokenRows(InMemoryTable(ids, labels), read_columns=columns_of)


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def reference_loss(net, rows, scale):
    """The same loss row by row, with logits and plain arithmetic."""
    total, count = torch.zeros(()), 0
    for number in range(len(rows)):
        row, own = rows.table.row(number), columns_of(number)
        ids = torch.from_numpy(row["input_ids"].astype(np.int64))
        log_probs = net(ids[None]).logits[0, :-1].log_softmax(-1)
        factor = own["weight"] * (2.0 if own["style"] == "loud" else 1.0) * scale
        for place, label in enumerate(row["labels"][1:].tolist()):
            if label != -100:
                value = log_probs[place, label]
                total = total - value * factor + 0.1 * value.exp() * (label % 2)
                count += 1
    return total / count


def make_trainer(net, folder, name, batching=None, **args):
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    settings = {
        "output_dir": str(folder / "out"), "report_to": [], "use_cpu": True, "bf16": False,
        "dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "max_steps": 1,
        "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0,
        "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
        "prediction_loss_only": True, "dataloader_pin_memory": False, "disable_tqdm": True,
    }  # fmt: skip
    return TokenTrainer(
        net, args=SFTConfig(**(settings | args)), train_dataset=make_rows(),
        eval_dataset=make_rows(), batching=batching, token_loss=TokenLoss(name),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="1", eos_token="2"
        ),
    )  # fmt: skip


PACKED = BatchingSettings(packing=True, eval_packing=True, length=40)


@pytest.mark.parametrize(
    ("batching", "batch", "accumulation"),
    [(None, 8, 1), (None, 2, 4), (PACKED, 4, 1), (PACKED, 1, 4)],
    ids=["one-batch", "accumulated", "packed", "packed-accumulated"],
)
def test_one_step_is_that_of_plain_arithmetic(tmp_path, batching, batch, accumulation):
    net = make_model()
    before = copy.deepcopy(net)
    loss = reference_loss(before, make_rows(), scale=0.5)
    loss.backward()
    trainer = make_trainer(
        net, tmp_path, {"python:own.py:weighted": {"scale": 0.5}}, batching,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    trainer.train()
    logged = next(row for row in trainer.state.log_history if "loss" in row)
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    # With SGD at rate 1 the step is the gradient.
    for (name, old), new in zip(before.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(old.data - new.data, old.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mean", "returned losses of shape () for 3 tokens. Return one for each token, such as "
         "-log_probs; luthier takes the mean over all trained tokens of a step."),
        ("number", "returned a float. Return one for each token"),
        ("detached", "returned losses without a gradient, so nothing would train"),
        ("broken", "returned -inf for 3 of the 3 tokens of the first batch, such as one with a "
         "log-probability of -1"),
        ("fails", "failed: NameError: name 'undefined' is not defined"),
        ("unknown", "needs quality, and there is no such column or setting. There are: style, "
         "weight."),
    ],
)  # fmt: skip
def test_what_a_function_does_wrong_is_said_on_the_first_batch(name, message):
    loss = TokenLoss(f"python:own.py:{name}")
    log_probs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    columns = [{"weight": 1, "style": "a"}, {"weight": 2.5, "style": "b"}]
    with pytest.raises(UserError) as caught:
        loss(log_probs, torch.tensor([5, 6, 7]), torch.tensor([0, 1, 1]), columns)
    assert f"trainer.loss: python:own.py:{name} {message}" in str(caught.value)


def test_a_function_of_one_argument_is_refused_before_the_first_batch():
    with pytest.raises(UserError) as caught:
        TokenLoss("python:own.py:one")
    assert "takes (log_probs), and is called with log_probs and labels" in str(caught.value)


def test_losses_that_are_not_finite_later_are_left_to_the_check_of_gradients():
    loss = TokenLoss("python:own.py:plain")
    log_probs, places = torch.tensor([-1.0], requires_grad=True), torch.tensor([0])
    assert loss(log_probs, places, places, [{}]).tolist() == [1.0]
    infinite = torch.tensor([-torch.inf], requires_grad=True)
    assert loss(infinite, places, places, [{}]).tolist() == [torch.inf]
