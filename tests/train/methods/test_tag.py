"""Tagging: which tokens train, losses against plain arithmetic, entities of whole sentences."""

import random

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from helpers.task_models import (
    bert,
    built,
    byte_level,
    config_of,
    llama,
    run,
    saved,
    wordpiece,
    written,
)
from luthier.errors import UserError
from luthier.metrics.classification import entity_scores
from luthier.model.adapters import add_adapter

ROWS = [
    {"tokens": ["Anna", "Bell", "found", "it"], "tags": ["B-PER", "I-PER", "O", "O"]},
    {"tokens": ["a", "luthier", "in", "Cremona", "."], "tags": ["O", "O", "O", "B-LOC", "O"]},
    {"tokens": ["violins"], "tags": ["O"]},
]
HELD = [
    {"tokens": ["Anna", "in", "Paris"], "tags": ["B-PER", "O", "B-LOC"]},
    {"tokens": ["instruments", "and", "Bell", "Anna"], "tags": ["O", "O", "B-PER", "I-PER"]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("bert"), bert, wordpiece())


def made(folder, model, rows=ROWS, held=None, tokenizer=None, **also):
    config = config_of("tag", folder, model, rows, held, **also)
    return built(config, tokenizer or wordpiece())


def plain(net, tokenizer, row):
    """The logits at the first token of each word, from the tokenizer's own alignment."""
    net.eval()
    batch = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
    words = batch.word_ids()
    first = [words.index(number) for number in range(len(row["tokens"]))]
    with torch.no_grad():
        return net(**batch).logits[0, first]


@pytest.mark.parametrize("size", [1, 2])
def test_the_evaluation_is_that_of_all_words(tmp_path, model, size):
    trainer, _ = made(tmp_path, model, held=HELD, args={"per_device_eval_batch_size": size})
    net = trainer.model
    assert net.config.id2label == {0: "B-LOC", 1: "B-PER", 2: "I-PER", 3: "O"}
    numbers, names = net.config.label2id, net.config.id2label
    logits = [plain(net, wordpiece(), row) for row in HELD]
    wanted = [torch.tensor([numbers[tag] for tag in row["tags"]]) for row in HELD]
    found = trainer.evaluate()
    loss = cross_entropy(torch.cat(logits), torch.cat(wanted))
    assert found["eval_loss"] == pytest.approx(float(loss), rel=1e-5)
    said = [[names[int(number)] for number in row.argmax(dim=-1)] for row in logits]
    scores = entity_scores(said, [row["tags"] for row in HELD])
    assert {name: found[f"eval_{name}"] for name in scores} == scores
    hits = sum(
        a == b for own, row in zip(said, HELD, strict=True)
        for a, b in zip(own, row["tags"], strict=True)
    )  # fmt: skip
    assert found["eval_accuracy"] == hits / 7


def test_only_first_tokens_have_a_label(tmp_path, model):
    trainer, _ = made(tmp_path, model, [{"tokens": ["Anna", "cardlute"], "tags": ["A", "B"]}])
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"][0].tolist()
    tokens = len(wordpiece()("Anna cardlute")["input_ids"])
    assert len(labels) == tokens > 4
    assert [label for label in labels if label != -100] == [0, 1]
    assert batch["items"].tolist() == [2]
    assert trainer.result_metrics == ("accuracy",)


@pytest.mark.parametrize(("size", "accumulate"), [(3, 1), (2, 2), (1, 3)])
def test_a_step_is_the_same_however_it_is_cut(tmp_path, model, size, accumulate):
    args = {
        "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate,
        "max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant",
        "max_grad_norm": 0, "logging_steps": 1, "weight_decay": 0.0,
    }  # fmt: skip
    trainer, _ = made(tmp_path, model, args=args)
    net, head = trainer.model, trainer.model.classifier.bias
    before = head.detach().clone()
    logits = torch.cat([plain(net, wordpiece(), row) for row in ROWS])
    wanted = torch.tensor([net.config.label2id[tag] for row in ROWS for tag in row["tags"]])
    # The gradient of a softmax's bias: the mean of what is said less what is right.
    gradient = (logits.softmax(dim=-1) - torch.eye(4)[wanted]).mean(dim=0)
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert logged == [pytest.approx(float(cross_entropy(logits, wanted)), rel=1e-5)]
    torch.testing.assert_close(head.detach(), before - gradient, rtol=1e-4, atol=1e-6)


def test_words_that_the_model_does_not_see_are_misses(tmp_path, model):
    held = [{"tokens": ["a", "Anna", "", "Bell"], "tags": ["O", "O", "B-LOC", "B-PER"]}]
    trainer, _ = made(tmp_path, model, held=held, chat={"max_length": 4})
    net = trainer.model
    with torch.no_grad():
        net.classifier.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 50.0]))
    found = trainer.evaluate()
    # It says O everywhere; the empty word has no token and Bell is cut off.
    assert found["eval_accuracy"] == 0.5
    assert (found["eval_entity_recall"], found["eval_entity_f1"]) == (0.0, 0.0)


