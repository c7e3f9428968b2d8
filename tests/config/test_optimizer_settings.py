"""`trainer.optimizer` in a config: names, code and groups, checked before anything is loaded."""

import pytest

from luthier.config.load import load_config
from luthier.errors import UserError

OVERRIDES = ["recipe=quickstart", "model.path=none/here", "lora=none", "quantization=none"]


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("def make(model, args, beta=0.9): ...\ndef bare(model): ...\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.optimizer.name=muon"],
        ["trainer.optimizer.name=lion_32bit"],
        ["trainer.optimizer.name=python:own.py:make"],
        [r"trainer.optimizer.name={python\:own.py\:make: {beta: 0.8}}"],
    ],
    ids=["muon", "transformers", "code", "code-with-arguments"],
)
def test_names_that_are_optimizers(words):
    config = load_config([*OVERRIDES, *words]).config
    assert config.trainer.optimizer_name in ("muon", "lion_32bit", "python:own.py:make")


def test_rates_in_texts_become_numbers():
    config = load_config(
        [*OVERRIDES, "trainer.optimizer.groups=[{match: embed, learning_rate: '1e-5'}]"]
    ).config
    assert config.trainer.optimizer.groups == [{"match": "embed", "learning_rate": 1e-5}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.optimizer.name=moun"], "'moun' is not an option. Did you mean muon?"),
        (["trainer.optimizer.name=python:own.py:bare"], "is called with model, args: too many"),
        (["trainer.optimizer.name=muon", "lora=default"], "beside an adapter none of them trains"),
        (
            ["trainer.optimizer.name=muon", "+trainer.args.optim=sgd"],
            "'muon', and trainer.args.optim is sgd. Keep one",
        ),
        (["trainer.optimizer.groups=[{match: '(', learning_rate: 1}]"], "no regular expression"),
        (["trainer.optimizer.groups=[{match: a}]"], "neither a learning_rate nor a weight_decay"),
        (["trainer.optimizer.groups=[{match: a, lr: 1}]"], "there is no setting lr"),
        (["trainer.optimizer.groups=[{match: a, learning_rate: -1}]"], "0 or more"),
        (
            ["trainer.optimizer.groups=[{match: a, learning_rate: 1}]",
             "trainer.optimizer.name=python:own.py:make"],
            "decides the groups. Remove one of the two.",
        ),
    ],
)  # fmt: skip
def test_mistakes(words, message):
    with pytest.raises(UserError) as caught:
        load_config([*OVERRIDES, *words])
    assert message in str(caught.value)