def test_tags_by_number_have_no_entities(tmp_path, model):
    rows = [row | {"tags": [len(word) for word in row["tokens"]]} for row in ROWS]
    trainer, _ = made(tmp_path, model, rows)
    assert list(trainer.model.config.id2label.values()) == ["1", "2", "4", "5", "7"]
    assert trainer.result_metrics == ("accuracy",)


@pytest.mark.parametrize(
    ("rows", "held", "words"),
    [
        (ROWS, [HELD[0] | {"tags": ["B-PER", "O", "B-ORG"]}],
         r"held\.jsonl:1: no training row has the label 'B-ORG'"),
        (ROWS[2:], None, "every word has the tag 'O'"),
        ([*ROWS, {"tokens": ["a"], "tags": [1]}], None, "some classes are names"),
    ],
    ids=["unseen-in-training", "one-tag-alone", "names-and-numbers"],
)  # fmt: skip
def test_tags_that_do_not_do_in_words(tmp_path, model, rows, held, words):
    with pytest.raises(UserError, match=words):
        made(tmp_path, model, rows, held)


def test_a_decoder_tags_too_and_its_head_is_saved_with_an_adapter(tmp_path):
    model = saved(tmp_path / "llama", llama, byte_level())
    config = config_of("tag", tmp_path, model, ROWS, HELD, lora={"r": 4})
    trainer, _ = built(
        config, byte_level(), lambda net: add_adapter(net, config.lora, 0, "TOKEN_CLS")
    )
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "adapter"))
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name for name in names if "lora" not in name} == {
        "base_model.model.score.weight", "base_model.model.score.bias"
    }  # fmt: skip


FIRST, LAST = ["Anna", "Ida", "Otto", "Mara"], ["Bell", "Stone", "Baker"]
PLACES = ["Paris", "Cremona", "Oslo", "Rome"]
PLAIN = ["found", "a", "lute", "in", "and", "lost", "the", "card", "near", "violins"]


def sentences(count, seed):
    """Sentences in which a person has one or two names, and a place one."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        tokens, tags = [], []
        for _ in range(draw.randint(2, 6)):
            kind = draw.random()
            if kind < 0.2:
                names = [draw.choice(FIRST), draw.choice(LAST)][: draw.randint(1, 2)]
                tokens += names
                tags += ["B-PER", "I-PER"][: len(names)]
            elif kind < 0.4:
                tokens.append(draw.choice(PLACES))
                tags.append("B-LOC")
            else:
                tokens.append(draw.choice(PLAIN))
                tags.append("O")
        rows.append({"tokens": tokens, "tags": tags})
    return rows


@pytest.mark.train
def test_a_run_learns_entities_and_its_model_tags_in_a_plain_pipeline(tmp_path):
    from transformers import pipeline

    texts = [" ".join(FIRST + LAST + PLACES + PLAIN)] * 4
    model = saved(tmp_path / "bert", bert, wordpiece(texts, 200))
    train = written(tmp_path / "train.jsonl", sentences(400, 0))
    held = written(tmp_path / "held.jsonl", sentences(60, 1))
    output, results = run(
        tmp_path, "trainer=tag", "model=hub", f"model.path={model}", "model.device=cpu",
        "model.dtype=float32", "dataset=files", f"dataset.path={train}", "dataset.eval.share=null",
        f"dataset.eval.path={held}", "trainer.args.learning_rate=5e-3", "trainer.args.max_steps=80",
    )  # fmt: skip
    assert set(results) == {
        "eval_loss", "accuracy", "entity_precision", "entity_recall", "entity_f1"
    }  # fmt: skip
    assert results["entity_f1"]["before"] < 0.5
    assert results["entity_f1"]["after"] > 0.9
    assert "entity_f1" in output
    tagger = pipeline(
        "token-classification", model=str(tmp_path / "run" / "model"), aggregation_strategy="first"
    )
    found = tagger("the lute in Oslo and Anna Bell lost")
    assert [(part["entity_group"], part["word"]) for part in found] == [
        ("LOC", "oslo"), ("PER", "anna bell")
    ]  # fmt: skip
